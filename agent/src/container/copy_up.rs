//! `tmpcopyup`: a new tmpfs begins with what is in the directory that it covers.
//!
//! What is copied is the image's, which may hold anything: links are never followed, and nothing but regular files and
//! directories is opened. The copy is bounded by the tmpfs and by the container's memory.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{
            FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstat, fstatat, mkdirat,
            mknodat, utimensat,
        },
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat, symlinkat},
};

/// Deepest nesting that is copied: each level holds descriptors.
const MAX_DEPTH: usize = 128;

/// Longest list of the names of extended attributes, and longest value, that the kernel has (`XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 << 10;

/// Copies all that is in `from` to `to`; with `owner`, `to` also gets its owner.
///
/// # Errors
///
/// The tmpfs is full, or the tree is nested too deeply.
pub fn copy(from: &OwnedFd, to: &OwnedFd, owner: bool) -> io::Result<()> {
    if owner {
        let stat = fstat(from)?;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        fchownat(to, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    }
    copy_entries(from.as_fd(), to.as_fd(), 0)
}

fn copy_entries(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::ELOOP.into());
    }
    // The guest's own /proc is still there.
    for entry in std::fs::read_dir(format!("/proc/self/fd/{}", from.as_raw_fd()))? {
        let name = CString::new(entry?.file_name().into_vec())?;
        copy_entry(from, to, &name, depth)?;
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let open_from = |flags: OFlag| {
        openat(
            from,
            name,
            flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
    };
    match kind {
        SFlag::S_IFDIR => {
            mkdirat(to, name, Mode::S_IRWXU)?;
            let below = open_from(OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(to, name, flags, Mode::empty())?;
            copy_entries(below.as_fd(), made.as_fd(), depth.saturating_add(1))?;
            fchown(
                &made,
                Some(Uid::from_raw(stat.st_uid)),
                Some(Gid::from_raw(stat.st_gid)),
            )?;
            copy_attributes(below.as_fd(), made.as_fd())?;
            fchmod(&made, mode(&stat))?;
            return set_times(to, name, &stat);
        }
        SFlag::S_IFREG => {
            let source = open_from(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let made = openat(to, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
            io::copy(
                &mut std::fs::File::from(source.try_clone()?),
                &mut std::fs::File::from(made.try_clone()?),
            )?;
            // A change of the owner clears what else belongs to it.
            fchown(
                &made,
                Some(Uid::from_raw(stat.st_uid)),
                Some(Gid::from_raw(stat.st_gid)),
            )?;
            copy_attributes(source.as_fd(), made.as_fd())?;
            fchmod(&made, mode(&stat))?;
            return set_times(to, name, &stat);
        }
        SFlag::S_IFLNK => symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?,
        kind => mknodat(to, name, kind, Mode::empty(), stat.st_rdev)?,
    }
    fchownat(
        to,
        name,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    if kind != SFlag::S_IFLNK {
        // Just made by us, and no link.
        fchmodat(to, name, mode(&stat), FchmodatFlags::FollowSymlink)?;
    }
    set_times(to, name, &stat)
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

fn set_times(directory: BorrowedFd<'_>, name: &CStr, stat: &FileStat) -> io::Result<()> {
    let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let modified = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    Ok(utimensat(
        directory,
        name,
        &accessed,
        &modified,
        UtimensatFlags::NoFollowSymlink,
    )?)
}

/// Copies extended attributes; those that the tmpfs does not have, or that this user must not set, are left out.
fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0u8; MAX_XATTR];
    // SAFETY: the buffer is of the length told.
    let len = unsafe { libc::flistxattr(from.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) };
    let Ok(len) = usize::try_from(len) else {
        return tolerate(io::Error::last_os_error());
    };
    let mut value = Vec::new();
    for name in names
        .get(..len)
        .unwrap_or_default()
        .split_inclusive(|byte| *byte == 0)
    {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        value.resize(MAX_XATTR, 0u8);
        // SAFETY: a C string, and a buffer of the length told.
        let len = unsafe {
            libc::fgetxattr(
                from.as_raw_fd(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        let Ok(len) = usize::try_from(len) else {
            tolerate(io::Error::last_os_error())?;
            continue;
        };
        // SAFETY: a C string, and a buffer that the kernel has just filled to this length.
        let set = unsafe { libc::fsetxattr(to.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), len, 0) };
        if set < 0 {
            tolerate(io::Error::last_os_error())?;
        }
    }
    Ok(())
}

fn tolerate(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOTSUP | libc::EPERM | libc::ENODATA | libc::EINVAL) => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        path::Path,
    };

    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_owners_and_no_link_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/file"), "content").unwrap();
        fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4750)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        nix::unistd::mkfifo(&from.join("pipe"), Mode::from_bits_truncate(0o640)).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(from.join("sub/file"), Some(7), Some(8)).unwrap();
            fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4750)).unwrap();
        }
        let open = |path: &Path| OwnedFd::from(fs::File::open(path).unwrap());
        fs::set_permissions(from.join("sub"), PermissionsExt::from_mode(0o1771)).unwrap();
        copy(&open(&from), &open(&to), true).unwrap();
        assert_eq!(fs::read(to.join("sub/file")).unwrap(), b"content");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        for name in ["sub", "sub/empty", "sub/file", "link", "pipe"] {
            let of = |root: &Path| {
                let metadata = fs::symlink_metadata(root.join(name)).unwrap();
                (metadata.mode(), metadata.uid(), metadata.gid(), metadata.mtime())
            };
            assert_eq!(of(&from), of(&to), "{name}");
        }
    }
}
