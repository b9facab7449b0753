//! A pty for a process, made inside its container so that its name (`/dev/pts/0`) is right there.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag, fstat, major, minor},
};

use super::plan::TerminalSize;
use crate::fault::Fault;

/// A pty's two ends.
#[derive(Debug)]
pub struct Terminal {
    /// For the agent.
    pub master: OwnedFd,
    /// For the process.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Makes one from `/dev/ptmx` of the calling process's root.
    pub fn open(size: TerminalSize, uid: u32) -> Result<Self, Fault> {
        let failed = |what: &'static str| move |error: io::Error| Fault::system(what, error);
        let master = open(
            "/dev/ptmx",
            OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| Fault::system("open /dev/ptmx for the terminal", error))?;
        let stat = fstat(&master).map_err(|error| Fault::system("stat /dev/ptmx", error))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFCHR || (major(stat.st_rdev), minor(stat.st_rdev)) != (5, 2) {
            return Err(Fault::spec(
                "process.terminal",
                "the container's /dev/ptmx is no pty multiplexer",
            ));
        }
        let unlock: libc::c_int = 0;
        // SAFETY: the request reads one int.
        let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) };
        if result < 0 {
            return Err(failed("unlock the terminal")(io::Error::last_os_error()));
        }
        // By descriptor, since the path of the slave would be resolved in what the container has mounted.
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: the request takes flags and returns a new descriptor.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        if slave < 0 {
            return Err(failed("open the terminal")(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        nix::unistd::fchown(&slave, Some(uid.into()), None)
            .map_err(|error| Fault::system("chown of the terminal", error))?;
        let terminal = Self { master, slave };
        if size != TerminalSize::default() {
            resize(terminal.slave.as_fd(), size).map_err(failed("size of the terminal"))?;
        }
        Ok(terminal)
    }

    /// Makes the slave the controlling terminal of the calling process, which leads a session that has none.
    pub fn control(&self) -> Result<(), Fault> {
        // SAFETY: integers only.
        let result = unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) };
        if result < 0 {
            return Err(Fault::system(
                "set the controlling terminal",
                io::Error::last_os_error(),
            ));
        }
        Ok(())
    }
}

/// Sets the size of a terminal, whichever of its ends `fd` is.
///
/// # Errors
///
/// It is not a terminal.
pub fn resize(fd: BorrowedFd<'_>, size: TerminalSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the request reads one winsize.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
