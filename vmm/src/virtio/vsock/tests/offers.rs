//! How streams and the guest's connections find each other.

use super::machine::*;
use crate::virtio::vsock::connection::CONNECT_TIMEOUT;
use crate::virtio::vsock::credit::BUF_ALLOC;
use crate::virtio::vsock::offers::MAX_WAITING;
use crate::virtio::vsock::packet::{Op, Ports, SHUTDOWN_BOTH};
use crate::worker::{Handler, READABLE};
use husk_vmm_protocol::vsock::StreamOffer;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

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
    let start = Instant::now();
    let stream = offer(&machine.engine, StreamOffer::Connect(22));
    assert_eq!(ops(&machine.step()), [Op::Request]);
    let deadline = machine.worker.muxer().next_deadline().unwrap();
    assert!(deadline <= Instant::now() + CONNECT_TIMEOUT);
    while !is_at_end(&stream) {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(10));
        machine.run();
    }
    assert!(start.elapsed() >= CONNECT_TIMEOUT);
    assert_eq!(ops(&machine.step()), [Op::Rst]);
    // No timer is left that rings.
    machine.run();
    assert_eq!(machine.connections(), 0);
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
    for port in 0..MAX_WAITING as u32 {
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
