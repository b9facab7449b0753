//! System calls that neither libc nor nix wraps: clone3, the mount API of file descriptors, capset.
//!
//! Each wrapper is as thin as it can be; policy lives with the callers.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// The `libc` crate has this constant in a type that is too small for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The descriptor that a system call has just answered.
pub fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the system call has just returned this new descriptor to us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Forks with `flags` (`CLONE_NEW…`) into `cgroup`. Answers the child's pid, or `None` in the child.
///
/// # Safety
///
/// The process must have one thread only: the child goes on in a copy of this process, locks included.
pub unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<i32>> {
    // SAFETY: all-zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is valid and of the size given; without CLONE_VM the child has its own stack.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })?;
    Ok(if pid == 0 {
        None
    } else {
        Some(i32::try_from(pid).map_err(io::Error::other)?)
    })
}

/// Forks with `flags` (`CLONE_NEW…`) into `cgroup` a child of this process's parent. Answers the child's pid, or
/// `None` in the child.
///
/// # Safety
///
/// As for [`clone3`].
pub unsafe fn clone3_sibling(flags: u64, cgroup: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    // SAFETY: all-zero is a valid clone_args. The signal at the child's exit is that of this process: none is taken.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | CLONE_INTO_CGROUP | libc::CLONE_PARENT as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: args is valid and of the size given; without CLONE_VM the child has its own stack.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })?;
    Ok(if pid == 0 {
        None
    } else {
        Some(i32::try_from(pid).map_err(io::Error::other)?)
    })
}

/// openat2(2): opens `path` beneath `dir`, `flags` and `mode` as for open(2), `resolve` of `RESOLVE_…`.
pub fn openat2(dir: BorrowedFd<'_>, path: &CStr, flags: i32, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    /// A `..` is not resolved while anything on the machine is mounted or renamed, and the caller is to try again.
    const ATTEMPTS: usize = 1000;
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    let mut opened = Err(io::ErrorKind::WouldBlock.into());
    for _ in 0..ATTEMPTS {
        // SAFETY: path is a C string and how a valid open_how of the size given.
        opened = own(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        });
        if !opened
            .as_ref()
            .is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::WouldBlock)
        {
            break;
        }
    }
    opened
}

/// Opens a copy of the mount at the descriptor `at`: with its submounts if `recursive`.
pub fn clone_tree(at: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: an empty C string and a descriptor.
    own(unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches the detached mount `tree` on top of the descriptor `at`.
pub fn attach_tree(tree: BorrowedFd<'_>, at: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: empty C strings and descriptors.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            at.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    })?;
    Ok(())
}

/// Sets and clears attributes (`MOUNT_ATTR_…`) and the propagation (`MS_…`, 0: keep) of the mount at `at`.
pub fn set_mount_attributes(
    at: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: attributes is a valid mount_attr of the size given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// A file system being configured, fsopen(2) and fsconfig(2).
pub struct FileSystem(OwnedFd);

impl FileSystem {
    /// Begins one of the type `name`.
    pub fn open(name: &CStr) -> io::Result<Self> {
        // SAFETY: name is a C string.
        own(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), libc::FSOPEN_CLOEXEC) }).map(Self)
    }

    /// Sets the option `key`, to `value` if it has one.
    pub fn set(&self, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
        let (command, value) = match value {
            Some(value) => (libc::FSCONFIG_SET_STRING, value.as_ptr()),
            None => (libc::FSCONFIG_SET_FLAG, std::ptr::null()),
        };
        // SAFETY: key and value are C strings (or null where the command wants none).
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key.as_ptr(),
                value,
                0,
            )
        })?;
        Ok(())
    }

    /// Makes the file system and a detached mount of it with `attributes` (`MOUNT_ATTR_…`).
    pub fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        let none = std::ptr::null::<libc::c_char>();
        // SAFETY: the command takes neither key nor value.
        check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                libc::FSCONFIG_CMD_CREATE,
                none,
                none,
                0,
            )
        })?;
        // SAFETY: only integers are passed.
        own(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attributes,
            )
        })
    }

    /// What the kernel has to say about a failure, from the file system's message log.
    pub fn complaint(&self) -> Option<String> {
        let mut message = [0u8; 512];
        let count = nix::unistd::read(self.0.as_fd(), &mut message).ok()?;
        let text = String::from_utf8_lossy(message.get(..count)?);
        // Each message is preceded by its kind: "e ", "w " or "i ".
        Some(text.get(2..)?.trim_end().to_owned())
    }
}

/// A descriptor that the runtime waits on.
pub fn watch<T: WatchedFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: both types own their descriptor and give the same one as long as they live.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Owners of one descriptor for life.
pub trait WatchedFd: AsRawFd {}
impl WatchedFd for OwnedFd {}
impl WatchedFd for std::fs::File {}

