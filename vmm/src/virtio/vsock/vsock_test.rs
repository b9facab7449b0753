//! The device as its guest and its engine see it.

use super::credit::BUF_ALLOC;
use super::muxer::{MAX_CONNECTIONS, MAX_REPLIES, Muxer};
use super::offers::Offers;
use super::packet::{
    HEADER_LEN, Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::worker::{Doorbell, VsockWorker};
use super::{State, Vsock};
use crate::memory::Memory;
use crate::virtio::device::{Activation, Device};
use crate::virtio::guest_queue::{GuestQueue, Part, eventfd, interrupt, memory};
use crate::worker::{Handler, Poll, READABLE, WorkerError};
use husk_vmm_protocol::vsock::{GUEST_CID, HOST_CID, StreamOffer};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::QueueT;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const SIZE: u64 = 0x40_0000;
const RX_DATA: u64 = 0x10_0000;
const RX_LEN: u32 = 4096;
const TX_DATA: u64 = 0x20_0000;
/// Room for one packet each.
const TX_STRIDE: u64 = 0x2000;
/// The guest's buffer for each connection.
const GUEST_BUF: u32 = 64 * 1024;

/// A pair of sockets: the device's end of the channel and the engine's.
fn channel() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors, which are ours alone.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

fn send_packet(channel: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) {
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
fn offer(channel: &OwnedFd, offer: StreamOffer) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_packet(channel, &offer.encode(), &[theirs.as_raw_fd()]);
    ours.set_nonblocking(true).unwrap();
    ours
}

/// What a non-blocking stream has now.
fn read_now(mut stream: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => all,
        Err(e) if e.kind() == ErrorKind::WouldBlock => all,
        Err(e) => panic!("{e}"),
    }
}

/// Whether the stream ended, with nothing left to read.
fn is_at_end(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// A guest's driver with the smallest of stacks above it.
struct Driver {
    memory: Memory,
    rx: GuestQueue,
    tx: GuestQueue,
    events: GuestQueue,
    /// By head: which place of RX_DATA.
    rx_place: Vec<u64>,
    tx_next: u64,
}

#[derive(Debug, PartialEq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Packet {
    fn op(&self) -> Option<Op> {
        Op::from_number(self.header.op)
    }
}

