//! How containerd calls the shim's program, and in which form it wants the answer.
//!
//! Nothing here touches the process or the machine: arguments, environment and stdin come in as values.
//! Source: containerd's `pkg/shim` (1.7 to 2.3) and Go's `flag` package.

use std::{collections::HashMap, path::PathBuf};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::{Enum, Message};

/// Most bytes of stdin that are read: containerd's own bound.
pub const MAX_STDIN_LEN: u64 = 10 << 20;

/// What the program is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Find or start the server of a container's sandbox, and print its address.
    Start,
    /// Remove what a dead server left behind.
    Delete,
    /// Be the server.
    Serve,
    /// Print what this runtime is and can do.
    Info,
    /// Print the version.
    Version,
}

/// The command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// containerd's own socket; empty under CRI-O.
    pub address: String,
    /// The program of the daemon that calls.
    pub publish_binary: String,
    /// The bundle, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// Path of the socket that the server got as its stdin.
    pub socket: String,
    /// Log more.
    pub debug: bool,
}

/// What is wrong with the command line or with stdin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// Not one of the flags.
    #[error("flag provided but not defined: -{0}")]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag needs an argument: -{0}")]
    MissingValue(String),
    /// A switch with a value that is not a truth value.
    #[error("invalid boolean value {value:?} for -{flag}")]
    NotBoolean {
        /// The switch.
        flag: String,
        /// The value.
        value: String,
    },
    /// Something after the flags which is not an action.
    #[error("unknown action {0:?}; known are start and delete")]
    UnknownAction(String),
    /// An argument that is not UTF-8.
    #[error("argument {0} is not valid UTF-8")]
    NotUtf8(usize),
    /// `-id` or `-namespace` is missing or could leave a directory.
    #[error(
        "-{flag} {value:?} is not valid: it must be 1 to 128 of [A-Za-z0-9_.+-], the first a letter, a digit or _"
    )]
    InvalidId {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
    /// The message on stdin is for another container.
    #[error("the bootstrap message is for {theirs}, the command line for {ours}")]
    OtherContainer {
        /// As the message says, NAMESPACE/ID.
        theirs: String,
        /// As the command line says, NAMESPACE/ID.
        ours: String,
    },
}

impl Invocation {
    /// Reads the arguments (without the program's name) as Go's `flag` package does: `-flag value`, `-flag=value`,
    /// one or two dashes, flags before the action.
    ///
    /// # Errors
    /// For what containerd never sends.
    pub fn parse<A: AsRef<std::ffi::OsStr>>(args: &[A]) -> Result<Self, UsageError> {
        let mut values: HashMap<&'static str, String> = HashMap::new();
        let mut switches: HashMap<&'static str, bool> = HashMap::new();
        let mut action = None;
        let mut rest = args.iter().enumerate();
        while let Some((index, arg)) = rest.next() {
            let arg = arg.as_ref().to_str().ok_or(UsageError::NotUtf8(index))?;
            let Some(flag) = arg.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
                action = Some(arg);
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            if flag.is_empty() {
                action = rest.next().and_then(|(_, next)| next.as_ref().to_str());
                break;
            }
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if let Some(&name) = SWITCHES.iter().find(|&&known| known == name) {
                let on = match inline.as_deref() {
                    None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
                    Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
                    Some(value) => {
                        return Err(UsageError::NotBoolean {
                            flag: name.to_owned(),
                            value: value.to_owned(),
                        });
                    }
                };
                switches.insert(name, on);
            } else if let Some(&name) = VALUES.iter().find(|&&known| known == name) {
                let value = match inline {
                    Some(value) => value,
                    None => {
                        let (index, value) = rest
                            .next()
                            .ok_or_else(|| UsageError::MissingValue(name.to_owned()))?;
                        value
                            .as_ref()
                            .to_str()
                            .ok_or(UsageError::NotUtf8(index))?
                            .to_owned()
                    }
                };
                values.insert(name, value);
            } else {
                return Err(UsageError::UnknownFlag(name.to_owned()));
            }
        }
        let is_set = |name| switches.get(name).copied().unwrap_or(false);
        let action = if is_set("v") || is_set("version") {
            Action::Version
        } else if is_set("info") {
            Action::Info
        } else {
            match action {
                Some("start") => Action::Start,
                Some("delete") => Action::Delete,
                None => Action::Serve,
                Some(other) => return Err(UsageError::UnknownAction(other.to_owned())),
            }
        };
        let mut take = |name| values.remove(name).unwrap_or_default();
        let invocation = Self {
            action,
            namespace: take("namespace"),
            id: take("id"),
            address: take("address"),
            publish_binary: take("publish-binary"),
            bundle: Some(take("bundle")).filter(|b| !b.is_empty()).map(PathBuf::from),
            socket: take("socket"),
            debug: is_set("debug"),
        };
        if !matches!(action, Action::Info | Action::Version) {
            for (flag, value) in [("namespace", &invocation.namespace), ("id", &invocation.id)] {
                if !husk_agent_protocol::limits::is_valid_id(value) {
                    return Err(UsageError::InvalidId {
                        flag,
                        value: value.clone(),
                    });
                }
            }
        }
        Ok(invocation)
    }
}

