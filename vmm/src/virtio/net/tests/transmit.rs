//! Frames from the guest.

use super::machine::*;
use crate::virtio::net::features::bits;
use crate::virtio::net::header::{LEN, MAX_FRAME};
use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;

#[test]
fn a_frame_gets_to_the_tap_as_it_is() {
    let mut machine = Machine::new();
    let mut sent = frame(1514 + LEN, 1);
    // A checksum to be made.
    sent[..8].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0]);
    let head = machine.send(&sent);
    machine.run();
    assert_eq!(machine.seen(0), [sent]);
    assert_eq!(machine.guest[0].tx.pop(), Some((head, 0)));
    assert_eq!(machine.irq.read().unwrap(), 1);
}

#[test]
fn pieces_are_put_together() {
    let mut machine = Machine::new();
    let sent = frame(3000, 2);
    let mut parts = vec![];
    let mut at = 0;
    // The header is cut by them, too.
    for length in [1, 10, 0, 4, 985, 1000, 1000] {
        parts.push(bytes(machine.place(&sent[at..at + length]), length as u32));
        at += length;
    }
    machine.guest[0].tx.add(&parts);
    machine.guest[0].tx.notify.write(1).unwrap();
    machine.run();
    assert_eq!(machine.seen(0), [sent]);
}

#[test]
fn lengths_are_bounded() {
    let mut machine = Machine::new();
    for (length, passes) in [
        (0, false),
        (1, false),
        (LEN - 1, false),
        (LEN, true), // A tap refuses it; to a socket it is a frame.
        (MAX_FRAME, true),
        (MAX_FRAME + 1, false),
        (0x2_0000, false),
    ] {
        let sent = frame(length, 3);
        let head = machine.send(&sent);
        machine.run();
        assert_eq!(machine.seen(0).len(), usize::from(passes), "{length}");
        assert_eq!(machine.guest[0].tx.pop(), Some((head, 0)));
    }
}

#[test]
fn what_was_not_agreed_on_is_dropped() {
    let mut machine = Machine::with(256, all_features() & !bits(&[VIRTIO_NET_F_CSUM]));
    let mut sent = frame(100, 4);
    sent[0] = 1;
    machine.send(&sent);
    sent[..2].copy_from_slice(&[0, 3]);
    machine.send(&sent);
    let plain = frame(100, 5);
    machine.send(&plain);
    machine.run();
    assert_eq!(machine.seen(0), [plain]);
    assert_eq!(machine.guest[0].tx.room(), 253);
    while machine.guest[0].tx.pop().is_some() {}
    assert_eq!(machine.guest[0].tx.room(), 256);
}

#[test]
fn a_tap_that_is_full_is_waited_for() {
    let mut machine = Machine::new();
    for seed in 0..200u8 {
        machine.send(&frame(5000, seed));
    }
    machine.run();
    // It does not spin, and the guest keeps what was not taken.
    assert_eq!(machine.run(), 0);
    let mut returned = 0;
    while machine.guest[0].tx.pop().is_some() {
        returned += 1;
    }
    assert!((1..200).contains(&returned), "{returned}");
    let mut seen = vec![];
    for _ in 0..200 {
        seen.extend(machine.seen(0));
        machine.run();
    }
    let expected: Vec<_> = (0..200).map(|seed| frame(5000, seed)).collect();
    assert!(seen == expected, "none is lost, and all are in order");
    while machine.guest[0].tx.pop().is_some() {
        returned += 1;
    }
    assert_eq!(returned, 200);
}

#[test]
fn a_tap_that_is_full_keeps_no_frame_from_the_guest() {
    let mut machine = Machine::new();
    for seed in 0..200u8 {
        machine.send(&frame(5000, seed));
    }
    machine.run();
    machine.guest[0].post_many(1);
    machine.network[0].send(&frame(100, 1)).unwrap();
    assert_eq!(bodies(&machine.step()), [body(&frame(100, 1))]);
}

#[test]
fn what_a_tap_refuses_is_dropped() {
    let mut machine = Machine::new();
    machine.network.clear();
    for seed in 0..100 {
        machine.send(&frame(100, seed));
    }
    machine.run();
    assert_eq!(machine.run(), 0);
    let mut returned = 0;
    while machine.guest[0].tx.pop().is_some() {
        returned += 1;
    }
    assert_eq!(returned, 100);
}

#[test]
fn what_one_event_does_is_bounded() {
    let mut machine = Machine::new();
    for seed in 0..200u8 {
        machine.send(&frame(100, seed));
    }
    let mut seen = 0;
    while machine.run_one() {
        let frames = machine.seen(0).len();
        assert!(frames <= 64, "{frames}");
        seen += frames;
    }
    assert_eq!(seen, 200);
}
