//! `mounts` of a spec: each becomes a detached mount with its attributes, which is then attached in the root.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::{SFlag, fstat};
use oci_spec::runtime::{LinuxIdMapping, Mount};

use super::{
    copy_up,
    mount_options::Options,
    root::{Kind, Root},
};
use crate::{fault::Fault, sys};

/// Types of file systems that the guest makes by itself: nothing of the host is behind them.
const GUEST_TYPES: &[&str] = &[
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup2",
    "hugetlbfs",
    "bpf",
    "tracefs",
    "securityfs",
];

/// One mount.
#[derive(Debug)]
pub struct MountPlan {
    /// For messages: `mounts[3] (/dev/pts)`.
    name: String,
    destination: PathBuf,
    source: Source,
    options: Options,
}

#[derive(Debug)]
enum Source {
    /// Bind this path of the guest.
    Bind(PathBuf),
    /// A new file system of this type, with this source for the record.
    New(CString, Option<CString>),
}

/// Whether mounts made in a volume are seen elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Mounts made elsewhere are seen here.
    Slave,
    /// And those made here elsewhere.
    Shared,
}

/// Reads `mounts`. `volumes` gives the source of a bind mount in the guest.
///
/// # Errors
///
/// A mount that husk cannot make.
pub fn plan(mounts: &[Mount], volumes: &HashMap<u32, PathBuf>) -> Result<Vec<MountPlan>, Fault> {
    for index in volumes.keys() {
        if usize::try_from(*index).map_or(true, |index| index >= mounts.len()) {
            return Err(Fault::spec(
                "volumes",
                format_args!("there is no mounts[{index}]"),
            ));
        }
    }
    let plan = |(index, mount): (usize, &Mount)| {
        let volume = u32::try_from(index).ok().and_then(|index| volumes.get(&index));
        plan_one(index, mount, volume.cloned())
    };
    mounts.iter().enumerate().map(plan).collect()
}

fn plan_one(index: usize, mount: &Mount, volume: Option<PathBuf>) -> Result<MountPlan, Fault> {
    let destination = mount.destination();
    let field = format!("mounts[{index}]");
    let name = format!("{field} ({})", destination.display());
    let refuse = |part: &str, why: &str| Err(Fault::spec(format_args!("{name}{part}"), why));
    if destination
        .components()
        .all(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        return refuse(".destination", "must be a path below /");
    }
    let mut options = Options::parse(mount.options().as_deref().unwrap_or_default(), &name)?;
    let given = |list: &Option<Vec<_>>| {
        list.as_ref()
            .is_some_and(|list: &Vec<LinuxIdMapping>| !list.is_empty())
    };
    let mapped = given(mount.uid_mappings()) || given(mount.gid_mappings());
    let kind = mount.typ().as_deref().unwrap_or_default();
    if kind == "bind" || options.bind.is_some() {
        options.bind.get_or_insert(false);
        if options.copy_up {
            return refuse(".options", "\"tmpcopyup\" is an option of tmpfs only");
        }
        // These say what is so anyway.
        options
            .data
            .retain(|(key, _)| key.as_c_str() != c"async" && key.as_c_str() != c"nolazytime");
        if let Some((key, _)) = options.data.first() {
            return refuse(".options", &format!("{key:?} is not an option of a bind mount"));
        }
        // Mapped owners are the host's work: the volume comes with them.
        let Some(source) = volume else {
            return refuse(".source", "the host has not shared this path with the guest");
        };
        return Ok(MountPlan {
            name,
            destination: destination.clone(),
            source: Source::Bind(source),
            options,
        });
    }
    if volume.is_some() {
        return refuse(".type", "a volume must be a bind mount");
    }
    if mapped || options.id_mapped.is_some() {
        return refuse(
            ".uidMappings",
            "id-mapped mounts are only supported for bind-mounts",
        );
    }
    // Containers see version 2 only, by whichever name the engine calls it.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    if !GUEST_TYPES.contains(&kind) {
        return refuse(
            ".type",
            &format!("file systems of type {kind:?} are not supported"),
        );
    }
    if options.copy_up && kind != "tmpfs" {
        return refuse(".options", "\"tmpcopyup\" is an option of tmpfs only");
    }
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| Fault::spec(&name, "contains a NUL character"));
    let source = mount
        .source()
        .as_deref()
        .filter(|source| !source.as_os_str().is_empty());
    let source = source
        .map(|source| text(source.as_os_str().as_bytes()))
        .transpose()?;
    let source = Source::New(text(kind.as_bytes())?, source);
    Ok(MountPlan {
        name,
        destination: destination.clone(),
        source,
        options,
    })
}