/// Flags with a value. `debug-socket` is containerd's and has no meaning here.
const VALUES: [&str; 7] = [
    "namespace",
    "id",
    "address",
    "publish-binary",
    "bundle",
    "socket",
    "debug-socket",
];
/// Flags without one.
const SWITCHES: [&str; 4] = ["debug", "info", "v", "version"];

/// What `start` is told besides the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartParams {
    /// Where events are published; empty: nowhere (CRI-O).
    pub ttrpc_address: String,
    /// containerd's own socket; part of what makes the server's address unique.
    pub grpc_address: String,
    /// The directory for the server's socket, where containerd names one (2.3 and later).
    pub socket_dir: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// The answer is to be the protobuf message.
    pub protobuf: bool,
}

impl StartParams {
    /// Joins the command line, the environment and stdin.
    ///
    /// stdin is the bootstrap message (2.3 and later), the runtime options (before), or empty. Both are protobuf and
    /// the options decode as a bootstrap message too, but name neither the id nor the namespace in its fields.
    ///
    /// # Errors
    /// When the message is another container's.
    pub fn resolve(
        invocation: &Invocation,
        environment: impl Fn(&str) -> Option<String>,
        stdin: &[u8],
    ) -> Result<Self, UsageError> {
        let variable = |name: &str| environment(name).unwrap_or_default();
        let legacy = || Self {
            ttrpc_address: variable("TTRPC_ADDRESS"),
            grpc_address: Some(invocation.address.clone())
                .filter(|address| !address.is_empty())
                .unwrap_or_else(|| variable("GRPC_ADDRESS")),
            socket_dir: None,
            debug: invocation.debug,
            protobuf: false,
        };
        if stdin.is_empty() {
            return Ok(legacy());
        }
        let Ok(message) = BootstrapParams::parse_from_bytes(stdin) else {
            return Ok(legacy());
        };
        if message.instance_id == invocation.id && message.namespace == invocation.namespace {
            return Ok(Self {
                ttrpc_address: message.containerd_ttrpc_address,
                grpc_address: message.containerd_grpc_address,
                socket_dir: message
                    .socket_dir
                    .filter(|dir| !dir.is_empty())
                    .map(PathBuf::from),
                debug: invocation.debug || message.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
                protobuf: true,
            });
        }
        // An `Any` of runtime options sets the first two fields of the message and nothing else.
        let only_an_any = BootstrapParams {
            instance_id: message.instance_id.clone(),
            namespace: message.namespace.clone(),
            ..BootstrapParams::default()
        };
        if message == only_an_any {
            return Ok(legacy());
        }
        Err(UsageError::OtherContainer {
            theirs: format!("{}/{}", message.namespace, message.instance_id),
            ours: format!("{}/{}", invocation.namespace, invocation.id),
        })
    }
}

/// The form of the answer to `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// JSON that names version 2 of the task API: containerd 1.7 and CRI-O refuse a higher one.
    JsonV2,
    /// JSON that names version 3: containerd 2.0 to 2.2.
    JsonV3,
    /// The protobuf message: containerd 2.3 and later.
    Protobuf,
}

impl Answer {
    /// The bytes to print.
    pub fn encode(self, address: &str) -> Vec<u8> {
        let json = |version: u32| {
            serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" })
                .to_string()
                .into_bytes()
        };
        match self {
            Self::JsonV2 => json(2),
            Self::JsonV3 => json(3),
            Self::Protobuf => {
                let result = BootstrapResult {
                    version: 3,
                    address: address.to_owned(),
                    protocol: "ttrpc".to_owned(),
                    ..BootstrapResult::default()
                };
                // Encoding into memory fails only for a message past 2 GiB.
                result.write_to_bytes().unwrap_or_default()
            }
        }
    }

    /// Chooses by what `containerd --version` prints, e.g. `containerd github.com/containerd/containerd v1.7.24 88bf…`.
    /// Whatever is not understood gets version 2, which all of them accept.
    pub fn for_version_output(output: &str) -> Self {
        let mut words = output.split_whitespace();
        if words.next() != Some("containerd") {
            return Self::JsonV2;
        }
        let major = words
            .nth(1)
            .map(|version| version.trim_start_matches('v'))
            .and_then(|version| version.split('.').next())
            .and_then(|major| major.parse::<u32>().ok());
        match major {
            Some(major) if major >= 2 => Self::JsonV3,
            _ => Self::JsonV2,
        }
    }
}

#[cfg(test)]
#[path = "bootstrap_test.rs"]
mod tests;
