//! The system calls of a passthrough server, one safe function each.
//!
//! Names are single path components relative to a descriptor; nothing here follows a symbolic link, except
//! [`reopen`], which opens what a descriptor already names. Nothing leaves a directory upwards but [`stat_above`].

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// An error number as FUSE carries it: positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// That of this thread's last failed system call.
    pub fn last() -> Self {
        Self::from(io::Error::last_os_error())
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl std::error::Error for Errno {}

/// What a system call gave.
pub type Result<T> = std::result::Result<T, Errno>;

/// The paths of what a descriptor names: of any file, of a directory, and of the directory above it.
const EMPTY: &CStr = c"";
const SELF: &CStr = c".";
const ABOVE: &CStr = c"..";

fn check(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 {
        Err(Errno::last())
    } else {
        Ok(result)
    }
}

fn check_len(result: libc::ssize_t) -> Result<usize> {
    usize::try_from(result).map_err(|_| Errno::last())
}

fn owned(result: libc::c_long) -> Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(|_| Errno(libc::EIO))?;
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the system call has just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor's number as a path: its name in /proc/self/fd.
pub struct FdName([u8; 12]);

impl FdName {
    /// That of `fd`.
    pub fn new(fd: BorrowedFd<'_>) -> Self {
        let mut name = [0; 12];
        let mut rest = fd.as_raw_fd().unsigned_abs();
        let mut digits = [0u8; 10];
        let mut count = 0;
        for slot in digits.iter_mut().rev() {
            *slot = b'0' + (rest % 10) as u8;
            rest /= 10;
            count += 1;
            if rest == 0 {
                break;
            }
        }
        for (to, from) in name.iter_mut().zip(digits.iter().skip(digits.len() - count)) {
            *to = *from;
        }
        Self(name)
    }

    /// The path.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// Opens the entry `name` of `dir` itself, without any right but to name it (`O_PATH | O_NOFOLLOW`).
pub fn open_entry(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    open_beneath(dir, name, libc::O_PATH, 0)
}

/// Attempts at opening a name whose file the host moves away while it is opened. (One fails about once in a thousand times
/// against a host that does nothing else.)
const ATTEMPTS: u32 = 16;

/// Opens the entry `name` of `dir` with `flags`, never a symbolic link's target, never outside `dir`.
///
/// # Errors
/// ESTALE if the file is moved away at each attempt; those of openat2(2).
pub fn open_beneath(dir: BorrowedFd<'_>, name: &CStr, flags: libc::c_int, mode: u32) -> Result<OwnedFd> {
    for _ in 0..ATTEMPTS {
        match open_beneath_once(dir, name, flags, mode) {
            // The kernel found the file, and found it elsewhere when it made sure of where it is. (It does so before it
            // opens anything, and not of what it has made, so nothing is done twice.)
            Err(Errno(libc::EXDEV | libc::EAGAIN)) => {}
            result => return result,
        }
    }
    Err(Errno(libc::ESTALE))
}

fn open_beneath_once(dir: BorrowedFd<'_>, name: &CStr, flags: libc::c_int, mode: u32) -> Result<OwnedFd> {
    // SAFETY: open_how is plain integers, for which zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `name` is NUL-terminated and `how` is of the size given; both live through the call.
    owned(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    })
}

/// Makes a file without a name in `dir`.
pub fn open_tmpfile(dir: BorrowedFd<'_>, flags: libc::c_int, mode: u32) -> Result<OwnedFd> {
    let flags = flags | libc::O_TMPFILE | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated and lives through the call.
    owned(unsafe { libc::openat(dir.as_raw_fd(), SELF.as_ptr(), flags, mode) }.into())
}

/// Opens anew what `fd` names. `proc_fds` is a descriptor of /proc/self/fd.
pub fn reopen(proc_fds: BorrowedFd<'_>, fd: BorrowedFd<'_>, flags: libc::c_int) -> Result<OwnedFd> {
    let name = FdName::new(fd);
    // SAFETY: the path is NUL-terminated and lives through the call.
    owned(
        unsafe {
            libc::openat(
                proc_fds.as_raw_fd(),
                name.as_c_str().as_ptr(),
                flags | libc::O_CLOEXEC,
            )
        }
        .into(),
    )
}

/// All that is known of the file that `fd` names.
pub fn stat(fd: BorrowedFd<'_>) -> Result<libc::statx> {
    stat_at(fd, EMPTY)
}

/// The same of the directory above the directory `dir`, across mounts. That of the process's root directory is itself.
///
/// # Errors
/// ENOENT if `dir` was moved out of what its mount shows.
pub fn stat_above(dir: BorrowedFd<'_>) -> Result<libc::statx> {
    stat_at(dir, ABOVE)
}

fn stat_at(fd: BorrowedFd<'_>, path: &CStr) -> Result<libc::statx> {
    // SAFETY: statx is plain integers, for which zero is valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated, `stat` has room for what is written; both live through the call.
    check(unsafe {
        libc::statx(
            fd.as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_SYNC_AS_STAT,
            libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID,
            &raw mut stat,
        )
    })?;
    Ok(stat)
}

/// The kind of file that `stat` tells of: the `S_IFMT` bits of its mode.
pub fn kind(stat: &libc::statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

/// How many descriptors this process may have.
pub fn max_descriptors() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives through the call.
    match check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }) {
        Ok(_) => usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX),
        Err(_) => 0,
    }
}

