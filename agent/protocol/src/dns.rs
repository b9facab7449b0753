//! DNS messages on a raw stream. The agent sends queries, the host answers each once, in any order; a message of no
//! bytes is the answer when there is none.
//!
//! Before each message is a [`Header`]: the query's number (`u32`, the agent's choice), the message's length (`u16`),
//! how the query was made (`u8`: 0 UDP, 1 TCP), a zero byte; all little-endian.

/// Length of a header, in bytes.
pub const HEADER_LEN: usize = 8;

/// Most queries that wait for an answer; more are answered with none.
pub const MAX_QUERIES: usize = 128;

/// How a query was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// Over a connection.
    Tcp,
}

/// What precedes a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The query.
    pub number: u32,
    /// Length of the message, in bytes.
    pub length: u16,
    /// The query's transport; the answer repeats it.
    pub transport: Transport,
}

impl Header {
    /// As bytes of the stream.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let [a, b, c, d] = self.number.to_le_bytes();
        let [e, f] = self.length.to_le_bytes();
        [a, b, c, d, e, f, self.transport as u8, 0]
    }

    /// The header in `bytes`, if it is one.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Option<Self> {
        let [a, b, c, d, e, f, transport, zero] = bytes;
        let transport = match (transport, zero) {
            (0, 0) => Transport::Udp,
            (1, 0) => Transport::Tcp,
            _ => return None,
        };
        Some(Self {
            number: u32::from_le_bytes([a, b, c, d]),
            length: u16::from_le_bytes([e, f]),
            transport,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_one_form() {
        let header = Header {
            number: 0x0403_0201,
            length: 0x0605,
            transport: Transport::Tcp,
        };
        let bytes = [1, 2, 3, 4, 5, 6, 1, 0];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::decode(bytes), Some(header));
        assert_eq!(Header::decode([1, 2, 3, 4, 5, 6, 2, 0]), None);
        assert_eq!(Header::decode([1, 2, 3, 4, 5, 6, 1, 1]), None);
    }
}
