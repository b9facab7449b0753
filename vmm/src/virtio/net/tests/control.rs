//! Several pairs.

use super::machine::*;
use proptest::prelude::*;

fn set_pairs(count: u16) -> Vec<u8> {
    [&[4, 0][..], &count.to_le_bytes()].concat()
}

/// Frames of each queue of the tap, by the pair that they came to.
fn spread(machine: &mut Machine) -> Vec<Vec<u8>> {
    for (seed, queue) in (0u8..).zip(&machine.network) {
        queue.send(&frame(100, seed)).unwrap();
    }
    machine.run();
    let memory = machine.memory.clone();
    machine
        .guest
        .iter_mut()
        .map(|pair| {
            let frames = pair.receive(&memory);
            pair.post_many(frames.len());
            let mut seeds: Vec<u8> = frames
                .iter()
                .map(|(_, found)| {
                    (0..8)
                        .find(|seed| body(found) == body(&frame(100, *seed)))
                        .unwrap()
                })
                .collect();
            seeds.sort_unstable();
            seeds
        })
        .collect()
}

#[test]
fn frames_go_to_the_pairs_in_use() {
    let mut machine = Machine::build(3, 64, all_features());
    for pair in &mut machine.guest {
        pair.post_many(32);
    }
    // One, until the driver says otherwise.
    assert_eq!(spread(&mut machine), [vec![0, 1, 2], vec![], vec![]]);
    assert_eq!(machine.command(&set_pairs(3)), 0);
    assert_eq!(spread(&mut machine), [[0], [1], [2]]);
    assert_eq!(machine.command(&set_pairs(2)), 0);
    assert_eq!(spread(&mut machine), [vec![0, 2], vec![1], vec![]]);
    assert_eq!(machine.command(&set_pairs(1)), 0);
    assert_eq!(spread(&mut machine), [vec![0, 1, 2], vec![], vec![]]);
    assert_eq!(machine.pairs.active(), 1);
}

#[test]
fn a_pair_that_lacks_buffers_keeps_no_frame_from_the_others() {
    let mut machine = Machine::build(2, 64, all_features());
    assert_eq!(machine.command(&set_pairs(2)), 0);
    machine.guest[1].post_many(32);
    assert_eq!(spread(&mut machine), [vec![], vec![1]]);
    assert_eq!(spread(&mut machine), [vec![], vec![1]]);
    machine.guest[0].post_many(32);
    machine.run();
    let memory = machine.memory.clone();
    assert_eq!(machine.guest[0].receive(&memory).len(), 2);
}

#[test]
fn each_pair_sends_by_its_own_queue_of_the_tap() {
    let mut machine = Machine::build(2, 64, all_features());
    let sent = frame(100, 9);
    let address = machine.place(&sent);
    machine.guest[1].tx.add(&[bytes(address, 100)]);
    machine.guest[1].tx.notify.write(1).unwrap();
    machine.run();
    assert!(machine.seen(0).is_empty());
    assert_eq!(machine.seen(1), [sent]);
}

#[test]
fn other_commands_are_refused() {
    let mut machine = Machine::build(2, 64, all_features());
    for bad in [
        &set_pairs(0)[..],
        &set_pairs(3),
        &set_pairs(u16::MAX),
        &[4, 0, 1],
        &[4, 0],
        &[4],
        &[],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[1, 1, 2, 2, 2, 2, 2, 2],
    ] {
        assert_eq!(machine.command(bad), 1, "{bad:?}");
        assert_eq!(machine.pairs.active(), 1);
    }
    // No room for the answer.
    let at = machine.place(&set_pairs(2));
    machine.control.add(&[bytes(at, 4)]);
    machine.control.notify.write(1).unwrap();
    machine.run();
    assert_eq!(machine.control.pop().unwrap().1, 0);
}

proptest! {
    #[test]
    fn no_commands_harm(commands in prop::collection::vec(prop::collection::vec(0u8..6, 0..8), 1..20)) {
        let mut machine = Machine::build(3, 64, all_features());
        for pair in &mut machine.guest {
            pair.post_many(32);
        }
        for command in commands {
            machine.command(&command);
            prop_assert!((1..=3).contains(&machine.pairs.active()));
            // Whichever are in use, frames of all queues of the tap get through.
            let frames = spread(&mut machine);
            prop_assert_eq!(frames.concat().len(), 3);
            prop_assert!(frames[machine.pairs.active()..].iter().all(Vec::is_empty));
        }
    }
}
