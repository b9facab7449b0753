//! Connections to the host: the agent always dials, the host never does.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, unix::AsyncFd},
    sync::Notify,
};

use crate::secret::Secret;

/// How long the kernel waits for the host's answer to a connection, in seconds. Its own two are too few where the whole
/// machine is emulated.
const ANSWER: libc::time_t = 30;

/// Context id of the host on vsock.
const HOST_CID: u32 = 2;

/// How the host is reached. Cheap to clone: all clones have one secret.
#[derive(Clone, Debug)]
pub struct Dial {
    ports: Ports,
    secret: Arc<OnceLock<Secret>>,
}

/// Where the host's ports are.
#[derive(Clone, Debug)]
enum Ports {
    /// On virtio-vsock.
    Vsock,
    /// Port N is the unix socket `N` in this directory: the agent without a VM.
    Unix(PathBuf),
}

impl Dial {
    /// By virtio-vsock.
    pub fn vsock() -> Self {
        Self::by(Ports::Vsock)
    }

    /// Port N is the unix socket `N` in `directory`: the agent without a VM.
    pub fn unix(directory: PathBuf) -> Self {
        Self::by(Ports::Unix(directory))
    }

    fn by(ports: Ports) -> Self {
        Self {
            ports,
            secret: Arc::default(),
        }
    }

    /// From now on streams begin with `secret`, which is wiped where it was.
    ///
    /// # Errors
    ///
    /// It has a wrong length, or there is one already.
    pub fn keep_secret(&self, secret: &mut [u8]) -> io::Result<()> {
        let secret = Secret::keep(secret)?;
        let kept = self.secret.set(secret);
        kept.map_err(|_| io::ErrorKind::AlreadyExists.into())
    }

    /// Connects a stream to `port` of the host, and proves to it whose it is.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub async fn connect(&self, port: u32) -> io::Result<Stream> {
        let mut stream = self.call(port).await?;
        if let Some(secret) = self.secret.get() {
            stream.write_all(secret.bytes()).await?;
        }
        Ok(stream)
    }

    /// Connects to `port` of the host.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or the transport is down.
    pub async fn call(&self, port: u32) -> io::Result<Stream> {
        match &self.ports {
            Ports::Vsock => {
                // SAFETY: integers only.
                let fd = unsafe {
                    libc::socket(
                        libc::AF_VSOCK,
                        libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                        0,
                    )
                };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: socket(2) has just made this descriptor for us.
                let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                set_answer_timeout(&socket)?;
                // SAFETY: all-zero is a valid sockaddr_vm.
                let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
                address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
                address.svm_cid = HOST_CID;
                address.svm_port = port;
                // SAFETY: address is a valid sockaddr_vm of the size given.
                let result = unsafe {
                    libc::connect(
                        socket.as_raw_fd(),
                        (&raw const address).cast(),
                        size_of::<libc::sockaddr_vm>() as libc::socklen_t,
                    )
                };
                if result < 0 {
                    let error = io::Error::last_os_error();
                    if error.raw_os_error() != Some(libc::EINPROGRESS) {
                        return Err(error);
                    }
                }
                // Registered only now: epoll reports a socket that has not begun to connect as writable.
                let stream = Stream::new(socket)?;
                stream.connected().await?;
                Ok(stream)
            }
            Ports::Unix(directory) => {
                let stream = std::os::unix::net::UnixStream::connect(directory.join(port.to_string()))?;
                stream.set_nonblocking(true)?;
                Stream::new(stream.into())
            }
        }
    }
}

fn set_answer_timeout(socket: &OwnedFd) -> io::Result<()> {
    /// Of linux/vm_sockets.h; its argument is a timeval.
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let timeout = libc::timeval {
        tv_sec: ANSWER,
        tv_usec: 0,
    };
    // SAFETY: the option reads one timeval of the size given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A connected stream socket to the host.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<OwnedFd>,
    ended: Option<Arc<Notify>>,
}

impl Stream {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = crate::sys::watch(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket, ended: None })
    }

    async fn connected(&self) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::SocketError)
                    .map_err(io::Error::from)
                    .and_then(|error| {
                        if error == 0 {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(error))
                        }
                    })
            })
            .await
    }

    /// Has `ended` notified when the stream reads its end or fails, or is dropped.
    pub fn notify_end(mut self, ended: Arc<Notify>) -> Self {
        self.ended = Some(ended);
        self
    }

    /// The socket, for those who copy between descriptors.
    pub fn socket(&self) -> &AsyncFd<OwnedFd> {
        &self.socket
    }

    /// Tells the host that nothing more follows.
    pub fn finish(&self) {
        // It may have gone already; then it knows.
        let _ = nix::sys::socket::shutdown(
            self.socket.get_ref().as_raw_fd(),
            nix::sys::socket::Shutdown::Write,
        );
    }

    fn end(&self) {
        if let Some(ended) = &self.ended {
            ended.notify_one();
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.end();
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|socket| Ok(nix::unistd::read(socket.get_ref(), unfilled)?)) {
                Ok(Ok(count)) => {
                    if count == 0 {
                        self.end();
                    }
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.end();
                    return Poll::Ready(Err(error));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(context))?;
            match guard.try_io(|socket| Ok(nix::unistd::write(socket.get_ref(), buffer)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use husk_agent_protocol::limits::SECRET_LEN;

    use super::*;

    #[tokio::test]
    async fn streams_begin_with_the_secret_and_the_agents_call_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let host = std::os::unix::net::UnixListener::bind(dir.path().join("7")).unwrap();
        let dial = Dial::unix(dir.path().to_owned());
        let heard = || {
            let mut heard = Vec::new();
            host.accept().unwrap().0.read_to_end(&mut heard).unwrap();
            heard
        };
        drop(dial.connect(7).await.unwrap());
        assert_eq!(heard(), b"", "there is none yet");
        let mut secret = [3; SECRET_LEN];
        // The clone that the sandbox has is told, and all have it.
        dial.clone().keep_secret(&mut secret).unwrap();
        assert_eq!(secret, [0; SECRET_LEN]);
        drop(dial.connect(7).await.unwrap());
        assert_eq!(heard(), [3; SECRET_LEN]);
        drop(dial.call(7).await.unwrap());
        assert_eq!(heard(), b"");
        assert!(dial.keep_secret(&mut [4; SECRET_LEN]).is_err(), "there is one");
        assert!(Dial::vsock().keep_secret(&mut [4; 3]).is_err());
    }
}
