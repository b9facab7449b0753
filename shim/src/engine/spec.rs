//! What the host needs to know of config.json. The agent gets the file itself.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::EngineError;
use crate::config::Security;
use crate::host::{
    cgroup::CpuList,
    hooks::Hooks,
    idmap::{IdMap, Range},
    namespaces::{Kind, Wanted},
    volume::Volume,
};

/// Where a container's resolver finds its nameservers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    oci_version: String,
    process: Option<Process>,
    root: Option<Root>,
    #[serde(default)]
    mounts: Vec<Mount>,
    hooks: Option<Hooks>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    linux: Option<Linux>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    namespaces: Option<Vec<Namespace>>,
    cgroups_path: Option<String>,
    resources: Option<Resources>,
    #[serde(flatten)]
    mappings: Mappings,
}

/// Of `linux.resources`, what names things of the host.
#[derive(Default, Deserialize)]
struct Resources {
    cpu: Option<Cpu>,
}

#[derive(Default, Deserialize)]
struct Cpu {
    cpus: Option<String>,
    mems: Option<String>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<PathBuf>,
}

/// Of `linux` or of a mount. Ids of the container (of the file system) are those of the host (on the mount).
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mappings {
    uid_mappings: Option<Vec<IdMapping>>,
    gid_mappings: Option<Vec<IdMapping>>,
}

#[derive(Clone, Copy, Deserialize)]
struct IdMapping {
    #[serde(rename = "containerID", default)]
    container_id: u32,
    #[serde(rename = "hostID", default)]
    host_id: u32,
    #[serde(default)]
    size: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    #[serde(default)]
    terminal: bool,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    oom_score_adj: Option<i32>,
    apparmor_profile: Option<String>,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Deserialize)]
struct Mount {
    #[serde(default)]
    destination: PathBuf,
    #[serde(rename = "type", default)]
    kind: String,
    source: Option<PathBuf>,
    #[serde(default)]
    options: Vec<String>,
    #[serde(flatten)]
    mappings: Mappings,
}

/// What the host does for a container.
#[derive(Debug, PartialEq, Eq)]
pub struct Spec {
    /// The root file system.
    pub root: PathBuf,
    /// The bind mounts.
    pub volumes: Vec<Volume>,
    /// The file that is the container's `/etc/resolv.conf`, if it is a bind mount.
    pub resolv_conf: Option<PathBuf>,
    /// The hooks that run on the host.
    pub hooks: Hooks,
    /// `linux.namespaces`.
    pub namespaces: Vec<Wanted>,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// `process.oomScoreAdj`.
    pub oom_score_adj: Option<i32>,
    /// The specification's version.
    pub oci_version: String,
    /// The annotations.
    pub annotations: BTreeMap<String, String>,
}

impl Spec {
    /// Reads config.json for a bundle.
    ///
    /// # Errors
    /// `InvalidSpec` for what is not config.json or asks for what the host cannot do; `InvalidArgument` when the
    /// engine and config.json disagree on the terminal.
    pub fn read(
        json: &[u8],
        bundle: &Path,
        terminal: bool,
        security: &Security,
    ) -> Result<Self, EngineError> {
        let config: Config = serde_json::from_slice(json)
            .map_err(|error| EngineError::InvalidSpec(format!("config.json is not valid: {error}")))?;
        let process = config
            .process
            .ok_or_else(|| invalid("config.json has no process"))?;
        check_process(&process, terminal, security, "config.json")?;
        let root = config.root.ok_or_else(|| invalid("config.json has no root"))?;
        if root.path.as_os_str().is_empty() {
            return Err(invalid("config.json has an empty root.path"));
        }
        let hooks = config.hooks.unwrap_or_default();
        hooks.check().map_err(EngineError::InvalidSpec)?;
        let Linux {
            namespaces,
            cgroups_path,
            resources,
            mappings: linux,
        } = config.linux.unwrap_or_default();
        if let Some(cpu) = resources.unwrap_or_default().cpu {
            cpu.check()?;
        }
        let namespaces = namespaces
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(index, namespace)| namespace.into_wanted(index))
            .collect::<Result<_, _>>()?;
        let resolv_conf = config
            .mounts
            .iter()
            .rposition(|mount| mount.is_bind() && mount.destination == Path::new(RESOLV_CONF));
        let volumes: Vec<Volume> = config
            .mounts
            .into_iter()
            .enumerate()
            .filter(|(_, mount)| mount.is_bind())
            .map(|(index, mount)| mount.into_volume(index, bundle, &linux))
            .collect::<Result<_, _>>()?;
        let resolv_conf = volumes
            .iter()
            .find(|volume| resolv_conf.is_some_and(|index| u32::try_from(index) == Ok(volume.index)))
            .map(|volume| volume.source.clone());
        Ok(Self {
            root: bundle.join(root.path),
            volumes,
            resolv_conf,
            hooks,
            namespaces,
            cgroups_path,
            oom_score_adj: process.oom_score_adj,
            oci_version: config.oci_version,
            annotations: config.annotations.unwrap_or_default(),
        })
    }
}

