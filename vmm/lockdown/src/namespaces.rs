//! Leaving the host's namespaces and its files: a user of one's own, and an empty root directory that nothing can be
//! written to. (A pid namespace has to be there before the process: husk starts it in one, see clone(2).)

use crate::check;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Why a namespace could not be left.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The user could not be changed.
    #[error("cannot become user {user}; husk must be started as root")]
    User {
        /// The user's number.
        user: u32,
        /// The cause.
        source: io::Error,
    },
    /// There can be no namespaces.
    #[error(
        "cannot make namespaces of its own; the sysctls user.max_user_namespaces, max_net_namespaces and the like must not be 0"
    )]
    Make(#[source] io::Error),
    /// The namespace's users could not be named.
    #[error("cannot write {file}")]
    Map {
        /// Which map.
        file: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The root directory could not be exchanged.
    #[error("cannot make an empty root directory: {step}")]
    Root {
        /// What was being done.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// `struct __user_cap_header_struct` and its data, version 3.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: libc::c_uint = 1;
const MOUNT_ATTR_NOSUID: libc::c_uint = 2;
const MOUNT_ATTR_NODEV: libc::c_uint = 4;
const MOUNT_ATTR_NOEXEC: libc::c_uint = 8;

/// Moves the process into user, mount, net, ipc, uts and cgroup namespaces of its own, in which it is `user` (and the group
/// of that number), the only one that they know, or who it was. It has all capabilities there, and none elsewhere. Its
/// root directory is empty and cannot be written to. To be called once, while it has one thread.
///
/// # Errors
/// At the first step that fails. The process is then of no use.
pub fn leave_host(user: Option<u32>) -> Result<(), NamespaceError> {
    if let Some(user) = user {
        become_user(user).map_err(|source| NamespaceError::User { user, source })?;
    }
    // SAFETY: no pointers are involved.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: no pointers are involved; the process has one thread.
    check(unsafe { libc::unshare(flags) }).map_err(NamespaceError::Make)?;
    let map = |file: &'static str, text: String| {
        fs::write(file, text).map_err(|source| NamespaceError::Map { file, source })
    };
    map("/proc/self/uid_map", format!("{user} {user} 1"))?;
    map("/proc/self/setgroups", "deny".to_owned())?;
    map("/proc/self/gid_map", format!("{group} {group} 1"))?;
    empty_root()?;
    // A change of rights takes the signal back that ends this process with the one that started it.
    // SAFETY: the option takes a plain number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) })
        .map_err(NamespaceError::Make)?;
    Ok(())
}

/// Becomes `user` and the group of that number, in no other group, and keeps the capabilities.
fn become_user(user: u32) -> io::Result<()> {
    // SAFETY: no pointers are involved but for the capabilities' structures, which have the lengths that version 3 tells
    // and live through the calls.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
        check(libc::setgroups(0, ptr::null()))?;
        check(libc::setresgid(user, user, user))?;
        check(libc::setresuid(user, user, user))?;
        let header = CapabilityHeader {
            version: CAPABILITY_VERSION_3,
            pid: 0,
        };
        let mut data = [CapabilityData::default(); 2];
        check(libc::syscall(
            libc::SYS_capget,
            &raw const header,
            data.as_mut_ptr(),
        ))?;
        for half in &mut data {
            half.effective = half.permitted;
        }
        check(libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()))?;
        // Otherwise its own files in /proc are root's.
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
    }
    Ok(())
}

fn empty_root() -> Result<(), NamespaceError> {
    let step = |step: &'static str| move |source: io::Error| NamespaceError::Root { step, source };
    let root = empty_file_system().map_err(step("mounting a file system"))?;
    // SAFETY: the paths are NUL-terminated and live through the calls.
    unsafe {
        check(libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            ptr::null(),
        ))
        .map_err(step("making the mounts its own"))?;
        check(libc::syscall(
            libc::SYS_move_mount,
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        ))
        .map_err(step("placing it"))?;
        check(libc::fchdir(root.as_raw_fd())).map_err(step("entering it"))?;
        // With both arguments the same, the old root ends up on top of the new one, whence it is detached.
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))
            .map_err(step("making it the root"))?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH)).map_err(step("leaving the old one"))?;
        check(libc::chdir(c"/".as_ptr())).map_err(step("entering it"))?;
    }
    Ok(())
}

/// A mount of a file system with nothing in it, which takes nothing.
fn empty_file_system() -> io::Result<OwnedFd> {
    // SAFETY: the strings are NUL-terminated and live through the calls; null is allowed where it is given.
    unsafe {
        let context = descriptor(libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC))?;
        let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
            check(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                key.map_or(ptr::null(), CStr::as_ptr),
                value.map_or(ptr::null(), CStr::as_ptr),
                0,
            ))
        };
        configure(FSCONFIG_SET_STRING, Some(c"mode"), Some(c"0555"))?;
        configure(FSCONFIG_SET_STRING, Some(c"nr_inodes"), Some(c"2"))?;
        configure(FSCONFIG_SET_STRING, Some(c"size"), Some(c"4096"))?;
        configure(FSCONFIG_CMD_CREATE, None, None)?;
        descriptor(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        ))
    }
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the system call has just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: u32 = 0x7000_0001;

    /// What is wrong in a process that has left the host: 0 if nothing is.
    fn what_is_wrong() -> i32 {
        // SAFETY: only system calls with paths that are NUL-terminated and live through the call.
        unsafe {
            let host = (libc::getuid(), libc::getgid()) == (USER, USER);
            let named = libc::open(c"/etc/passwd".as_ptr(), libc::O_PATH) >= 0
                || libc::open(c"/proc/self".as_ptr(), libc::O_PATH) >= 0
                || libc::open(c"/../../etc".as_ptr(), libc::O_PATH) >= 0;
            let made = libc::mkdir(c"/made".as_ptr(), 0o700) == 0;
            let groups = libc::getgroups(0, ptr::null_mut());
            match (host, named, made, groups) {
                (false, ..) => 10,
                (_, true, ..) => 11,
                (_, _, true, _) => 12,
                (_, _, _, 1..) => 13,
                // The loopback interface of a new net namespace, and no other.
                _ if libc::if_nametoindex(c"lo".as_ptr()) != 1 => 14,
                _ => 0,
            }
        }
    }

    #[test]
    fn who_has_left_the_host_has_nothing_of_it() {
        // SAFETY: no pointers are involved.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("not run: only root can become somebody else");
            return;
        }
        let mut status = 0;
        // SAFETY: the child has one thread, and ends without returning.
        unsafe {
            match libc::fork() {
                0 => libc::_exit(match leave_host(Some(USER)) {
                    Ok(()) => what_is_wrong(),
                    Err(error) => {
                        eprintln!("{error}: {:?}", std::error::Error::source(&error));
                        99
                    }
                }),
                child => assert_eq!(libc::waitpid(child, &raw mut status, 0), child),
            }
        }
        assert!(libc::WIFEXITED(status), "{status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 0);
    }
}
