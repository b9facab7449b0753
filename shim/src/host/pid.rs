//! Processes named by pid and start time, so that a pid that was given out again is never taken for the old one.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

/// A process that was once seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub started: u64,
}

impl Identity {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = start_time(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat"))?;
        Ok(Self { pid, started })
    }

    /// Whether the process lives. One that has ended and was not waited for does not.
    pub fn lives(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else {
            return false;
        };
        let state = stat
            .rsplit_once(')')
            .and_then(|(_, after_name)| after_name.split_ascii_whitespace().next());
        start_time(&stat) == Some(self.started) && !matches!(state, None | Some("Z" | "X"))
    }

    /// A descriptor of the process, or `None` if it has ended.
    ///
    /// # Errors
    /// When pidfds cannot be had.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let fd = match pidfd_open(self.pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            other => other?,
        };
        // The descriptor first, then the look at the start time: it is the descriptor's process that was looked at.
        Ok(matches!(Self::of(self.pid), Ok(now) if now == self).then_some(fd))
    }

    /// Kills the process and waits up to `patience` for its end. True when it is gone.
    ///
    /// # Errors
    /// When it may not be killed.
    pub fn kill(self, patience: Duration) -> io::Result<bool> {
        let Some(fd) = self.open()? else { return Ok(true) };
        pidfd_signal(&fd, libc::SIGKILL)?;
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        Ok(nix::poll::poll(&mut fds, timeout)? > 0)
    }
}

/// A descriptor of the process that has `pid` now.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal to the process of a pidfd. One that has ended already is fine.
///
/// # Errors
/// `EPERM`, `EINVAL`.
pub fn pidfd_signal(fd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call; a null siginfo is allowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0u32,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Field 22 of `/proc/PID/stat`. The second field, the name, may hold blanks and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_a_hostile_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 10";
        assert_eq!(start_time(stat), Some(98765));
        assert_eq!(start_time("42 (x"), None);
    }

    #[test]
    fn a_pid_given_out_again_is_left_alone() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let seen = Identity::of(child.id()).unwrap();
        let other = Identity {
            started: seen.started + 1,
            ..seen
        };
        assert!(other.kill(Duration::from_secs(1)).unwrap());
        assert!(child.try_wait().unwrap().is_none());
        assert!(seen.lives() && !other.lives());
        assert!(seen.kill(Duration::from_secs(5)).unwrap());
        assert!(!seen.lives(), "a zombie does not live");
        child.wait().unwrap();
        assert!(seen.open().unwrap().is_none());
    }
}
