//! What the host needs to know of config.json. The agent gets the file itself.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::EngineError;
use crate::host::volume::Volume;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    process: Option<Process>,
    root: Option<Root>,
    #[serde(default)]
    mounts: Vec<Mount>,
    hooks: Option<Hooks>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    terminal: bool,
    #[serde(default)]
    args: Vec<String>,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Deserialize)]
struct Mount {
    #[serde(rename = "type", default)]
    kind: String,
    source: Option<PathBuf>,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hooks {
    prestart: Vec<serde::de::IgnoredAny>,
    create_runtime: Vec<serde::de::IgnoredAny>,
    create_container: Vec<serde::de::IgnoredAny>,
    poststart: Vec<serde::de::IgnoredAny>,
    poststop: Vec<serde::de::IgnoredAny>,
}

/// What the host does for a container.
#[derive(Debug, PartialEq, Eq)]
pub struct Spec {
    /// The root file system.
    pub root: PathBuf,
    /// The bind mounts.
    pub volumes: Vec<Volume>,
}

impl Spec {
    /// Reads config.json for a bundle.
    ///
    /// # Errors
    /// `InvalidSpec` for what is not config.json or asks for what the host cannot do; `InvalidArgument` when the
    /// engine and config.json disagree on the terminal.
    pub fn read(json: &[u8], bundle: &Path, terminal: bool) -> Result<Self, EngineError> {
        let config: Config = serde_json::from_slice(json)
            .map_err(|error| EngineError::InvalidSpec(format!("config.json is not valid: {error}")))?;
        let process = config
            .process
            .ok_or_else(|| invalid("config.json has no process"))?;
        check_process(&process, terminal, "config.json")?;
        let root = config.root.ok_or_else(|| invalid("config.json has no root"))?;
        if root.path.as_os_str().is_empty() {
            return Err(invalid("config.json has an empty root.path"));
        }
        check_hooks(&config.hooks.unwrap_or_default())?;
        let volumes = config
            .mounts
            .into_iter()
            .enumerate()
            .filter(|(_, mount)| mount.is_bind())
            .map(|(index, mount)| mount.into_volume(index, bundle))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            root: bundle.join(root.path),
            volumes,
        })
    }
}

/// Checks the `process` object of an exec.
///
/// # Errors
/// As [`Spec::read`].
pub fn check_exec(json: &[u8], terminal: bool) -> Result<(), EngineError> {
    let process: Process = serde_json::from_slice(json)
        .map_err(|error| EngineError::InvalidSpec(format!("the process is not valid: {error}")))?;
    check_process(&process, terminal, "the exec")
}

fn check_process(process: &Process, terminal: bool, whose: &str) -> Result<(), EngineError> {
    if process.args.is_empty() {
        return Err(invalid(&format!("{whose}: process.args must not be empty")));
    }
    if process.terminal != terminal {
        let said = |terminal| if terminal { "a terminal" } else { "no terminal" };
        return Err(EngineError::InvalidArgument(format!(
            "{whose} asks for {}, the engine for {}",
            said(process.terminal),
            said(terminal)
        )));
    }
    Ok(())
}

fn check_hooks(hooks: &Hooks) -> Result<(), EngineError> {
    let all = [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ];
    match all.iter().find(|(_, hooks)| !hooks.is_empty()) {
        Some((name, _)) => Err(invalid(&format!("hooks.{name} is not supported"))),
        None => Ok(()),
    }
}

impl Mount {
    fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }

    fn is_bind(&self) -> bool {
        self.kind == "bind" || self.has("bind") || self.has("rbind")
    }

    fn into_volume(self, index: usize, bundle: &Path) -> Result<Volume, EngineError> {
        let read_only = self
            .options
            .iter()
            .rfind(|option| matches!(option.as_str(), "ro" | "rw"));
        let read_only = read_only.is_some_and(|option| option == "ro") || self.has("rro");
        let recursive = self.has("rbind");
        let source = self.source.filter(|source| !source.as_os_str().is_empty());
        let source =
            source.ok_or_else(|| invalid(&format!("mounts[{index}] is a bind mount without a source")))?;
        let index = u32::try_from(index).map_err(|_| invalid("config.json has too many mounts"))?;
        Ok(Volume {
            index,
            source: bundle.join(source),
            recursive,
            read_only,
        })
    }
}

fn invalid(message: &str) -> EngineError {
    EngineError::InvalidSpec(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(json: &str) -> Result<Spec, String> {
        Spec::read(json.as_bytes(), Path::new("/b"), false).map_err(|error| error.to_string())
    }

    #[test]
    fn bind_mounts_are_volumes_and_others_are_the_agents() {
        let spec = read(
            r#"{"process":{"args":["sh"]},"root":{"path":"rootfs"},"mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/a","type":"bind","source":"/host/a","options":["rbind","ro"]},
                {"destination":"/b","source":"sub","options":["bind"]}]}"#,
        )
        .unwrap();
        let volume = |index, source: &str, recursive, read_only| Volume {
            index,
            source: source.into(),
            recursive,
            read_only,
        };
        assert_eq!(
            spec.volumes,
            [
                volume(1, "/host/a", true, true),
                volume(2, "/b/sub", false, false)
            ]
        );
        assert_eq!(spec.root, Path::new("/b/rootfs"));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        for (json, message) in [
            ("hello", "config.json is not valid"),
            ("{}", "no process"),
            (r#"{"process":{},"root":{"path":"r"}}"#, "process.args"),
            (r#"{"process":{"args":["sh"]}}"#, "no root"),
            (
                r#"{"process":{"args":["sh"]},"root":{"path":"r"},"hooks":{"prestart":[{"path":"/x"}]}}"#,
                "hooks.prestart",
            ),
            (
                r#"{"process":{"args":["sh"]},"root":{"path":"r"},"mounts":[{"type":"bind"}]}"#,
                "mounts[0]",
            ),
            (
                r#"{"process":{"args":["sh"],"terminal":true},"root":{"path":"r"}}"#,
                "a terminal",
            ),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_json_is_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = Spec::read(&bytes, Path::new("/b"), false);
            let _ = check_exec(&bytes, true);
        }
    }
}
