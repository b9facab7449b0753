//! The user's terminal: raw while a container has it, and its size.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
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
    use nix::{
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
        assert!(RawMode::enter(tempfile::tempfile().unwrap().as_fd()).is_err());
        assert_eq!(super::size(pty.slave.as_fd()), Some((97, 31)));
    }
}
