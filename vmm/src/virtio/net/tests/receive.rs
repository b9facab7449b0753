//! Frames to the guest.

use super::machine::*;
use crate::virtio::net::header::MAX_FRAME;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_frame_fills_one_buffer() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(4);
    let sent = frame(1000, 1);
    machine.network[0].send(&sent).unwrap();
    let frames = machine.step();
    assert_eq!(frames.len(), 1);
    assert_eq!((frames[0].0, frames[0].1.len()), (1, 1000));
    assert_eq!(body(&frames[0].1), body(&sent));
    assert_eq!(machine.irq.read().unwrap(), 1);
    assert_eq!(machine.guest[0].rx.room(), 256 - 3);
}

#[test]
fn a_frame_is_spread_over_buffers_and_each_tells_its_share() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(100);
    // To the last byte of a buffer, and one more; the largest that there is.
    for (length, buffers) in [(2048, 1), (2049, 2), (4096, 2), (MAX_FRAME, 33)] {
        let sent = frame(length, 2);
        machine.network[0].send(&sent).unwrap();
        let frames = machine.step();
        assert_eq!(frames.len(), 1);
        assert_eq!((frames[0].0, frames[0].1.len()), (buffers, length));
        assert_eq!(body(&frames[0].1), body(&sent));
    }
}

#[test]
fn a_chain_of_odd_pieces_is_filled_too() {
    let mut machine = Machine::new();
    // The header and the count in it are cut by the pieces.
    let parts: Vec<_> = [5, 6, 1, 0, 100, 900]
        .iter()
        .enumerate()
        .map(|(index, length)| room(RX_DATA + 0x1000 * index as u64, *length))
        .collect();
    machine.guest[0].post(&parts);
    machine.guest[0].post_many(1);
    let sent = frame(1500, 3);
    machine.network[0].send(&sent).unwrap();
    let frames = machine.step();
    assert_eq!(frames.len(), 1);
    assert_eq!((frames[0].0, frames[0].1.len()), (2, 1500));
    assert_eq!(body(&frames[0].1), body(&sent));
}

#[test]
fn many_frames_keep_their_order() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(250);
    let mut sent = vec![];
    for turn in 0..200usize {
        for _ in 0..5 {
            let frame = frame(14 + 12 + (turn * 37) % 5000, sent.len() as u8);
            machine.network[0].send(&frame).unwrap();
            sent.push(frame);
        }
        let frames = machine.step();
        let buffers: usize = frames.iter().map(|(count, _)| usize::from(*count)).sum();
        machine.guest[0].post_many(buffers);
        let expected: Vec<_> = std::mem::take(&mut sent);
        assert_eq!(
            bodies(&frames),
            expected.iter().map(|frame| body(frame)).collect::<Vec<_>>()
        );
    }
}

#[test]
fn without_merging_each_frame_has_its_own_buffer() {
    let mut machine = Machine::with(256, without_merging());
    machine.guest[0].post_many(3);
    machine.network[0].send(&frame(2048, 1)).unwrap();
    machine.network[0].send(&frame(2049, 2)).unwrap();
    machine.network[0].send(&frame(60, 3)).unwrap();
    let frames = machine.step();
    // One was too long; its buffer was good for the next.
    assert_eq!(bodies(&frames), [body(&frame(2048, 1)), body(&frame(60, 3))]);
    assert!(frames.iter().all(|(count, _)| *count == 1));
    assert_eq!(machine.guest[0].rx.room(), 256 - 1);
}

#[test]
fn a_flood_into_a_guest_that_gives_no_buffers_waits_in_the_tap() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(2);
    let mut sent = 0u8;
    while machine.network[0].send(&frame(1000, sent)).is_ok() {
        sent += 1;
        // The thread sleeps: a frame costs a wake-up at most, and there is an end to it when the tap is full.
        assert!(machine.run() <= 20);
    }
    assert!(sent > 10);
    assert_eq!(machine.run(), 0);
    let mut seen = machine.step();
    assert_eq!(seen.len(), 2);
    // None of those that the tap has taken is lost, and traffic goes on.
    while seen.len() < usize::from(sent) {
        machine.guest[0].post_many(7);
        let frames = machine.step();
        assert_eq!(frames.len(), 7.min(usize::from(sent) - seen.len()));
        seen.extend(frames);
    }
    for (seed, (_, found)) in (0..sent).zip(&seen) {
        assert_eq!(body(found), body(&frame(1000, seed)));
    }
    assert_eq!(machine.run(), 0);
}

