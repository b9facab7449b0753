use super::register::*;
use super::status::*;
use super::*;
use crate::virtio::device::{ActivateError, INTERRUPT_CONFIG};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

const FEATURE: u64 = 1 << 3;
const SIZE: u64 = 1 << 20;

#[derive(Default)]
struct Seen {
    activations: Vec<Activation>,
    resets: usize,
    writes: Vec<(u64, Vec<u8>)>,
    config: Vec<u8>,
}

struct Fake {
    seen: Arc<Mutex<Seen>>,
    config: Vec<u8>,
}

impl Device for Fake {
    fn kind(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &'static [u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        FEATURE | (1 << VIRTIO_RING_F_EVENT_IDX)
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.seen.lock().unwrap().writes.push((offset, data.to_vec()));
        self.config[0] = self.config[0].wrapping_add(1);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.seen.lock().unwrap();
        if !activation.queues[0].queue.ready() {
            return Err(ActivateError::QueueMissing(0));
        }
        seen.activations.push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.seen.lock().unwrap().resets += 1;
    }
}

struct Driver {
    transport: Transport,
    seen: Arc<Mutex<Seen>>,
}

impl Driver {
    fn new() -> Self {
        // A second region with a hole before it.
        let memory = Memory::from_ranges(&[
            (GuestAddress(0), SIZE as usize),
            (GuestAddress(2 * SIZE), SIZE as usize),
        ])
        .unwrap();
        let seen = Arc::new(Mutex::new(Seen {
            config: b"config".to_vec(),
            ..Seen::default()
        }));
        let config = seen.lock().unwrap().config.clone();
        let device = Fake {
            seen: Arc::clone(&seen),
            config,
        };
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            transport: Transport::new(Box::new(device), memory, interrupt).unwrap(),
            seen,
        }
    }

    /// A transport with this state in front of such a device and the same memory, and what that device sees.
    fn copy(&self, state: State) -> (Result<Transport, RestoreError>, Arc<Mutex<Seen>>) {
        let seen = Arc::<Mutex<Seen>>::default();
        let device = Fake {
            seen: Arc::clone(&seen),
            config: b"config".to_vec(),
        };
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let memory = self.transport.memory.clone();
        (
            Transport::restore(state, Box::new(device), memory, interrupt),
            seen,
        )
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn accept(&mut self, features: u64) {
        self.set(DRIVER_FEATURES_SEL, 0);
        self.set(DRIVER_FEATURES, features as u32);
        self.set(DRIVER_FEATURES_SEL, 1);
        self.set(DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// Up to FEATURES_OK.
    fn negotiate(&mut self, features: u64) -> bool {
        self.set(STATUS, ACKNOWLEDGE);
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.get(STATUS) & FEATURES_OK != 0
    }

    fn set_up_queue(&mut self, index: u32, size: u32, descriptors: u64, available: u64, used: u64) {
        self.set(QUEUE_SEL, index);
        self.set(QUEUE_NUM, size);
        for (low, address) in [
            (QUEUE_DESC_LOW, descriptors),
            (QUEUE_DRIVER_LOW, available),
            (QUEUE_DEVICE_LOW, used),
        ] {
            self.set(low, address as u32);
            self.set(low + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn needs_reset(&mut self) -> bool {
        self.get(STATUS) & NEEDS_RESET != 0
    }
}

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

fn started() -> Driver {
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1 | FEATURE));
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    driver.start();
    assert!(!driver.needs_reset());
    driver
}

#[test]
fn a_well_behaved_driver_gets_its_device() {
    let mut driver = Driver::new();
    assert_eq!(driver.get(register::MAGIC), 0x7472_6976);
    assert_eq!(driver.get(register::VERSION), 2);
    assert_eq!(driver.get(DEVICE_ID), 42);
    driver.set(DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.get(DEVICE_FEATURES), 1);
    assert!(driver.negotiate(VERSION_1 | FEATURE | (1 << VIRTIO_RING_F_EVENT_IDX)));
    driver.set(QUEUE_SEL, 1);
    assert_eq!(driver.get(QUEUE_NUM_MAX), 64);
    assert_eq!(driver.get(QUEUE_READY), 0);
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    assert_eq!(driver.get(QUEUE_READY), 1);
    driver.start();
    assert_eq!(driver.get(STATUS), 15);
    let seen = driver.seen.lock().unwrap();
    let activation = &seen.activations[0];
    let queue = activation.queues[0].queue.state();
    assert_eq!(
        (queue.size, queue.desc_table, queue.avail_ring, queue.used_ring),
        (128, 0x1000, 0x2000, 0x3000)
    );
    assert!(queue.event_idx_enabled);
    assert!(!activation.queues[1].queue.ready());
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [VERSION_1 | 1, VERSION_1 | (1 << 63), FEATURE, 0] {
        assert!(!Driver::new().negotiate(features), "{features:#x}");
    }
    // After FEATURES_OK they are settled.
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1));
    driver.accept(VERSION_1 | FEATURE);
    assert_eq!(driver.transport.save().driver_features, VERSION_1);
}

#[test]
fn only_legal_status_transitions_are_taken() {
    let all = [1u32, 2, 4, 8];
    let masks: Vec<u32> = (0..16)
        .map(|i| (0..4).filter(|b| i >> b & 1 == 1).map(|b| all[b]).sum())
        .collect();
    for wanted in masks.iter().filter(|m| **m != 0) {
        let mut driver = Driver::new();
        driver.set(STATUS, *wanted);
        assert_eq!(
            driver.get(STATUS),
            if *wanted == 1 { 1 } else { 0 },
            "from 0 to {wanted}"
        );
    }
    let mut driver = started();
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.get(STATUS), 15, "no way back but a reset");
}

