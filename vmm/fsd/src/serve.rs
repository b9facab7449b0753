//! The server's loop: a request from the channel, its answer back, on a few threads at once.

use crate::credentials;
use crate::fuse::{Args, Body, InHeader, OUT_HEADER_LEN};
use crate::passthrough::{Answer, Passthrough};
use crate::seccomp;
use crate::sys::{self, Errno};
use husk_lockdown::limits;
use husk_lockdown::seccomp::SeccompError;
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, MAX_REQUEST_LEN, ReplyHeader, RequestHeader};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc;

/// Threads that carry requests out, so that one slow request does not hold up the others.
pub const THREADS: usize = 4;

/// Bytes of headers before a reply's body.
pub const REPLY_START: usize = HEADER_LEN + OUT_HEADER_LEN;

/// Why the server could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A thread could not be started.
    #[error("a thread could not be started")]
    Thread(#[source] io::Error),
    /// A thread could not be readied.
    #[error("a thread could not take a working directory of its own")]
    Enter(#[source] Errno),
    /// A thread's system calls could not be limited, or the threads' number.
    #[error("a thread could not be locked in")]
    Limit(#[source] io::Error),
    /// Likewise.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The channel failed.
    #[error("the channel to the VMM failed while {0}")]
    Channel(&'static str, #[source] io::Error),
    /// A thread panicked, which only a bug can bring about.
    #[error("a thread panicked")]
    Panicked,
}

/// Serves `share` on `channel` until its other end is closed.
///
/// Returns when the first thread has seen the end; others may still be at work on a request. The caller is expected
/// to end the process.
///
/// # Errors
/// When threads cannot be had or the channel fails otherwise.
pub fn serve(share: Passthrough, channel: OwnedFd) -> Result<(), ServeError> {
    // Never freed: the process ends with it, and to give so much memory back might take long.
    let (share, channel) = &*Box::leak(Box::new((share, channel)));
    let (ended, end) = mpsc::channel();
    for n in 0..THREADS {
        let ended = ended.clone();
        let name = format!("fs-{n}");
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                // The receiver is gone when another thread has ended before.
                let _ = ended.send(work(&name, share, channel.as_fd()));
            })
            .map_err(ServeError::Thread)?;
    }
    drop(ended);
    limits::limit(libc::RLIMIT_NPROC, 0).map_err(ServeError::Limit)?;
    seccomp::limit_main()?;
    end.recv().unwrap_or(Err(ServeError::Panicked))
}

fn work(name: &str, share: &Passthrough, channel: BorrowedFd<'_>) -> Result<(), ServeError> {
    credentials::enter(share.proc_fds()).map_err(ServeError::Enter)?;
    seccomp::limit_worker(name)?;
    let mut packet = vec![0; HEADER_LEN + MAX_REQUEST_LEN];
    let mut body = Body::new(REPLY_START, HEADER_LEN + MAX_REPLY_LEN);
    loop {
        let len = match receive(channel, &mut packet) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) => return Err(ServeError::Channel("receiving", e)),
        };
        // A longer packet than was received is a broken rule of the VMM's: what is left is answered as malformed.
        let Some((header, request)) = packet
            .get(..len.min(packet.len()))
            .and_then(RequestHeader::decode)
        else {
            return Err(ServeError::Channel(
                "reading a packet too short",
                io::ErrorKind::InvalidData.into(),
            ));
        };
        let attached = answer(share, header, request, &mut body);
        let Some(attached) = attached else { continue };
        let file = match &attached {
            Answer::Opened(file) => Some(file.fd()),
            _ => None,
        };
        let sent = match send(channel, body.packet(), file) {
            // Too many descriptors are under way. Without one the VMM refuses the open and releases it.
            Err(e) if file.is_some() && !is_end(&e) => send(channel, body.packet(), None),
            sent => sent,
        };
        match sent {
            Ok(()) => {}
            Err(e) if is_end(&e) => return Ok(()),
            Err(e) => return Err(ServeError::Channel("sending", e)),
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// Carries out one request and leaves its reply in `body`, behind [`REPLY_START`] bytes; `None` if it has none. The
/// calling thread has [`entered`](crate::credentials::enter).
pub fn answer(share: &Passthrough, header: RequestHeader, request: &[u8], body: &mut Body) -> Option<Answer> {
    body.reset((header.capacity as usize).saturating_sub(OUT_HEADER_LEN));
    let mut args = Args::new(request);
    let (unique, result) = match InHeader::read(&mut args) {
        Ok(head) if head.len as usize == request.len() => {
            let result = share.handle(&head, args, body);
            if Passthrough::is_silent(head.opcode) {
                return None;
            }
            (head.unique, result)
        }
        Ok(head) => (head.unique, Err(Errno(libc::EINVAL))),
        Err(error) => (0, Err(error)),
    };
    let (answer, error) = match result {
        Ok(answer) => (answer, 0),
        Err(error) => {
            body.reset(0);
            (Answer::Body, guest_error(error).wrapping_neg())
        }
    };
    let len = OUT_HEADER_LEN.saturating_add(body.len()) as u32;
    let tag = ReplyHeader { tag: header.tag }.encode();
    let fields = tag
        .into_iter()
        .chain(len.to_le_bytes())
        .chain(error.to_le_bytes())
        .chain(unique.to_le_bytes());
    for (to, from) in body.headers().iter_mut().zip(fields) {
        *to = from;
    }
    Some(answer)
}

/// The error as the guest is to see it. Errors of FUSE are 1 to 511.
fn guest_error(error: Errno) -> i32 {
    match error.0 {
        // That this process has no descriptors left is, to the guest, a want of its file system.
        libc::EMFILE => libc::ENFILE,
        e @ 1..512 => e,
        _ => libc::EIO,
    }
}

fn receive(channel: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        // Descriptors that a packet brings along are not asked for, so the kernel closes them.
        // SAFETY: `into` has room for the length given and lives through the call.
        let n = unsafe { libc::recv(channel.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Room for one descriptor in a control message, aligned as its header wants.
#[repr(C, align(8))]
struct Control([u8; 24]);

fn send(channel: BorrowedFd<'_>, packet: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut data = libc::iovec {
        iov_base: packet.as_ptr().cast_mut().cast(),
        iov_len: packet.len(),
    };
    let mut control = Control([0; 24]);
    // SAFETY: msghdr is plain integers and pointers, for which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    if let Some(file) = file {
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        // SAFETY: `control` has room for one header and one descriptor, which CMSG_* stay within.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            if let Some(header) = header.as_mut() {
                header.cmsg_level = libc::SOL_SOCKET;
                header.cmsg_type = libc::SCM_RIGHTS;
                header.cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) as usize;
                libc::CMSG_DATA(header)
                    .cast::<RawFd>()
                    .write_unaligned(file.as_raw_fd());
            }
        }
    }
    loop {
        // SAFETY: `message` and all that it points to live through the call.
        if unsafe { libc::sendmsg(channel.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes sure that the channel blocks, however its maker left it.
///
/// # Errors
/// When `channel` is not open.
pub fn make_blocking(channel: BorrowedFd<'_>) -> sys::Result<()> {
    // SAFETY: no pointers are involved.
    let flags = unsafe { libc::fcntl(channel.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(Errno::last());
    }
    // SAFETY: no pointers are involved.
    if unsafe { libc::fcntl(channel.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) } < 0 {
        return Err(Errno::last());
    }
    Ok(())
}
