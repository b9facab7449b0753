//! The fs channel: FUSE requests from the VMM to `husk-fsd`, and its replies.
//!
//! A `SOCK_SEQPACKET` socket. A request is [`RequestHeader`] followed by the FUSE request as the guest wrote it
//! (`fuse_in_header` and its arguments; at most [`MAX_REQUEST_LEN`] in all). A reply is [`ReplyHeader`] followed
//! by the FUSE reply (`fuse_out_header` and its body; at most [`MAX_REPLY_LEN`] in all). Requests may be answered
//! in any order; requests that have no answer in FUSE (FORGET, BATCH_FORGET, INTERRUPT) have none here.
//!
//! File contents do not travel here. A reply to FUSE_OPEN, FUSE_CREATE or FUSE_TMPFILE that is no error has a
//! descriptor attached (`SCM_RIGHTS`, one): the opened regular file behind the reply's `fh`. The VMM then answers
//! the guest's FUSE_READ and FUSE_WRITE of that handle itself, between the file and guest memory, until it sees
//! FUSE_RELEASE (which it also passes on). READ and WRITE never reach the server. If the VMM cannot keep the file,
//! it sends a FUSE_RELEASE (and for a file just looked up a FUSE_FORGET) of its own. All integers are little-endian
//! (x86_64).

/// Largest request packet in bytes: a SETXATTR of 64 KiB and two names, with room to spare.
pub const MAX_REQUEST_LEN: usize = 80 * 1024;

/// Largest reply packet in bytes: a READDIRPLUS of 64 KiB or an xattr of 64 KiB, with room to spare.
pub const MAX_REPLY_LEN: usize = 80 * 1024;

/// Most bytes of one FUSE_READ or FUSE_WRITE (`max_write`, and `max_pages` of FUSE_INIT): 1 MiB.
pub const MAX_DATA_LEN: usize = 1 << 20;

/// Precedes every request: `tag: u32`, `capacity: u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Chosen by the VMM, unique among the requests under way; the reply bears it.
    pub tag: u32,
    /// Most bytes that the FUSE reply (header included) may have: what the guest has room for.
    pub capacity: u32,
}

/// Precedes every reply: `tag: u32`, `reserved: u32` (0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// The request's.
    pub tag: u32,
}

/// Length of either header in bytes.
pub const HEADER_LEN: usize = 8;

impl RequestHeader {
    /// As it travels.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        (u64::from(self.tag) | (u64::from(self.capacity) << 32)).to_le_bytes()
    }

    /// Splits a packet into header and FUSE request; `None` if it is too short.
    pub fn decode(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = packet.split_first_chunk::<HEADER_LEN>()?;
        let word = u64::from_le_bytes(*header);
        Some((
            Self {
                tag: word as u32,
                capacity: (word >> 32) as u32,
            },
            rest,
        ))
    }
}

impl ReplyHeader {
    /// As it travels.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        u64::from(self.tag).to_le_bytes()
    }

    /// Splits a packet into header and FUSE reply; `None` if it is too short.
    pub fn decode(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = packet.split_first_chunk::<HEADER_LEN>()?;
        Some((
            Self {
                tag: u64::from_le_bytes(*header) as u32,
            },
            rest,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::{ReplyHeader, RequestHeader};

    #[test]
    fn headers_round_trip() {
        let request = RequestHeader {
            tag: 7,
            capacity: 4096,
        };
        let mut packet = request.encode().to_vec();
        packet.extend(b"fuse");
        assert_eq!(
            RequestHeader::decode(&packet),
            Some((request, b"fuse".as_slice()))
        );
        let reply = ReplyHeader { tag: u32::MAX };
        assert_eq!(
            ReplyHeader::decode(&reply.encode()),
            Some((reply, b"".as_slice()))
        );
    }

    #[test]
    fn short_packets_are_refused() {
        assert_eq!(RequestHeader::decode(b"1234567"), None);
        assert_eq!(ReplyHeader::decode(b""), None);
    }
}
