//! A guest, an engine and the device between them, for the tests.

use crate::memory::Memory;
use crate::virtio::guest_queue::{GuestQueue, Part, eventfd, interrupt, memory};
use crate::virtio::vsock::muxer::Muxer;
use crate::virtio::vsock::offers::Offers;
use crate::virtio::vsock::packet::{HEADER_LEN, Header, Op, Ports, TYPE_STREAM};
use crate::virtio::vsock::worker::{Doorbell, VsockWorker};
use crate::worker::{Handler, Poll, WorkerError};
use husk_vmm_protocol::vsock::{GUEST_CID, HOST_CID, StreamOffer};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub const SIZE: u64 = 0x40_0000;

pub const RX_DATA: u64 = 0x10_0000;

pub const RX_LEN: u32 = 4096;

pub const TX_DATA: u64 = 0x20_0000;

/// Room for one packet each.
pub const TX_STRIDE: u64 = 0x2000;

/// The guest's buffer for each connection.
pub const GUEST_BUF: u32 = 64 * 1024;

/// A pair of sockets: the device's end of the channel and the engine's.
pub fn channel() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors, which are ours alone.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

pub fn send_packet(channel: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) {
    let mut control = [0u64; 16];
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: the message describes `bytes` and `control`, which live through the call; `control` has room for the
    // descriptors, at most 20.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        if !descriptors.is_empty() {
            let length = size_of_val(descriptors) as u32;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(length) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
            std::ptr::copy_nonoverlapping(
                descriptors.as_ptr(),
                libc::CMSG_DATA(header).cast(),
                descriptors.len(),
            );
        }
        let sent = libc::sendmsg(channel.as_raw_fd(), &raw const message, 0);
        assert_eq!(sent, bytes.len() as isize);
    }
}

/// Makes an offer; the engine's end of the stream, non-blocking.
pub fn offer(channel: &OwnedFd, offer: StreamOffer) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_packet(channel, &offer.encode(), &[theirs.as_raw_fd()]);
    ours.set_nonblocking(true).unwrap();
    ours
}

/// What a non-blocking stream has now.
pub fn read_now(mut stream: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => all,
        Err(e) if e.kind() == ErrorKind::WouldBlock => all,
        Err(e) => panic!("{e}"),
    }
}

/// Whether the stream ended, with nothing left to read.
pub fn is_at_end(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// A guest's driver with the smallest of stacks above it.
pub struct Driver {
    pub memory: Memory,
    pub rx: GuestQueue,
    pub tx: GuestQueue,
    pub events: GuestQueue,
    /// By head: which place of RX_DATA.
    pub rx_place: Vec<u64>,
    pub tx_next: u64,
}

#[derive(Debug, PartialEq)]
pub struct Packet {
    pub header: Header,
    pub data: Vec<u8>,
}

impl Packet {
    pub fn op(&self) -> Option<Op> {
        Op::from_number(self.header.op)
    }
}

pub fn header(ports: Ports, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_BUF,
        ..Header::default()
    }
}

impl Driver {
    pub fn new() -> Self {
        let memory = memory(SIZE as usize);
        Self {
            rx: GuestQueue::new(&memory, 0, 128),
            tx: GuestQueue::new(&memory, GuestQueue::SPAN, 128),
            events: GuestQueue::new(&memory, 2 * GuestQueue::SPAN, 16),
            memory,
            rx_place: vec![0; 128],
            tx_next: 0,
        }
    }

    pub fn post(&mut self, place: u64) {
        // In two parts, the second beginning within the data.
        let address = RX_DATA + place * 2 * u64::from(RX_LEN);
        let head = self.rx.add(&[
            Part {
                address,
                length: 100,
                write: true,
            },
            Part {
                address: address + 100,
                length: RX_LEN - 100,
                write: true,
            },
        ]);
        self.rx_place[usize::from(head)] = place;
    }

    /// Gives the device `count` buffers.
    pub fn post_many(&mut self, count: u64) {
        for place in 0..count {
            self.post(place);
        }
        self.rx.notify.write(1).unwrap();
    }

    /// Sends a packet; `false` if the queue is full.
    pub fn send(&mut self, header: Header, data: &[u8]) -> bool {
        while self.tx.pop().is_some() {}
        if self.tx.room() < 3 || data.len() > 0x1f00 {
            return false;
        }
        let address = TX_DATA + self.tx_next % 64 * TX_STRIDE;
        self.tx_next += 1;
        self.memory
            .write_slice(header.as_slice(), GuestAddress(address))
            .unwrap();
        self.memory.write_slice(data, GuestAddress(address + 64)).unwrap();
        let half = data.len() / 2;
        let part = |address, length: usize| Part {
            address,
            length: length as u32,
            write: false,
        };
        self.tx.add(&[
            part(address, HEADER_LEN),
            part(address + 64, half),
            part(address + 64 + half as u64, data.len() - half),
        ]);
        self.tx.notify.write(1).unwrap();
        true
    }

