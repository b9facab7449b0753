//! The socket device, with an engine behind it that offers streams and uses them.

use super::drive;
use crate::descriptors::send;
use crate::driver::Host;
use crate::input::Input;
use husk_vmm::virtio::vsock::Vsock;
use husk_vmm::worker::inline;
use husk_vmm_protocol::vsock::{GUEST_CID, HOST_CID, StreamOffer};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

const HEADER_LEN: usize = 44;

/// Most streams that the engine has at once.
const MAX_STREAMS: usize = 64;

/// Ports of the host's: the agent's, one for streams, and the first of those of connections to the guest.
const HOST_PORTS: [u32; 5] = [1024, 0x1_0000, 1 << 30, (1 << 30) + 1, (1 << 30) + 2];

struct Engine {
    /// The guest's context id.
    guest: u64,
    offers: Option<OwnedFd>,
    streams: Vec<UnixStream>,
}

impl Host for Engine {
    fn request(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        if queue != 1 {
            // Room, and nothing to say.
            return if input.u8() == 0 { vec![0] } else { vec![] };
        }
        let how = input.u8();
        let op = u16::from(input.u8() % 9);
        let port = |input: &mut Input<'_>, known: &[u32]| match input.u8() {
            raw @ 0xf0.. => u32::from(raw) << 24 | u32::from(input.u16()),
            choice => known[usize::from(choice) % known.len()],
        };
        let guest_port = port(input, &[1000, 1001, 1002, 7]);
        let host_port = port(input, &HOST_PORTS);
        let flags = if op == 4 { u32::from(input.u8() % 4) } else { 0 };
        let space = match input.u8() {
            0 => 0,
            1 => u32::MAX,
            2 => input.u32(),
            pages => u32::from(pages) << 8,
        };
        let forwarded = match input.u8() {
            0xff => input.u32(),
            count => u32::from(count) * 16,
        };
        let mut data = match (op, how & 3) {
            (5, 0) => vec![0x77; usize::from(input.u8()) * 0x80],
            (5, _) => input.text(512).to_vec(),
            _ => vec![],
        };
        let length = if how & 0x80 == 0 {
            data.len() as u32
        } else {
            input.number() as u32
        };
        let (from, to, kind) = match how & 0x7c {
            0x04 => (input.number(), HOST_CID, 1),
            0x08 => (self.guest, input.number(), 1),
            0x0c => (self.guest, HOST_CID, input.u16()),
            _ => (self.guest, HOST_CID, 1),
        };
        let mut packet = vec![];
        packet.extend(from.to_le_bytes());
        packet.extend(to.to_le_bytes());
        packet.extend(guest_port.to_le_bytes());
        packet.extend(host_port.to_le_bytes());
        packet.extend(length.to_le_bytes());
        packet.extend(kind.to_le_bytes());
        packet.extend(op.to_le_bytes());
        packet.extend(flags.to_le_bytes());
        packet.extend(space.to_le_bytes());
        packet.extend(forwarded.to_le_bytes());
        packet.append(&mut data);
        if how & 0x7c == 0x10 {
            packet.truncate(usize::from(input.u8()));
        }
        packet
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        match what & 7 {
            0 | 1 if self.streams.len() < MAX_STREAMS => {
                let Ok((own, given)) = UnixStream::pair() else {
                    return;
                };
                own.set_nonblocking(true).expect("a socket can");
                given.set_nonblocking(what & 0x80 == 0).expect("a socket can");
                let offer = if what & 1 == 0 {
                    StreamOffer::Listen(input.one_of(&[1024, 0x1_0000]))
                } else {
                    StreamOffer::Connect(input.one_of(&[1000, 1001, 1002, u32::MAX]))
                };
                if let Some(offers) = &self.offers {
                    send(offers, &offer.encode(), &[given.as_fd()]);
                }
                self.streams.push(own);
            }
            2 | 3 => {
                let count = usize::from(input.u8()) * 0x40;
                if let Some(mut stream) = self.stream(input) {
                    let _ = stream.write(&vec![0x55; count]);
                }
            }
            4 => {
                let count = usize::from(input.u8()) * 0x100;
                if let Some(mut stream) = self.stream(input) {
                    let _ = stream.read(&mut vec![0; count]);
                }
            }
            5 => {
                if let Some(stream) = self.stream(input) {
                    let how = input.one_of(&[Shutdown::Read, Shutdown::Write, Shutdown::Both]);
                    let _ = stream.shutdown(how);
                }
            }
            6 if !self.streams.is_empty() => {
                self.streams.swap_remove(input.below(self.streams.len()));
            }
            _ => match (input.u8(), &self.offers) {
                (0, _) => self.offers = None,
                (count, Some(offers)) => {
                    let streams: Vec<_> = self.streams.iter().map(AsFd::as_fd).collect();
                    let count = usize::from(count) % 10;
                    send(offers, input.text(16), &streams[..count.min(streams.len())]);
                }
                _ => {}
            },
        }
    }

    fn returned(&mut self, queue: usize, bytes: &[u8]) {
        if queue != 0 || bytes.is_empty() {
            return;
        }
        assert!(bytes.len() >= HEADER_LEN, "a packet of {} bytes", bytes.len());
        let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(field(24) as usize, bytes.len() - HEADER_LEN, "a packet's length");
        // Answers to packets of others go where these came from.
        if bytes[30] != 3 {
            assert_eq!((field(0), field(8)), (HOST_CID as u32, self.guest as u32));
        }
    }
}

impl Engine {
    fn stream(&self, input: &mut Input<'_>) -> Option<&UnixStream> {
        let index = input.below(self.streams.len());
        self.streams.get(index)
    }
}

/// The device's end of the channel, and what is at the other one, for a guest of that context id.
pub(super) fn engine(guest: u64) -> (OwnedFd, impl Host) {
    let (device, own) = crate::descriptors::packet_pair();
    let engine = Engine {
        guest,
        offers: Some(own),
        streams: vec![],
    };
    (device, engine)
}

/// The socket device.
pub fn vsock(bytes: &[u8]) {
    inline::enter();
    let (offers, mut engine) = engine(GUEST_CID);
    let device = Vsock::new(GUEST_CID, offers).expect("descriptors");
    drive(&mut Input::new(bytes), vec![Box::new(device)], &mut engine);
}