#[test]
fn a_frame_that_lacks_buffers_waits_for_them() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(1);
    let sent = frame(MAX_FRAME, 4);
    machine.network[0].send(&sent).unwrap();
    machine.network[0].send(&frame(80, 5)).unwrap();
    for _ in 0..32 {
        assert!(machine.step().is_empty());
        assert_eq!(machine.run(), 0);
        machine.guest[0].post_many(1);
    }
    let frames = machine.step();
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].0, 33);
    assert_eq!(body(&frames[0].1), body(&sent));
    machine.guest[0].post_many(1);
    assert_eq!(bodies(&machine.step()), [body(&frame(80, 5))]);
}

#[test]
fn a_frame_larger_than_all_buffers_is_dropped() {
    let mut machine = Machine::with(4, all_features());
    machine.guest[0].post_many(4);
    machine.network[0].send(&frame(4 * 2048 + 1, 6)).unwrap();
    machine.network[0].send(&frame(4 * 2048, 7)).unwrap();
    let frames = machine.step();
    assert_eq!(bodies(&frames), [body(&frame(4 * 2048, 7))]);
}

#[test]
fn a_frame_beyond_the_longest_is_dropped() {
    for features in [all_features(), without_merging()] {
        let mut machine = Machine::with(256, features);
        machine.guest[0].post_many(2);
        machine.network[0].send(&frame(100_000, 6)).unwrap();
        machine.network[0].send(&frame(80, 7)).unwrap();
        assert_eq!(bodies(&machine.step()), [body(&frame(80, 7))]);
    }
}

#[test]
fn chains_of_many_pieces_are_used_one_after_the_other() {
    let mut machine = Machine::new();
    // Together more than 512 pieces: an indirect table each.
    let table = |machine: &mut Machine, index: u64| {
        let table: Vec<u8> = (0..200u16)
            .flat_map(|entry| {
                let address = RX_DATA + 0x1000 * index + 16 * u64::from(entry);
                let (flags, next) = if entry < 199 { (3u16, entry + 1) } else { (2, 0) };
                [
                    &address.to_le_bytes()[..],
                    &16u32.to_le_bytes(),
                    &flags.to_le_bytes(),
                    &next.to_le_bytes(),
                ]
                .concat()
            })
            .collect();
        let at = machine.place(&table);
        machine.guest[0]
            .rx
            .store(index as u16, at, table.len() as u32, 4, 0);
        machine.guest[0].rx.publish(index as u16);
    };
    for index in 0..4 {
        table(&mut machine, index);
    }
    for seed in 0..4 {
        machine.network[0].send(&frame(3000, seed)).unwrap();
    }
    machine.run();
    for seed in 0..4u8 {
        assert_eq!(machine.guest[0].rx.pop(), Some((u16::from(seed), 3000)));
        let mut found = vec![0; 3000];
        machine
            .memory
            .read_slice(&mut found, GuestAddress(RX_DATA + 0x1000 * u64::from(seed)))
            .unwrap();
        assert_eq!(body(&found), body(&frame(3000, seed)));
    }
}

#[test]
fn what_one_event_does_is_bounded() {
    let mut machine = Machine::new();
    machine.guest[0].post_many(200);
    let mut sent = 0;
    while sent < 150 && machine.network[0].send(&frame(100, 0)).is_ok() {
        sent += 1;
    }
    assert!(sent > 70, "the socket's buffer is too small for this test");
    let mut passes = 0;
    while machine.run_one() {
        passes += 1;
        let frames = machine.guest[0].receive(&machine.memory);
        assert!(frames.len() <= 64, "{}", frames.len());
        sent -= frames.len();
    }
    assert_eq!(sent, 0);
    assert!(passes > 2);
}
