//! System calls that std has not, and acting as another user.

use super::server::{check, posix_path};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Runs `act` on a thread with these ids and no capabilities. Its panics are the caller's.
pub fn as_user<T: Send>(uid: u32, groups: &[u32], act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let gid = groups.first().copied().unwrap_or(uid);
            // The system calls themselves: glibc's functions would change all threads.
            // SAFETY: `groups` has the length given; no other pointers are involved.
            unsafe {
                assert_eq!(
                    libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()),
                    0
                );
                assert_eq!(libc::syscall(libc::SYS_setresgid, gid, gid, gid), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
            }
            act()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The error number of a failure; panics on success.
#[track_caller]
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(e) => e.raw_os_error().unwrap(),
    }
}

pub fn mknod(path: &Path, mode: u32, device: libc::dev_t) -> io::Result<()> {
    let path = posix_path(path);
    // SAFETY: the path is NUL-terminated and lives through the call.
    check(unsafe { libc::mknod(path.as_ptr(), mode, device) }).map(|_| ())
}

pub fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let (from, to) = (posix_path(from), posix_path(to));
    // SAFETY: the paths are NUL-terminated and live through the call.
    check(unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) })
        .map(|_| ())
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (posix_path(path), posix_path(Path::new(name)));
    // SAFETY: the strings are NUL-terminated, `value` has the length given; all live through the call.
    check(unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
    .map(|_| ())
}

pub fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name) = (posix_path(path), posix_path(Path::new(name)));
    let mut value = vec![0; 65536];
    // SAFETY: the strings are NUL-terminated, `value` has the length given; all live through the call.
    let n = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
    Ok(value)
}

pub fn list_xattrs(path: &Path) -> io::Result<Vec<String>> {
    let path = posix_path(path);
    let mut names = vec![0u8; 65536];
    // SAFETY: the path is NUL-terminated, `names` has the length given; both live through the call.
    let n = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
    Ok(names
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(|n| String::from_utf8(n.to_vec()).unwrap())
        .collect())
}

pub fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (posix_path(path), posix_path(Path::new(name)));
    // SAFETY: the strings are NUL-terminated and live through the call.
    check(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(|_| ())
}

pub fn fallocate(file: &impl AsRawFd, mode: i32, offset: i64, len: i64) -> io::Result<()> {
    // SAFETY: no pointers are involved.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(|_| ())
}

pub fn seek(file: &impl AsRawFd, offset: i64, whence: i32) -> io::Result<i64> {
    // SAFETY: no pointers are involved.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if at < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(at)
    }
}
