//! Copying between a process's streams on the host (FIFO, pipe, tty, socket, file) and its streams of the guest.
//!
//! Memory is bounded: a chunk is read only when the one before has been written, and an idle stream holds no buffer.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{MsgFlags, recv, send},
};
use tokio::{
    io::{AsyncWriteExt, Interest, unix::AsyncFd},
    net::UnixStream,
    sync::watch,
    task::consume_budget,
};

/// Bytes copied at a time: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// An end on the host that can be copied from or to.
#[derive(Debug)]
pub struct Handle {
    fd: Readiness,
    socket: bool,
}

#[derive(Debug)]
enum Readiness {
    /// The kernel tells when it is ready.
    Told(AsyncFd<OwnedFd>),
    /// Always ready: a regular file, /dev/null.
    Always(OwnedFd),
}

impl Handle {
    /// Takes a descriptor over. Its file may be shared with other processes, whose view of it (blocking or not) is
    /// left alone where possible.
    ///
    /// # Errors
    /// When the descriptor cannot be looked at or watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = std::fs::File::from(fd);
        let kind = file.metadata()?.file_type();
        let fd = OwnedFd::from(file);
        if kind.is_file() || kind.is_block_device() || kind.is_dir() {
            return Ok(Self {
                fd: Readiness::Always(fd),
                socket: false,
            });
        }
        // A socket is told for each call that it must not wait.
        let fd = if kind.is_socket() { fd } else { not_waiting(fd)? };
        let interest = match fcntl(&fd, FcntlArg::F_GETFL)? & libc::O_ACCMODE {
            libc::O_RDONLY => Interest::READABLE,
            libc::O_WRONLY => Interest::WRITABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        // SAFETY: an OwnedFd names the same open descriptor as long as it lives.
        match unsafe { AsyncFd::register_with_interest(fd, interest) } {
            Ok(fd) => Ok(Self {
                fd: Readiness::Told(fd),
                socket: kind.is_socket(),
            }),
            Err(error) => {
                let (fd, error) = error.into_parts();
                match error.raw_os_error() {
                    // /dev/null, /dev/zero and the like.
                    Some(libc::EPERM) => Ok(Self {
                        fd: Readiness::Always(fd),
                        socket: false,
                    }),
                    _ => Err(error),
                }
            }
        }
    }

    async fn readable(&self) -> io::Result<()> {
        match &self.fd {
            Readiness::Told(fd) => fd.readable().await.map(|mut ready| ready.retain_ready()),
            Readiness::Always(_) => Ok(()),
        }
    }

    /// Reads what is there; `None` when that is nothing. With `look`, also what the kernel has not told of yet.
    fn try_read(&self, buffer: &mut [u8], look: bool) -> io::Result<Option<usize>> {
        let mut read = |fd: &OwnedFd| {
            if self.socket {
                return Ok(recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?);
            }
            Ok(nix::unistd::read(fd, buffer)?)
        };
        loop {
            let result = match &self.fd {
                Readiness::Told(fd) if look => read(fd.get_ref()),
                Readiness::Told(fd) => fd.try_io(Interest::READABLE, &mut read),
                Readiness::Always(fd) => read(fd),
            };
            match result {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // A tty whose other side is closed.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Some(0)),
                Err(error) => return Err(error),
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| {
                if self.socket {
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    return Ok(send(fd.as_raw_fd(), bytes, flags)?);
                }
                Ok(nix::unistd::write(fd, bytes)?)
            };
            let result = match &self.fd {
                Readiness::Told(fd) => fd.async_io(Interest::WRITABLE, write).await,
                Readiness::Always(fd) => write(fd),
            };
            match result {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The same file with a file description of its own that does not wait, so that other users of the file see no
/// change; where there can be none, the descriptor itself, set not to wait.
fn not_waiting(fd: OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) {
        return Ok(fd);
    }
    if !is_pty_master(&fd) {
        let mode = flags.bits() & libc::O_ACCMODE;
        let opened = OpenOptions::new()
            .read(mode != libc::O_WRONLY)
            .write(mode != libc::O_RDONLY)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if let Ok(file) = opened {
            return Ok(file.into());
        }
    }
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(fd)
}

/// A pty's master: opening it by name would make another pty.
fn is_pty_master(fd: &OwnedFd) -> bool {
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes one unsigned int; the descriptor is open.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGPTN, &raw mut number) == 0 }
}

/// Copies a process's input to the guest until its end, or until `close` is true and all that was there before has
/// been sent. The guest then sees the end of its input.
///
/// # Errors
/// When the host's end cannot be read. The guest closing its end is no error.
pub async fn feed(
    source: Handle,
    mut stream: UnixStream,
    mut close: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut closing = false;
    loop {
        if !closing {
            tokio::select! {
                biased;
                ready = source.readable() => ready?,
                // A sender that is gone closes nothing: the task is then ended from outside.
                Ok(_) = close.wait_for(|close| *close) => closing = true,
            }
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            // A stream that never pauses must not keep others from their turn.
            consume_budget().await;
            match source.try_read(&mut chunk, closing)? {
                Some(0) => return ignore_hang_up(stream.shutdown().await),
                Some(length) => {
                    let Some(bytes) = chunk.get(..length) else {
                        return Ok(());
                    };
                    if let Err(error) = stream.write_all(bytes).await {
                        return ignore_hang_up(Err(error));
                    }
                }
                None if closing => return ignore_hang_up(stream.shutdown().await),
                None => break,
            }
        }
    }
}

/// Copies a process's output to the host until its end. When the host's end takes no more, the stream is closed at
/// once, and the writer in the guest learns of it.
///
/// # Errors
/// When the host's end cannot be written, other than for want of a reader.
pub async fn drain(stream: UnixStream, sink: Handle) -> io::Result<()> {
    loop {
        if let Err(error) = stream.readable().await {
            return ignore_hang_up(Err(error));
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            // A stream that never pauses must not keep others from their turn.
            consume_budget().await;
            match stream.try_read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    let Some(bytes) = chunk.get(..length) else {
                        return Ok(());
                    };
                    if let Err(error) = sink.write_all(bytes).await {
                        return ignore_hang_up(Err(error));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return ignore_hang_up(Err(error)),
            }
        }
    }
}

/// The other side going away is how streams end. `EIO`: a tty that is hung up.
fn ignore_hang_up(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if [Errno::EPIPE, Errno::ECONNRESET, Errno::ENOTCONN, Errno::EIO]
                .contains(&Errno::from_raw(error.raw_os_error().unwrap_or(0))) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A pair of connected streams: one end for this process, the other to hand over.
///
/// # Errors
/// When the kernel refuses.
pub fn stream_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (own, theirs) = std::os::unix::net::UnixStream::pair()?;
    own.set_nonblocking(true)?;
    Ok((UnixStream::from_std(own)?, theirs.into()))
}

#[cfg(test)]
#[path = "stdio_test.rs"]
mod tests;
