//! The packets: one byte that tells the kind, and up to two little-endian 32-bit numbers.

use std::ops::Deref;

/// Longest packet, in bytes.
pub const MAX_LEN: usize = 9;

/// A packet, made without memory from the heap: a stand-in cannot ask for more.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    bytes: [u8; MAX_LEN],
    length: usize,
}

impl Deref for Packet {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&self.bytes)
    }
}

/// What the engine says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// First of all: join the namespaces of the descriptors, make those of these `CLONE_NEW…` flags, and stand.
    Stand {
        /// Flags for unshare(2).
        unshare: i32,
    },
    /// The container has ended with this exit code: end with it too.
    Exit(i32),
    /// The container was killed by this signal: die of it too.
    Die(i32),
}

/// What the stand-in says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It stands.
    Ready,
    /// It cannot; it ends.
    Failed {
        /// What it was doing.
        step: Step,
        /// The system's error number.
        errno: i32,
    },
    /// It was sent this signal.
    Signal(i32),
}

/// A step to where the stand-in stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Joining the namespace of the descriptor of this index.
    Join(u8),
    /// Making namespaces.
    Unshare,
    /// Taking charge of its signals.
    Signals,
    /// Giving up its rights.
    Lockdown,
}

impl Order {
    /// As a packet.
    pub fn encode(self) -> Packet {
        match self {
            Self::Stand { unshare } => packet(b's', &[unshare]),
            Self::Exit(code) => packet(b'x', &[code]),
            Self::Die(signal) => packet(b'd', &[signal]),
        }
    }

    /// From a packet; `None` if it is not one.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let (kind, number) = packet.split_first()?;
        let number = i32::from_le_bytes(number.try_into().ok()?);
        match kind {
            b's' => Some(Self::Stand { unshare: number }),
            b'x' => Some(Self::Exit(number)),
            b'd' => Some(Self::Die(number)),
            _ => None,
        }
    }
}

impl Word {
    /// As a packet.
    pub fn encode(self) -> Packet {
        match self {
            Self::Ready => packet(b'r', &[]),
            Self::Failed { step, errno } => packet(b'f', &[step.number(), errno]),
            Self::Signal(signal) => packet(b'i', &[signal]),
        }
    }

    /// From a packet; `None` if it is not one.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let (kind, numbers) = packet.split_first()?;
        let mut numbers = numbers
            .chunks(4)
            .map(|bytes| bytes.try_into().ok().map(i32::from_le_bytes));
        let word = match kind {
            b'r' => Self::Ready,
            b'f' => Self::Failed {
                step: Step::of(numbers.next()??)?,
                errno: numbers.next()??,
            },
            b'i' => Self::Signal(numbers.next()??),
            _ => return None,
        };
        numbers.next().is_none().then_some(word)
    }
}

impl Step {
    fn number(self) -> i32 {
        match self {
            Self::Join(index) => index.into(),
            Self::Unshare => 256,
            Self::Signals => 257,
            Self::Lockdown => 258,
        }
    }

    fn of(number: i32) -> Option<Self> {
        Some(match number {
            256 => Self::Unshare,
            257 => Self::Signals,
            258 => Self::Lockdown,
            index => Self::Join(u8::try_from(index).ok()?),
        })
    }
}

fn packet(kind: u8, numbers: &[i32]) -> Packet {
    let mut packet = Packet {
        bytes: [0; MAX_LEN],
        length: 1 + 4 * numbers.len(),
    };
    let bytes = [kind]
        .into_iter()
        .chain(numbers.iter().flat_map(|number| number.to_le_bytes()));
    for (to, from) in packet.bytes.iter_mut().zip(bytes) {
        *to = from;
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for order in [
            Order::Stand { unshare: 1 << 30 },
            Order::Exit(255),
            Order::Die(15),
        ] {
            assert_eq!(Order::decode(&order.encode()), Some(order));
            assert!(order.encode().len() <= MAX_LEN);
        }
        let failed = |step| Word::Failed { step, errno: 22 };
        for word in [
            Word::Ready,
            Word::Signal(64),
            failed(Step::Join(3)),
            failed(Step::Unshare),
            failed(Step::Signals),
            failed(Step::Lockdown),
        ] {
            assert_eq!(Word::decode(&word.encode()), Some(word));
            assert!(word.encode().len() <= MAX_LEN);
        }
    }

    #[test]
    fn what_is_no_packet_is_none() {
        for bytes in [&b""[..], b"x", b"x123", b"x12345", b"q1234"] {
            assert_eq!(Order::decode(bytes), None, "{bytes:?}");
        }
        for bytes in [&b""[..], b"r1", b"i", b"i123", b"i12345678", b"f1234", b"q"] {
            assert_eq!(Word::decode(bytes), None, "{bytes:?}");
        }
    }
}
