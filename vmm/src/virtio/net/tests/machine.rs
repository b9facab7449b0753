//! A guest, a network and the device between them, for the tests.

use crate::memory::Memory;
use crate::virtio::guest_queue::{GuestQueue, Part, eventfd, interrupt, memory};
use crate::virtio::net::control::Control;
use crate::virtio::net::features::{bits, offered};
use crate::virtio::net::header::LEN;
use crate::virtio::net::pairs::Pairs;
use crate::virtio::net::tap::{OFFLOADS, Tap};
use crate::virtio::net::worker::PairWorker;
use crate::worker::{Handler, Poll, WorkerError};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub const SIZE: u64 = 0x100_0000;

/// Buffers for frames to each guest's pair, a page apart.
pub const RX_DATA: u64 = 0x10_0000;

/// Buffers for frames from the guest, one after the other.
pub const TX_DATA: u64 = 0x80_0000;

/// Length of a buffer to the guest, if nothing else is said.
pub const ROOM: u32 = 2048;

/// All that is offered.
pub fn all_features() -> u64 {
    offered(OFFLOADS[0], true)
}

/// The same, but one buffer for each frame.
pub fn without_merging() -> u64 {
    all_features() & !bits(&[VIRTIO_NET_F_MRG_RXBUF])
}

/// A queue of a tap: the device's end, and that of the network behind it.
pub fn tap() -> (OwnedFd, UnixDatagram) {
    let (device, network) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    network.set_nonblocking(true).unwrap();
    (device.into(), network)
}

/// A frame with its header: `length` bytes in all, told apart by `seed`.
pub fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; LEN.min(length)];
    frame.extend((LEN..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed));
    frame
}

/// What the network sees of it, and the guest: all but the header.
pub fn body(frame: &[u8]) -> &[u8] {
    &frame[LEN..]
}

pub fn room(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        write: true,
    }
}

pub fn bytes(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        write: false,
    }
}

/// The guest's side of one pair.
pub struct Pair {
    pub rx: GuestQueue,
    pub tx: GuestQueue,
    /// The buffers of each chain to the guest.
    parts: BTreeMap<u16, Vec<Part>>,
    base: u64,
    posted: u64,
}

impl Pair {
    pub fn new(memory: &Memory, index: usize, size: u16) -> Self {
        let rings = 2 * index as u64 * GuestQueue::SPAN;
        Self {
            rx: GuestQueue::new(memory, rings, size),
            tx: GuestQueue::new(memory, rings + GuestQueue::SPAN, size),
            parts: BTreeMap::new(),
            base: RX_DATA + 0x10_0000 * index as u64,
            posted: 0,
        }
    }

    /// Gives the device a chain of these buffers, and says so.
    pub fn post(&mut self, parts: &[Part]) -> u16 {
        let head = self.rx.add(parts);
        self.parts.insert(head, parts.to_vec());
        self.rx.notify.write(1).unwrap();
        head
    }

    /// Gives it `count` buffers of [`ROOM`] bytes.
    pub fn post_many(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.base + 0x1000 * (self.posted % 256);
            self.posted += 1;
            self.post(&[room(address, ROOM)]);
        }
    }

    /// The frames that came: of how many buffers, and all bytes.
    pub fn receive(&mut self, memory: &Memory) -> Vec<(u16, Vec<u8>)> {
        let mut frames = vec![];
        while let Some(mut bytes) = self.pop(memory) {
            assert!(bytes.len() >= LEN, "a buffer came back unused");
            let count = u16::from_le_bytes(bytes[10..12].try_into().unwrap());
            for _ in 1..count {
                bytes.extend(self.pop(memory).expect("a frame is seen as a whole"));
            }
            frames.push((count, bytes));
        }
        frames
    }

    /// What came in the next chain.
    fn pop(&mut self, memory: &Memory) -> Option<Vec<u8>> {
        let (head, length) = self.rx.pop()?;
        let mut found = vec![];
        for part in self.parts.remove(&head).unwrap() {
            let mut bytes = vec![0; (length as usize - found.len()).min(part.length as usize)];
            memory.read_slice(&mut bytes, GuestAddress(part.address)).unwrap();
            found.extend(bytes);
        }
        assert_eq!(found.len(), length as usize);
        Some(found)
    }
}

/// The device without its threads.
pub struct Machine {
    pub memory: Memory,
    pub guest: Vec<Pair>,
    pub control: GuestQueue,
    pub network: Vec<UnixDatagram>,
    pub workers: Vec<(PairWorker, Poll)>,
    pub pairs: Arc<Pairs>,
    pub irq: EventFd,
    tx_place: u64,
}