/// The file system that `fd` is on.
pub fn statfs(fd: BorrowedFd<'_>) -> Result<libc::statfs64> {
    // SAFETY: statfs64 is plain integers, for which zero is valid.
    let mut stat: libc::statfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` has room for what is written and lives through the call.
    check(unsafe { libc::fstatfs64(fd.as_raw_fd(), &raw mut stat) })?;
    Ok(stat)
}

/// Sets the permission bits. Follows nothing: `fd` names no symbolic link (the caller sees to that).
pub fn chmod(proc_fds: BorrowedFd<'_>, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    let name = FdName::new(fd);
    // SAFETY: the path is NUL-terminated and lives through the call.
    check(unsafe { libc::fchmodat(proc_fds.as_raw_fd(), name.as_c_str().as_ptr(), mode, 0) })?;
    Ok(())
}

/// Sets owner and group; `u32::MAX` leaves one as it is.
pub fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: the path is NUL-terminated and lives through the call.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), EMPTY.as_ptr(), uid, gid, libc::AT_EMPTY_PATH) })?;
    Ok(())
}

/// Sets the times of access and change; `tv_nsec` may be UTIME_NOW or UTIME_OMIT.
pub fn set_times(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Result<()> {
    // SAFETY: the path is NUL-terminated, `times` has two entries; both live through the call.
    check(unsafe {
        libc::utimensat(
            fd.as_raw_fd(),
            EMPTY.as_ptr(),
            times.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Sets the size of an open file.
pub fn truncate(fd: BorrowedFd<'_>, size: i64) -> Result<()> {
    // SAFETY: no pointers are involved.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) })?;
    Ok(())
}

/// Makes a directory.
pub fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<()> {
    // SAFETY: `name` is NUL-terminated and lives through the call.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) })?;
    Ok(())
}

/// Makes a special or an empty regular file.
pub fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: libc::dev_t) -> Result<()> {
    // SAFETY: `name` is NUL-terminated and lives through the call.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) })?;
    Ok(())
}

/// Makes a symbolic link that says `target`.
pub fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // SAFETY: both strings are NUL-terminated and live through the call.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })?;
    Ok(())
}

/// Gives the file that `fd` names another name. Needs CAP_DAC_READ_SEARCH.
pub fn link(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    // SAFETY: both strings are NUL-terminated and live through the call.
    check(unsafe {
        libc::linkat(
            fd.as_raw_fd(),
            EMPTY.as_ptr(),
            dir.as_raw_fd(),
            name.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Removes a name: a directory's if `directory`, another's if not.
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, directory: bool) -> Result<()> {
    let flags = if directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: `name` is NUL-terminated and lives through the call.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) })?;
    Ok(())
}

/// Renames, with the flags of renameat2(2).
pub fn rename(
    from: BorrowedFd<'_>,
    old: &CStr,
    to: BorrowedFd<'_>,
    new: &CStr,
    flags: libc::c_uint,
) -> Result<()> {
    // SAFETY: both names are NUL-terminated and live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            old.as_ptr(),
            to.as_raw_fd(),
            new.as_ptr(),
            flags,
        )
    };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Reads what the symbolic link `fd` says into `into`; returns how much.
pub fn read_link(fd: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize> {
    // SAFETY: the path is NUL-terminated, `into` has room for the length given; both live through the call.
    check_len(unsafe {
        libc::readlinkat(
            fd.as_raw_fd(),
            EMPTY.as_ptr(),
            into.as_mut_ptr().cast(),
            into.len(),
        )
    })
}

/// Reads entries of an open directory, as `struct linux_dirent64`, from its position on.
pub fn read_dir(fd: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize> {
    // SAFETY: `into` has room for the length given and lives through the call.
    let n = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            into.as_mut_ptr(),
            into.len(),
        )
    };
    usize::try_from(n).map_err(|_| Errno::last())
}

/// Moves the position of an open file or directory, or finds data or holes.
pub fn seek(fd: BorrowedFd<'_>, offset: i64, whence: libc::c_int) -> Result<u64> {
    // SAFETY: no pointers are involved.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| Errno::last())
}

/// Writes a file's data (and, if not `data_only`, all that is known of it) to its storage.
pub fn sync(fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
    // SAFETY: no pointers are involved.
    check(unsafe {
        if data_only {
            libc::fdatasync(fd.as_raw_fd())
        } else {
            libc::fsync(fd.as_raw_fd())
        }
    })?;
    Ok(())
}

/// Writes all of the file system that `fd` is on to its storage.
pub fn sync_file_system(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no pointers are involved.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) })?;
    Ok(())
}

/// fallocate(2).
pub fn allocate(fd: BorrowedFd<'_>, mode: libc::c_int, offset: i64, len: i64) -> Result<()> {
    // SAFETY: no pointers are involved.
    check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) })?;
    Ok(())
}

/// copy_file_range(2) between two ranges; returns how much was copied.
pub fn copy_range(
    from: BorrowedFd<'_>,
    mut from_at: i64,
    to: BorrowedFd<'_>,
    mut to_at: i64,
    len: usize,
) -> Result<usize> {
    // SAFETY: both offsets live through the call.
    check_len(unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_at,
            to.as_raw_fd(),
            &raw mut to_at,
            len,
            0,
        )
    })
}

/// Closes a duplicate of `fd`: what close(2) would report of it, it reports now.
pub fn flush(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no pointers are involved.
    let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: `copy` was just made and is known to nobody else.
    check(unsafe { libc::close(copy) })?;
    Ok(())
}

/// Extended attributes of what `fd` names, be it a symbolic link or a special file. The calling thread's working
/// directory must be /proc/self/fd (see [`crate::credentials::enter`]): before Linux 6.13 there is no call that
/// takes an `O_PATH` descriptor.
pub mod xattr {
    use super::{CStr, Errno, FdName, Result, check, check_len};
    use std::os::fd::BorrowedFd;

    /// Reads `name`'s value; an empty `into` asks for its length.
    pub fn get(fd: BorrowedFd<'_>, name: &CStr, into: &mut [u8]) -> Result<usize> {
        let path = FdName::new(fd);
        // SAFETY: the strings are NUL-terminated, `into` has room for the length given; all live through the call.
        check_len(unsafe {
            libc::getxattr(
                path.as_c_str().as_ptr(),
                name.as_ptr(),
                into.as_mut_ptr().cast(),
                into.len(),
            )
        })
    }

    /// Sets `name`'s value.
    pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: libc::c_int) -> Result<()> {
        let path = FdName::new(fd);
        // SAFETY: the strings are NUL-terminated, `value` has the length given; all live through the call.
        check(unsafe {
            libc::setxattr(
                path.as_c_str().as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags,
            )
        })?;
        Ok(())
    }

    /// Lists the names; an empty `into` asks for their length.
    pub fn list(fd: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize> {
        let path = FdName::new(fd);
        // SAFETY: the path is NUL-terminated, `into` has room for the length given; both live through the call.
        check_len(unsafe { libc::listxattr(path.as_c_str().as_ptr(), into.as_mut_ptr().cast(), into.len()) })
    }

    /// Removes `name`.
    pub fn remove(fd: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        let path = FdName::new(fd);
        // SAFETY: both strings are NUL-terminated and live through the call.
        if unsafe { libc::removexattr(path.as_c_str().as_ptr(), name.as_ptr()) } < 0 {
            return Err(Errno::last());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{Errno, FdName, open_beneath};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    #[test]
    fn descriptors_are_named_in_decimal() {
        for (fd, name) in [
            (0, c"0"),
            (7, c"7"),
            (10, c"10"),
            (1_048_576, c"1048576"),
            (i32::MAX, c"2147483647"),
        ] {
            // SAFETY: the descriptor is only named, never used.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            assert_eq!(FdName::new(fd).as_c_str(), name);
        }
    }

    /// The kernel's EXDEV would tell a guest of a mount that there is not.
    #[test]
    fn a_file_that_is_being_moved_out_is_there_or_not() {
        // In memory, where a move takes little more time than the kernel's look at it.
        let outside = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let inside = outside.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let dir = std::fs::File::open(&inside).unwrap();
        let (here, there) = (inside.join("x"), outside.path().join("x"));
        std::fs::write(&here, "").unwrap();
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    std::fs::rename(&here, &there).unwrap();
                    std::fs::rename(&there, &here).unwrap();
                }
            });
            let start = Instant::now();
            let mut failed = None;
            while failed.is_none() && start.elapsed() < Duration::from_secs(1) && !mover.is_finished() {
                let path = || open_beneath(dir.as_fd(), c"x", libc::O_PATH, 0);
                // The mover's rename replaces what is made.
                let make = || open_beneath(dir.as_fd(), c"x", libc::O_CREAT | libc::O_EXCL, 0o600);
                failed = (0..100)
                    .map(|n| if n % 10 == 0 { make() } else { path() })
                    .filter_map(Result::err)
                    .find(|error| ![libc::ENOENT, libc::EEXIST].contains(&error.0));
            }
            end.store(true, Ordering::Relaxed);
            assert_eq!(failed, None::<Errno>);
        });
    }
}
