//! A connection without queues and table.

use super::connection::{Connection, Fate, Phase};
use super::credit::BUF_ALLOC;
use super::packet::{HEADER_LEN, Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::guest_queue::memory;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use vm_memory::{Bytes, GuestAddress};

const PORTS: Ports = Ports { guest: 1, host: 2 };

fn buffers(memory: &Memory, address: u64, length: usize) -> Buffers<'_> {
    Buffers::at(memory, GuestAddress(address), length)
}

struct Pair {
    memory: Memory,
    connection: Connection,
    stream: UnixStream,
}

impl Pair {
    fn new() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let request = Header {
            buf_alloc: BUF_ALLOC,
            src_port: PORTS.guest,
            dst_port: PORTS.host,
            ..Header::default()
        };
        let mut pair = Self {
            memory: memory(0x10_0000),
            connection: Connection::accept(&request, theirs.into()),
            stream: ours,
        };
        assert_eq!(pair.next().map(|(op, _)| op), Some(Op::Response));
        pair
    }

    /// The next packet to the guest: its operation and its data.
    fn next(&mut self) -> Option<(Op, Vec<u8>)> {
        let mut room = buffers(&self.memory, 0x8_0000, 4096 - HEADER_LEN);
        let (header, fate) = self.connection.next(3, &mut room);
        assert_eq!(fate, Fate::Live);
        let header = header?;
        let mut data = vec![0; header.len as usize];
        self.memory.read_slice(&mut data, GuestAddress(0x8_0000)).unwrap();
        Some((Op::from_number(header.op).unwrap(), data))
    }

    fn receive(&mut self, op: Op, flags: u32, data: &[u8]) -> Fate {
        self.memory.write_slice(data, GuestAddress(0)).unwrap();
        let header = Header {
            flags,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        };
        let mut payload = buffers(&self.memory, 0, data.len());
        self.connection.receive(&header, op, &mut payload)
    }
}

#[test]
fn a_packet_is_announced_only_if_there_may_be_one() {
    let mut pair = Pair::new();
    // It has yet to be tried.
    assert!(pair.connection.has_packet());
    assert_eq!(pair.next(), None);
    assert!(!pair.connection.has_packet());
    pair.stream.write_all(b"x").unwrap();
    assert_eq!(pair.connection.event(), Fate::Live);
    assert!(pair.connection.has_packet());
    assert_eq!(pair.next(), Some((Op::Rw, b"x".to_vec())));
}

#[test]
fn an_event_that_is_none_changes_nothing() {
    let mut pair = Pair::new();
    for _ in 0..3 {
        assert_eq!(pair.connection.event(), Fate::Live);
        assert_eq!(pair.next(), None);
    }
    assert_eq!(pair.connection.phase(), Phase::Established);
}

#[test]
fn the_order_of_half_closes_does_not_matter() {
    for guest_first in [true, false] {
        let mut pair = Pair::new();
        for guest in [guest_first, !guest_first] {
            if guest {
                assert_eq!(pair.receive(Op::Shutdown, SHUTDOWN_SEND, b""), Fate::Live);
                assert_eq!(pair.stream.read(&mut [0]).unwrap(), 0);
            } else {
                pair.stream.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(pair.connection.event(), Fate::Live);
                while pair.next().is_some() {}
            }
        }
        assert_eq!(pair.connection.phase(), Phase::Closing);
        assert_eq!(pair.receive(Op::Shutdown, SHUTDOWN_BOTH, b""), Fate::Reset);
    }
}

#[test]
fn shutdown_flags_of_the_guest_add_up() {
    let mut pair = Pair::new();
    assert_eq!(pair.receive(Op::Shutdown, SHUTDOWN_RECEIVE, b""), Fate::Live);
    assert_eq!(pair.receive(Op::Shutdown, 0, b""), Fate::Live);
    assert_eq!(pair.receive(Op::Shutdown, SHUTDOWN_SEND | 0xf0, b""), Fate::Reset);
}

#[test]
fn what_nobody_reads_takes_no_more_memory_than_the_credit() {
    let mut pair = Pair::new();
    let mut sent = 0;
    while pair.receive(Op::Rw, 0, &[7; 4000]) == Fate::Live {
        sent += 4000;
        assert!(sent < 100 * BUF_ALLOC, "the credit is without end");
    }
    assert!(pair.connection.backlog() > BUF_ALLOC as usize - 4000);
    assert!(pair.connection.backlog_memory() <= BUF_ALLOC as usize);
}

proptest! {
    #[test]
    fn any_order_of_things_keeps_the_buffer_and_ends(
        steps in prop::collection::vec((0u8..9, 0usize..6000, 0u32..4), 1..200)
    ) {
        let mut pair = Pair::new();
        let mut stream = Some(pair.stream.try_clone().unwrap());
        let mut sent = 0usize;
        let mut got = 0usize;
        for (what, length, flags) in steps {
            let fate = match what {
                0..4 => {
                    sent += length;
                    pair.receive(Op::Rw, 0, &vec![7; length])
                }
                4 => pair.receive(Op::CreditRequest, 0, b""),
                5 if length % 8 == 0 => pair.receive(Op::Shutdown, flags, b""),
                6 => {
                    let mut bytes = vec![0; length];
                    got += stream.as_mut().and_then(|s| s.read(&mut bytes).ok()).unwrap_or(0);
                    pair.connection.event()
                }
                7 => {
                    let _ = stream.as_mut().map(|s| s.write(&vec![8; length]));
                    pair.connection.event()
                }
                _ => {
                    let mut room = buffers(&pair.memory, 0x8_0000, 4000);
                    pair.connection.next(3, &mut room).1
                }
            };
            prop_assert!(pair.connection.backlog() <= BUF_ALLOC as usize);
            prop_assert!(got <= sent);
            prop_assert_eq!(pair.connection.wants_output(), pair.connection.backlog() > 0);
            if fate != Fate::Live {
                return Ok(());
            }
        }
        drop(stream.take());
        // The other handle is the last.
        pair.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let _ = pair.connection.event();
        for _ in 0..1000 {
            let mut room = buffers(&pair.memory, 0x8_0000, 4000);
            if pair.connection.next(3, &mut room).0.is_none() {
                break;
            }
        }
        prop_assert!(!pair.connection.has_packet());
        prop_assert_eq!(pair.connection.backlog(), 0);
    }
}
