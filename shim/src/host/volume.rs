//! Volumes: bind mounts of the spec whose sources are on the host, shown to the guest through the share.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, PROC_SUPER_MAGIC, fstatfs};

use super::{
    idmap::IdMap,
    mount::{Clone, clone_tree_with, open_path, set_read_only_below},
};

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
    /// Nor through the mounts below the source.
    pub read_only_below: bool,
    /// Whose its files appear to be.
    pub id_map: Option<IdMap>,
}

/// Which file something is, and through which mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl FileId {
    /// That of an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is an empty C string and the buffer is of the kernel's size.
        let result = unsafe {
            libc::statx(
                file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_INO | libc::STATX_MNT_ID,
                found.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed and then filled by the kernel; every bit pattern is a valid statx.
        let found = unsafe { found.assume_init() };
        Ok(Self {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            mount: found.stx_mnt_id,
        })
    }
}

/// Why a volume could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The source is not there or cannot be mounted.
    #[error("mounts[{index}].source: cannot mount the volume {}", path.display())]
    Source {
        /// The mount's place in the spec.
        index: u32,
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its owners cannot be mapped.
    #[error("uidMappings: cannot map the owners of {}", path.display())]
    Mapping {
        /// The source.
        path: PathBuf,
        /// Why: `EINVAL` if the file system has no mapped mounts, or the mapping is wrong.
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
            index: self.index,
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
        let mut mapped = Ok(());
        let cloned = clone_tree_with(source.as_fd(), target, how, |tree| {
            if self.read_only_below {
                set_read_only_below(tree)?;
            }
            mapped = self.id_map.as_ref().map_or(Ok(()), |map| map.apply(tree));
            mapped
                .as_ref()
                .map_or(Err(io::ErrorKind::Other.into()), |()| Ok(()))
        });
        match mapped {
            Err(source) => Err(VolumeError::Mapping {
                path: self.source.clone(),
                source,
            }),
            Ok(()) => cloned.map_err(error),
        }
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
            read_only_below: false,
            id_map: None,
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
    fn the_owners_of_a_mapped_volume_are_mapped_both_ways() {
        use std::os::unix::fs::{MetadataExt, chown};
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("root's"), "").unwrap();
        fs::write(source.join("stranger's"), "").unwrap();
        chown(source.join("stranger's"), Some(70_000), Some(70_000)).unwrap();
        let range = |size| super::super::idmap::Range {
            inside: 0,
            outside: 100_000,
            size,
        };
        let mapped = Volume {
            id_map: Some(IdMap {
                users: vec![range(1000)],
                groups: vec![range(1000)],
                recursive: false,
            }),
            ..volume(&source, false)
        };
        let target = dir.path().join("target");
        mapped.make(&target).unwrap();
        let owner = |path: &Path| {
            fs::metadata(path)
                .map(|found| (found.uid(), found.gid()))
                .unwrap()
        };
        assert_eq!(owner(&target.join("root's")), (100_000, 100_000));
        // Ids that are not mapped are nobody's.
        assert_eq!(owner(&target.join("stranger's")).0, 65_534);
        chown(target.join("root's"), Some(100_005), Some(100_006)).unwrap();
        assert_eq!(owner(&source.join("root's")), (5, 6));
        // The file server makes files as their owners, by file-system ids: of this thread alone.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: no pointers are involved; the calls act on the calling thread.
                unsafe {
                    libc::syscall(libc::SYS_setfsgid, 100_001);
                    libc::syscall(libc::SYS_setfsuid, 100_001);
                }
                chown(&source, Some(1), Some(1)).unwrap_err();
                let made = fs::File::create(target.join("new"));
                assert!(made.is_err(), "the directory is not theirs");
            });
        });
        chown(&source, Some(1), Some(1)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: as above.
                unsafe {
                    libc::syscall(libc::SYS_setfsgid, 100_001);
                    libc::syscall(libc::SYS_setfsuid, 100_001);
                }
                fs::File::create(target.join("new")).unwrap();
            });
        });
        assert_eq!(owner(&source.join("new")), (1, 1));
        // Who is not mapped can own nothing here.
        let refused = fs::File::create(target.join("other")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EOVERFLOW));
        unmount(&target).unwrap();

        let wrong = Volume {
            id_map: Some(IdMap {
                users: vec![range(0)],
                groups: vec![range(1000)],
                recursive: false,
            }),
            ..volume(&source, false)
        };
        let error = wrong.make(&dir.path().join("wrong")).unwrap_err();
        assert!(matches!(error, VolumeError::Mapping { .. }), "{error}");
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
