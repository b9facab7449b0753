//! Guests that keep no rules.

use super::machine::*;
use crate::virtio::guest_queue::{GuestQueue, Part};
use crate::worker::WorkerError;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// One descriptor as bytes.
fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    [
        &address.to_le_bytes()[..],
        &length.to_le_bytes(),
        &flags.to_le_bytes(),
        &next.to_le_bytes(),
    ]
    .concat()
}

/// Fills the first places of the table with chains of which none is of use, of buffers with flag `own`, the wrong
/// one of which is `wrong`. Their heads.
fn malformed(machine: &mut Machine, tx: bool) -> Vec<u16> {
    let (own, wrong) = if tx { (0, WRITE) } else { (WRITE, 0) };
    let nested = machine.place(&descriptor(TX_DATA, 16, INDIRECT, 0));
    let long = descriptor(TX_DATA, 1, own | NEXT, 0).repeat(1);
    let circle = machine.place(&long);
    let many: Vec<u8> = (0..600u16)
        .flat_map(|at| descriptor(TX_DATA, 1, own | if at < 599 { NEXT } else { 0 }, at + 1))
        .collect();
    let many = machine.place(&many);
    let queue = if tx {
        &mut machine.guest[0].tx
    } else {
        &mut machine.guest[0].rx
    };
    // A circle; past the end; over the end of the address space; the wrong direction, alone, second, and first.
    queue.store(0, TX_DATA, 44, own | NEXT, 1);
    queue.store(1, TX_DATA, 44, own | NEXT, 0);
    queue.store(2, SIZE - 1, 44, own, 0);
    queue.store(3, u64::MAX - 3, 44, own, 0);
    queue.store(4, TX_DATA, 1500, wrong, 0);
    queue.store(5, TX_DATA, 1500, own | NEXT, 6);
    queue.store(6, TX_DATA, 1500, wrong, 0);
    queue.store(7, TX_DATA, 1500, wrong | NEXT, 8);
    queue.store(8, TX_DATA, 1500, own, 0);
    // An indirect table within one; of an odd size; out of memory; empty; in a circle; of more than there may be.
    queue.store(9, nested, 16, INDIRECT, 0);
    queue.store(10, nested, 15, INDIRECT, 0);
    queue.store(11, SIZE, 16, INDIRECT, 0);
    queue.store(12, nested, 0, INDIRECT, 0);
    queue.store(13, circle, 16, INDIRECT, 0);
    queue.store(14, many, 600 * 16, INDIRECT, 0);
    // Nothing; less than a header, alone and in pieces; more than 4 GiB; on to where there is no descriptor.
    queue.store(15, TX_DATA, 0, own, 0);
    queue.store(16, TX_DATA, 11, own, 0);
    queue.store(17, TX_DATA, 5, own | NEXT, 18);
    queue.store(18, TX_DATA, 6, own, 0);
    queue.store(19, TX_DATA, u32::MAX, own | NEXT, 20);
    queue.store(20, TX_DATA, u32::MAX, own, 0);
    queue.store(21, TX_DATA, 1500, own | NEXT, 256);
    vec![0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21]
}

#[test]
fn malformed_frames_are_returned_and_the_device_goes_on() {
    let mut machine = Machine::new();
    let heads = malformed(&mut machine, true);
    for head in &heads {
        machine.guest[0].tx.publish(*head);
    }
    let sent = frame(200, 1);
    let address = machine.place(&sent);
    machine.guest[0].tx.store(100, address, 200, 0, 0);
    machine.guest[0].tx.publish(100);
    machine.guest[0].tx.notify.write(1).unwrap();
    machine.run();
    for head in heads.into_iter().chain([100]) {
        assert_eq!(machine.guest[0].tx.pop(), Some((head, 0)));
    }
    assert_eq!(machine.seen(0), [sent]);
}

