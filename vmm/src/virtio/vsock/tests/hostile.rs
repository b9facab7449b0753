//! Guests that keep no rules, and the limits that hold then.

use super::machine::*;
use crate::virtio::guest_queue::{GuestQueue, Part};
use crate::virtio::vsock::credit::BUF_ALLOC;
use crate::virtio::vsock::muxer::{MAX_CONNECTIONS, MAX_REPLIES};
use crate::virtio::vsock::packet::{HEADER_LEN, Header, Op, Ports, TYPE_STREAM};
use crate::worker::WorkerError;
use husk_vmm_protocol::vsock::{GUEST_CID, HOST_CID, StreamOffer};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

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
