//! The VMM's end of the fs channel: packets out and in, without waiting.

use super::wire::IN_HEADER_LEN;
use crate::virtio::buffers::retry;
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, RequestHeader};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A request of the VMM's own, to take back what the server did for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    bytes: [u8; Self::MAX_LEN],
    len: usize,
}

impl Request {
    const MAX_LEN: usize = IN_HEADER_LEN + 3 * 8;

    /// One of `opcode` about `node`, with up to three arguments. It names no user: the server asks for none here.
    pub fn new(opcode: u32, node: u64, arguments: &[u64]) -> Self {
        let len = IN_HEADER_LEN
            .saturating_add(arguments.len().saturating_mul(8))
            .min(Self::MAX_LEN);
        let mut bytes = [0; Self::MAX_LEN];
        let fields = (len as u32)
            .to_le_bytes()
            .into_iter()
            .chain(opcode.to_le_bytes())
            .chain(0u64.to_le_bytes())
            .chain(node.to_le_bytes())
            .chain([0; 16])
            .chain(arguments.iter().flat_map(|a| a.to_le_bytes()));
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        Self { bytes, len }
    }

    /// As it travels; its reply, if it gets one, bears `tag`.
    pub fn packet(&self, tag: u32) -> Vec<u8> {
        let header = RequestHeader {
            tag,
            capacity: MAX_REPLY_LEN as u32,
        }
        .encode();
        header
            .iter()
            .chain(self.bytes.iter().take(self.len))
            .copied()
            .collect()
    }
}

/// The way to the server. Outlives the workers that use it.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    last_tag: u32,
}

/// A packet from the server.
#[derive(Debug)]
pub struct Received {
    /// Its length in bytes.
    pub len: usize,
    /// The descriptor that came along.
    pub file: Option<OwnedFd>,
}

/// What receiving came to.
#[derive(Debug)]
pub enum Receive {
    /// A packet.
    Packet(Received),
    /// Nothing is there.
    Empty,
    /// The server is gone.
    End,
}

/// Length of a buffer that takes any reply.
pub const REPLY_BUFFER_LEN: usize = HEADER_LEN + MAX_REPLY_LEN;

/// Room for one descriptor in a control message, aligned as its header wants.
#[repr(C, align(8))]
struct Control([u8; 24]);

impl Channel {
    /// The VMM's end of a channel.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, last_tag: 0 }
    }

    /// The descriptor to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// A tag that no request of late has had.
    pub fn next_tag(&mut self) -> u32 {
        self.last_tag = self.last_tag.wrapping_add(1);
        self.last_tag
    }

    /// Sends a packet; `false` if there is no room for it now.
    ///
    /// # Errors
    /// When the server is gone or the channel is broken.
    pub fn send(&self, packet: &[u8]) -> io::Result<bool> {
        // SAFETY: `packet` has the length given and lives through the call.
        let sent = retry(|| unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        });
        match sent {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Receives a packet into `into`. A packet longer than that has its full length told.
    ///
    /// # Errors
    /// When the channel is broken.
    pub fn receive(&self, into: &mut [u8]) -> io::Result<Receive> {
        let mut data = libc::iovec {
            iov_base: into.as_mut_ptr().cast(),
            iov_len: into.len(),
        };
        let mut control = Control([0; 24]);
        // SAFETY: all fields of msghdr are plain numbers and pointers, for which zero is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
        // SAFETY: `message` and all that it points to live through the call.
        let len = retry(|| unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, flags) });
        match len {
            // A packet of no bytes is not one of the protocol's, so this is the end.
            Ok(0) => Ok(Receive::End),
            Ok(len) => Ok(Receive::Packet(Received {
                len,
                file: attached(&message),
            })),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Receive::Empty),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(Receive::End),
            Err(e) => Err(e),
        }
    }
}

/// The descriptor in a received message. The control buffer has room for one, so there are never two to lose (the
/// kernel drops what does not fit).
fn attached(message: &libc::msghdr) -> Option<OwnedFd> {
    // SAFETY: the kernel has filled in the message's control buffer, whose length CMSG_FIRSTHDR respects.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    // SAFETY: no pointers are involved.
    let len = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) } as usize;
    if header.cmsg_level != libc::SOL_SOCKET || header.cmsg_type != libc::SCM_RIGHTS || header.cmsg_len < len
    {
        return None;
    }
    // SAFETY: the header says that a descriptor follows, which the kernel has just made for this process.
    unsafe {
        Some(OwnedFd::from_raw_fd(
            libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned(),
        ))
    }
}
