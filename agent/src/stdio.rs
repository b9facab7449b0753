//! A process's standard streams: pipes (or a pty), each copied to or from a raw stream of its own to the host.
//!
//! Every copy ends by itself: an output at its EOF, which is when the last holder of the pipe has closed it and has
//! nothing to do with the exit of the process; an input at the host's EOF or when nobody can read the pipe any
//! more. Nothing is buffered beyond one chunk a stream: whoever writes too fast waits.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use husk_agent_protocol::messages;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat::Mode,
    unistd::pipe2,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    dial::{Dial, Stream},
    fault::Fault,
    log, sys,
};

/// A chunk begins small, since most processes say little, and grows while it is filled.
const FIRST_CHUNK: usize = 4 << 10;
const LARGEST_CHUNK: usize = 64 << 10;

/// What becomes descriptors 0, 1 and 2 of the process.
#[derive(Debug)]
pub enum ProcessEnd {
    /// A pty, which the process opens itself, from its container's devpts.
    Terminal,
    /// These, in order.
    Files([OwnedFd; 3]),
}

/// The agent's ends of the pipes; all `None` with a terminal.
#[derive(Debug, Default)]
pub struct AgentEnd {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The streams to the host.
#[derive(Debug)]
pub struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// Makes the pipes for a process without a terminal. They belong to `uid`, so that `/dev/stdout` can be opened.
///
/// # Errors
///
/// Out of descriptors, or `/dev/null` is missing.
pub fn pipes(ports: &messages::Stdio, uid: u32) -> Result<(ProcessEnd, AgentEnd), Fault> {
    let null = || {
        open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|error| Fault::system("open /dev/null", error))
    };
    let pipe = || -> Result<(OwnedFd, OwnedFd), Fault> {
        let ends = pipe2(OFlag::O_CLOEXEC).map_err(|error| Fault::system("pipe", error))?;
        nix::unistd::fchown(&ends.0, Some(uid.into()), None)
            .map_err(|error| Fault::system("chown of a pipe", error))?;
        Ok(ends)
    };
    let mut agent = AgentEnd::default();
    let stdin = if ports.stdin_port == 0 {
        null()?
    } else {
        let (read, write) = pipe()?;
        agent.stdin = Some(write);
        read
    };
    let output = |port: u32, end: &mut Option<OwnedFd>| {
        if port == 0 {
            return null();
        }
        let (read, write) = pipe()?;
        *end = Some(read);
        Ok(write)
    };
    let stdout = output(ports.stdout_port, &mut agent.stdout)?;
    let stderr = output(ports.stderr_port, &mut agent.stderr)?;
    Ok((ProcessEnd::Files([stdin, stdout, stderr]), agent))
}

/// Connects the streams that `ports` names.
///
/// # Errors
///
/// The host does not listen on one of them.
pub async fn connect(dial: &Dial, ports: &messages::Stdio) -> Result<Streams, Fault> {
    let connect = |name: &'static str, port: u32| async move {
        if port == 0 {
            return Ok(None);
        }
        let stream = dial.connect(port).await;
        stream
            .map(Some)
            .map_err(|error| Fault::system(format_args!("connect {name} to port {port}"), error))
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect("stdin", ports.stdin_port),
        connect("stdout", ports.stdout_port),
        connect("stderr", ports.stderr_port)
    )?;
    Ok(Streams {
        stdin,
        stdout,
        stderr,
    })
}

/// A descriptor that the agent waits on.
///
/// # Errors
///
/// Out of memory, or a kind of file that cannot be waited on.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL)?;
    fcntl(
        fd.as_fd(),
        FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK),
    )?;
    sys::watch(fd, interest)
}

/// Copies between the pipes and the streams, each on its own, until each ends.
///
/// # Errors
///
/// As [`watch`].
pub fn copy_pipes(pipes: AgentEnd, streams: Streams) -> io::Result<()> {
    if let (Some(pipe), Some(stream)) = (pipes.stdin, streams.stdin) {
        let pipe = watch(pipe, Interest::WRITABLE | Interest::ERROR)?;
        tokio::spawn(async move {
            tokio::select! {
                end = copy(stream.socket(), &pipe) => end.log("stdin"),
                // No process reads it any more: free the pipe and tell the host, even if the host says nothing.
                _ = pipe.ready(Interest::ERROR) => {}
            }
        });
    }
    for (name, pipe, stream) in [
        ("stdout", pipes.stdout, streams.stdout),
        ("stderr", pipes.stderr, streams.stderr),
    ] {
        if let (Some(pipe), Some(stream)) = (pipe, stream) {
            let pipe = watch(pipe, Interest::READABLE)?;
            tokio::spawn(async move {
                copy(&pipe, stream.socket()).await.log(name);
                stream.finish();
            });
        }
    }
    Ok(())
}

/// Copies between a pty's master and the streams until the last process has closed the pty.
pub fn copy_terminal(master: Arc<AsyncFd<OwnedFd>>, streams: Streams) {
    tokio::spawn(async move {
        let input = async {
            if let Some(stream) = &streams.stdin {
                copy(stream.socket(), &master).await.log("terminal input");
            }
            // A host that types nothing more still wants to see the output.
            std::future::pending::<()>().await;
        };
        let output = async {
            match &streams.stdout {
                Some(stream) => {
                    copy(&master, stream.socket()).await.log("terminal output");
                    stream.finish();
                }
                None => discard(&master).await,
            }
        };
        tokio::select! {
            () = input => {}
            () = output => {}
        }
    });
}

enum End {
    Eof,
    ReadFailed(io::Error),
    WriteFailed(io::Error),
}

impl End {
    fn log(self, name: &str) {
        match self {
            Self::Eof => {}
            Self::ReadFailed(error) => log::warning!("{name}: read: {error}"),
            // The reader went away: the writer learns it by SIGPIPE, and nobody else needs to.
            Self::WriteFailed(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Self::WriteFailed(error) => log::warning!("{name}: write: {error}"),
        }
    }
}

async fn read(from: &AsyncFd<OwnedFd>, chunk: &mut [u8]) -> io::Result<usize> {
    from.async_io(Interest::READABLE, |fd| {
        loop {
            match nix::unistd::read(fd, &mut *chunk) {
                Err(Errno::EINTR) => {}
                // A pty whose last slave was closed.
                Err(Errno::EIO) => return Ok(0),
                result => return Ok(result?),
            }
        }
    })
    .await
}

async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> End {
    let mut chunk = vec![0u8; FIRST_CHUNK];
    loop {
        let count = match read(from, &mut chunk).await {
            Ok(0) => return End::Eof,
            Ok(count) => count,
            Err(error) => return End::ReadFailed(error),
        };
        let mut rest = chunk.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            let written = to.async_io(Interest::WRITABLE, |fd| {
                loop {
                    match nix::unistd::write(fd, rest) {
                        Err(Errno::EINTR) => {}
                        result => return Ok(result?),
                    }
                }
            });
            match written.await {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) => return End::WriteFailed(error),
            }
        }
        if count == chunk.len() && count < LARGEST_CHUNK {
            chunk.resize(count.saturating_mul(4).min(LARGEST_CHUNK), 0);
        }
    }
}

async fn discard(from: &AsyncFd<OwnedFd>) {
    let mut chunk = vec![0u8; FIRST_CHUNK];
    while let Ok(count) = read(from, &mut chunk).await {
        if count == 0 {
            return;
        }
    }
}
