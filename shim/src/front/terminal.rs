//! The user's terminal: raw while a container has it, its size, and streams of our own on it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal in raw mode. As it was before when dropped.
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Every key goes to whoever reads `terminal`, none to this process as a signal.
    ///
    /// # Errors
    /// When it is not a terminal.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let terminal = terminal.try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(&self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}

/// A terminal's size: columns and rows. `None` when it is not a terminal or does not know.
pub fn size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, to where `size` lives, and the descriptor is open through the borrow.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// A descriptor for the same stream that is ours to make non-blocking: the flag belongs to the open file, which the
/// shell that started us goes on using. A regular file keeps the shared offset, and has no such flag.
///
/// # Errors
/// When it is closed.
pub fn own(stream: BorrowedFd<'_>, write: bool) -> io::Result<OwnedFd> {
    let copy = stream.try_clone_to_owned()?;
    let file = File::from(copy);
    let kind = file.metadata()?.file_type();
    if !kind.is_fifo() && !kind.is_char_device() {
        return Ok(OwnedFd::from(file));
    }
    let reopened = OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", stream.as_raw_fd()));
    // Another user's terminal (after su) cannot be opened again: then the shared one has to do.
    Ok(reopened.map_or_else(|_| OwnedFd::from(file), OwnedFd::from))
}

/// The first of the standard streams that is a terminal.
pub fn find() -> Option<OwnedFd> {
    let streams = [
        io::stdin().as_fd().try_clone_to_owned(),
        io::stdout().as_fd().try_clone_to_owned(),
    ];
    streams
        .into_iter()
        .filter_map(Result::ok)
        .find(|stream| nix::unistd::isatty(stream).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::{
        fcntl::{FcntlArg, OFlag, fcntl},
        pty::{Winsize, openpty},
        sys::termios::LocalFlags,
    };

    use super::*;

    #[test]
    fn a_terminal_is_as_before_afterwards() {
        let size = Winsize {
            ws_row: 31,
            ws_col: 97,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let echoes = || {
            tcgetattr(&pty.slave)
                .unwrap()
                .local_flags
                .contains(LocalFlags::ECHO | LocalFlags::ISIG)
        };
        assert!(echoes());
        let raw = RawMode::enter(pty.slave.as_fd()).unwrap();
        assert!(!echoes());
        drop(raw);
        assert!(echoes());
        assert_eq!(super::size(pty.slave.as_fd()), Some((97, 31)));
    }

    #[test]
    fn our_streams_leave_the_shell_s_alone() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let ours = own(writer.as_fd(), true).unwrap();
        let flags = |fd: BorrowedFd<'_>| OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
        assert!(flags(ours.as_fd()).contains(OFlag::O_NONBLOCK));
        assert!(!flags(writer.as_fd()).contains(OFlag::O_NONBLOCK));
        File::from(ours).write_all(b"x").unwrap();
        let mut byte = [0];
        File::from(reader).read_exact(&mut byte).unwrap();

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        File::from(own(file.as_fd(), true).unwrap())
            .write_all(b"after")
            .unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12);
        assert!(super::size(file.as_fd()).is_none());
        assert!(RawMode::enter(file.as_fd()).is_err());
    }
}
