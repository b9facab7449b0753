//! The runtime's options as engines pass them along with a task: where the configuration is, and what runc would be told.

use std::path::PathBuf;

use containerd_shim_protos::shim::oci::Options as RuncOptions;
use protobuf::{CodedInputStream, Message, well_known_types::any::Any};

use crate::config::Source;

/// Longest options, in bytes; a configuration in them is bounded further.
const MAX_LEN: usize = 2 << 20;

/// What the options say that means something to husk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the configuration is.
    pub config: Source,
    /// `SystemdCgroup`: the cgroup's path is one of systemd's, and systemd is to be asked for it.
    pub systemd_cgroup: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: Source::Default,
            systemd_cgroup: false,
        }
    }
}

/// Why options are refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// None that husk knows.
    #[error(
        "options of type {0:?} are not known to husk; it takes runtimeoptions.v1.Options and containerd.runc.v1.Options"
    )]
    Type(String),
    /// Not what their type says.
    #[error("the options ({kind}) cannot be read: {problem}")]
    Malformed {
        /// Their type.
        kind: &'static str,
        /// Why.
        problem: String,
    },
    /// Two configurations at once.
    #[error("the runtime's options have both ConfigPath and ConfigBody; give one of them")]
    Both,
    /// An option that would change what the container is, and has no counterpart here.
    #[error("the runtime's option {0} is not supported by husk; remove it")]
    Unsupported(&'static str),
}

impl Options {
    /// Reads the options of a task. None at all: the defaults.
    ///
    /// # Errors
    /// For options of another kind or that cannot be read.
    pub fn read(options: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(options) = options else {
            return Ok(Self::default());
        };
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        match name {
            "" if options.value.is_empty() => Ok(Self::default()),
            // Under the first name since containerd 1.2, under the second since 1.6.
            "cri.runtimeoptions.v1.Options" | "runtimeoptions.v1.Options" => generic(&options.value),
            "containerd.runc.v1.Options" => runc(&options.value),
            // What containerd 1.7's client sends with a user namespace to whatever is not runc: the owner of the
            // pipes, which in the guest are made by the agent.
            "containerd.linux.runc.CreateOptions" => Ok(Self::default()),
            other => Err(OptionsError::Type(other.to_owned())),
        }
    }
}

/// `runtimeoptions.v1.Options`: 1 `type_url`, 2 `config_path`, 3 `config_body`.
fn generic(message: &[u8]) -> Result<Options, OptionsError> {
    let malformed = |problem: String| OptionsError::Malformed {
        kind: "runtimeoptions.v1.Options",
        problem,
    };
    if message.len() > MAX_LEN {
        return Err(malformed(format!("they are longer than {MAX_LEN} bytes")));
    }
    let (mut path, mut body) = (String::new(), Vec::new());
    let mut read = || -> protobuf::Result<()> {
        let mut input = CodedInputStream::from_bytes(message);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag >> 3 {
                2 => path = input.read_string()?,
                3 => body = input.read_bytes()?,
                _ => input.skip_field(protobuf::rt::WireType::new(tag & 7).ok_or_else(|| {
                    protobuf::Error::from(std::io::Error::other(format!("field tag {tag} has no wire type")))
                })?)?,
            }
        }
        Ok(())
    };
    read().map_err(|error| malformed(error.to_string()))?;
    let config = match (path.is_empty(), body.is_empty()) {
        (true, true) => Source::Default,
        (false, true) => Source::File(PathBuf::from(path)),
        (true, false) => Source::Text(
            String::from_utf8(body).map_err(|_| malformed("config_body is not valid UTF-8".into()))?,
        ),
        (false, false) => return Err(OptionsError::Both),
    };
    Ok(Options {
        config,
        ..Options::default()
    })
}