/// Checks what an update of `linux.resources` names on the host.
///
/// # Errors
/// `InvalidSpec`.
pub fn check_resources(json: &[u8]) -> Result<(), EngineError> {
    let resources: Resources = serde_json::from_slice(json)
        .map_err(|error| EngineError::InvalidSpec(format!("linux.resources is not valid: {error}")))?;
    resources.cpu.map_or(Ok(()), |cpu| cpu.check())
}

impl Cpu {
    /// CPUs and memory nodes are the host's: those that it does not have are refused, as runc's kernel does.
    fn check(&self) -> Result<(), EngineError> {
        for (field, list, present) in [
            ("cpus", &self.cpus, CpuList::online_cpus()),
            ("mems", &self.mems, CpuList::online_nodes()),
        ] {
            let Some(text) = list.as_deref().filter(|text| !text.is_empty()) else {
                continue;
            };
            let field = format!("linux.resources.cpu.{field}");
            let list: CpuList = text
                .parse()
                .map_err(|()| invalid(&format!("{field}: {text:?} is no list of numbers")))?;
            // A host that does not tell has what is asked for.
            let missing = present.ok().and_then(|present| list.first_missing_in(&present));
            if let Some(number) = missing {
                return Err(invalid(&format!("{field}: the host has no {number}")));
            }
        }
        Ok(())
    }
}

/// Checks the `process` object of an exec.
///
/// # Errors
/// As [`Spec::read`].
pub fn check_exec(json: &[u8], terminal: bool, security: &Security) -> Result<(), EngineError> {
    let process: Process = serde_json::from_slice(json)
        .map_err(|error| EngineError::InvalidSpec(format!("the process is not valid: {error}")))?;
    check_process(&process, terminal, security, "the exec")
}

