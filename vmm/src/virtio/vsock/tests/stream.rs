//! What happens on a connection: data, credit, half-closes.

use super::machine::*;
use crate::virtio::vsock::connection::CLOSE_TIMEOUT;
use crate::virtio::vsock::credit::BUF_ALLOC;
use crate::virtio::vsock::packet::{Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use husk_vmm_protocol::vsock::StreamOffer;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

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
    let before = Instant::now();
    machine.step();
    assert_eq!(machine.connections(), 1);
    let now = Instant::now();
    let deadline = machine.worker.muxer().next_deadline().unwrap();
    assert!(before + CLOSE_TIMEOUT <= deadline && deadline <= now + CLOSE_TIMEOUT);
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
    let bytes = |packets: &[Packet]| packets.iter().map(|p| p.data.len()).sum::<usize>();
    machine.send(with(Op::Request, 10_000, 0), b"");
    (&stream).write_all(&[7; 50_000]).unwrap();
    let packets = machine.step();
    assert_eq!(bytes(&packets), 10_000);
    assert!(ops(&packets).ends_with(&[Op::Rw, Op::CreditRequest]));
    // Nothing new: not asked a second time.
    assert!(machine.send(with(Op::CreditUpdate, 10_000, 0), b"").is_empty());
    // A count of what never was sent gives nothing.
    assert!(
        machine
            .send(with(Op::CreditUpdate, 10_000, 10_001), b"")
            .is_empty()
    );
    let packets = machine.send(with(Op::CreditUpdate, 10_000, 600), b"");
    assert_eq!(ops(&packets), [Op::Rw, Op::CreditRequest]);
    assert_eq!(bytes(&packets), 600);
    let packets = machine.send(with(Op::CreditUpdate, 100_000, 10_600), b"");
    assert_eq!(bytes(&packets), 39_400);
    let packets = machine.send(with(Op::CreditRequest, 100_000, 50_000), b"");
    assert_eq!(ops(&packets), [Op::CreditUpdate]);
}

#[test]
fn many_small_packets_do_not_overrun_the_guest() {
    let mut machine = Machine::new();
    let (ports, stream) = machine.connected();
    let mut packets = Vec::new();
    for _ in 0..200 {
        (&stream)
            .write_all(b"a line of input, which nobody reads yet\n")
            .unwrap();
        packets.extend(machine.step());
    }
    // Linux holds a bit more than one for each KiB of its buffer.
    assert_eq!(packets.len() as u32, GUEST_BUF / 1024 + 1);
    assert_eq!(packets.last().unwrap().op(), Some(Op::CreditRequest));
    let got: usize = packets.iter().map(|p| p.data.len()).sum();
    // All that has gathered comes in large ones.
    let update = Header {
        fwd_cnt: got as u32,
        ..header(ports, Op::CreditUpdate)
    };
    let packets = machine.send(update, b"");
    assert!(packets[0].data.len() > 4000);
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
