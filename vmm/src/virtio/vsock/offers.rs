//! The streams that the engine hands over (see [`husk_vmm_protocol::vsock`]), and those that wait for the guest.

use crate::virtio::buffers::retry;
use crate::warning;
use husk_vmm_protocol::vsock::{OFFER_LEN, StreamOffer};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most streams that wait for a connection of the guest.
pub const MAX_WAITING: usize = 4096;

/// Room for control messages, in units that align them: one of up to 8 descriptors. The kernel closes those for
/// which there is no room, and says so.
const CONTROL_WORDS: usize = 6;

/// The channel of offers, and the streams that the guest has yet to connect to.
#[derive(Debug)]
pub struct Offers {
    channel: OwnedFd,
    open: bool,
    waiting: BTreeMap<u32, VecDeque<OwnedFd>>,
    count: usize,
}

/// A stream that is to be connected to a port of the guest.
#[derive(Debug)]
pub struct ConnectOffer {
    /// The guest's port.
    pub port: u32,
    /// The stream.
    pub stream: OwnedFd,
}

/// What one packet of the channel was.
enum Packet {
    Offer(StreamOffer, OwnedFd),
    Refused(&'static str),
    End,
}

impl Offers {
    /// Takes offers from `channel`, a `SOCK_SEQPACKET` socket.
    pub fn new(channel: OwnedFd) -> Self {
        Self {
            channel,
            open: true,
            waiting: BTreeMap::new(),
            count: 0,
        }
    }

    /// The channel.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether the engine can still send offers.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Takes packets from the channel until there is none. LISTEN offers are kept for
    /// [`take`](Self::take); the next CONNECT offer is returned. `None`: no more packets now.
    pub fn next_connect(&mut self) -> Option<ConnectOffer> {
        while self.open {
            match receive(self.channel.as_fd()) {
                Ok(Packet::Offer(StreamOffer::Connect(port), stream)) => {
                    return Some(ConnectOffer { port, stream });
                }
                Ok(Packet::Offer(StreamOffer::Listen(port), stream)) => self.keep(port, stream),
                Ok(Packet::Refused(why)) => warning!("vsock: an offer was refused: {why}"),
                Ok(Packet::End) => self.open = false,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(e) => {
                    warning!("vsock: the channel of offers failed: {e}");
                    self.open = false;
                }
            }
        }
        None
    }

    fn keep(&mut self, port: u32, stream: OwnedFd) {
        if self.count >= MAX_WAITING {
            self.drop_abandoned();
        }
        if self.count >= MAX_WAITING {
            warning!(
                "vsock: {MAX_WAITING} streams wait for the guest already; one for port {port} was closed"
            );
            return;
        }
        self.waiting.entry(port).or_default().push_back(stream);
        self.count = self.count.saturating_add(1);
    }

    /// The oldest stream that waits for a connection to `port`.
    pub fn take(&mut self, port: u32) -> Option<OwnedFd> {
        let queue = self.waiting.get_mut(&port)?;
        let stream = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&port);
        }
        if stream.is_some() {
            self.count = self.count.saturating_sub(1);
        }
        stream
    }

    /// Number of streams that wait.
    pub fn waiting(&self) -> usize {
        self.count
    }

    /// Closes the streams whose other end is closed. Only when space is short: such a stream may still hold what
    /// the guest is to read.
    fn drop_abandoned(&mut self) {
        for queue in self.waiting.values_mut() {
            queue.retain(|stream| !is_hung_up(stream.as_fd()));
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
        self.count = self.waiting.values().map(VecDeque::len).sum();
    }
}

/// Whether neither end of a stream can send any more: the other end is closed, or both are shut down.
pub fn is_hung_up(stream: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one entry, alive through the call, which does not wait.
    let ready = retry(|| unsafe { libc::poll(&raw mut poll, 1, 0) } as isize);
    matches!(ready, Ok(n) if n > 0) && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

fn receive(channel: BorrowedFd<'_>) -> io::Result<Packet> {
    // One byte more than an offer has, so that a longer packet is known as such.
    let mut packet = [0u8; OFFER_LEN + 1];
    let mut control = [0u64; CONTROL_WORDS];
    let mut vector = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: all fields of msghdr are plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message describes `packet` and `control`, which live through the call.
    let length = retry(|| unsafe {
        libc::recvmsg(
            channel.as_raw_fd(),
            &raw mut message,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
        )
    })?;
    let mut streams = descriptors(&message);
    if length == 0 && streams.is_empty() {
        return Ok(Packet::End);
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Ok(Packet::Refused(
            "it came with too many descriptors, or this process has no more left",
        ));
    }
    let Some(offer) = packet.get(..length).and_then(StreamOffer::decode) else {
        return Ok(Packet::Refused("it is not of the form that was agreed on"));
    };
    match (streams.pop(), streams.is_empty()) {
        (Some(stream), true) if is_unix_stream(stream.as_fd()) => Ok(Packet::Offer(offer, stream)),
        (Some(_), true) => Ok(Packet::Refused("its descriptor is not a unix stream socket")),
        _ => Ok(Packet::Refused("it has not exactly one descriptor")),
    }
}

/// Takes hold of all descriptors that came with a message, so that those not wanted get closed.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel wrote well-formed control messages to msg_control and their length to msg_controllen;
    // the CMSG macros stay within them.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !entry.is_null() {
        // SAFETY: not null, so a whole header within the control buffer, which is aligned for it.
        let header = unsafe { &*entry };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN only computes, and CMSG_DATA points just after the header.
            let (head, data) = unsafe { (libc::CMSG_LEN(0) as usize, libc::CMSG_DATA(entry)) };
            let count = header.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: the kernel wrote `count` descriptors here, each new and ours alone.
                found.push(unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(i).read_unaligned()) });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        entry = unsafe { libc::CMSG_NXTHDR(message, entry) };
    }
    found
}

fn is_unix_stream(fd: BorrowedFd<'_>) -> bool {
    let option = |name| {
        let mut value: libc::c_int = 0;
        let mut length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: `value` has the room that `length` tells of.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        (result == 0).then_some(value)
    };
    option(libc::SO_DOMAIN) == Some(libc::AF_UNIX) && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM)
}
