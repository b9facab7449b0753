//! What is refused. What is not, and that it goes on then, is tested with the transport.

use super::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const SIZES: [u16; 2] = [256, 64];
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const OFFERED: u64 = VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Where a driver that does no more than it has to is in this stage.
fn at(status: u32) -> State {
    State {
        status,
        driver_features: if status & FEATURES_OK == 0 { 0 } else { VERSION_1 },
        ..State::new(&SIZES)
    }
}

fn check(state: &State) -> Result<(), RestoreError> {
    state.check(OFFERED, &SIZES)
}

#[test]
fn only_a_status_that_a_driver_can_come_to_is_taken() {
    let stages = [0, ACKNOWLEDGE, TAKEN, NEGOTIATED, RUNNING];
    // All bits of the lowest byte, and some above.
    for status in (0..0x100).chain([0x10f, 0x8000_000f, u32::MAX]) {
        let possible = stages.contains(&(status & !FAILED)) || status & !FAILED == RUNNING | NEEDS_RESET;
        let checked = check(&at(status));
        if possible {
            checked.unwrap();
        } else {
            assert!(
                matches!(checked, Err(RestoreError::Status(found)) if found == status),
                "{status:#x}"
            );
        }
    }
}

#[test]
fn features_are_those_offered_once_they_are_settled_and_none_before_the_driver_is_there() {
    for (status, features, possible) in [
        (0, 1, false),
        (FAILED, VERSION_1, false),
        (ACKNOWLEDGE, VERSION_1, false),
        // Not settled yet.
        (TAKEN, u64::MAX, true),
        (TAKEN | FAILED, 1, true),
        (NEGOTIATED, OFFERED, true),
        (NEGOTIATED, 0, false),
        (NEGOTIATED, OFFERED & !VERSION_1, false),
        (NEGOTIATED, OFFERED | 1, false),
        (RUNNING, VERSION_1 | 1 << 63, false),
        (RUNNING | FAILED, OFFERED | 2, false),
        (RUNNING | NEEDS_RESET, OFFERED | 2, false),
    ] {
        let state = State {
            driver_features: features,
            ..at(status)
        };
        match check(&state) {
            Ok(()) => assert!(possible, "{state:?}"),
            Err(RestoreError::Features { .. }) => assert!(!possible, "{state:?}"),
            Err(other) => panic!("{state:?}: {other}"),
        }
    }
}

#[test]
fn queues_are_as_many_as_the_device_has_and_untouched_until_features_are_settled() {
    for count in [0, 1, 3] {
        let mut state = at(RUNNING);
        state.queues.resize(count, QueueRegisters::new(64));
        let found = check(&state);
        assert!(
            matches!(found, Err(RestoreError::QueueCount { found, expected: 2 }) if found == count),
            "{found:?}"
        );
    }
    let changes: [fn(&mut QueueRegisters); 5] = [
        |queue| queue.size = 32,
        |queue| queue.ready = true,
        |queue| queue.descriptors = 0x1000,
        |queue| queue.available = 0x1000,
        |queue| queue.used = 0x1000,
    ];
    for change in changes {
        for status in [0, ACKNOWLEDGE, TAKEN, TAKEN | FAILED] {
            let mut state = at(status);
            change(&mut state.queues[1]);
            let found = check(&state);
            assert!(
                matches!(found, Err(RestoreError::QueueEarly { index: 1, .. })),
                "{found:?}"
            );
        }
        let mut state = at(NEGOTIATED);
        change(&mut state.queues[1]);
        check(&state).unwrap();
    }
}

#[test]
fn interrupts_are_those_that_there_are_and_of_devices_that_were_started() {
    for (status, bits, possible) in [
        (0, INTERRUPT_QUEUE, false),
        (NEGOTIATED, INTERRUPT_CONFIG, false),
        (NEGOTIATED | FAILED, INTERRUPT_QUEUE, false),
        (RUNNING, INTERRUPT_QUEUE | INTERRUPT_CONFIG, true),
        (RUNNING | FAILED, INTERRUPT_QUEUE, true),
        (RUNNING | NEEDS_RESET, INTERRUPT_CONFIG, true),
        (RUNNING, 4, false),
        (RUNNING, u32::MAX, false),
    ] {
        let state = State {
            interrupt_status: bits,
            ..at(status)
        };
        match check(&state) {
            Ok(()) => assert!(possible, "{state:?}"),
            Err(RestoreError::Interrupts { .. }) => assert!(!possible, "{state:?}"),
            Err(other) => panic!("{state:?}: {other}"),
        }
    }
}

#[test]
fn what_is_selected_may_be_what_is_not_there() {
    check(&State {
        queue_select: u32::MAX,
        device_features_select: 2,
        driver_features_select: u32::MAX,
        generation: u32::MAX,
        ..at(RUNNING)
    })
    .unwrap();
}

#[test]
fn fields_that_are_none_are_no_state() {
    let whole = serde_json::to_value(at(RUNNING)).unwrap();
    serde_json::from_value::<State>(whole.clone()).unwrap();
    let mut more = whole.clone();
    more["active"] = true.into();
    assert!(serde_json::from_value::<State>(more).is_err());
    let mut more = whole.clone();
    more["queues"][0]["next"] = 1.into();
    assert!(serde_json::from_value::<State>(more).is_err());
    for (field, value) in [("status", -1i64), ("status", 1 << 32), ("driver_features", -1)] {
        let mut wrong = whole.clone();
        wrong[field] = value.into();
        assert!(serde_json::from_value::<State>(wrong).is_err(), "{field}");
    }
}