/// pivot_root(".", "."): the current directory becomes the root, with the old root stacked on top of it.
pub fn pivot_root_here() -> io::Result<()> {
    // SAFETY: two C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    Ok(())
}

/// Closes every descriptor from `first` to `last`, both included.
pub fn close_range(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: integers only. Whoever owned those descriptors in this (forked) process never uses them again.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// Sets the effective, permitted and inheritable capabilities of this thread at once (capset(2), version 3).
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes a header and two data records, which these are.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Puts this thread under the filter `program`, with `flags` (`SECCOMP_FILTER_FLAG_…`).
pub fn load_seccomp_filter(program: &[libc::sock_filter], flags: u64) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: program is a valid sock_fprog, whose instructions live as long as the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

/// prctl(2) with integer arguments.
pub fn prctl(option: i32, a: u64, b: u64) -> io::Result<i32> {
    // SAFETY: callers pass options whose arguments are integers; unused ones are zero, as the kernel demands.
    let result = unsafe { libc::prctl(option, a, b, 0u64, 0u64) };
    check(result.into())?;
    Ok(result)
}

/// Gives this process a session keyring of its own called `name`. A kernel without keys is fine.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // SAFETY: name is a C string.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING as libc::c_long,
            name.as_ptr(),
        )
    });
    match result {
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

/// Sets this thread's I/O priority: `class` 1 to 3, `level` 0 to 7.
pub fn set_io_priority(class: u32, level: u32) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, (class << 13) | level) })?;
    Ok(())
}

/// Sets how this thread is scheduled (sched_setattr(2)).
pub fn set_scheduler(attributes: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: attributes is a valid sched_attr, which says its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attributes), 0) })?;
    Ok(())
}

/// Has this thread run on `processors` only, one bit each.
pub fn set_processors(processors: &[u64]) -> io::Result<()> {
    // SAFETY: the pointer is to as many bytes as are said.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(processors),
            processors.as_ptr(),
        )
    })?;
    Ok(())
}

/// The processors that this thread may run on, one bit each.
pub fn processors() -> io::Result<Vec<u64>> {
    // More than any kernel's NR_CPUS.
    let mut processors = vec![0u64; 1024];
    // SAFETY: the pointer is to as many bytes as are said. The answer is how many of them were written.
    let written = check(unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            0,
            size_of_val(processors.as_slice()),
            processors.as_mut_ptr(),
        )
    })?;
    processors.truncate(usize::try_from(written).map_err(io::Error::other)? / size_of::<u64>());
    Ok(processors)
}

/// Sets one limit of this process.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: limit is a valid rlimit.
    check(unsafe { libc::setrlimit(resource, &raw const limit) }.into())?;
    Ok(())
}

/// Raises the hard limit of this process to `hard`, if it is below.
pub fn allow_rlimit(resource: u32, hard: u64) -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: limit is a valid rlimit.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) }.into())?;
    if limit.rlim_max < hard {
        set_rlimit(resource, limit.rlim_cur, hard)?;
    }
    Ok(())
}

/// Sends a signal to one process (kill(2) with a pid above 0).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: integers only.
    check(unsafe { libc::kill(pid, signal) }.into())?;
    Ok(())
}

/// A descriptor for the process `pid`, which is ours or a child not yet reaped.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only; the descriptor is close-on-exec.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Enters the namespaces of `kinds` (`CLONE_NEW…`) of the process that `of`, a pidfd, names, or the one that `of` is.
/// A pid namespace is entered by the next children only.
pub fn enter_namespaces(of: BorrowedFd<'_>, kinds: i32) -> io::Result<()> {
    // SAFETY: a descriptor and flags.
    check(unsafe { libc::setns(of.as_raw_fd(), kinds) }.into())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{fs, os::fd::AsFd, sync::mpsc, thread};

    #[test]
    fn paths_that_lead_up_are_resolved_while_others_rename() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "").unwrap();
        let renaming = thread::spawn(move || {
            while let Err(mpsc::TryRecvError::Empty) = stopped.try_recv() {
                fs::rename(&from, &to).unwrap();
                fs::rename(&to, &from).unwrap();
            }
        });
        let root = fs::File::open(dir.path()).unwrap();
        for _ in 0..20_000 {
            let path = c"a/../a/b/../b/c/../../../a/b/c";
            let opened = openat2(root.as_fd(), path, libc::O_PATH, 0, libc::RESOLVE_IN_ROOT);
            opened.unwrap();
        }
        drop(stop);
        renaming.join().unwrap();
    }
}