#[test]
fn malformed_buffers_are_returned_and_the_device_goes_on() {
    for features in [all_features(), without_merging()] {
        let mut machine = Machine::with(256, features);
        let heads = malformed(&mut machine, false);
        for head in &heads {
            machine.guest[0].rx.publish(*head);
        }
        machine.guest[0].rx.store(100, RX_DATA, 2048, WRITE, 0);
        machine.guest[0].rx.publish(100);
        let sent = frame(200, 1);
        machine.network[0].send(&sent).unwrap();
        machine.run();
        for head in heads {
            assert_eq!(machine.guest[0].rx.pop(), Some((head, 0)));
        }
        assert_eq!(machine.guest[0].rx.pop(), Some((100, 200)));
        let mut found = [0; 200];
        machine
            .memory
            .read_slice(&mut found, GuestAddress(RX_DATA))
            .unwrap();
        assert_eq!(body(&found), body(&sent));
    }
}

#[test]
fn a_guest_that_gives_only_useless_buffers_keeps_nobody_busy() {
    let mut machine = Machine::new();
    machine.network[0].send(&frame(200, 1)).unwrap();
    machine.guest[0].rx.store(0, RX_DATA, 4, WRITE, 0);
    for _ in 0..50 {
        for _ in 0..250 {
            machine.guest[0].rx.publish(0);
        }
        machine.guest[0].rx.notify.write(1).unwrap();
        assert!(machine.run() < 20);
        for _ in 0..250 {
            assert_eq!(machine.guest[0].rx.pop(), Some((0, 0)));
        }
        assert_eq!(machine.run(), 0);
    }
    machine.guest[0].rx.store(0, RX_DATA, 2048, WRITE, 0);
    machine.guest[0].rx.publish(0);
    machine.guest[0].rx.notify.write(1).unwrap();
    machine.run();
    assert_eq!(machine.guest[0].rx.pop(), Some((0, 200)));
}

#[test]
fn buffers_beyond_the_queues_places_end_it() {
    let mut machine = Machine::with(4, all_features());
    machine.guest[0].rx.store(0, RX_DATA, 2048, WRITE, 0);
    for _ in 0..3 {
        for _ in 0..2 {
            machine.guest[0].rx.publish(0);
        }
        machine.network[0].send(&frame(200, 1)).unwrap();
        machine.run();
    }
    // Three are in use. None of them comes back by being given again.
    for _ in 0..2 {
        machine.guest[0].rx.publish(0);
    }
    machine.network[0].send(&frame(200, 1)).unwrap();
    assert!(matches!(machine.try_run(), Err(WorkerError::Protocol(_))));
}

#[test]
fn rings_beyond_use_end_the_worker() {
    for ring in 0..3 {
        let mut machine = Machine::build(2, 64, all_features());
        let queue = match ring {
            0 => &mut machine.guest[0].rx,
            1 => &mut machine.guest[0].tx,
            _ => &mut machine.control,
        };
        queue.set_available_index(65);
        queue.notify.write(1).unwrap();
        machine.network[0].send(&frame(200, 1)).unwrap();
        assert!(matches!(machine.try_run(), Err(WorkerError::Queue(_))));
    }
    // A head that is no descriptor.
    for tx in [false, true] {
        let mut machine = Machine::new();
        let queue = if tx {
            &mut machine.guest[0].tx
        } else {
            &mut machine.guest[0].rx
        };
        queue.publish(256);
        queue.notify.write(1).unwrap();
        machine.network[0].send(&frame(200, 1)).unwrap();
        assert!(machine.try_run().is_err());
    }
}

#[test]
fn a_buffer_is_what_it_was_when_it_was_given() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(2);
    machine.network[0].send(&frame(100, 1)).unwrap();
    assert_eq!(machine.step().len(), 1);
    // The second is held by now.
    for index in 0..256 {
        machine.guest[0].rx.store(index, SIZE * 2, u32::MAX, NEXT, index);
    }
    machine.network[0].send(&frame(100, 2)).unwrap();
    assert_eq!(bodies(&machine.step()), [body(&frame(100, 2))]);
}

#[derive(Clone, Debug)]
enum Act {
    Frame(usize),
    Flood(usize),
    Post(Vec<(u64, u32, bool)>),
    Send(Vec<(u64, u32, bool)>),
    See,
    Pairs(u16),
}

