//! `SOCK_SEQPACKET` pairs: one end for this process, the other for a child.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use tokio::io::unix::AsyncFd;

/// This process's end of a pair.
#[derive(Debug)]
pub struct Seqpacket(AsyncFd<OwnedFd>);

impl Seqpacket {
    /// Makes a pair. The child's end blocks.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (own, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self::own(own)?, theirs))
    }

    fn own(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd names the same open descriptor as long as it lives.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Sends one packet, with a descriptor or without. Waits while the receiver is behind.
    ///
    /// # Errors
    /// `EPIPE` when the other end is closed.
    pub async fn send(&self, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let raw: Option<[RawFd; 1]> = fd.map(|fd| [fd.as_raw_fd()]);
        loop {
            let mut ready = self.0.writable().await?;
            let sent = ready.try_io(|socket| {
                let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
                sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(packet)],
                    rights.as_slice(),
                    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                    None,
                )
                .map_err(io::Error::from)
            });
            match sent {
                Ok(result) => return result.map(drop),
                Err(_would_block) => {}
            }
        }
    }

    /// Receives one packet into `buffer`: its length, and 0 at the end. What does not fit is cut off.
    ///
    /// # Errors
    /// `ECONNRESET` when the other end went away with packets unread.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|socket| {
                recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
            });
            match received {
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn packets_keep_their_bounds_and_the_end_is_seen() {
        let (own, theirs) = Seqpacket::pair().unwrap();
        let theirs = Seqpacket::own(theirs).unwrap();
        own.send(b"one", None).await.unwrap();
        own.send(b"two", Some(own.as_fd())).await.unwrap();
        let mut buffer = [0; 16];
        assert_eq!(theirs.recv(&mut buffer).await.unwrap(), 3);
        assert_eq!(theirs.recv(&mut buffer).await.unwrap(), 3);
        assert_eq!(&buffer[..3], b"two");
        drop(own);
        assert_eq!(theirs.recv(&mut buffer).await.unwrap(), 0);
        assert_eq!(
            theirs.send(b"x", None).await.unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    }
}