/// runc's options, which Docker passes to every runtime and `ctr` on request. They are about runc's way of making a
/// container; those that leave a trace which somebody could miss are refused.
fn runc(message: &[u8]) -> Result<Options, OptionsError> {
    let options = RuncOptions::parse_from_bytes(message).map_err(|error| OptionsError::Malformed {
        kind: "containerd.runc.v1.Options",
        problem: error.to_string(),
    })?;
    if !options.task_api_address.is_empty() {
        return Err(OptionsError::Unsupported("TaskApiAddress"));
    }
    // The engine's user expects the shim in that cgroup. husk's processes are in the sandbox's.
    if !options.shim_cgroup.is_empty() {
        return Err(OptionsError::Unsupported("ShimCgroup"));
    }
    let without_meaning = [
        // The guest's root is never a ramdisk, and its containers never share a keyring with the host.
        ("NoPivotRoot", options.no_pivot_root),
        ("NoNewKeyring", options.no_new_keyring),
        // The streams in the guest belong to the process's user whoever owns the host's.
        ("IoUid", options.io_uid != 0),
        ("IoGid", options.io_gid != 0),
        // There is no runc and no CRIU: checkpoints are refused where they are asked for.
        ("BinaryName", !options.binary_name.is_empty()),
        ("Root", !options.root.is_empty()),
        ("CriuImagePath", !options.criu_image_path.is_empty()),
        ("CriuWorkPath", !options.criu_work_path.is_empty()),
    ];
    for (name, given) in without_meaning {
        if given {
            tracing::debug!(option = name, "runc's option has no meaning for husk");
        }
    }
    Ok(Options {
        systemd_cgroup: options.systemd_cgroup,
        ..Options::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        }
    }

    fn read(type_url: &str, value: Vec<u8>) -> Result<Options, OptionsError> {
        Options::read(Some(&any(type_url, value)))
    }

    /// A protobuf string or bytes field.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        field.extend(content);
        field
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(Options::read(None).unwrap(), Options::default());
        assert_eq!(read("", vec![]).unwrap(), Options::default());
        assert_eq!(
            read("runtimeoptions.v1.Options", vec![]).unwrap(),
            Options::default()
        );
    }

    #[test]
    fn the_configuration_is_a_file_or_a_text() {
        const NAME: &str = "type.googleapis.com/runtimeoptions.v1.Options";
        let path = [field(1, b"husk"), field(2, b"/etc/other.toml")].concat();
        assert_eq!(
            read(NAME, path.clone()).unwrap().config,
            Source::File("/etc/other.toml".into())
        );
        let body = field(3, b"[machine]\n");
        assert_eq!(
            read(NAME, body.clone()).unwrap().config,
            Source::Text("[machine]\n".into())
        );
        assert_eq!(read(NAME, [path, body].concat()).unwrap_err(), OptionsError::Both);
        for bad in [field(3, b"\xff"), vec![0x12, 200], vec![0x17]] {
            let error = read(NAME, bad).unwrap_err();
            assert!(matches!(error, OptionsError::Malformed { .. }), "{error}");
        }
    }

    #[test]
    fn runc_s_options_are_taken_for_what_they_mean_here() {
        let read =
            |options: RuncOptions| read("containerd.runc.v1.Options", options.write_to_bytes().unwrap());
        let docker = RuncOptions {
            systemd_cgroup: true,
            io_uid: 7,
            root: "/run/docker".into(),
            ..RuncOptions::default()
        };
        let taken = read(docker).unwrap();
        assert_eq!((taken.systemd_cgroup, taken.config), (true, Source::Default));
        let shim_cgroup = RuncOptions {
            shim_cgroup: "/x".into(),
            ..RuncOptions::default()
        };
        assert_eq!(
            read(shim_cgroup).unwrap_err(),
            OptionsError::Unsupported("ShimCgroup")
        );
    }

    #[test]
    fn other_types_are_refused_by_name() {
        assert_eq!(
            read("x.y.Z", vec![]).unwrap_err(),
            OptionsError::Type("x.y.Z".into())
        );
    }
}
