//! Forking: the child's first steps, and the socket on which it reports to the agent until its exec closes it.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use husk_agent_protocol::limits::MAX_MESSAGE_LEN;
use nix::{
    cmsg_space,
    errno::Errno,
    poll::{PollFd, PollFlags},
    sys::{
        signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
            sendmsg, socketpair,
        },
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use super::oom;
use crate::{fault::Fault, sys};

/// How long a process in between may take, in milliseconds.
const STAGE: u16 = 10_000;

const READY: u8 = b'r';
const TERMINAL: u8 = b't';
const GO: u8 = b'g';

/// Whether this process is a forked child of the agent rather than the agent.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Whether this process is a forked child of the agent: then a panic is not the end of the machine.
pub fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// What the child says.
#[derive(Debug)]
pub enum Report {
    /// The master of its terminal, before it is ready.
    Terminal(OwnedFd),
    /// All is prepared.
    Ready,
    /// It has failed and exits.
    Fault(Fault),
    /// The socket is closed: by the exec, or because the child was killed.
    Closed,
}

/// The agent's end of the socket.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// The child's next report.
    pub async fn report(&self) -> Report {
        let received = self
            .0
            .async_io(Interest::READABLE, |socket| Ok(receive(socket.as_raw_fd())?))
            .await;
        match received {
            Ok(report) => report,
            // It is gone, and had not read all that was sent to it.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Report::Closed,
            Err(error) => Report::Fault(Fault::system("read from the new process", error)),
        }
    }

    /// Lets the child exec. If it is gone already, its next report says so.
    pub fn go(&self) {
        let _ = nix::sys::socket::send(self.0.as_raw_fd(), &[GO], MsgFlags::MSG_NOSIGNAL);
    }
}

fn receive(socket: RawFd) -> Result<Report, Errno> {
    let mut packet = [0u8; MAX_MESSAGE_LEN + 1];
    let mut space = cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut passed = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us.
                passed = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    let count = message.bytes;
    let packet = packet.get(..count).unwrap_or_default();
    Ok(match packet.first() {
        None => Report::Closed,
        Some(&READY) => Report::Ready,
        Some(&TERMINAL) => passed.map_or_else(
            || Report::Fault(Fault::system("new process", Errno::EBADMSG)),
            Report::Terminal,
        ),
        Some(_) => Report::Fault(
            Fault::decode(packet).unwrap_or_else(|| Fault::system("new process", Errno::EBADMSG)),
        ),
    })
}

/// The child's end of the socket.
#[derive(Debug)]
pub struct Reporter(OwnedFd);

impl Reporter {
    /// Passes `master`, the agent's end of the terminal.
    pub fn terminal(&self, master: BorrowedFd<'_>) -> Result<(), Fault> {
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&[TERMINAL])],
            &[ControlMessage::ScmRights(&[master.as_raw_fd()])],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|error| Fault::system("report to the agent", error))?;
        Ok(())
    }

    /// All is prepared. (By write(2), since this process may be under its container's filter, as is [`Self::fault`]. If
    /// the agent is gone, so is everything.)
    pub fn ready(&self) -> Result<(), Fault> {
        nix::unistd::write(&self.0, &[READY]).map_err(|error| Fault::system("report to the agent", error))?;
        Ok(())
    }

    /// Waits until the agent says go. `false`: the agent has given up.
    pub fn wait(&self) -> bool {
        let mut packet = [0u8; 1];
        loop {
            match nix::unistd::read(&self.0, &mut packet) {
                Err(Errno::EINTR) => {}
                result => return result == Ok(1) && packet == [GO],
            }
        }
    }

    fn fault(&self, fault: &Fault) {
        // If the agent does not listen any more, the exit status has to do.
        let _ = nix::unistd::write(&self.0, &fault.encode());
    }
}

/// Forks a child with `flags` (`CLONE_NEW…`) into `cgroup`, in which `child` runs until it execs or answers why it
/// could not. Of the agent's descriptors it has only `keep` (and 0, 1, 2). `oom_score_adj`: `None` is 0. Answers the pid
/// and the socket.
///
/// The caller registers the pid before it yields to the reaper.
pub fn fork(
    flags: u64,
    cgroup: BorrowedFd<'_>,
    keep: &[RawFd],
    oom_score_adj: Option<i32>,
    child: impl FnOnce(&Reporter) -> Fault,
) -> Result<(i32, Channel), Fault> {
    let (channel, theirs) = socket()?;
    match clone(flags, Some(cgroup), oom_score_adj)? {
        Some(pid) => Ok((pid, channel)),
        None => end(Reporter(theirs), |reporter| match first_steps(reporter, keep) {
            Ok(()) => child(reporter),
            Err(fault) => fault,
        }),
    }
}