fn check_process(
    process: &Process,
    terminal: bool,
    security: &Security,
    whose: &str,
) -> Result<(), EngineError> {
    let apparmor = process.apparmor_profile.as_deref().unwrap_or_default();
    if !security.ignores_apparmor(apparmor) {
        return Err(invalid(&format!(
            "process.apparmorProfile: the guest's kernel has no AppArmor to enforce {apparmor:?}; ask for \
             \"unconfined\", or let the operator's ignored_apparmor_profiles name it"
        )));
    }
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

impl Namespace {
    fn into_wanted(self, index: usize) -> Result<Wanted, EngineError> {
        let Some(kind) = Kind::from_name(&self.kind) else {
            return Err(invalid(&format!(
                "linux.namespaces[{index}].type: there is no {:?} namespace",
                self.kind
            )));
        };
        let path = self.path.filter(|path| !path.as_os_str().is_empty());
        Ok(Wanted { kind, path })
    }
}

impl Mount {
    fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option == name)
    }

    fn is_bind(&self) -> bool {
        self.kind == "bind" || self.has("bind") || self.has("rbind")
    }

    fn into_volume(self, index: usize, bundle: &Path, container: &Mappings) -> Result<Volume, EngineError> {
        let id_map = self.id_map(index, container)?;
        let read_only = self
            .options
            .iter()
            .rfind(|option| matches!(option.as_str(), "ro" | "rw"));
        let read_only = read_only.is_some_and(|option| option == "ro") || self.has("rro");
        let recursive = self.has("rbind");
        let below = self
            .options
            .iter()
            .rfind(|option| matches!(option.as_str(), "rro" | "rrw"));
        let read_only_below = below.is_some_and(|option| option == "rro");
        let source = self.source.filter(|source| !source.as_os_str().is_empty());
        let source =
            source.ok_or_else(|| invalid(&format!("mounts[{index}] is a bind mount without a source")))?;
        let index = u32::try_from(index).map_err(|_| invalid("config.json has too many mounts"))?;
        Ok(Volume {
            index,
            source: bundle.join(source),
            recursive,
            read_only,
            read_only_below,
            id_map,
        })
    }

    /// Whose the files of the mount appear to be: by its own mappings or, if it only asks for some, by the container's.
    fn id_map(&self, index: usize, container: &Mappings) -> Result<Option<IdMap>, EngineError> {
        let given = |mappings: &Mappings| {
            let ranges = |list: &Option<Vec<IdMapping>>| {
                let ranges = list.iter().flatten().map(|mapping| Range {
                    inside: mapping.container_id,
                    outside: mapping.host_id,
                    size: mapping.size,
                });
                ranges.collect::<Vec<_>>()
            };
            (ranges(&mappings.uid_mappings), ranges(&mappings.gid_mappings))
        };
        let (mut users, mut groups) = given(&self.mappings);
        if users.is_empty() && groups.is_empty() {
            if !self.has("idmap") && !self.has("ridmap") {
                return Ok(None);
            }
            (users, groups) = given(container);
            if users.is_empty() || groups.is_empty() {
                return Err(invalid(&format!(
                    "mounts[{index}].options: idmap without mappings needs those of a user namespace"
                )));
            }
        }
        if users.is_empty() || groups.is_empty() {
            return Err(invalid(&format!(
                "mounts[{index}].uidMappings: id-mapped mounts must have both uid and gid mappings specified"
            )));
        }
        Ok(Some(IdMap {
            users,
            groups,
            recursive: self.has("ridmap"),
        }))
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
        Spec::read(json.as_bytes(), Path::new("/b"), false, &Security::default())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_resolvers_file_is_the_mount_that_is_seen() {
        let resolv_conf = |mounts: &str| {
            let json =
                format!(r#"{{"process":{{"args":["sh"]}},"root":{{"path":"r"}},"mounts":[{mounts}]}}"#);
            read(&json).unwrap().resolv_conf
        };
        let bind = |destination: &str, source: &str| {
            format!(r#"{{"destination":"{destination}","type":"bind","source":"{source}"}}"#)
        };
        let other = bind("/etc/hosts", "/h/hosts");
        assert_eq!(resolv_conf(&other), None);
        let one = bind("/etc/resolv.conf", "/h/a");
        assert_eq!(resolv_conf(&format!("{other},{one}")), Some("/h/a".into()));
        let two = bind("/etc//resolv.conf/", "b");
        assert_eq!(resolv_conf(&format!("{one},{two},{other}")), Some("/b/b".into()));
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
            read_only_below: false,
            id_map: None,
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
    fn volumes_are_mapped_as_the_spec_says() {
        let own = r#""uidMappings":[{"containerID":0,"hostID":5,"size":9}],"gidMappings":[{"containerID":1,"hostID":6,"size":8}]"#;
        let map = |mount: &str, linux: &str| {
            let spec = read(&format!(
                r#"{{"process":{{"args":["sh"]}},"root":{{"path":"r"}},"linux":{{{linux}}},
                    "mounts":[{{"destination":"/a","type":"bind","source":"/a",{mount}}}]}}"#
            ))?;
            Ok::<_, String>(spec.volumes.first().and_then(|volume| volume.id_map.clone()))
        };
        let range = |inside, outside, size| Range {
            inside,
            outside,
            size,
        };
        let expected = IdMap {
            users: vec![range(0, 5, 9)],
            groups: vec![range(1, 6, 8)],
            recursive: false,
        };
        assert_eq!(map(own, "").unwrap(), Some(expected.clone()));
        assert_eq!(
            map(r#""options":["idmap"]"#, own).unwrap(),
            Some(expected.clone())
        );
        let recursive = map(&format!(r#""options":["ridmap"],{own}"#), "").unwrap();
        assert_eq!(
            recursive,
            Some(IdMap {
                recursive: true,
                ..expected
            })
        );
        assert_eq!(map(r#""options":["ro"]"#, own).unwrap(), None);
        let error = map(r#""options":["idmap"]"#, "").unwrap_err();
        assert!(error.contains("mounts[0].options"), "{error}");
        let error = map(r#""uidMappings":[{"hostID":1,"size":1}]"#, "").unwrap_err();
        assert!(error.contains("mounts[0].uidMappings"), "{error}");
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        for (json, message) in [
            ("hello", "config.json is not valid"),
            ("{}", "no process"),
            (r#"{"process":{},"root":{"path":"r"}}"#, "process.args"),
            (r#"{"process":{"args":["sh"]}}"#, "no root"),
            (
                r#"{"process":{"args":["sh"]},"root":{"path":"r"},"hooks":{"prestart":[{"path":"x"}]}}"#,
                "hooks.prestart[0].path",
            ),
            (
                r#"{"process":{"args":["sh"]},"root":{"path":"r"},"linux":{"namespaces":[{"type":"net"}]}}"#,
                "linux.namespaces[0].type",
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
            let _ = Spec::read(&bytes, Path::new("/b"), false, &Security::default());
            let _ = check_exec(&bytes, true, &Security::default());
        }
    }
}
