//! A container's root file system: the mounts that the engine names, on the host.

use std::{
    fs, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use super::mount::{self, Options};

/// A mount that the engine asks for, in the words of containerd's `types.Mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Type of the file system, or `bind`.
    pub kind: String,
    /// Device, directory or name.
    pub source: String,
    /// Where, beneath the root; empty: the root itself.
    pub target: String,
    /// Options as in fstab(5): flags by name, and data of the file system.
    pub options: Vec<String>,
}

/// Why a root file system could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// An option that is not applied rather than ignored.
    #[error("the root file system's mount option {0:?} is not supported")]
    Option(String),
    /// The directory to mount on could not be made or found.
    #[error("cannot mount the root file system on {}", path.display())]
    Target {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the mount.
    #[error("cannot mount the root file system: {kind} of {what} on {}", target.display())]
    Mount {
        /// Type.
        kind: String,
        /// Source.
        what: String,
        /// Target.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Mounts `mounts` in order on `root`, which is made if needed.
///
/// # Errors
/// When one of them fails; then those before it are unmounted again.
pub fn mount_all(mounts: &[Mount], root: &Path) -> Result<(), RootfsError> {
    let target_error = |source| RootfsError::Target {
        path: root.to_owned(),
        source,
    };
    match fs::create_dir(root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(target_error(error)),
        _ => {}
    }
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(mount, root) {
            for _ in 0..done {
                mount::unmount(root).map_err(target_error)?;
            }
            return Err(error);
        }
    }
    Ok(())
}

fn mount_one(mount: &Mount, root: &Path) -> Result<(), RootfsError> {
    let mut options = Options::parse(&mount.options).map_err(RootfsError::Option)?;
    if mount.kind == "bind" {
        options.flags.insert(nix::mount::MsFlags::MS_BIND);
    }
    let on = |target: &Path| {
        mount::mount(&mount.kind, &mount.source, target, &options).map_err(|source| RootfsError::Mount {
            kind: mount.kind.clone(),
            what: mount.source.clone(),
            target: target.to_owned(),
            source,
        })
    };
    if mount.target.trim_matches('/').is_empty() {
        return on(root);
    }
    let place = mount::open_in_root(root, &mount.target).map_err(|source| RootfsError::Target {
        path: root.join(&mount.target),
        source,
    })?;
    on(&PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tmpfs(target: &str, options: &[&str]) -> Mount {
        Mount {
            kind: "tmpfs".into(),
            source: "test".into(),
            target: target.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn an_overlay_is_mounted_as_containerd_describes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        // Overlay cannot have its upper directory on an overlay, as a test machine's /tmp may be.
        mount_all(&[tmpfs("", &[])], dir.path()).unwrap();
        for name in ["lower", "upper", "work", "bundle"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("lower/file"), "below").unwrap();
        let overlay = Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", path("lower")),
                format!("upperdir={}", path("upper")),
                format!("workdir={}", path("work")),
            ],
        };
        let root = PathBuf::from(path("bundle/rootfs"));
        mount_all(&[overlay], &root).unwrap();
        assert_eq!(fs::read(root.join("file")).unwrap(), b"below");
        fs::write(root.join("new"), "x").unwrap();
        assert!(Path::new(&path("upper/new")).exists());
        mount::unmount(&root).unwrap();
        mount::unmount(dir.path()).unwrap();
    }

    #[test]
    fn a_failure_leaves_nothing_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = Mount {
            kind: "nosuchfs".into(),
            ..tmpfs("", &[])
        };
        let error = mount_all(&[tmpfs("", &["size=1m"]), wrong], dir.path()).unwrap_err();
        assert!(matches!(error, RootfsError::Mount { .. }), "{error}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(dir.path().to_str().unwrap()));
    }

    #[test]
    fn a_target_stays_beneath_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), root.join("link")).unwrap();
        for target in ["link", "../outside"] {
            assert!(mount_all(&[tmpfs(target, &[])], &root).is_err(), "{target}");
        }
    }
}