impl MountPlan {
    /// Where the volume is that this mounts, if it mounts one.
    pub fn volume(&self) -> Option<&Path> {
        match &self.source {
            Source::Bind(path) => Some(path),
            _ => None,
        }
    }

    /// How mounts in it are shared with other containers; `None` for not at all.
    pub fn propagation(&self) -> Option<Propagation> {
        let has = |kind: u64| self.options.propagation.iter().any(|(set, _)| *set == kind);
        if has(libc::MS_SHARED) {
            Some(Propagation::Shared)
        } else {
            has(libc::MS_SLAVE).then_some(Propagation::Slave)
        }
    }

    /// Whether a bind mount comes with the mounts below its source.
    pub fn is_recursive(&self) -> bool {
        self.options.bind.unwrap_or(false)
    }

    /// Whether this replaces the container's `/dev` by a directory of the host, which has its own devices then.
    pub fn is_host_dev(&self) -> bool {
        matches!(self.source, Source::Bind(_)) && self.is_dev()
    }

    fn is_dev(&self) -> bool {
        Path::new("/dev") == self.destination
    }

    /// Whether only the sandbox's root can make it, since it shows the sandbox's network.
    pub fn is_of_sandbox(&self) -> bool {
        matches!(&self.source, Source::New(kind, _) if kind.as_c_str() == c"sysfs")
    }