fn header(ports: Ports, op: Op) -> Header {
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
    fn new() -> Self {
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

    fn post(&mut self, place: u64) {
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
    fn post_many(&mut self, count: u64) {
        for place in 0..count {
            self.post(place);
        }
        self.rx.notify.write(1).unwrap();
    }

    /// Sends a packet; `false` if the queue is full.
    fn send(&mut self, header: Header, data: &[u8]) -> bool {
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
    fn receive(&mut self) -> Vec<Packet> {
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
struct Machine {
    guest: Driver,
    engine: OwnedFd,
    worker: VsockWorker,
    poll: Poll,
    irq: EventFd,
    again: EventFd,
    reset: Arc<AtomicBool>,
}

impl Machine {
    fn bare() -> Self {
        let guest = Driver::new();
        let (device, engine) = channel();
        let (interrupt, irq) = interrupt();
        let again = eventfd();
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
                again: again.try_clone().unwrap(),
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

    fn new() -> Self {
        let mut machine = Self::bare();
        machine.guest.post_many(64);
        machine.run();
        machine
    }

    /// Handles events until there are none: fails if there is no end to them.
    fn try_run(&mut self) -> Result<(), WorkerError> {
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

    fn run(&mut self) {
        self.try_run().unwrap();
    }

    fn send(&mut self, header: Header, data: &[u8]) -> Vec<Packet> {
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

    fn step(&mut self) -> Vec<Packet> {
        self.run();
        self.guest.receive()
    }

    fn connections(&self) -> usize {
        self.worker.muxer().connections()
    }

    /// A connection of the guest to a port of the host.
    fn connected(&mut self) -> (Ports, UnixStream) {
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

fn ops(packets: &[Packet]) -> Vec<Op> {
    packets.iter().map(|p| p.op().unwrap()).collect()
}

fn shutdown(ports: Ports, flags: u32) -> Header {
    Header {
        flags,
        ..header(ports, Op::Shutdown)
    }
}

const PORTS: Ports = Ports {
    guest: 5000,
    host: 1024,
};

#[test]
fn a_guest_gets_the_stream_that_was_offered_for_its_port() {
    let mut machine = Machine::new();
    let other = offer(&machine.engine, StreamOffer::Listen(1025));
    let first = offer(&machine.engine, StreamOffer::Listen(1024));
    let second = offer(&machine.engine, StreamOffer::Listen(1024));
    let answer = machine.send(header(PORTS, Op::Request), b"");
    assert_eq!(ops(&answer), [Op::Response]);
    let answer = answer[0].header;
    assert_eq!(
        ({ answer.src_port }, { answer.dst_port }, { answer.buf_alloc }),
        (1024, 5000, BUF_ALLOC)
    );
    machine.send(header(PORTS, Op::Rw), b"hello");
    assert_eq!(read_now(&first), b"hello");
    assert!(read_now(&second).is_empty() && read_now(&other).is_empty());
    (&first).write_all(b"welcome").unwrap();
    let packets = machine.step();
    assert_eq!(ops(&packets), [Op::Rw]);
    assert_eq!(packets[0].data, b"welcome");
    // The next one gets the next stream, and then there is none.
    let next = Ports { guest: 5001, ..PORTS };
    assert_eq!(ops(&machine.send(header(next, Op::Request), b"")), [Op::Response]);
    let third = Ports { guest: 5002, ..PORTS };
    assert_eq!(ops(&machine.send(header(third, Op::Request), b"")), [Op::Rst]);
}

#[test]
fn an_offer_that_is_only_in_the_channel_counts() {
    let mut machine = Machine::new();
    let _stream = offer(&machine.engine, StreamOffer::Listen(1024));
    machine.guest.send(header(PORTS, Op::Request), b"");
    // The guest's packet is seen first.
    machine.worker.handle(1, READABLE, &machine.poll).unwrap();
    assert_eq!(ops(&machine.guest.receive()), [Op::Response]);
}

#[test]
fn an_offer_whose_engine_has_written_and_gone_is_still_delivered() {
    let mut machine = Machine::new();
    let stream = offer(&machine.engine, StreamOffer::Listen(1024));
    (&stream).write_all(b"stdin").unwrap();
    drop(stream);
    let packets = machine.send(header(PORTS, Op::Request), b"");
    assert_eq!(ops(&packets), [Op::Response, Op::Rw, Op::Shutdown]);
    assert_eq!(packets[1].data, b"stdin");
    assert_eq!({ packets[2].header.flags }, SHUTDOWN_BOTH);
    assert!(machine.send(header(PORTS, Op::Rst), b"").is_empty());
    assert_eq!(machine.connections(), 0);
}

#[test]
fn one_interrupt_per_pass_and_none_for_nothing() {
    let mut machine = Machine::new();
    let _ = machine.irq.read();
    let _stream = offer(&machine.engine, StreamOffer::Listen(1024));
    for guest in 0..20 {
        let ports = Ports { guest, host: 77 };
        assert!(machine.guest.send(header(ports, Op::Request), b""));
    }
    machine.run();
    assert_eq!(machine.irq.read().unwrap(), 1);
    assert_eq!(machine.guest.receive().len(), 20);
    machine.run();
    assert!(machine.irq.read().is_err());
}

#[test]
fn halves_are_closed_one_by_one() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    // The host has said all; the guest goes on.
    (&stream).write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = machine.step();
    assert_eq!(ops(&packets), [Op::Rw, Op::Shutdown]);
    assert_eq!({ packets[1].header.flags }, SHUTDOWN_SEND);
    assert!(machine.send(header(ports, Op::Rw), b"answer").is_empty());
    assert_eq!(read_now(&stream), b"answer");
    assert!(!is_at_end(&stream));
    // Now the guest too: both directions are done, of which it is told.
    let packets = machine.send(shutdown(ports, SHUTDOWN_SEND), b"");
    assert!(is_at_end(&stream));
    assert_eq!(ops(&packets), [Op::Shutdown]);
    assert_eq!({ packets[0].header.flags }, SHUTDOWN_BOTH);
    assert!(machine.send(header(ports, Op::Rst), b"").is_empty());
    assert_eq!(machine.connections(), 0);
}

#[test]
fn a_guest_that_has_said_all_can_still_read() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    assert!(machine.send(shutdown(ports, SHUTDOWN_SEND), b"").is_empty());
    assert!(is_at_end(&stream));
    (&stream).write_all(b"for you").unwrap();
    let packets = machine.step();
    assert_eq!(packets[0].data, b"for you");
    // More from the guest is against its word.
    assert_eq!(ops(&machine.send(header(ports, Op::Rw), b"x")), [Op::Rst]);
    assert_eq!(machine.connections(), 0);
}

#[test]
fn a_guest_that_closes_is_answered_by_rst_and_the_host_sees_a_clean_end() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    machine.send(header(ports, Op::Rw), b"bye");
    // Not yet read by the device, which has no credit for it: must not turn the end into an error.
    machine.send(
        Header {
            buf_alloc: 0,
            ..header(ports, Op::CreditUpdate)
        },
        b"",
    );
    (&stream).write_all(b"too late").unwrap();
    let packets = machine.send(shutdown(ports, SHUTDOWN_BOTH), b"");
    assert!(ops(&packets).ends_with(&[Op::Rst]), "{packets:?}");
    assert_eq!(machine.connections(), 0);
    let mut text = String::new();
    (&stream).read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    assert_eq!((&stream).write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    assert!(machine.send(shutdown(ports, SHUTDOWN_RECEIVE), b"").is_empty());
    assert_eq!((&stream).write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    // It may write.
    assert!(machine.send(header(ports, Op::Rw), b"still").is_empty());
    assert_eq!(read_now(&stream), b"still");
    assert_eq!(ops(&machine.send(shutdown(ports, SHUTDOWN_SEND), b"")), [Op::Rst]);
    assert!(is_at_end(&stream));
}

#[test]
fn a_host_that_is_gone_ends_both_directions() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    drop(stream);
    let packets = machine.step();
    assert_eq!({ packets.last().unwrap().header.flags }, SHUTDOWN_BOTH);
    // Under way then.
    assert!(machine.send(header(ports, Op::Rw), b"unheard").is_empty());
    assert_eq!(ops(&machine.send(shutdown(ports, SHUTDOWN_BOTH), b"")), [Op::Rst]);
    assert_eq!(machine.connections(), 0);
}

#[test]
fn a_host_that_reads_no_more_is_known_at_the_next_write() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    stream.shutdown(Shutdown::Read).unwrap();
    assert!(machine.step().is_empty());
    let packets = machine.send(header(ports, Op::Rw), b"unheard");
    assert_eq!(ops(&packets), [Op::Shutdown]);
    assert_eq!({ packets[0].header.flags }, SHUTDOWN_RECEIVE);
    (&stream).write_all(b"but I talk").unwrap();
    assert_eq!(machine.step()[0].data, b"but I talk");
}

#[test]
fn a_guest_that_never_takes_leave_is_reset_in_time() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    drop(stream);
    machine.step();
    assert_eq!(machine.connections(), 1);
    let now = Instant::now();
    let deadline = machine.worker.muxer().next_deadline().unwrap();
    assert!(deadline > now + Duration::from_secs(7) && deadline < now + Duration::from_secs(9));
    // A guest that wants the port again before that gets it.
    let _stream = offer(&machine.engine, StreamOffer::Listen(ports.host));
    assert_eq!(
        ops(&machine.send(header(ports, Op::Request), b"")),
        [Op::Response]
    );
    assert_eq!(machine.connections(), 1);
    assert_eq!(machine.worker.muxer().next_deadline(), None);
}

/// Our count of bytes taken, as the device tells it when asked.
fn ask_credit(machine: &mut Machine, ports: Ports) -> u32 {
    let packets = machine.send(header(ports, Op::CreditRequest), b"");
    assert_eq!(ops(&packets), [Op::CreditUpdate]);
    packets[0].header.fwd_cnt
}

/// Fills the host's stream, and the device's buffer behind it, as far as the guest has credit. All that was sent
/// before must have been read.
fn fill(machine: &mut Machine, ports: Ports, seed: u8) -> Vec<u8> {
    let mut sent = Vec::new();
    let start = ask_credit(machine, ports);
    let mut forwarded = start;
    loop {
        let mut credit = BUF_ALLOC - (sent.len() as u32 - (forwarded - start));
        if credit == 0 {
            let before = forwarded;
            forwarded = ask_credit(machine, ports);
            credit = forwarded - before;
            if credit == 0 {
                return sent;
            }
        }
        let chunk: Vec<u8> = (0..credit.min(4000))
            .map(|i| (i as u8).wrapping_mul(7) ^ seed)
            .collect();
        for packet in machine.send(header(ports, Op::Rw), &chunk) {
            assert_eq!(packet.op(), Some(Op::CreditUpdate));
            forwarded = packet.header.fwd_cnt;
        }
        sent.extend(chunk);
    }
}

#[test]
fn a_guest_has_its_credit_and_not_a_byte_more() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    let sent = fill(&mut machine, ports, 3);
    assert!(sent.len() >= BUF_ALLOC as usize);
    assert_eq!(ops(&machine.send(header(ports, Op::Rw), b"x")), [Op::Rst]);
    assert_eq!(machine.connections(), 0);
    let got = read_now(&stream);
    assert!(sent.starts_with(&got));
    assert!(is_at_end(&stream));
}

#[test]
fn a_slow_reader_gets_all_in_order_and_the_guest_its_credit_back() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    let mut sent = fill(&mut machine, ports, 5);
    let mut got = Vec::new();
    let mut updates = 0;
    while got.len() < sent.len() {
        let before = got.len();
        got.extend(read_now(&stream));
        assert_ne!(got.len(), before, "stuck");
        updates += machine.step().len();
    }
    assert!(got == sent);
    assert!((1..=3).contains(&updates), "{updates}");
    machine.send(header(ports, Op::Rw), b"more");
    sent.extend(b"more");
    assert_eq!(read_now(&stream), b"more");
}

#[test]
fn what_a_guest_sent_before_it_closed_arrives_however_slowly_it_is_read() {
    for (last, by_rst) in [(Op::Shutdown, false), (Op::Rst, true)] {
        let mut machine = Machine::new();
        let (ports, stream) = machine.connected();
        let sent = fill(&mut machine, ports, 9);
        let packets = machine.send(
            Header {
                flags: SHUTDOWN_BOTH,
                ..header(ports, last)
            },
            b"",
        );
        assert!(packets.is_empty(), "{packets:?}");
        assert_eq!(machine.connections(), 1);
        let mut got = Vec::new();
        let mut packets = Vec::new();
        for _ in 0..100 {
            got.extend(read_now(&stream));
            packets.extend(machine.step());
        }
        assert!(got == sent, "{} of {}", got.len(), sent.len());
        assert!(is_at_end(&stream));
        assert_eq!(machine.connections(), 0);
        assert_eq!(ops(&packets).contains(&Op::Rst), !by_rst);
    }
}

#[test]
fn a_guest_that_let_go_can_use_its_port_while_the_old_words_are_read() {
    let mut machine = Machine::new();
    let (ports, slow) = machine.connected();
    let sent = fill(&mut machine, ports, 1);
    machine.send(header(ports, Op::Rst), b"");
    let (_, stream) = machine.connected();
    machine.send(header(ports, Op::Rw), b"new");
    assert_eq!(read_now(&stream), b"new");
    let mut got = Vec::new();
    for _ in 0..100 {
        got.extend(read_now(&slow));
        machine.run();
    }
    assert!(got == sent);
    assert_eq!(machine.connections(), 1);
    // And one whose host goes away before it has read all is no burden.
    fill(&mut machine, ports, 2);
    machine.send(header(ports, Op::Rst), b"");
    drop(stream);
    machine.run();
    assert_eq!(machine.connections(), 0);
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut machine = Machine::new();
    let stream = offer(&machine.engine, StreamOffer::Listen(1024));
    let with = |op, buf_alloc, fwd_cnt| Header {
        buf_alloc,
        fwd_cnt,
        ..header(PORTS, op)
    };
    machine.send(with(Op::Request, 1000, 0), b"");
    (&stream).write_all(&[7; 5000]).unwrap();
    let packets = machine.step();
    assert_eq!(ops(&packets), [Op::Rw, Op::CreditRequest]);
    assert_eq!(packets[0].data.len(), 1000);
    // Nothing new: not asked a second time.
    assert!(machine.send(with(Op::CreditUpdate, 1000, 0), b"").is_empty());
    // A count of what never was sent gives nothing.
    assert!(machine.send(with(Op::CreditUpdate, 1000, 1001), b"").is_empty());
    let packets = machine.send(with(Op::CreditUpdate, 1000, 600), b"");
    assert_eq!(ops(&packets), [Op::Rw, Op::CreditRequest]);
    assert_eq!(packets[0].data.len(), 600);
    let packets = machine.send(with(Op::CreditUpdate, 10_000, 1600), b"");
    assert_eq!(packets.iter().map(|p| p.data.len()).sum::<usize>(), 3400);
    assert_eq!(
        ops(&machine.send(with(Op::CreditRequest, 10_000, 5000), b"")),
        [Op::CreditUpdate]
    );
}

#[test]
fn the_hosts_end_is_told_to_a_guest_without_room() {
    let mut machine = Machine::new();
    let stream = offer(&machine.engine, StreamOffer::Listen(1024));
    let request = Header {
        buf_alloc: 0,
        ..header(PORTS, Op::Request)
    };
    assert_eq!(ops(&machine.send(request, b"")), [Op::Response]);
    assert!(machine.step().is_empty());
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = machine.step();
    assert_eq!(ops(&packets), [Op::Shutdown]);
    assert_eq!({ packets[0].header.flags }, SHUTDOWN_SEND);
}

#[test]
fn a_stream_is_connected_to_a_port_of_the_guest() {
    let mut machine = Machine::new();
    let stream = offer(&machine.engine, StreamOffer::Connect(22));
    let packets = machine.step();
    assert_eq!(ops(&packets), [Op::Request]);
    let request = packets[0].header;
    assert_eq!({ request.dst_port }, 22);
    assert!({ request.src_port } >= 1 << 30);
    let ports = Ports {
        guest: 22,
        host: request.src_port,
    };
    // Nothing is sent before the guest has answered.
    (&stream).write_all(b"hello").unwrap();
    assert!(machine.step().is_empty());
    let packets = machine.send(header(ports, Op::Response), b"");
    assert_eq!(packets[0].data, b"hello");
    assert_eq!(machine.worker.muxer().next_deadline(), None);
    machine.send(header(ports, Op::Rw), b"answer");
    assert_eq!(read_now(&stream), b"answer");
    let again = offer(&machine.engine, StreamOffer::Connect(22));
    let packets = machine.step();
    let other = packets[0].header.src_port;
    assert_ne!(other, { request.src_port });
    // Refused.
    let ports = Ports {
        guest: 22,
        host: other,
    };
    assert!(machine.send(header(ports, Op::Rst), b"").is_empty());
    assert!(is_at_end(&again));
    assert_eq!(machine.connections(), 1);
}

#[test]
fn a_guest_that_does_not_answer_a_request_is_given_up() {
    let mut machine = Machine::new();
    let stream = offer(&machine.engine, StreamOffer::Connect(22));
    assert_eq!(ops(&machine.step()), [Op::Request]);
    let start = Instant::now();
    while !is_at_end(&stream) {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(10));
        machine.run();
    }
    assert!(start.elapsed() > Duration::from_millis(1900));
    assert_eq!(ops(&machine.step()), [Op::Rst]);
    // No timer is left that rings.
    machine.run();
    assert_eq!(machine.connections(), 0);
}

#[test]
fn a_guest_that_answers_a_request_wrongly_is_refused() {
    for op in [Op::Rw, Op::Request, Op::Shutdown, Op::CreditUpdate] {
        let mut machine = Machine::new();
        let stream = offer(&machine.engine, StreamOffer::Connect(22));
        let packets = machine.step();
        let ports = Ports {
            guest: 22,
            host: packets[0].header.src_port,
        };
        assert_eq!(ops(&machine.send(header(ports, op), b"")), [Op::Rst]);
        assert!(is_at_end(&stream));
    }
}

#[test]
fn packets_that_cannot_be_are_refused_or_dropped() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    let good = header(ports, Op::Rw);
    // Nobody to answer: another's context id.
    assert!(machine.send(Header { src_cid: 4, ..good }, b"x").is_empty());
    // RST is never answered.
    for bad in [
        Header {
            kind: 2,
            ..header(ports, Op::Rst)
        },
        Header {
            src_port: 1,
            ..header(ports, Op::Rst)
        },
    ] {
        assert!(machine.send(bad, b"").is_empty());
    }
    // No such operation, no such connection.
    assert_eq!(ops(&machine.send(Header { op: 0, ..good }, b"x")), [Op::Rst]);
    assert_eq!(ops(&machine.send(Header { op: 8, ..good }, b"x")), [Op::Rst]);
    for op in [
        Op::Rw,
        Op::Response,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let unknown = Header {
            dst_port: 9,
            ..header(ports, op)
        };
        assert_eq!(ops(&machine.send(unknown, b"")), [Op::Rst]);
    }
    assert_eq!(machine.connections(), 1);
    assert!(read_now(&stream).is_empty());
    // A length beyond the buffer ends the connection.
    assert!(machine.guest.send(Header { len: 6, ..good }, b"12345"));
    assert_eq!(ops(&machine.step()), [Op::Rst]);
    assert_eq!(machine.connections(), 0);
    assert!(is_at_end(&stream));
}

#[test]
fn other_contexts_and_kinds_of_socket_are_refused() {
    let mut machine = Machine::new();
    let _stream = offer(&machine.engine, StreamOffer::Listen(1024));
    let request = header(PORTS, Op::Request);
    machine.guest.send(
        Header {
            dst_cid: 7,
            ..request
        },
        b"",
    );
    machine.guest.send(Header { kind: 2, ..request }, b"");
    let refusals: Vec<_> = machine
        .step()
        .iter()
        .map(|packet| {
            assert_eq!(packet.op(), Some(Op::Rst));
            ({ packet.header.src_cid }, { packet.header.kind })
        })
        .collect();
    // In the words of the packet that is refused, so that the guest finds its socket.
    assert_eq!(refusals, [(7, TYPE_STREAM), (HOST_CID, 2)]);
}

#[test]
fn a_second_request_on_an_open_connection_ends_it() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    assert_eq!(ops(&machine.send(header(ports, Op::Request), b"")), [Op::Rst]);
    assert!(is_at_end(&stream));
    assert_eq!(machine.connections(), 0);
}

#[test]
fn malformed_chains_are_returned_and_the_device_goes_on() {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    let (next, write, indirect) = (
        VRING_DESC_F_NEXT as u16,
        VRING_DESC_F_WRITE as u16,
        VRING_DESC_F_INDIRECT as u16,
    );
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    while machine.guest.tx.pop().is_some() {}
    let tx = &mut machine.guest.tx;
    // An indirect table within an indirect table.
    machine
        .guest
        .memory
        .write_slice(
            &[
                &0u64.to_le_bytes()[..],
                &16u32.to_le_bytes(),
                &indirect.to_le_bytes(),
                &[0, 0],
            ]
            .concat(),
            GuestAddress(TX_DATA + 0x1000),
        )
        .unwrap();
    tx.store(0, TX_DATA, 44, next, 0);
    tx.store(1, TX_DATA, 43, 0, 0);
    tx.store(2, SIZE - 1, 44, 0, 0);
    tx.store(3, u64::MAX - 3, 44, 0, 0);
    tx.store(4, TX_DATA, 44, write, 0);
    tx.store(5, TX_DATA, 44, write | next, 6);
    tx.store(6, TX_DATA, 44, 0, 0);
    tx.store(7, TX_DATA + 0x1000, 16, indirect, 0);
    tx.store(8, TX_DATA, 0, 0, 0);
    tx.store(9, TX_DATA, u32::MAX, next, 10);
    tx.store(10, TX_DATA, u32::MAX, 0, 0);
    let heads = [0, 1, 2, 3, 4, 5, 7, 8, 9];
    for head in heads {
        tx.publish(head);
    }
    tx.notify.write(1).unwrap();
    machine.run();
    for head in heads {
        assert_eq!(machine.guest.tx.pop(), Some((head, 0)));
    }
    assert!(machine.guest.receive().is_empty());
    machine.send(header(ports, Op::Rw), b"still here");
    assert_eq!(read_now(&stream), b"still here");
}

#[test]
fn buffers_of_the_guest_that_are_of_no_use_are_returned_empty() {
    let mut machine = Machine::bare();
    let place = RX_DATA;
    let part = |address, length, write| Part {
        address,
        length,
        write,
    };
    let rx = &mut machine.guest.rx;
    let bad = [
        rx.add(&[part(place, 44, true)]),
        rx.add(&[part(place, 4096, false)]),
        rx.add(&[part(SIZE - 8, 4096, true)]),
        rx.add(&[part(place, 0, true)]),
    ];
    machine.guest.post(1);
    assert!(machine.guest.send(header(PORTS, Op::Request), b""));
    machine.run();
    for head in bad {
        assert_eq!(machine.guest.rx.pop(), Some((head, 0)));
    }
    assert_eq!(ops(&machine.guest.receive()), [Op::Rst]);
}

#[test]
fn a_queue_that_is_broken_stops_the_device_and_ends_its_streams() {
    for broken in [
        |g: &mut Driver| g.tx.set_available_index(5000),
        |g: &mut Driver| g.tx.publish(128),
    ] {
        let mut machine = Machine::new();
        let (_, stream) = machine.connected();
        broken(&mut machine.guest);
        machine.guest.tx.notify.write(1).unwrap();
        assert!(matches!(machine.try_run(), Err(WorkerError::Queue(_))));
        assert!(is_at_end(&stream));
    }
}

#[test]
fn a_guest_that_gives_no_buffers_is_not_served_and_costs_nothing() {
    let mut machine = Machine::bare();
    let stream = offer(&machine.engine, StreamOffer::Listen(1024));
    let _ = machine.guest.send(header(PORTS, Op::Request), b"");
    // A flood of packets that each want an answer.
    let mut sent = 0;
    for _ in 0..2000 {
        if machine
            .guest
            .send(header(Ports { guest: 1, host: 1 }, Op::Rw), b"")
        {
            sent += 1;
        }
        machine.run();
    }
    // As many as are kept, and a full queue of those that are not looked at.
    assert!((MAX_REPLIES..=MAX_REPLIES + 128).contains(&sent), "{sent}");
    assert!(machine.worker.muxer().is_congested());
    (&stream).write_all(b"waiting").unwrap();
    machine.run();
    // Once there are buffers, all goes on.
    machine.guest.post_many(64);
    let mut packets = Vec::new();
    for _ in 0..100 {
        packets.extend(machine.step());
    }
    assert_eq!(ops(&packets).iter().filter(|op| **op == Op::Rst).count(), sent);
    assert!(packets.iter().any(|p| p.data == b"waiting"));
}

#[test]
fn connections_are_capped() {
    raise_descriptor_limit();
    let mut machine = Machine::new();
    let mut streams = Vec::new();
    for guest in 0..=MAX_CONNECTIONS as u32 {
        streams.push(offer(&machine.engine, StreamOffer::Listen(1024)));
        let answer = machine.send(header(Ports { guest, host: 1024 }, Op::Request), b"");
        let last = guest == MAX_CONNECTIONS as u32;
        assert_eq!(ops(&answer), [if last { Op::Rst } else { Op::Response }]);
    }
    assert_eq!(machine.connections(), MAX_CONNECTIONS);
    let refused = offer(&machine.engine, StreamOffer::Connect(1));
    assert!(machine.step().is_empty());
    assert!(is_at_end(&refused));
    // One ends, and its place goes to the stream that still waits.
    machine.send(header(Ports { guest: 5, host: 1024 }, Op::Rst), b"");
    assert!(is_at_end(&streams[5]));
    let again = Ports {
        guest: 9999,
        host: 1024,
    };
    assert_eq!(
        ops(&machine.send(header(again, Op::Request), b"")),
        [Op::Response]
    );
}

fn raise_descriptor_limit() {
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

#[test]
fn connections_take_turns() {
    let mut machine = Machine::bare();
    let busy = offer(&machine.engine, StreamOffer::Listen(1));
    let quiet = offer(&machine.engine, StreamOffer::Listen(2));
    machine
        .guest
        .send(header(Ports { guest: 1, host: 1 }, Op::Request), b"");
    machine
        .guest
        .send(header(Ports { guest: 2, host: 2 }, Op::Request), b"");
    machine.run();
    (&busy).write_all(&[1; 40_000]).unwrap();
    (&quiet).write_all(b"me too").unwrap();
    machine.guest.post_many(5);
    machine.run();
    let packets = machine.guest.receive();
    assert_eq!(packets.len(), 5);
    let turn = packets.iter().position(|p| p.data == b"me too").unwrap();
    assert!(turn <= 3, "{packets:?}");
}

#[test]
fn offers_that_are_not_as_agreed_are_refused_and_their_descriptors_closed() {
    let mut machine = Machine::new();
    let good = StreamOffer::Listen(1024).encode();
    let mut ends = Vec::new();
    let mut send = |bytes: &[u8], count: usize| {
        let pairs: Vec<_> = (0..count).map(|_| UnixStream::pair().unwrap()).collect();
        let descriptors: Vec<_> = pairs.iter().map(|(_, theirs)| theirs.as_raw_fd()).collect();
        send_packet(&machine.engine, bytes, &descriptors);
        ends.extend(pairs.into_iter().map(|(ours, _)| ours));
    };
    send(&good, 0);
    send(&good, 2);
    send(&good, 20);
    send(&good[..7], 1);
    send(&[good.as_slice(), &[0]].concat(), 1);
    send(&[0; 8], 1);
    send(&[9; 100], 3);
    machine.run();
    assert_eq!(machine.worker.muxer().offers().waiting(), 0);
    for end in &ends {
        assert!(is_at_end(end));
    }
    // Not a stream.
    let (device, other) = channel();
    send_packet(&machine.engine, &good, &[device.as_raw_fd()]);
    send_packet(&machine.engine, &good, &[machine.irq.as_raw_fd()]);
    machine.run();
    drop(device);
    let mut byte = [0u8];
    // SAFETY: room for one byte.
    let count = unsafe { libc::recv(other.as_raw_fd(), byte.as_mut_ptr().cast(), 1, 0) };
    assert_eq!(count, 0);
    // After all that, a good one.
    let (ports, stream) = machine.connected();
    machine.send(header(ports, Op::Rw), b"fine");
    assert_eq!(read_now(&stream), b"fine");
}

#[test]
fn waiting_offers_are_capped_and_abandoned_ones_make_room() {
    raise_descriptor_limit();
    let mut machine = Machine::new();
    let mut streams = Vec::new();
    for port in 0..super::offers::MAX_WAITING as u32 {
        streams.push(offer(&machine.engine, StreamOffer::Listen(port)));
        machine.run();
    }
    let refused = offer(&machine.engine, StreamOffer::Listen(9));
    machine.run();
    assert!(is_at_end(&refused));
    streams.truncate(100);
    let taken = offer(&machine.engine, StreamOffer::Listen(9));
    machine.run();
    assert!(!is_at_end(&taken));
    assert_eq!(machine.worker.muxer().offers().waiting(), 101);
}

#[test]
fn the_end_of_the_channel_leaves_connections_alone() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    machine.engine = channel().0;
    machine.run();
    machine.send(header(ports, Op::Rw), b"on and on");
    assert_eq!(read_now(&stream), b"on and on");
}

#[test]
fn a_transport_reset_ends_connections_and_tells_the_guest() {
    let mut machine = Machine::new();
    let (_, stream) = machine.connected();
    let _waiting = offer(&machine.engine, StreamOffer::Listen(1024));
    machine.run();
    machine.reset.store(true, Ordering::Release);
    machine.again.write(1).unwrap();
    machine.run();
    assert!(is_at_end(&stream));
    assert_eq!(machine.connections(), 0);
    // The guest gives the buffer late.
    machine
        .guest
        .memory
        .write_obj(u32::MAX, GuestAddress(TX_DATA))
        .unwrap();
    machine.guest.events.add(&[Part {
        address: TX_DATA,
        length: 4,
        write: true,
    }]);
    machine.guest.events.notify.write(1).unwrap();
    machine.run();
    assert_eq!(machine.guest.events.pop().unwrap().1, 4);
    let event: u32 = machine.guest.memory.read_obj(GuestAddress(TX_DATA)).unwrap();
    assert_eq!(event, 0);
    // What waits for the guest goes on to.
    assert_eq!(
        ops(&machine.send(header(PORTS, Op::Request), b"")),
        [Op::Response]
    );
}

/// Moves `count` bytes each way over one connection, the guest minding its credit; both ends compare.
fn transfer(machine: &mut Machine, ports: Ports, stream: &UnixStream, count: usize) {
    let pattern = |i: usize, seed: usize| (i.wrapping_mul(31).wrapping_add(i >> 8).wrapping_add(seed)) as u8;
    let (mut host_sent, mut host_got, mut guest_sent, mut guest_got) = (0, 0, 0, 0);
    let mut forwarded = 0u32;
    let mut idle = 0;
    let (mut guest_told, mut round) = (0u32, 0usize);
    while host_got < count || guest_got < count {
        let before = (host_sent, host_got, guest_sent, guest_got);
        round += 1;
        // The host writes and reads in odd portions.
        let end = count.min(host_sent + 1 + round * 7919 % 30_000);
        let chunk: Vec<u8> = (host_sent..end).map(|i| pattern(i, 1)).collect();
        if !chunk.is_empty() {
            match (&*stream).write(&chunk) {
                Ok(n) => host_sent += n,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        let mut chunk = vec![0; 1 + round * 104_729 % 50_000];
        match (&*stream).read(&mut chunk) {
            Ok(n) => {
                for byte in &chunk[..n] {
                    assert_eq!(*byte, pattern(host_got, 2));
                    host_got += 1;
                }
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        // So does the guest.
        for _ in 0..8 {
            let credit = BUF_ALLOC - (guest_sent as u32).wrapping_sub(forwarded);
            let n = (count - guest_sent)
                .min(credit as usize)
                .min(1 + round * 613 % 7000);
            if n == 0 {
                break;
            }
            let chunk: Vec<u8> = (guest_sent..guest_sent + n).map(|i| pattern(i, 2)).collect();
            let header = Header {
                len: n as u32,
                fwd_cnt: guest_got as u32,
                ..header(ports, Op::Rw)
            };
            if !machine.guest.send(header, &chunk) {
                break;
            }
            guest_sent += n;
            guest_told = guest_got as u32;
        }
        machine.run();
        for packet in machine.guest.receive() {
            forwarded = packet.header.fwd_cnt;
            assert_eq!({ packet.header.buf_alloc }, BUF_ALLOC);
            for byte in &packet.data {
                assert_eq!(*byte, pattern(guest_got, 1));
                guest_got += 1;
            }
        }
        assert!(
            guest_got as u32 - guest_told <= GUEST_BUF,
            "the guest's buffer overflows"
        );
        if guest_got as u32 != guest_told && round % 3 == 0 {
            guest_told = guest_got as u32;
            let update = Header {
                fwd_cnt: guest_told,
                ..header(ports, Op::CreditUpdate)
            };
            assert!(machine.guest.send(update, b""));
            machine.run();
        }
        idle = if before == (host_sent, host_got, guest_sent, guest_got) {
            idle + 1
        } else {
            0
        };
        assert!(idle < 20, "stuck at {before:?}");
    }
    assert_eq!((host_sent, guest_sent), (count, count));
}

#[test]
fn bytes_arrive_unchanged_both_ways() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    transfer(&mut machine, ports, &stream, 3_000_000);
    assert!(machine.send(shutdown(ports, SHUTDOWN_SEND), b"").len() <= 2);
    assert!(is_at_end(&stream));
}

/// What a driver that keeps no rule may do.
#[derive(Clone, Debug)]
enum Act {
    Packet {
        src_cid: u64,
        dst_cid: u64,
        guest: u32,
        host: u32,
        len: u32,
        kind: u16,
        op: u16,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
        data: usize,
    },
    Listen(u32),
    Connect(u32),
    HostWrite(usize),
    HostRead(usize),
    HostClose(usize),
    HostShutdown(usize),
    Post(usize),
    Receive,
}

fn act() -> impl Strategy<Value = Act> {
    let packet = (
        prop_oneof![20 => Just(GUEST_CID), 1 => any::<u64>()],
        prop_oneof![20 => Just(HOST_CID), 1 => any::<u64>()],
        prop_oneof![10 => 0u32..3, 1 => any::<u32>()],
        prop_oneof![10 => 0u32..3, 5 => (1u32 << 30)..(1 << 30) + 3, 1 => any::<u32>()],
        (
            0usize..5000,
            prop_oneof![20 => Just(None), 1 => any::<u32>().prop_map(Some)],
        ),
        prop_oneof![20 => Just(TYPE_STREAM), 1 => any::<u16>()],
        prop_oneof![5 => Just(1u16), 5 => Just(2u16), 20 => Just(5u16), 10 => 3u16..8, 1 => any::<u16>()],
        any::<u32>(),
        prop_oneof![5 => Just(GUEST_BUF), 1 => any::<u32>(), 1 => 0u32..2],
        prop_oneof![5 => 0u32..10_000, 1 => any::<u32>()],
    )
        .prop_map(
            |(src_cid, dst_cid, guest, host, (data, len), kind, op, flags, buf_alloc, fwd_cnt)| Act::Packet {
                src_cid,
                dst_cid,
                guest,
                host,
                len: len.unwrap_or(data as u32),
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                data,
            },
        );
    prop_oneof![
        20 => packet,
        3 => (0u32..3).prop_map(Act::Listen),
        1 => (0u32..3).prop_map(Act::Connect),
        3 => any::<usize>().prop_map(Act::HostWrite),
        2 => any::<usize>().prop_map(Act::HostRead),
        1 => any::<usize>().prop_map(Act::HostClose),
        1 => any::<usize>().prop_map(Act::HostShutdown),
        2 => (0usize..20).prop_map(Act::Post),
        2 => Just(Act::Receive),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_packets_harm(acts in prop::collection::vec(act(), 1..150)) {
        let mut machine = Machine::bare();
        let mut streams: VecDeque<UnixStream> = VecDeque::new();
        let mut places: Vec<u64> = (0..60).collect();
        for act in acts {
            match act {
                Act::Packet { src_cid, dst_cid, guest, host, len, kind, op, flags, buf_alloc, fwd_cnt, data } => {
                    let header = Header {
                        src_cid, dst_cid, src_port: guest, dst_port: host, len, kind, op, flags, buf_alloc, fwd_cnt,
                    };
                    machine.guest.send(header, &vec![op as u8; data]);
                }
                Act::Listen(port) => streams.push_back(offer(&machine.engine, StreamOffer::Listen(port))),
                Act::Connect(port) => streams.push_back(offer(&machine.engine, StreamOffer::Connect(port))),
                Act::HostWrite(at) => {
                    if let Some(mut stream) = streams.get(at % streams.len().max(1)) {
                        let _ = stream.write(&[1; 3000]);
                    }
                }
                Act::HostRead(at) => {
                    if let Some(mut stream) = streams.get(at % streams.len().max(1)) {
                        let _ = stream.read(&mut [0; 3000]);
                    }
                }
                Act::HostClose(at) => {
                    if !streams.is_empty() {
                        streams.remove(at % streams.len());
                    }
                }
                Act::HostShutdown(at) => {
                    if let Some(stream) = streams.get(at % streams.len().max(1)) {
                        let _ = stream.shutdown(if at % 2 == 0 { Shutdown::Read } else { Shutdown::Write });
                    }
                }
                Act::Post(count) => {
                    for place in places.drain(..count.min(places.len())) {
                        machine.guest.post(place);
                    }
                    machine.guest.rx.notify.write(1).unwrap();
                }
                Act::Receive => {
                    while let Some((head, length)) = machine.guest.rx.pop() {
                        prop_assert!(length == 0 || (length as usize >= HEADER_LEN && length <= RX_LEN));
                        places.push(machine.guest.rx_place[usize::from(head)]);
                    }
                }
            }
            machine.run();
            let muxer = machine.worker.muxer();
            prop_assert!(muxer.backlog() <= muxer.connections() * BUF_ALLOC as usize);
            prop_assert!(muxer.connections() <= streams.len() + 150);
        }
        // Whatever came before: when the host is gone and time has passed, no connection is left but those for
        // which the guest has no room.
        streams.clear();
        for place in std::mem::take(&mut places) {
            machine.guest.post(place);
        }
        machine.guest.rx.notify.write(1).unwrap();
        for _ in 0..10 {
            machine.step();
        }
        machine.worker.expire_all();
        machine.run();
        prop_assert_eq!(machine.worker.muxer().next_deadline(), None);
        prop_assert_eq!(machine.connections(), machine.worker.muxer().without_credit());
        machine.reset.store(true, Ordering::Release);
        machine.again.write(1).unwrap();
        machine.run();
        prop_assert_eq!(machine.connections(), 0);
    }

    #[test]
    fn no_rings_harm(bytes in prop::collection::vec(any::<u8>(), 2048), index in 0u16..130, at in 0u64..0x4000) {
        let mut machine = Machine::bare();
        let _stream = offer(&machine.engine, StreamOffer::Listen(0));
        // Descriptors and available rings of all queues, overwritten in part.
        for queue in 0..3 {
            let address = queue * GuestQueue::SPAN + at % 0x2800;
            machine.guest.memory.write_slice(&bytes[..1024], GuestAddress(address)).unwrap();
        }
        machine.guest.tx.set_available_index(index);
        machine.guest.rx.set_available_index(index);
        for queue in [&machine.guest.tx, &machine.guest.rx, &machine.guest.events] {
            queue.notify.write(1).unwrap();
        }
        // It may stop, it may go on.
        let _ = machine.try_run();
    }
}

/// The device as the transport sees it, its thread running.
struct Active {
    device: Vsock,
    guest: Driver,
    engine: OwnedFd,
    irq: EventFd,
}

fn activation(guest: &Driver) -> (Activation, EventFd) {
    let (interrupt, irq) = interrupt();
    (
        Activation {
            memory: guest.memory.clone(),
            queues: vec![
                guest.rx.device_side(true),
                guest.tx.device_side(true),
                guest.events.device_side(true),
            ],
            interrupt,
            features: 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX,
        },
        irq,
    )
}

impl Active {
    fn new() -> Self {
        let (channel, engine) = channel();
        let mut guest = Driver::new();
        guest.post_many(64);
        let mut device = Vsock::new(GUEST_CID, channel);
        let (activation, irq) = activation(&guest);
        device.activate(activation).unwrap();
        Self {
            device,
            guest,
            engine,
            irq,
        }
    }

    /// Waits for packets.
    fn receive(&mut self) -> Vec<Packet> {
        let start = Instant::now();
        loop {
            let packets = self.guest.receive();
            if !packets.is_empty() {
                return packets;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no packet came");
            let mut poll = libc::pollfd {
                fd: self.irq.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one entry.
            unsafe { libc::poll(&raw mut poll, 1, 1000) };
            let _ = self.irq.read();
        }
    }
}

#[test]
fn the_running_device_serves_and_is_reset() {
    let mut active = Active::new();
    for _ in 0..2 {
        let stream = offer(&active.engine, StreamOffer::Listen(1024));
        stream.set_nonblocking(false).unwrap();
        assert!(active.guest.send(header(PORTS, Op::Request), b""));
        assert_eq!(ops(&active.receive()), [Op::Response]);
        assert!(active.guest.send(
            Header {
                len: 4,
                ..header(PORTS, Op::Rw)
            },
            b"ping"
        ));
        let mut text = [0; 4];
        (&stream).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"ping");
        (&stream).write_all(b"pong").unwrap();
        let packets = active.receive();
        assert_eq!(packets[0].data, b"pong");
        // The driver starts anew: the connection ends, the channel does not.
        active.device.reset();
        assert_eq!((&stream).read(&mut text).unwrap(), 0);
        active.guest = Driver::new();
        active.guest.post_many(64);
        let (activation, irq) = activation(&active.guest);
        active.irq = irq;
        active.device.activate(activation).unwrap();
    }
}

#[test]
fn an_active_device_is_not_activated_twice_and_needs_its_queues() {
    let mut active = Active::new();
    let (second, _) = activation(&active.guest);
    assert!(active.device.activate(second).is_err());
    active.device.reset();
    let (mut missing, _) = activation(&active.guest);
    missing.queues[1].queue.set_ready(false);
    assert!(active.device.activate(missing).is_err());
    let (mut missing, _) = activation(&active.guest);
    missing.queues.truncate(2);
    assert!(active.device.activate(missing).is_err());
    // None of these has cost it its channel.
    let (good, _) = activation(&active.guest);
    active.device.activate(good).unwrap();
}

#[test]
fn a_restored_device_tells_its_guest_that_connections_are_lost() {
    let active = Active::new();
    let json = serde_json::to_string(&active.device.save()).unwrap();
    let state: State = serde_json::from_str(&json).unwrap();
    assert_eq!(
        state,
        State {
            guest_cid: GUEST_CID,
            transport_reset: true
        }
    );
    let mut guest = Driver::new();
    guest.events.add(&[Part {
        address: TX_DATA,
        length: 4,
        write: true,
    }]);
    let mut copy = Vsock::restore(state.clone(), channel().0);
    assert_eq!(copy.save(), state);
    assert_eq!(copy.config(), GUEST_CID.to_le_bytes());
    let (activation, irq) = activation(&guest);
    copy.activate(activation).unwrap();
    let start = Instant::now();
    while guest.events.pop().is_none() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(1));
    }
    copy.reset();
    assert_eq!(irq.read().unwrap(), 1);
    assert!(!copy.save().transport_reset);
    // The other one, running, is told to.
    active.device.transport_reset();
    assert!(active.device.save().transport_reset);
}