impl Machine {
    /// One pair with queues of `size` places.
    pub fn with(size: u16, features: u64) -> Self {
        Self::build(1, size, features)
    }

    /// One pair.
    pub fn new() -> Self {
        Self::with(256, all_features())
    }

    pub fn build(count: usize, size: u16, features: u64) -> Self {
        let memory = memory(SIZE as usize);
        let guest: Vec<Pair> = (0..count).map(|index| Pair::new(&memory, index, size)).collect();
        let control = GuestQueue::new(&memory, 2 * count as u64 * GuestQueue::SPAN, size);
        let (interrupt, irq) = interrupt();
        let (taps, network): (Vec<_>, Vec<_>) = (0..count).map(|_| tap()).unzip();
        let pairs = Arc::new(Pairs::new(
            taps.into_iter().map(Tap::new).collect(),
            (0..count).map(|_| eventfd()).collect(),
            count,
            1,
        ));
        let mut commands = Some(Control::new(
            control.device_side(true),
            memory.clone(),
            interrupt.clone(),
            Some(pairs.clone()),
        ));
        let workers = guest
            .iter()
            .enumerate()
            .map(|(index, pair)| {
                let mut worker = PairWorker::new(
                    pairs.clone(),
                    index,
                    memory.clone(),
                    [pair.rx.device_side(true), pair.tx.device_side(true)],
                    commands.take(),
                    interrupt.clone(),
                    features,
                );
                let poll = Poll::new().unwrap();
                worker.register(&poll).unwrap();
                (worker, poll)
            })
            .collect();
        Self {
            memory,
            guest,
            control,
            network,
            workers,
            pairs,
            irq,
            tx_place: 0,
        }
    }

    /// Handles events until there are none: fails if there is no end to them. How many there were.
    pub fn try_run(&mut self) -> Result<usize, WorkerError> {
        for events in 0..20_000 {
            let mut any = false;
            for (worker, poll) in &mut self.workers {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                // SAFETY: room for one event.
                let count = unsafe { libc::epoll_wait(poll.as_raw_fd(), &raw mut event, 1, 0) };
                if count > 0 {
                    any = true;
                    worker.handle(event.u64 as u32, event.events, poll)?;
                }
            }
            if !any {
                return Ok(events);
            }
        }
        panic!("the worker is busy for nothing");
    }

    pub fn run(&mut self) -> usize {
        self.try_run().unwrap()
    }

    /// Handles one event of the first pair, if there is one.
    pub fn run_one(&mut self) -> bool {
        let (worker, poll) = &mut self.workers[0];
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event.
        let count = unsafe { libc::epoll_wait(poll.as_raw_fd(), &raw mut event, 1, 0) };
        if count > 0 {
            worker.handle(event.u64 as u32, event.events, poll).unwrap();
        }
        count > 0
    }

    /// Frames from the network to the first pair.
    pub fn step(&mut self) -> Vec<(u16, Vec<u8>)> {
        self.run();
        self.guest[0].receive(&self.memory)
    }

    /// Puts `bytes` where the device may read them.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        if self.tx_place + bytes.len() as u64 > SIZE - TX_DATA {
            self.tx_place = 0;
        }
        let address = TX_DATA + self.tx_place;
        self.tx_place += bytes.len() as u64;
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        address
    }

    /// The guest sends a frame by the first pair.
    pub fn send(&mut self, frame: &[u8]) -> u16 {
        let address = self.place(frame);
        let head = self.guest[0].tx.add(&[bytes(address, frame.len() as u32)]);
        self.guest[0].tx.notify.write(1).unwrap();
        head
    }

    /// What came to the network by the tap's queue.
    pub fn seen(&self, queue: usize) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; 0x2_0000];
        std::iter::from_fn(|| {
            let length = self.network[queue].recv(&mut buffer).ok()?;
            Some(buffer[..length].to_vec())
        })
        .collect()
    }

    /// The driver's command and the device's answer.
    pub fn command(&mut self, command: &[u8]) -> u8 {
        let at = self.place(command);
        let answer = self.place(&[0xaa]);
        self.control
            .add(&[bytes(at, command.len() as u32), room(answer, 1)]);
        self.control.notify.write(1).unwrap();
        self.run();
        assert_eq!(self.control.pop().unwrap().1, 1);
        self.memory.read_obj(GuestAddress(answer)).unwrap()
    }
}

/// Those of a list of frames as they came.
pub fn bodies(frames: &[(u16, Vec<u8>)]) -> Vec<&[u8]> {
    frames.iter().map(|(_, frame)| body(frame)).collect()
}
