//! An OCI bundle, as far as the front looks into it. The engine reads the rest.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use husk_agent_protocol::limits::{MAX_SPEC_LEN, is_valid_id};
use serde::Deserialize;

/// The annotations that put containers into one sandbox, the first that is there.
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// There is no config.json.
    #[error("{}: no such file", .0.display())]
    NoConfig(PathBuf),
    /// config.json cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// config.json is too large for the wire to the guest.
    #[error("{} is larger than {MAX_SPEC_LEN} bytes", .0.display())]
    TooLarge(PathBuf),
    /// config.json is not what the OCI runtime specification says.
    #[error("{} is not a valid OCI configuration: {source}", path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// config.json has no process.
    #[error("{}: \"process\" is missing: there is nothing to run", .0.display())]
    NoProcess(PathBuf),
    /// The annotations name a sandbox whose name could leave a directory.
    #[error("the sandbox's id {0:?} (from the annotations) is not valid")]
    InvalidGroup(String),
}

/// What the front reads of config.json.
#[derive(Debug, Default, Deserialize)]
pub struct Outline {
    /// The container's hostname.
    pub hostname: Option<String>,
    /// What its creator noted.
    #[serde(default)]
    pub annotations: Option<HashMap<String, String>>,
    /// Its init process.
    pub process: Option<ProcessOutline>,
    /// Linux's own part.
    pub linux: Option<LinuxOutline>,
}

/// What the front reads of `process`.
#[derive(Debug, Default, Deserialize)]
pub struct ProcessOutline {
    /// Whether it has a terminal.
    #[serde(default)]
    pub terminal: bool,
}

/// What the front reads of `linux`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinuxOutline {
    /// Where its processes are in the host's cgroups.
    pub cgroups_path: Option<String>,
    /// What it has of its own, and what it shares.
    #[serde(default)]
    pub namespaces: Option<Vec<NamespaceOutline>>,
    /// What the container may use.
    pub resources: Option<ResourcesOutline>,
}

/// What the front reads of an entry of `linux.namespaces`.
#[derive(Debug, Default, Deserialize)]
pub struct NamespaceOutline {
    /// Its kind.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Which; none: a new one.
    pub path: Option<PathBuf>,
}

impl LinuxOutline {
    /// The network namespace that it is to join.
    pub fn network(&self) -> Option<PathBuf> {
        let mut namespaces = self.namespaces.iter().flatten();
        let network = namespaces.find(|namespace| namespace.kind == "network")?;
        network.path.clone().filter(|path| !path.as_os_str().is_empty())
    }
}

/// What the front reads of `linux.resources`.
#[derive(Debug, Default, Deserialize)]
pub struct ResourcesOutline {
    /// Processor time.
    pub cpu: Option<CpuOutline>,
    /// Memory.
    pub memory: Option<MemoryOutline>,
    /// Threads.
    pub pids: Option<PidsOutline>,
}

/// What the front reads of `linux.resources.cpu`, in microseconds.
#[derive(Debug, Default, Deserialize)]
pub struct CpuOutline {
    /// Time in each period; negative or none: no limit.
    pub quota: Option<i64>,
    /// The period.
    pub period: Option<u64>,
    /// The share among others; 0 or none: the default's.
    pub shares: Option<u64>,
    /// The host's CPUs, as a list.
    pub cpus: Option<String>,
    /// The host's memory nodes, as a list.
    pub mems: Option<String>,
}

/// What the front reads of `linux.resources.pids`.
#[derive(Debug, Default, Deserialize)]
pub struct PidsOutline {
    /// The limit; 0, negative or none: no limit.
    pub limit: Option<i64>,
}

/// What the front reads of `linux.resources.memory`, in bytes.
#[derive(Debug, Default, Deserialize)]
pub struct MemoryOutline {
    /// The limit; negative or none: no limit.
    pub limit: Option<i64>,
}

impl Outline {
    /// The sandbox that the annotations put the container into; `id` when they name none.
    ///
    /// # Errors
    /// When the name is not an id.
    pub fn group(&self, id: &str) -> Result<String, BundleError> {
        let group = self
            .annotations
            .as_ref()
            .and_then(|annotations| GROUP_ANNOTATIONS.iter().find_map(|name| annotations.get(*name)))
            .map_or(id, String::as_str);
        if is_valid_id(group) {
            Ok(group.to_owned())
        } else {
            Err(BundleError::InvalidGroup(group.to_owned()))
        }
    }
}

/// A bundle whose config.json was read.
#[derive(Debug)]
pub struct Bundle {
    /// config.json as it was read.
    pub spec: Vec<u8>,
    /// What the front reads of it.
    pub outline: Outline,
}

impl Bundle {
    /// Reads the config.json in `directory`.
    ///
    /// # Errors
    /// When it is not there, too large or not an OCI configuration.
    pub fn read(directory: &Path) -> Result<Self, BundleError> {
        let path = directory.join("config.json");
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => BundleError::NoConfig(path.clone()),
            _ => BundleError::Unreadable {
                path: path.clone(),
                source,
            },
        })?;
        let mut spec = Vec::new();
        let limit = u64::try_from(MAX_SPEC_LEN).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit)
            .read_to_end(&mut spec)
            .map_err(|source| BundleError::Unreadable {
                path: path.clone(),
                source,
            })?;
        if spec.len() > MAX_SPEC_LEN {
            return Err(BundleError::TooLarge(path));
        }
        let outline =
            serde_json::from_slice(&spec).map_err(|source| BundleError::Malformed { path, source })?;
        Ok(Self { spec, outline })
    }

    /// Its process.
    ///
    /// # Errors
    /// When it has none.
    pub fn process(&self, directory: &Path) -> Result<&ProcessOutline, BundleError> {
        self.outline
            .process
            .as_ref()
            .ok_or_else(|| BundleError::NoProcess(directory.join("config.json")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Bundle, BundleError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        Bundle::read(dir.path())
    }

    #[test]
    fn a_container_is_its_own_sandbox_unless_annotated() {
        let group = |annotations: serde_json::Value| {
            let text = serde_json::json!({ "ociVersion": "1.2.0", "annotations": annotations }).to_string();
            read(&text).unwrap().outline.group("c")
        };
        assert_eq!(group(serde_json::json!(null)).unwrap(), "c");
        assert_eq!(group(serde_json::json!({ "a": "b" })).unwrap(), "c");
        assert_eq!(
            group(serde_json::json!({ "io.kubernetes.cri.sandbox-id": "pod" })).unwrap(),
            "pod"
        );
        let both = serde_json::json!({ "io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "group" });
        assert_eq!(group(both).unwrap(), "group");
        for hostile in ["../../etc", "", "a/b"] {
            group(serde_json::json!({ "io.kubernetes.cri.sandbox-id": hostile })).unwrap_err();
        }
    }

    #[test]
    fn bad_bundles_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let error = Bundle::read(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.ends_with("none/config.json: no such file"), "{error}");
        let error = read("{").unwrap_err().to_string();
        assert!(error.contains("is not a valid OCI configuration: EOF"), "{error}");
        let error = read("[]").unwrap_err();
        assert!(matches!(error, BundleError::Malformed { .. }), "{error}");
        let bundle = read("{}").unwrap();
        let error = bundle.process(Path::new("/b")).unwrap_err().to_string();
        assert_eq!(
            error,
            "/b/config.json: \"process\" is missing: there is nothing to run"
        );
        let error = read(&" ".repeat(MAX_SPEC_LEN + 1)).unwrap_err();
        assert!(matches!(error, BundleError::TooLarge(_)), "{error}");
    }
}