fn parts() -> impl Strategy<Value = Vec<(u64, u32, bool)>> {
    let address = prop_oneof![30 => RX_DATA..SIZE, 1 => any::<u64>(), 1 => SIZE - 4096..SIZE + 4096];
    let length = prop_oneof![10 => 0u32..5000, 3 => 0u32..30, 1 => any::<u32>()];
    prop::collection::vec((address, length, prop::bool::weighted(0.95)), 1..6)
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        5 => (1usize..3000).prop_map(Act::Frame),
        2 => (1usize..70_000).prop_map(Act::Frame),
        1 => (0usize..100).prop_map(Act::Flood),
        10 => parts().prop_map(Act::Post),
        6 => parts().prop_map(Act::Send),
        2 => Just(Act::See),
        1 => (0u16..4).prop_map(Act::Pairs),
    ]
}

fn described(parts: &[(u64, u32, bool)], write: bool) -> Vec<Part> {
    parts
        .iter()
        .map(|(address, length, right)| Part {
            address: *address,
            length: *length,
            write: write == *right,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_buffers_harm(acts in prop::collection::vec(act(), 1..100), merge: bool) {
        let features = if merge { all_features() } else { without_merging() };
        let mut machine = Machine::build(2, 64, features);
        for act in acts {
            match act {
                Act::Frame(length) => {
                    let _ = machine.network[length % 2].send(&frame(length, 1));
                }
                Act::Flood(count) => {
                    for _ in 0..count {
                        let _ = machine.network[0].send(&frame(1500, 1));
                    }
                }
                Act::Post(parts) => {
                    let rx = &mut machine.guest[0].rx;
                    while rx.pop().is_some() {}
                    if rx.room() >= parts.len() {
                        rx.add(&described(&parts, true));
                        rx.notify.write(1).unwrap();
                    }
                }
                Act::Send(parts) => {
                    let tx = &mut machine.guest[0].tx;
                    while tx.pop().is_some() {}
                    if tx.room() >= parts.len() {
                        tx.add(&described(&parts, false));
                        tx.notify.write(1).unwrap();
                    }
                }
                Act::See => {
                    let seen = machine.seen(0);
                    prop_assert!(seen.iter().all(|frame| (12..=65_562).contains(&frame.len())));
                }
                Act::Pairs(count) => {
                    machine.command(&[&[4, 0][..], &count.to_le_bytes()].concat());
                }
            }
            machine.run();
        }
        // Whatever came before: frames get through to a guest that gives room for them, if only its small buffers
        // are used up by small frames first.
        machine.command(&[4, 0, 1, 0]);
        let mut through = false;
        for _ in 0..1000 {
            let guest = &mut machine.guest[0];
            through |= std::iter::from_fn(|| guest.rx.pop()).any(|(_, length)| length == 1999);
            if through {
                break;
            }
            if guest.rx.room() > 0 {
                guest.rx.add(&[room(RX_DATA, 4096)]);
                guest.rx.notify.write(1).unwrap();
            }
            let _ = machine.network[0].send(&frame(12, 1));
            let _ = machine.network[0].send(&frame(1999, 1));
            machine.seen(0);
            machine.run();
        }
        prop_assert!(through);
        machine.seen(0);
        machine.run();
        while machine.guest[0].tx.pop().is_some() {}
        prop_assert_eq!(machine.guest[0].tx.room(), 64);
    }

    #[test]
    fn no_rings_harm(bytes in prop::collection::vec(any::<u8>(), 2048), index in 0u16..300, at in 0u64..0x4000) {
        let mut machine = Machine::new();
        // Descriptors and available rings of all queues, overwritten in part.
        for queue in 0..3 {
            let address = queue * GuestQueue::SPAN + at % 0x2800;
            machine.memory.write_slice(&bytes[..1024], GuestAddress(address)).unwrap();
        }
        machine.guest[0].tx.set_available_index(index);
        machine.guest[0].rx.set_available_index(index);
        machine.network[0].send(&frame(2000, 1)).unwrap();
        machine.network[0].send(&frame(60_000, 1)).unwrap();
        for queue in [&machine.guest[0].tx, &machine.guest[0].rx, &machine.control] {
            queue.notify.write(1).unwrap();
        }
        // It may stop, it may go on.
        let _ = machine.try_run();
    }
}
