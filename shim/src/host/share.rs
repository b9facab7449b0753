//! The share: the directory that the guest sees. Mounts are made in it while `husk-fsd` serves it.

use std::{
    fs::{self, DirBuilder},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::Path,
};

use nix::{
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sys::stat::Mode,
};

use super::mount::unmount;

/// Makes the share at `path`: a mount of its own, in a peer group of its own. Mounts made in it reach copies of the
/// mount namespace made later (the file server's) and no other.
///
/// # Errors
/// When it cannot be made; then nothing is mounted.
pub fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o755).create(path)?;
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    // First out of the group of the file system around it, which the whole host may be in.
    let grouped = set(path, MsFlags::MS_PRIVATE).and_then(|()| set(path, MsFlags::MS_SHARED));
    if grouped.is_err() {
        unmount(path)?;
    }
    grouped
}

fn set(path: &Path, propagation: MsFlags) -> io::Result<()> {
    Ok(mount(
        None::<&str>,
        path,
        None::<&str>,
        propagation,
        None::<&str>,
    )?)
}

/// Opens the share as a place, for the file server.
///
/// # Errors
/// The kernel's.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

/// Removes a directory of mount points: empty directories and empty files on one file system. Whatever else is
/// there (a mount that would not go, a file with content) is left and is an error: nothing of the host's is ever
/// deleted through a mount. Nothing there is fine.
///
/// # Errors
/// For what is left.
pub fn remove_mount_points(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            // rmdir refuses a mount point and a directory that is not empty.
            match fs::remove_dir(entry.path()) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {
                    same_file_system(path, &entry.path())?;
                    remove_mount_points(&entry.path())?;
                }
                other => other?,
            }
        } else {
            if entry.metadata()?.len() > 0 {
                return Err(io::Error::new(
                    io::ErrorKind::DirectoryNotEmpty,
                    format!("{} is not an empty mount point", entry.path().display()),
                ));
            }
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn same_file_system(one: &Path, other: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    if is_mount_root(other)? || fs::symlink_metadata(one)?.dev() != fs::symlink_metadata(other)?.dev() {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{} is still mounted", other.display()),
        ));
    }
    Ok(())
}

/// Whether something is mounted on `path`.
fn is_mount_root(path: &Path) -> io::Result<bool> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string and the buffer is of the kernel's size.
    let result = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            0,
            found.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed and then filled by the kernel; every bit pattern is a valid statx.
    let found = unsafe { found.assume_init() };
    Ok(found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mount::{Clone, clone_tree, open_path, unmount_below};
    use std::os::fd::AsFd;

    #[test]
    fn what_is_mounted_or_has_content_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        let precious = dir.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("data"), "").unwrap();
        make(&share).unwrap();
        fs::create_dir_all(share.join("c/rootfs")).unwrap();
        fs::write(share.join("c/file"), "").unwrap();
        let how = Clone {
            recursive: true,
            read_only: false,
            follow: false,
        };
        clone_tree(
            open_path(&precious).unwrap().as_fd(),
            &share.join("c/rootfs"),
            how,
        )
        .unwrap();
        assert!(remove_mount_points(&share.join("c")).is_err());
        assert!(precious.join("data").exists());
        unmount_below(&share.join("c")).unwrap();
        fs::write(share.join("c/full"), "content").unwrap();
        assert!(remove_mount_points(&share.join("c")).is_err());
        assert_eq!(fs::read(share.join("c/full")).unwrap(), b"content");
        fs::remove_file(share.join("c/full")).unwrap();
        remove_mount_points(&share.join("c")).unwrap();
        unmount_below(&share).unwrap();
        remove_mount_points(&share).unwrap();
        remove_mount_points(&share).unwrap();
        assert!(!share.exists() && precious.join("data").exists());
    }
}