/// As [`fork`], but by a process in between, which stays in the agent's cgroup: it runs `stage`, and what it has
/// become (ids, namespaces, limits) the child inherits, which gets what `stage` answered. The child is the agent's
/// own all the same.
///
/// The agent waits for the process in between, whose few system calls wait for nobody.
pub fn fork_through<T>(
    stage: impl FnOnce() -> Result<T, Fault>,
    flags: u64,
    cgroup: BorrowedFd<'_>,
    keep: &[RawFd],
    oom_score_adj: Option<i32>,
    child: impl FnOnce(&Reporter, T) -> Fault,
) -> Result<(i32, Channel), Fault> {
    let (channel, theirs) = socket()?;
    let (answer, question) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| Fault::system("pipe", error))?;
    let mut keep = keep.to_vec();
    keep.extend([cgroup.as_raw_fd(), question.as_raw_fd()]);
    let Some(between) = clone(0, None, oom_score_adj)? else {
        end(Reporter(theirs), |reporter| {
            let staged = first_steps(reporter, &keep).and_then(|()| stage());
            let staged = match staged {
                Ok(staged) => staged,
                Err(fault) => return fault,
            };
            // SAFETY: this process has one thread, as the agent has.
            match unsafe { sys::clone3_sibling(flags, cgroup) } {
                Err(error) => Fault::system("fork", error),
                Ok(Some(pid)) => {
                    // If the agent does not read it, it gives up, and the child with it.
                    let _ = nix::unistd::write(&question, &pid.to_ne_bytes());
                    // SAFETY: ends this process without running the exit handlers that belong to the agent.
                    unsafe { libc::_exit(0) }
                }
                Ok(None) => {
                    drop(question);
                    match nix::unistd::setsid() {
                        Ok(_) => child(reporter, staged),
                        Err(error) => Fault::system("setsid", error),
                    }
                }
            }
        })
    };
    drop((theirs, question));
    match read_pid(&answer) {
        Ok(pid) => Ok((pid, channel)),
        // It reports why, or is gone.
        Err(Errno::EPIPE) => Err(
            match wait(channel.0.as_fd()).and_then(|()| receive(channel.0.as_raw_fd())) {
                Ok(Report::Fault(fault)) => fault,
                _ => Fault::system("the process in between ended", Errno::EPIPE),
            },
        ),
        Err(error) => {
            // Not reaped, so the pid is its own still. A child it may have made ends with its channel.
            let _ = sys::kill(between, libc::SIGKILL);
            Err(Fault::system("wait for the process in between", error))
        }
    }
}

/// Forks, with the score that the child shall have.
fn clone(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    oom_score_adj: Option<i32>,
) -> Result<Option<i32>, Fault> {
    let own = oom::lend(oom_score_adj.unwrap_or(0))
        .map_err(|error| Fault::system("set process.oomScoreAdj", error))?;
    // SAFETY: the agent is single-threaded by construction (a current-thread runtime, no blocking tasks).
    let forked = unsafe { sys::clone3(flags, cgroup) };
    if !matches!(forked, Ok(None)) {
        own.restore();
    }
    forked.map_err(|error| Fault::system("fork", error))
}

/// The number that the process in between writes; EPIPE if it ends without.
fn read_pid(answer: &OwnedFd) -> Result<i32, Errno> {
    wait(answer.as_fd())?;
    let mut pid = [0u8; 4];
    match nix::unistd::read(answer, &mut pid)? {
        4 => Ok(i32::from_ne_bytes(pid)),
        _ => Err(Errno::EPIPE),
    }
}

/// Waits until there is something to read, or an end.
fn wait(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut poll = [PollFd::new(fd, PollFlags::POLLIN)];
    loop {
        match nix::poll::poll(&mut poll, STAGE) {
            Ok(0) => return Err(Errno::ETIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The two ends of a child's socket.
fn socket() -> Result<(Channel, OwnedFd), Fault> {
    let failed = |error: Errno| Fault::system("socketpair", error);
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
    .map_err(failed)?;
    // The child waits in read(2).
    nix::fcntl::fcntl(
        theirs.as_fd(),
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
    )
    .map_err(failed)?;
    let channel = sys::watch(ours, Interest::READABLE)
        .map(Channel)
        .map_err(|error| Fault::system("watch a socket", error))?;
    Ok((channel, theirs))
}

/// A forked child's life: `work` until its exec, or else the report of its fault.
fn end(reporter: Reporter, work: impl FnOnce(&Reporter) -> Fault) -> ! {
    FORKED.store(true, Ordering::Relaxed);
    let fault = work(&reporter);
    reporter.fault(&fault);
    // SAFETY: ends this process without running the exit handlers that belong to the agent.
    unsafe { libc::_exit(fault.kind.exit_code()) }
}

fn first_steps(reporter: &Reporter, keep: &[RawFd]) -> Result<(), Fault> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.extend(u32::try_from(reporter.0.as_raw_fd()));
    keep.sort_unstable();
    let failed = |error| Fault::system("close descriptors", error);
    let mut next = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        sys::close_range(next, fd.saturating_sub(1)).map_err(failed)?;
        next = fd.saturating_add(1);
    }
    sys::close_range(next, u32::MAX).map_err(failed)?;

    // The agent ignores SIGPIPE and may block signals; neither is to outlive the exec.
    let failed = |error| Fault::system("reset signals", error);
    // SAFETY: no handler is installed, only the default restored.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(failed)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(failed)?;

    nix::unistd::setsid().map_err(|error| Fault::system("setsid", error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn one_that_is_gone_before_it_read_go_is_gone_and_no_fault() {
        let (channel, theirs) = socket().unwrap();
        channel.go();
        drop(theirs);
        let report = channel.report().await;
        assert!(matches!(report, Report::Closed), "{report:?}");
    }
}