#[test]
fn queue_registers_are_closed_before_features_ok_and_after_driver_ok() {
    let mut driver = Driver::new();
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    assert_eq!(driver.get(QUEUE_READY), 0);

    let mut driver = started();
    let before = driver.transport.save();
    driver.set_up_queue(0, 64, 0x5000, 0x6000, 0x7000);
    driver.set(QUEUE_READY, 0);
    assert_eq!(driver.transport.save(), before);

    // While a queue is ready its addresses stay.
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    driver.set(QUEUE_DESC_LOW, 0x9000);
    assert_eq!(driver.transport.save().queues[0].descriptors, 0x1000);
}

#[test]
fn bad_queues_are_never_activated() {
    for (why, size, descriptors, available, used) in [
        ("size 0", 0, 0x1000, 0x2000, 0x3000),
        ("not a power of two", 100, 0x1000, 0x2000, 0x3000),
        ("above the maximum", 512, 0x1000, 0x2000, 0x3000),
        ("does not fit 16 bits", 0x1_0080, 0x1000, 0x2000, 0x3000),
        ("misaligned descriptors", 128, 0x1008, 0x2000, 0x3000),
        ("misaligned available ring", 128, 0x1000, 0x2001, 0x3000),
        ("misaligned used ring", 128, 0x1000, 0x2000, 0x3002),
        ("across the end of a region", 128, SIZE - 16, 0x2000, 0x3000),
        ("in the hole", 128, 0x1000, SIZE + 0x1000, 0x3000),
        ("in the devices", 128, 0x1000, 0x2000, crate::layout::VIRTIO_START),
        ("wraps around", 128, 0x1000, 0x2000, u64::MAX - 3),
    ] {
        let mut driver = Driver::new();
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(0, size, descriptors, available, used);
        driver.start();
        assert!(driver.needs_reset(), "{why}");
        assert!(driver.seen.lock().unwrap().activations.is_empty(), "{why}");
        assert_eq!(driver.get(INTERRUPT_STATUS), INTERRUPT_CONFIG, "{why}");
        // And a reset makes it good again.
        driver.set(STATUS, 0);
        assert!(driver.negotiate(VERSION_1));
        driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
        driver.start();
        assert!(!driver.needs_reset(), "{why}");
    }
}

#[test]
fn a_missing_queue_needs_a_reset() {
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1));
    driver.start();
    assert!(driver.needs_reset());
}

#[test]
fn reset_stops_the_device_and_clears_all() {
    let mut driver = started();
    driver.transport.interrupt.signal_queue();
    driver.set(STATUS, 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 1);
    assert_eq!(driver.get(STATUS), 0);
    assert_eq!(driver.get(INTERRUPT_STATUS), 0);
    assert_eq!(driver.transport.save(), Driver::new().transport.save());
}