    /// The packets that the device sent, their buffers being given to it again.
    pub fn receive(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some((head, length)) = self.rx.pop() {
            let place = self.rx_place[usize::from(head)];
            let address = RX_DATA + place * 2 * u64::from(RX_LEN);
            assert!(length >= HEADER_LEN as u32 && length <= RX_LEN, "{length}");
            let mut header = Header::default();
            self.memory
                .read_slice(header.as_mut_slice(), GuestAddress(address))
                .unwrap();
            let mut data = vec![0; length as usize - HEADER_LEN];
            self.memory
                .read_slice(&mut data, GuestAddress(address + HEADER_LEN as u64))
                .unwrap();
            assert_eq!({ header.len } as usize, data.len());
            // A refusal speaks in the words of what it refuses.
            if header.op != Op::Rst as u16 {
                assert_eq!(
                    ({ header.src_cid }, { header.dst_cid }, { header.kind }),
                    (HOST_CID, GUEST_CID, TYPE_STREAM)
                );
            }
            packets.push(Packet { header, data });
            self.post(place);
        }
        if !packets.is_empty() {
            self.rx.notify.write(1).unwrap();
        }
        packets
    }
}

/// A guest, a device whose thread is the test, and an engine.
pub struct Machine {
    pub guest: Driver,
    pub engine: OwnedFd,
    pub worker: VsockWorker,
    pub poll: Poll,
    pub irq: EventFd,
    pub again: Arc<EventFd>,
    pub reset: Arc<AtomicBool>,
}

impl Machine {
    pub fn bare() -> Self {
        let guest = Driver::new();
        let (device, engine) = channel();
        let (interrupt, irq) = interrupt();
        let again = Arc::new(eventfd());
        let reset = Arc::new(AtomicBool::new(false));
        let mut worker = VsockWorker::new(
            guest.memory.clone(),
            [
                guest.rx.device_side(true),
                guest.tx.device_side(true),
                guest.events.device_side(true),
            ],
            interrupt,
            Muxer::new(GUEST_CID, Offers::new(device)),
            Doorbell {
                again: Arc::clone(&again),
                reset: reset.clone(),
            },
        )
        .unwrap();
        let poll = Poll::new().unwrap();
        worker.register(&poll).unwrap();
        Self {
            guest,
            engine,
            worker,
            poll,
            irq,
            again,
            reset,
        }
    }

    pub fn new() -> Self {
        let mut machine = Self::bare();
        machine.guest.post_many(64);
        machine.run();
        machine
    }

    /// Handles events until there are none: fails if there is no end to them.
    pub fn try_run(&mut self) -> Result<(), WorkerError> {
        for _ in 0..20_000 {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event.
            let count = unsafe { libc::epoll_wait(self.poll.as_raw_fd(), &raw mut event, 1, 0) };
            if count == 0 {
                return Ok(());
            }
            assert_eq!(count, 1);
            self.worker.handle(event.u64 as u32, event.events, &self.poll)?;
        }
        panic!("the worker is busy for nothing");
    }

    pub fn run(&mut self) {
        self.try_run().unwrap();
    }

    pub fn send(&mut self, header: Header, data: &[u8]) -> Vec<Packet> {
        assert!(self.guest.send(
            Header {
                len: data.len() as u32,
                ..header
            },
            data
        ));
        self.run();
        self.guest.receive()
    }

    pub fn step(&mut self) -> Vec<Packet> {
        self.run();
        self.guest.receive()
    }

    pub fn connections(&self) -> usize {
        self.worker.muxer().connections()
    }

    /// A connection of the guest to a port of the host.
    pub fn connected(&mut self) -> (Ports, UnixStream) {
        let ports = Ports {
            guest: 5000,
            host: 1024,
        };
        let stream = offer(&self.engine, StreamOffer::Listen(ports.host));
        let answer = self.send(header(ports, Op::Request), b"");
        assert_eq!(ops(&answer), [Op::Response]);
        (ports, stream)
    }
}

pub fn ops(packets: &[Packet]) -> Vec<Op> {
    packets.iter().map(|p| p.op().unwrap()).collect()
}

pub fn shutdown(ports: Ports, flags: u32) -> Header {
    Header {
        flags,
        ..header(ports, Op::Shutdown)
    }
}

pub const PORTS: Ports = Ports {
    guest: 5000,
    host: 1024,
};

pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives through both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    assert!(
        limit.rlim_max >= 16 * 1024,
        "this test needs more descriptors: ulimit -n 16384"
    );
}
