//! Mappings of ids: whose a file on a mount appears to be.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, sys::wait::waitpid, unistd::Pid};

use super::pid::pidfd_signal;

/// `size` ids from `inside` on, in the file system, are those from `outside` on, on the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First id in the file system.
    pub inside: u32,
    /// First id on the mount.
    pub outside: u32,
    /// How many.
    pub size: u32,
}

/// The mapping of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// Of users.
    pub users: Vec<Range>,
    /// Of groups.
    pub groups: Vec<Range>,
    /// Also of the mounts below.
    pub recursive: bool,
}

impl IdMap {
    /// A user namespace with the mapping, as mount_setattr(2) takes it. It lives as long as the descriptor.
    ///
    /// # Errors
    /// When the kernel refuses the mapping (`EINVAL`: ranges overlap, are empty or too many).
    pub fn user_namespace(&self) -> io::Result<OwnedFd> {
        let child = Member::new()?;
        let pid = child.pid.as_raw();
        for (file, ranges) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            let lines = ranges
                .iter()
                .map(|range| format!("{} {} {}\n", range.inside, range.outside, range.size));
            fs::write(format!("/proc/{pid}/{file}"), lines.collect::<String>())?;
        }
        Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
    }

    /// Gives `mount`, which is not attached yet, the mapping.
    ///
    /// # Errors
    /// When the mapping is refused, or the file system has no mapped mounts (`EINVAL`).
    pub fn apply(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        let namespace = self.user_namespace()?;
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: namespace.as_raw_fd() as u64,
        };
        let recursive = if self.recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the structure outlives the call and its size is told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | recursive,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// Reads ranges as containerd's mount options have them: `inside:outside:size`, separated by commas.
pub fn parse(text: &str) -> Option<Vec<Range>> {
    let range = |text: &str| {
        let mut numbers = text.split(':').map(|number| number.parse::<u32>().ok());
        let range = Range {
            inside: numbers.next()??,
            outside: numbers.next()??,
            size: numbers.next()??,
        };
        numbers.next().is_none().then_some(range)
    };
    text.split(',').map(range).collect()
}

/// A process that does nothing but be in a user namespace of its own. Ended when dropped.
struct Member {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Member {
    fn new() -> io::Result<Self> {
        let flags = (libc::CLONE_NEWUSER | libc::CLONE_PIDFD | libc::SIGCHLD) as u64;
        let mut pidfd: i32 = -1;
        // SAFETY: without a stack of its own or CLONE_VM this is a fork. The child makes nothing but raw system calls,
        // whatever locks other threads held. The kernel writes the descriptor to `pidfd`.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                flags,
                std::ptr::null_mut::<libc::c_void>(),
                &raw mut pidfd,
                0,
                0,
            )
        };
        match pid {
            0 => loop {
                // SAFETY: no pointers are involved; both calls only end or suspend this process.
                unsafe {
                    libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                    libc::syscall(libc::SYS_pause);
                }
            },
            1.. => {
                let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
                // SAFETY: the kernel has just made this descriptor for us.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Self { pid, pidfd })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It is not reaped yet, so it is there; and SIGKILL ends it at once.
        let _ = pidfd_signal(&self.pidfd, libc::SIGKILL);
        while waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_namespace_has_the_mapping_and_its_maker_is_gone() {
        let range = |inside, outside, size| Range {
            inside,
            outside,
            size,
        };
        let map = IdMap {
            users: vec![range(0, 100_000, 1000), range(1000, 5, 1)],
            groups: vec![range(0, 7, 1)],
            recursive: false,
        };
        let namespace = map.user_namespace().unwrap();
        let kind = fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap();
        assert!(kind.to_str().unwrap().starts_with("user:["));
        let wrong = IdMap {
            users: vec![range(0, 1, 0)],
            ..map
        };
        assert_eq!(
            wrong.user_namespace().unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
