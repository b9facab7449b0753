//! What the server gives up before it reads its first request.
//!
//! It ends with the share as its root directory in mount, net, ipc and uts namespaces of its own (husk starts it in a pid
//! namespace, too), a private /proc/self/fd and nothing else of /proc, the capabilities of [`capabilities::KEPT`], no
//! descriptors but those of its table, and, where the kernel has Landlock, no file outside the share that it may open, no
//! program that it may execute and no port that it may reach. Its user
//! stays the host's root: a user namespace's root has no right to files of others. What system calls its threads may make
//! is limited once they run ([`crate::seccomp`]).
//! Mounts that the host makes beneath the share later still show up: the namespace is a slave of the host's. For
//! that the host has to have the share on a shared mount (`mount --make-shared`).

use crate::capabilities::{self, Sets, set_of};
use crate::sys::Errno;
use husk_lockdown::landlock::{self, Files};
use husk_lockdown::limits;
use husk_lockdown::violation::{self, Witness};
use husk_vmm_protocol::fds::fsd as table;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Why the server could not lock itself up, or was started wrongly.
#[derive(Debug, thiserror::Error)]
pub enum LockdownError {
    /// A descriptor of the table is missing or of the wrong kind.
    #[error("descriptor {fd} is not {expected}; husk-fsd is started by husk, not by hand")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What it should be.
        expected: &'static str,
    },
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
}

/// What the server still has afterwards, besides its channel.
#[derive(Debug)]
pub struct Jail {
    /// The share's root directory (`O_PATH`): also the process's.
    pub root: OwnedFd,
    /// /proc/self/fd (`O_PATH`), on a procfs mounted nowhere.
    pub proc_fds: OwnedFd,
}

const NAMESPACES: libc::c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

const SECBIT_NOROOT: libc::c_ulong = 1 << 0;
const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
const SECBIT_KEEP_CAPS_LOCKED: libc::c_ulong = 1 << 5;
const SECBIT_NO_CAP_AMBIENT_RAISE: libc::c_ulong = 1 << 6;

/// Bits that keep capabilities apart from user ids: the server takes on a caller's ids without losing its rights.
/// Each is locked (the next higher bit).
const SECURE_BITS: libc::c_ulong = SECBIT_NOROOT
    | (SECBIT_NOROOT << 1)
    | SECBIT_NO_SETUID_FIXUP
    | (SECBIT_NO_SETUID_FIXUP << 1)
    | SECBIT_KEEP_CAPS_LOCKED
    | SECBIT_NO_CAP_AMBIENT_RAISE
    | (SECBIT_NO_CAP_AMBIENT_RAISE << 1);

const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

// SAFETY: AT_FDCWD stands for the working directory wherever a directory's descriptor is wanted.
const AT_CWD: BorrowedFd<'static> = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };

const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;
const MOUNT_ATTR_NOEXEC: u64 = 8;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Checks that the share's descriptor is a directory and the channel's a packet socket.
///
/// # Errors
/// When one is not.
pub fn check_descriptors(share: RawFd, channel: RawFd) -> Result<(), LockdownError> {
    // SAFETY: stat is plain integers, for which zero is valid; it lives through the call.
    let is_directory = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        libc::fstat(share, &raw mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFDIR
    };
    if !is_directory {
        return Err(LockdownError::Descriptor {
            fd: share,
            expected: "the share's root directory",
        });
    }
    if socket_option(channel, libc::SO_TYPE) != Some(libc::SOCK_SEQPACKET)
        || socket_option(channel, libc::SO_DOMAIN) != Some(libc::AF_UNIX)
    {
        return Err(LockdownError::Descriptor {
            fd: channel,
            expected: "a Unix packet socket to husk-vmm",
        });
    }
    Ok(())
}

fn socket_option(fd: RawFd, option: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has room for the length given; both live through the call.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(value)
}

/// Locks the process up. To be called once, before it has other threads. `share` is consumed: it belongs to the
/// host's mount namespace. All descriptors from `end` on are closed.
///
/// # Errors
/// At the first step that fails. The process is then of no use.
pub fn enter(share: OwnedFd, end: RawFd) -> Result<Jail, LockdownError> {
    let step = |step: &'static str| move |source: Errno| LockdownError::Step { step, source };

    #[cfg(feature = "captured")]
    if husk_lockdown::captured::is_free() {
        return stay_free(share).map_err(step("taking the share as it is"));
    }
    close_from(end).map_err(step("closing descriptors that were passed by mistake"))?;
    limits::one_heap();
    limits::nothing_but_files().map_err(|e| step("setting resource limits")(e.into()))?;
    // A file larger than RLIMIT_FSIZE is to be an error that the guest sees, not the server's end.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // SAFETY: no pointers are involved.
    unsafe { libc::umask(0) };

    // A working directory moves along into a new mount namespace; a descriptor stays in the old one.
    call(unsafe_fchdir(share.as_fd())).map_err(step("entering the share"))?;
    drop(share);
    // SAFETY: no pointers are involved; the process has one thread.
    call(unsafe { libc::unshare(NAMESPACES) })
        .map_err(step("making namespaces (husk-fsd must be started as root)"))?;
    mount_flags(libc::MS_REC | libc::MS_SLAVE).map_err(step("cutting the way for mounts to the host"))?;
    let proc_fds = private_proc_fds().map_err(step("making a private /proc"))?;
    let root = take_share_as_root().map_err(step("making the share the root directory"))?;

    drop_rights().map_err(step("giving up capabilities"))?;
    let files = Files::Outside {
        root: root.as_raw_fd(),
    };
    // The kernel shows it nowhere; who looks at a sandbox finds it in the log.
    match landlock::deny(files).map_err(|e| step("locking itself in by Landlock")(e.into()))? {
        0 => eprintln!(
            "husk-fsd: warning: this host's kernel has no Landlock to lock the file server in with (it takes ABI 2)"
        ),
        abi => eprintln!("husk-fsd: info: locked in by Landlock, ABI {abi}"),
    }
    violation::watch(Witness {
        program: "husk-fsd",
        log: table::LOG,
        reports: None,
    })
    .map_err(|e| step("watching for forbidden system calls")(e.into()))?;
    Ok(Jail { root, proc_fds })
}