#[test]
fn a_driver_that_failed_can_do_nothing_but_reset() {
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1));
    driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED);
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    driver.start();
    assert_eq!(driver.get(STATUS) & DRIVER_OK, 0);
    assert!(driver.seen.lock().unwrap().activations.is_empty());
}

#[test]
fn notifications_reach_active_queues_only() {
    let mut driver = Driver::new();
    driver.set(QUEUE_NOTIFY, 0);
    assert!(driver.transport.notifiers()[0].read().is_err());
    // As KVM does it, before the device is ready.
    driver.transport.notifiers()[0].write(1).unwrap();
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queue(0, 128, 0x1000, 0x2000, 0x3000);
    driver.start();
    assert!(
        driver.seen.lock().unwrap().activations[0].queues[0]
            .notify
            .read()
            .is_err()
    );
    driver.set(QUEUE_NOTIFY, 0);
    driver.set(QUEUE_NOTIFY, 2);
    driver.set(QUEUE_NOTIFY, u32::MAX);
    assert_eq!(
        driver.seen.lock().unwrap().activations[0].queues[0]
            .notify
            .read()
            .unwrap(),
        1
    );
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut driver = started();
    driver.transport.interrupt.signal_queue();
    driver.transport.interrupt.signal_config();
    assert_eq!(driver.get(INTERRUPT_STATUS), 3);
    driver.set(INTERRUPT_ACK, 1);
    assert_eq!(driver.get(INTERRUPT_STATUS), 2);
}

#[test]
fn the_configuration_space_is_read_at_any_width_and_within_its_bounds() {
    let mut driver = Driver::new();
    for (offset, expected) in [
        (0, &b"config\0\0"[..]),
        (2, b"nfi"),
        (5, b"g\0"),
        (6, b"\0"),
        (0xe00, b"\0\0"),
    ] {
        let mut data = vec![0xaa; expected.len()];
        driver.transport.read(CONFIG + offset, &mut data);
        assert_eq!(data, expected);
    }
    driver.transport.write(CONFIG, b"x");
    assert!(driver.seen.lock().unwrap().writes.is_empty(), "no driver yet");
    let before = driver.get(CONFIG_GENERATION);
    assert!(driver.negotiate(VERSION_1));
    driver.transport.write(CONFIG + 1, b"xy");
    assert_eq!(driver.seen.lock().unwrap().writes, [(1, b"xy".to_vec())]);
    assert_eq!(driver.get(CONFIG_GENERATION), before + 1);
    assert_eq!(driver.get(CONFIG_GENERATION), before + 1);
}

#[test]
fn there_is_no_shared_memory() {
    let mut driver = Driver::new();
    driver.set(SHM_SEL, 0);
    assert_eq!(driver.get(SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.get(SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn registers_of_odd_width_or_offset_are_not_there() {
    let mut driver = Driver::new();
    for (offset, width) in [(0u64, 1usize), (0, 2), (0, 8), (1, 4), (2, 4), (STATUS + 1, 4)] {
        let mut data = vec![0xaa; width];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; width]);
    }
    driver.transport.write(STATUS, &[1]);
    driver.transport.write(STATUS, &[1, 0]);
    driver.transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.get(STATUS), 0);
}

#[test]
fn state_round_trip() {
    let driver = started();
    driver.transport.interrupt.signal_queue();
    let state = driver.transport.save();
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<State>(&json).unwrap(), state);
    let (again, seen) = driver.copy(state.clone());
    let mut again = again.unwrap();
    assert_eq!(again.save(), state);
    assert_eq!(seen.lock().unwrap().activations.len(), 1);
    again.write(QUEUE_NOTIFY, &0u32.to_le_bytes());
    assert_eq!(again.notifiers()[0].read().unwrap(), 1, "it is active");
}

#[test]
fn a_restored_device_goes_on_where_its_used_rings_end() {
    let driver = started();
    driver
        .transport
        .memory
        .write_obj(0xfffeu16, GuestAddress(0x3002))
        .unwrap();
    let (again, seen) = driver.copy(driver.transport.save());
    again.unwrap();
    let queue = seen.lock().unwrap().activations[0].queues[0].queue.state();
    assert_eq!((queue.next_avail, queue.next_used), (0xfffe, 0xfffe));
    assert_eq!((queue.size, queue.desc_table), (128, 0x1000));
}