    /// Mounts it in `root`, in the calling process's mount namespace. `handed` is the detached mount if it has been made
    /// already.
    pub fn apply(&self, root: &Root, handed: Option<&OwnedFd>) -> Result<(), Fault> {
        let failed = |what: &'static str| {
            let name = &self.name;
            move |error: std::io::Error| Fault::system(format_args!("{name}: {what}"), error)
        };
        let (tree, place) = match &self.source {
            Source::Bind(path) => {
                let source = nix::fcntl::open(
                    path,
                    nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
                    nix::sys::stat::Mode::empty(),
                )
                .map_err(|error| failed("open the source")(error.into()))?;
                let stat = fstat(&source).map_err(|error| failed("stat the source")(error.into()))?;
                let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
                let kind = if kind == SFlag::S_IFDIR {
                    Kind::Directory
                } else {
                    Kind::File
                };
                let (place, _) = root
                    .ensure(&self.destination, kind)
                    .map_err(failed("mount point"))?;
                let tree = match handed {
                    Some(tree) => tree.try_clone().map_err(failed("bind"))?,
                    None => sys::clone_tree(source.as_fd(), self.is_recursive()).map_err(failed("bind"))?,
                };
                (tree, place)
            }
            Source::New(kind, source) => {
                let (place, existed) = root
                    .ensure(&self.destination, Kind::Directory)
                    .map_err(failed("mount point"))?;
                let mode = if existed && kind.as_c_str() == c"tmpfs" {
                    let stat = fstat(&place).map_err(|error| failed("stat")(error.into()))?;
                    Some(stat.st_mode & 0o7777)
                } else {
                    None
                };
                let tree = match handed {
                    Some(tree) => tree.try_clone().map_err(failed("use the file system"))?,
                    None => self.make(kind, source.as_ref(), mode)?,
                };
                if self.options.copy_up && existed {
                    let own = |key: &CString| matches!(key.to_bytes(), b"uid" | b"gid");
                    let owner = !self.options.data.iter().any(|(key, _)| own(key));
                    let below = root.open(&self.destination, libc::O_RDONLY | libc::O_DIRECTORY);
                    below
                        .and_then(|below| copy_up::copy(&below, &tree, owner))
                        .map_err(failed("tmpcopyup"))?;
                }
                (tree, place)
            }
        };
        let options = &self.options;
        for (attributes, recursive) in [(options.attributes, false), (options.recursive, true)] {
            if attributes != Default::default() {
                sys::set_mount_attributes(tree.as_fd(), attributes.set, attributes.clear, 0, recursive)
                    .map_err(failed("set options"))?;
            }
        }
        sys::attach_tree(tree.as_fd(), place.as_fd()).map_err(failed("mount"))?;
        for (propagation, recursive) in &options.propagation {
            sys::set_mount_attributes(tree.as_fd(), 0, 0, *propagation, *recursive)
                .map_err(failed("set propagation"))?;
        }
        Ok(())
    }

    /// The new file system that this mounts, detached and without the attributes of the mount.
    ///
    /// # Errors
    ///
    /// The kernel refuses; or it is a bind mount.
    pub fn make_new(&self, mode: Option<u32>) -> Result<OwnedFd, Fault> {
        match &self.source {
            Source::New(kind, source) => self.make(kind, source.as_ref(), mode),
            Source::Bind(_) => Err(Fault::spec(&self.name, "is no new file system")),
        }
    }

    /// A new file system. A tmpfs over a directory takes its mode, unless the options say otherwise.
    fn make(&self, kind: &CString, source: Option<&CString>, mode: Option<u32>) -> Result<OwnedFd, Fault> {
        let named =
            |what: &str, error: std::io::Error| Fault::system(format_args!("{}: {what}", self.name), error);
        let system = sys::FileSystem::open(kind).map_err(|error| named("make the file system", error))?;
        let set = |key: &CStr, value: Option<&CStr>| {
            system.set(key, value).map_err(|error| {
                let why = system
                    .complaint()
                    .unwrap_or_else(|| crate::fault::describe(&error));
                Fault::spec(
                    format_args!("{}.options", self.name),
                    format_args!("{key:?}: {why}"),
                )
            })
        };
        if let Some(source) = source {
            set(c"source", Some(source))?;
        }
        let mode = mode.filter(|_| self.options.data.iter().all(|(key, _)| key.as_c_str() != c"mode"));
        if let Some(mode) = mode {
            let mode = CString::new(format!("{mode:o}")).unwrap_or_default();
            set(c"mode", Some(&mode))?;
        }
        for (key, value) in &self.options.data {
            set(key, value.as_deref())?;
        }
        system
            .mount(0)
            .map_err(|error| named("make the file system", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_json(json: &str, volumes: &[(u32, u32)]) -> Result<Vec<MountPlan>, Fault> {
        let mounts: Vec<Mount> = serde_json::from_str(json).unwrap();
        let path = |number: u32| Path::new("/share/.volumes").join(number.to_string());
        let volumes = volumes.iter().map(|(index, number)| (*index, path(*number)));
        plan(&mounts, &volumes.collect())
    }

    #[test]
    fn binds_come_from_the_share_only() {
        let bind = r#"[{"destination":"/data","type":"bind","source":"/srv","options":["rbind","ro"]}]"#;
        let plans = plan_json(bind, &[(0, 3)]).unwrap();
        assert!(matches!(&plans[0].source, Source::Bind(path) if path == Path::new("/share/.volumes/3")));
        let fault = plan_json(bind, &[]).unwrap_err();
        assert!(
            fault.message.starts_with("mounts[0] (/data).source: "),
            "{}",
            fault.message
        );
        assert!(plan_json(bind, &[(1, 0)]).is_err());
        assert!(plan_json(r#"[{"destination":"/x","type":"tmpfs"}]"#, &[(0, 0)]).is_err());
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_by_name() {
        for (field, json) in [
            (
                "mounts[0] (/).destination",
                r#"[{"destination":"/","type":"tmpfs"}]"#,
            ),
            (
                "mounts[0] (/..).destination",
                r#"[{"destination":"/..","type":"tmpfs"}]"#,
            ),
            (
                "mounts[0] (/a).type",
                r#"[{"destination":"/a","type":"ext4","source":"/dev/sda"}]"#,
            ),
            (
                "mounts[0] (/a).options",
                r#"[{"destination":"/a","type":"proc","options":["tmpcopyup"]}]"#,
            ),
            (
                "mounts[0] (/a).options",
                r#"[{"destination":"/a","type":"bind","options":["size=1"]}]"#,
            ),
            (
                "mounts[0] (/a).uidMappings",
                r#"[{"destination":"/a","type":"tmpfs","uidMappings":[{"hostID":1,"containerID":0,"size":1}]}]"#,
            ),
        ] {
            let fault = plan_json(json, &[]).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    #[test]
    fn cgroups_are_of_version_2() {
        let plans = plan_json(r#"[{"destination":"/sys/fs/cgroup","type":"cgroup"}]"#, &[]).unwrap();
        assert!(matches!(&plans[0].source, Source::New(kind, None) if kind.as_c_str() == c"cgroup2"));
    }
}