/// What serving needs, with nothing given up for it.
#[cfg(feature = "captured")]
fn stay_free(share: OwnedFd) -> Result<Jail, Errno> {
    // SAFETY: no pointers are involved.
    call(unsafe { libc::umask(0) as libc::c_int })?;
    call(unsafe_fchdir(share.as_fd()))?;
    Ok(Jail {
        root: share,
        proc_fds: open_path(AT_CWD, c"/proc/self/fd")?,
    })
}

fn call(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

fn descriptor(result: libc::c_long) -> Result<OwnedFd, Errno> {
    match RawFd::try_from(result) {
        // SAFETY: the system call has just made this descriptor; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Errno::last()),
    }
}

fn unsafe_fchdir(fd: BorrowedFd<'_>) -> libc::c_int {
    // SAFETY: no pointers are involved.
    unsafe { libc::fchdir(fd.as_raw_fd()) }
}

fn close_from(end: RawFd) -> Result<(), Errno> {
    // SAFETY: the process has not yet opened anything of its own that it still uses.
    let result = unsafe { libc::syscall(libc::SYS_close_range, end, libc::c_uint::MAX, 0) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

fn mount_flags(flags: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: the strings are NUL-terminated and live through the call; null is allowed where it is given.
    call(unsafe { libc::mount(c"none".as_ptr(), c"/".as_ptr(), ptr::null(), flags, ptr::null()) })
}

/// /proc/self/fd of a procfs that shows processes alone and has no place in the file tree.
fn private_proc_fds() -> Result<OwnedFd, Errno> {
    // SAFETY: the string is NUL-terminated and lives through the call.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) })?;
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        // SAFETY: the strings are NUL-terminated and live through the call; null where the command has none.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                key.map_or(ptr::null(), CStr::as_ptr),
                value.map_or(ptr::null(), CStr::as_ptr),
                0,
            )
        };
        if result < 0 { Err(Errno::last()) } else { Ok(()) }
    };
    configure(FSCONFIG_SET_STRING, Some(c"subset"), Some(c"pid"))?;
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: no pointers are involved.
    let mount =
        descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    open_path(mount.as_fd(), c"self/fd")
}

fn open_path(dir: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated and lives through the call.
    descriptor(unsafe { libc::openat(dir.as_raw_fd(), path.as_ptr(), flags) }.into())
}

/// Makes the working directory the root directory; the former root is gone from the namespace.
///
/// The share is a mount of its own on a host, and taken as it is. A copy would be blind for a moment: what the host
/// mounts beneath the share does not reach a tree that is not attached anywhere.
fn take_share_as_root() -> Result<OwnedFd, Errno> {
    let mut tree = open_path(AT_CWD, c".")?;
    match restrict(tree.as_fd()) {
        // A plain directory, which nothing reaches anyway.
        Err(error) if error == Errno(libc::EINVAL) => {
            tree = mount_on_itself()?;
            call(unsafe_fchdir(tree.as_fd()))?;
        }
        other => other?,
    }
    // With both arguments the same, the old root ends up on top of the new one, whence it is detached.
    // SAFETY: the paths are NUL-terminated and live through the call.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    if pivoted < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the path is NUL-terminated and lives through the call.
    call(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) })?;
    // SAFETY: the path is NUL-terminated and lives through the call.
    call(unsafe { libc::chdir(c"/".as_ptr()) })?;
    open_path(tree.as_fd(), c".")
}

/// The server makes device nodes for the guest. Were it subverted, it could not open one. (A mount that the host
/// makes later brings its own flags along: the host is to mount with nodev too.)
///
/// # Errors
/// `EINVAL` if `tree` is not the root of a mount.
fn restrict(tree: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the path is NUL-terminated, `attributes` has the size given; both live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Makes the working directory a mount of its own, restricted.
fn mount_on_itself() -> Result<OwnedFd, Errno> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the path is NUL-terminated and lives through the call.
    let tree =
        descriptor(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c".".as_ptr(), flags) })?;
    restrict(tree.as_fd())?;
    // SAFETY: the paths are NUL-terminated and live through the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c".".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if moved < 0 { Err(Errno::last()) } else { Ok(tree) }
}

fn drop_rights() -> Result<(), Errno> {
    let prctl = |option: libc::c_int, argument: libc::c_ulong| {
        // SAFETY: none of the options used here takes a pointer.
        unsafe { libc::prctl(option, argument, 0, 0, 0) }
    };
    call(prctl(libc::PR_SET_SECUREBITS, SECURE_BITS))?;
    for capability in 0..capabilities::END {
        if !capabilities::KEPT.contains(&capability) && prctl(libc::PR_CAPBSET_READ, capability.into()) == 1 {
            call(prctl(libc::PR_CAPBSET_DROP, capability.into()))?;
        }
    }
    // SAFETY: no groups are given, so no pointer is read.
    call(unsafe { libc::setgroups(0, ptr::null()) })?;
    let kept = set_of(&capabilities::KEPT) & capabilities::get()?.permitted;
    capabilities::set(Sets {
        effective: kept,
        permitted: kept,
        inheritable: 0,
    })?;
    call(prctl(libc::PR_SET_NO_NEW_PRIVS, 1))?;
    call(prctl(libc::PR_SET_DUMPABLE, 0))
}