#[test]
fn a_device_that_is_not_active_is_reset_and_waits_for_a_driver() {
    let mut driver = Driver::new();
    assert!(driver.negotiate(VERSION_1));
    // No queue is there, or none that is any good: allowed, until the driver says that it is ready.
    driver.set_up_queue(1, 100, 3, u64::MAX, SIZE);
    for needs_reset in [false, true] {
        if needs_reset {
            driver.start();
            assert!(driver.needs_reset());
        }
        let state = driver.transport.save();
        let (again, seen) = driver.copy(state.clone());
        let mut again = again.unwrap();
        assert_eq!(again.save(), state);
        assert!(seen.lock().unwrap().activations.is_empty());
        assert_eq!(seen.lock().unwrap().resets, 1);
        again.write(QUEUE_NOTIFY, &0u32.to_le_bytes());
        assert!(again.notifiers()[0].read().is_err(), "it is not active");
        // The old driver goes on, or a new one comes.
        let status = if needs_reset { 0u32 } else { NEGOTIATED };
        again.write(STATUS, &status.to_le_bytes());
        assert_eq!(again.save().status, status);
    }
}

#[test]
fn an_active_device_is_not_restored_with_queues_that_it_could_not_have() {
    let good = started().transport.save();
    type Change = fn(&mut QueueRegisters);
    let changes: [(&str, Change); 12] = [
        ("size 0", |queue| queue.size = 0),
        ("not a power of two", |queue| queue.size = 100),
        ("above the maximum", |queue| queue.size = 512),
        ("does not fit 16 bits", |queue| queue.size = 0x1_0080),
        ("misaligned descriptors", |queue| queue.descriptors += 8),
        ("misaligned available ring", |queue| queue.available += 1),
        ("misaligned used ring", |queue| queue.used += 2),
        ("across the end of a region", |queue| {
            queue.descriptors = SIZE - 16
        }),
        ("in the hole", |queue| queue.available = SIZE + 0x1000),
        ("behind memory", |queue| queue.used = 3 * SIZE),
        ("in the devices", |queue| queue.used = crate::layout::VIRTIO_START),
        ("wraps around", |queue| queue.used = u64::MAX - 3),
    ];
    for (why, change) in changes {
        let driver = Driver::new();
        let mut state = good.clone();
        change(&mut state.queues[0]);
        let (refused, seen) = driver.copy(state);
        let refused = refused.map(drop).unwrap_err();
        let queue = matches!(refused, RestoreError::Start(StartError::Queue { index: 0, .. }));
        assert!(queue, "{why}: {refused:?}");
        assert!(seen.lock().unwrap().activations.is_empty(), "{why}");
    }
    // The device has a say, too.
    let mut state = good;
    state.queues[0].ready = false;
    let (refused, _) = Driver::new().copy(state);
    let refused = refused.map(drop).unwrap_err();
    let missing = matches!(
        refused,
        RestoreError::Start(StartError::Device(ActivateError::QueueMissing(0)))
    );
    assert!(missing, "{refused:?}");
}

proptest! {
    #[test]
    fn any_accesses_are_taken(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x120, Just(STATUS), any::<u64>()], prop_oneof![proptest::collection::vec(any::<u8>(), 0..9), (0u32..16).prop_map(|v| v.to_le_bytes().to_vec())]),
            0..200,
        )
    ) {
        let mut driver = Driver::new();
        for (write, offset, mut data) in accesses {
            if write { driver.transport.write(offset, &data) } else { driver.transport.read(offset, &mut data) }
        }
        // Wherever a driver has got to, a copy can go on from there.
        let state = driver.transport.save();
        let (again, _) = driver.copy(state.clone());
        prop_assert_eq!(again.unwrap().save(), state);
        for activation in &driver.seen.lock().unwrap().activations {
            for active in &activation.queues {
                prop_assert!(!active.queue.ready() || active.queue.is_valid(&activation.memory));
            }
        }
    }
}
