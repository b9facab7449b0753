//! The vsock channel: how the engine hands streams to the VMM.
//!
//! Each packet is a [`StreamOffer`] of 8 bytes with exactly one descriptor (`SCM_RIGHTS`): a connected unix
//! stream socket. The VMM joins it to a vsock connection of the guest and closes it when that ends; half-closes
//! are carried both ways.

/// The guest's context id.
pub const GUEST_CID: u64 = 3;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// Length of an encoded offer in bytes.
pub const OFFER_LEN: usize = 8;

/// A stream on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamOffer {
    /// For the guest's next connection to this port of the host. Offers of one port are taken in order.
    Listen(u32),
    /// To be connected to this port of the guest now. The stream is closed if the guest refuses.
    Connect(u32),
}

impl StreamOffer {
    /// `op: u32 le` (1 listen, 2 connect), `port: u32 le`.
    pub fn encode(self) -> [u8; OFFER_LEN] {
        let (op, port) = match self {
            Self::Listen(port) => (1u32, port),
            Self::Connect(port) => (2u32, port),
        };
        (u64::from(op) | (u64::from(port) << 32)).to_le_bytes()
    }

    /// The offer in `packet`, or `None` if it is not one.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let word = u64::from_le_bytes(packet.try_into().ok()?);
        let port = (word >> 32) as u32;
        match word as u32 {
            1 => Some(Self::Listen(port)),
            2 => Some(Self::Connect(port)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::StreamOffer;

    #[test]
    fn round_trip_and_layout() {
        for offer in [StreamOffer::Listen(1024), StreamOffer::Connect(u32::MAX)] {
            assert_eq!(StreamOffer::decode(&offer.encode()), Some(offer));
        }
        assert_eq!(
            StreamOffer::Listen(0x0102_0304).encode(),
            [1, 0, 0, 0, 4, 3, 2, 1]
        );
    }

    #[test]
    fn anything_else_is_refused() {
        assert_eq!(StreamOffer::decode(&[]), None);
        assert_eq!(StreamOffer::decode(&[1, 0, 0, 0, 4, 3, 2]), None);
        assert_eq!(StreamOffer::decode(&[3, 0, 0, 0, 4, 3, 2, 1]), None);
        assert_eq!(StreamOffer::decode(&[1, 0, 0, 0, 4, 3, 2, 1, 0]), None);
    }
}
