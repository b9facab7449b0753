//! Volumes: bind mounts of the spec whose sources are on the host, shown to the guest through the share.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, PROC_SUPER_MAGIC, fstatfs};

use super::mount::{Clone, clone_tree, open_path};

/// `SYSFS_MAGIC` of magic.h.
const SYSFS_MAGIC: FsType = FsType(0x6265_6572);

/// A bind mount of the spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its place in the spec's list of mounts.
    pub index: u32,
    /// What it shows.
    pub source: PathBuf,
    /// With the mounts below the source.
    pub recursive: bool,
    /// Nothing may be written through it.
    pub read_only: bool,
}

/// Why a volume could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The source is not there or cannot be mounted.
    #[error("cannot mount the volume {}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's kernel interfaces are not for guests.
    #[error("the volume {} is the host's kernel interface (proc, sysfs or cgroup) and is not shared", .0.display())]
    HostInterface(PathBuf),
}

impl Volume {
    /// Makes the volume at `target`, in the share.
    ///
    /// # Errors
    /// Then nothing is mounted; the mount point may be there.
    pub fn make(&self, target: &Path) -> Result<(), VolumeError> {
        let error = |source| VolumeError::Source {
            path: self.source.clone(),
            source,
        };
        let source = open_path(&self.source).map_err(error)?;
        let kind = fstatfs(&source)
            .map_err(|errno| error(errno.into()))?
            .filesystem_type();
        if [PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP2_SUPER_MAGIC].contains(&kind) {
            return Err(VolumeError::HostInterface(self.source.clone()));
        }
        let is_dir = File::from(source.try_clone().map_err(error)?)
            .metadata()
            .map_err(error)?
            .is_dir();
        if is_dir {
            fs::create_dir(target)
        } else {
            File::create_new(target).map(drop)
        }
        .map_err(error)?;
        let how = Clone {
            recursive: self.recursive,
            read_only: self.read_only,
            follow: true,
        };
        clone_tree(source.as_fd(), target, how).map_err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mount::unmount;

    fn volume(source: &Path, read_only: bool) -> Volume {
        Volume {
            index: 0,
            source: source.to_owned(),
            recursive: true,
            read_only,
        }
    }

    #[test]
    fn files_and_directories_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "content").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (number, source) in [&file, &link].into_iter().enumerate() {
            let target = dir.path().join(number.to_string());
            volume(source, true).make(&target).unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"content");
            assert!(fs::write(&target, "x").is_err());
            unmount(&target).unwrap();
        }
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let target = dir.path().join("target");
        volume(&sub, false).make(&target).unwrap();
        fs::write(target.join("new"), "x").unwrap();
        unmount(&target).unwrap();
        assert!(sub.join("new").exists());
    }

    #[test]
    fn missing_sources_and_kernel_interfaces_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let error = volume(&dir.path().join("missing"), false)
            .make(&target)
            .unwrap_err();
        assert!(matches!(error, VolumeError::Source { .. }));
        assert!(!target.exists());
        let error = volume(Path::new("/proc/sys"), false).make(&target).unwrap_err();
        assert!(matches!(error, VolumeError::HostInterface(_)));
        assert!(!target.exists());
    }
}
