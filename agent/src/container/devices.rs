//! `/dev`: the devices that every container has, those of `linux.devices`, and the usual links.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat, major, makedev, minor, mknodat},
    unistd::{Gid, Uid, fchownat, symlinkat},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::{
    root::{Kind, Root},
    user::Mappings,
};
use crate::{fault::Fault, sys};

/// (path, major, minor) of the devices of every container; all are character devices of mode 0666.
const DEFAULT: &[(&str, u64, u64)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// (name in `/dev`, target)
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A node to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    path: PathBuf,
    kind: SFlag,
    number: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// The default devices and those of `linux.devices`; of one path, the spec's.
///
/// # Errors
///
/// A device that the guest does not have.
pub fn plan(devices: &[LinuxDevice]) -> Result<Vec<DevicePlan>, Fault> {
    let mut plans = Vec::new();
    for (path, major, minor) in DEFAULT {
        if devices.iter().all(|device| device.path() != Path::new(path)) {
            plans.push(DevicePlan {
                path: path.into(),
                kind: SFlag::S_IFCHR,
                number: makedev(*major, *minor),
                mode: 0o666,
                uid: 0,
                gid: 0,
            });
        }
    }
    for (index, device) in devices.iter().enumerate() {
        plans.push(plan_one(&format!("linux.devices[{index}]"), device)?);
    }
    Ok(plans)
}

fn plan_one(field: &str, device: &LinuxDevice) -> Result<DevicePlan, Fault> {
    let field = format!("{field} ({})", device.path().display());
    if !device.path().starts_with("/dev") || device.path() == Path::new("/dev") {
        return Err(Fault::spec(field, "must be below /dev"));
    }
    let (kind, class) = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => (SFlag::S_IFCHR, Some("char")),
        LinuxDeviceType::B => (SFlag::S_IFBLK, Some("block")),
        LinuxDeviceType::P => (SFlag::S_IFIFO, None),
        LinuxDeviceType::A => return Err(Fault::spec(field, "a node cannot be of type \"a\"")),
    };
    let mut number = 0;
    if let Some(class) = class {
        // The kernel's bounds: 12 bits and 20 bits.
        let (Ok(major @ 0..=0xfff), Ok(minor @ 0..=0xf_ffff)) =
            (u64::try_from(device.major()), u64::try_from(device.minor()))
        else {
            return Err(Fault::spec(field, "major or minor is out of range"));
        };
        // Memory devices have no entry there for their open-time twins; they are always there.
        if major != 1 && !Path::new(&format!("/sys/dev/{class}/{major}:{minor}")).exists() {
            return Err(Fault::spec(
                field,
                format_args!("the guest has no {class} device {major}:{minor}"),
            ));
        }
        number = makedev(major, minor);
    }
    Ok(DevicePlan {
        path: device.path().clone(),
        kind,
        number,
        mode: device.file_mode().unwrap_or(0o666) & 0o777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// Makes the nodes and the links in `root`. Those in `handed`, by their index in `plans`, have been made already as
/// detached mounts, since a user namespace has no device nodes of its own.
pub fn make(plans: &[DevicePlan], handed: &HashMap<usize, OwnedFd>, root: &Root) -> Result<(), Fault> {
    for (index, plan) in plans.iter().enumerate() {
        let made = match handed.get(&index) {
            Some(node) => root
                .ensure(&plan.path, Kind::File)
                .and_then(|(place, _)| sys::attach_tree(node.as_fd(), place.as_fd())),
            None => plan.make(root),
        };
        made.map_err(|error| Fault::system(format_args!("make {}", plan.path.display()), error))?;
    }
    let failed = |error: io::Error| Fault::system("links in /dev", error);
    let (dev, _) = root.ensure(Path::new("/dev"), Kind::Directory).map_err(failed)?;
    for (name, target) in LINKS {
        match symlinkat(*target, &dev, *name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    Ok(())
}

impl DevicePlan {
    fn make(&self, root: &Root) -> io::Result<()> {
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(Errno::EINVAL.into());
        };
        let (parent, _) = root.ensure(parent, Kind::Directory)?;
        match mknodat(&parent, name, self.kind, Mode::empty(), self.number) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                let stat = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
                let is_device = self.kind != SFlag::S_IFIFO;
                if kind == self.kind
                    && (!is_device
                        || (major(stat.st_rdev), minor(stat.st_rdev))
                            == (major(self.number), minor(self.number)))
                {
                    return Ok(());
                }
                return Err(Errno::EEXIST.into());
            }
            Err(error) => return Err(error.into()),
        }
        self.set_access(parent.as_fd(), Path::new(name), self.uid, self.gid)?;
        Ok(())
    }
}

impl DevicePlan {
    /// Makes the node in `directory`, of an attached mount, under the name `index`, and answers a detached mount of it;
    /// `None` for a FIFO, which anybody can make.
    pub fn make_outside(
        &self,
        directory: BorrowedFd<'_>,
        index: usize,
        mappings: &Mappings,
    ) -> Result<Option<OwnedFd>, Fault> {
        if self.kind == SFlag::S_IFIFO {
            return Ok(None);
        }
        let field = |name: &str| format!("linux.devices ({}).{name}", self.path.display());
        let uid = mappings.user(self.uid);
        let uid = uid.ok_or_else(|| Fault::spec(field("uid"), "is not mapped by linux.uidMappings"))?;
        let gid = mappings.group(self.gid);
        let gid = gid.ok_or_else(|| Fault::spec(field("gid"), "is not mapped by linux.gidMappings"))?;
        let failed = |error: Errno| Fault::system(format_args!("make {}", self.path.display()), error);
        let name = index.to_string();
        let name = Path::new(&name);
        mknodat(directory, name, self.kind, Mode::empty(), self.number).map_err(failed)?;
        self.set_access(directory, name, uid, gid).map_err(failed)?;
        let node = openat(
            directory,
            name,
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(failed)?;
        let tree = sys::clone_tree(node.as_fd(), false);
        tree.map(Some)
            .map_err(|error| Fault::system(format_args!("make {}", self.path.display()), error))
    }

    /// The owner and the mode of a node just made.
    fn set_access(&self, directory: BorrowedFd<'_>, name: &Path, uid: u32, gid: u32) -> Result<(), Errno> {
        fchownat(
            directory,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        // The node is new and the container not yet running: nobody can have put a link here.
        fchmodat(
            directory,
            name,
            Mode::from_bits_truncate(self.mode),
            FchmodatFlags::FollowSymlink,
        )
    }
}

/// Puts the terminal at `/dev/console`.
pub fn console(slave: BorrowedFd<'_>, root: &Root) -> Result<(), Fault> {
    let failed = |error: io::Error| Fault::system("mount /dev/console", error);
    let (place, _) = root
        .ensure(Path::new("/dev/console"), Kind::File)
        .map_err(failed)?;
    let tree = sys::clone_tree(slave, false).map_err(failed)?;
    sys::attach_tree(tree.as_fd(), place.as_fd()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_json(json: &str) -> Result<Vec<DevicePlan>, Fault> {
        plan(&serde_json::from_str::<Vec<LinuxDevice>>(json).unwrap())
    }

    #[test]
    fn the_specs_device_replaces_the_default() {
        let plans =
            plan_json(r#"[{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":384}]"#).unwrap();
        assert_eq!(plans.len(), DEFAULT.len());
        let null: Vec<_> = plans
            .iter()
            .filter(|plan| plan.path == Path::new("/dev/null"))
            .collect();
        assert_eq!(null.len(), 1);
        assert_eq!(null[0].mode, 0o600);
    }

    #[test]
    fn devices_that_are_not_there_are_refused() {
        for json in [
            r#"[{"path":"/dev/x","type":"c","major":4000,"minor":1}]"#,
            r#"[{"path":"/dev/x","type":"c","major":-1,"minor":1}]"#,
            r#"[{"path":"/dev/x","type":"a","major":1,"minor":3}]"#,
            r#"[{"path":"/etc/x","type":"c","major":1,"minor":3}]"#,
        ] {
            let fault = plan_json(json).unwrap_err();
            assert!(
                fault.message.starts_with("linux.devices[0] (/"),
                "{}",
                fault.message
            );
        }
    }
}
