//! The network device, in front of sockets that stand for the queues of a tap.

use super::drive;
use crate::driver::Host;
use crate::input::Input;
use husk_vmm::virtio::net::Net;
use husk_vmm::virtio::net::header::{LEN, MAX_FRAME};
use husk_vmm::worker::inline;
use husk_vmm_protocol::config::NicConfig;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

/// The network's ends of the queues.
struct Network {
    taps: Vec<Option<UnixDatagram>>,
}

impl Host for Network {
    fn request(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let pairs = self.taps.len();
        if queue == 2 * pairs {
            // Class and command, and how many pairs.
            let mut command = vec![input.u8() % 6, input.u8() % 3];
            command.extend(input.one_of(&[1, 2, 0, 3, u16::MAX]).to_le_bytes());
            command.extend(input.text(8));
            return command;
        }
        if queue % 2 == 0 {
            // Room for frames, and nothing to say.
            return if input.u8() == 0 { vec![0] } else { vec![] };
        }
        let mut frame = match input.u8() {
            0..=0x7f => {
                let mut header = [0; LEN];
                header[0] = input.u8() & 1;
                header[1] = input.one_of(&[0, 1, 4, 5, 0x81, 0x84, 3, 0xff]);
                header.to_vec()
            }
            _ => input.bytes(LEN).to_vec(),
        };
        let length = match input.u8() {
            long @ 0xf0.. => usize::from(long & 0xf) * 0x1200,
            length => usize::from(length),
        };
        let seed = input.u8();
        frame.resize(frame.len() + length, seed);
        frame
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        let tap = usize::from(what) % self.taps.len();
        let Some(socket) = &mut self.taps[tap] else {
            return;
        };
        match what >> 2 & 7 {
            0 => {
                let mut frame = vec![0; MAX_FRAME + 1];
                while let Ok(length) = socket.recv(&mut frame) {
                    assert!((LEN..=MAX_FRAME).contains(&length), "a frame of {length} bytes");
                    assert_eq!(frame[0] & !1, 0, "flags that are none of a driver's");
                    assert!(matches!(frame[1] & 0x7f, 0 | 1 | 4 | 5), "segments of no kind");
                }
            }
            1 if what & 0x20 != 0 => self.taps[tap] = None,
            _ => {
                let length = match input.u8() {
                    long @ 0xf0.. => usize::from(long & 0xf) * 0x1130,
                    length => usize::from(length) * 8,
                };
                let mut frame = input.text(32).to_vec();
                frame.resize(length, 0xee);
                // A tap's queue may be full.
                let _ = socket.send(&frame);
            }
        }
    }

    fn returned(&mut self, queue: usize, bytes: &[u8]) {
        if queue % 2 == 0 && queue == 2 * self.taps.len() {
            assert!(bytes.len() <= 1, "an answer to a command is one byte");
        }
    }
}

/// As many queues of a tap, and what is at their other ends.
pub(super) fn network(pairs: usize) -> (Vec<OwnedFd>, impl Host) {
    let mut network = Network { taps: vec![] };
    let mut taps = vec![];
    for _ in 0..pairs {
        let (device, own) = UnixDatagram::pair().expect("descriptors");
        device.set_nonblocking(true).expect("a socket can");
        own.set_nonblocking(true).expect("a socket can");
        network.taps.push(Some(own));
        taps.push(device.into());
    }
    (taps, network)
}

/// The network device, of one pair of queues or of two.
pub fn net(bytes: &[u8]) {
    inline::enter();
    let mut input = Input::new(bytes);
    let pairs = input.below(2) + 1;
    let (taps, mut network) = network(pairs);
    let config = NicConfig {
        mac: [2, 0, 0, 0, 0, 1],
        queue_pairs: pairs as u8,
    };
    let device = Net::new("net", &config, taps).expect("sockets are taps");
    drive(&mut input, vec![Box::new(device)], &mut network);
}
