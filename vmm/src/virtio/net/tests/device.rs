//! The device behind its transport, its threads running.

use super::machine::*;
use crate::memory::Memory;
use crate::virtio::device::{ActivateError, Device};
use crate::virtio::guest_queue::{GuestQueue, interrupt, memory};
use crate::virtio::mmio::{Transport, register, status};
use crate::virtio::net::features::bits;
use crate::virtio::net::{Net, State};
use crate::virtio::registers::{RestoreError, StartError};
use husk_vmm_protocol::config::NicConfig;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MAC: [u8; 6] = [2, 0x42, 0xac, 0x11, 0, 2];

fn nic(queue_pairs: u8) -> (Net, Vec<UnixDatagram>) {
    let (taps, network) = (0..queue_pairs).map(|_| tap()).unzip();
    let config = NicConfig {
        mac: MAC,
        queue_pairs,
    };
    (Net::new("net0", &config, taps).unwrap(), network)
}

/// A driver, as far as it takes one.
struct Driver {
    memory: Memory,
    transport: Transport,
    irq: EventFd,
    network: Vec<UnixDatagram>,
    pairs: Vec<Pair>,
    control: GuestQueue,
}

impl Driver {
    fn new(queue_pairs: u8) -> Self {
        let memory = memory(SIZE as usize);
        let (device, network) = nic(queue_pairs);
        let (interrupt, irq) = interrupt();
        let pairs = usize::from(queue_pairs);
        Self {
            transport: Transport::new(Box::new(device), memory.clone(), interrupt).unwrap(),
            irq,
            network,
            pairs: (0..pairs).map(|index| Pair::new(&memory, index, 64)).collect(),
            control: GuestQueue::new(&memory, 2 * pairs as u64 * GuestQueue::SPAN, 64),
            memory,
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn get(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn offered(&mut self) -> u64 {
        self.set(register::DEVICE_FEATURES_SEL, 0);
        let low = self.get(register::DEVICE_FEATURES);
        self.set(register::DEVICE_FEATURES_SEL, 1);
        u64::from(low) | u64::from(self.get(register::DEVICE_FEATURES)) << 32
    }

    /// Starts the device with these features and the queues of `pairs` pairs, and that of commands if there is one.
    fn start(&mut self, features: u64, pairs: usize) {
        let mut status = 0;
        for bit in [status::ACKNOWLEDGE, status::DRIVER] {
            status |= bit;
            self.set(register::STATUS, status);
        }
        for (word, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(register::DRIVER_FEATURES_SEL, word);
            self.set(register::DRIVER_FEATURES, value);
        }
        status |= status::FEATURES_OK;
        self.set(register::STATUS, status);
        assert_eq!(self.get(register::STATUS), status);
        for queue in 0..2 * pairs as u32 {
            self.set_up_queue(queue, u64::from(queue) * GuestQueue::SPAN);
        }
        if features & bits(&[VIRTIO_NET_F_CTRL_VQ]) != 0 {
            // Behind those of one pair if the driver knows of no others.
            let known = if features & bits(&[VIRTIO_NET_F_MQ]) == 0 {
                1
            } else {
                self.pairs.len()
            };
            self.set_up_queue(2 * known as u32, 2 * self.pairs.len() as u64 * GuestQueue::SPAN);
        }
        self.set(register::STATUS, status | status::DRIVER_OK);
    }

    fn set_up_queue(&mut self, queue: u32, base: u64) {
        self.set(register::QUEUE_SEL, queue);
        assert!(self.get(register::QUEUE_NUM_MAX) >= 64);
        self.set(register::QUEUE_NUM, 64);
        self.set(register::QUEUE_DESC_LOW, base as u32);
        self.set(register::QUEUE_DRIVER_LOW, base as u32 + 0x2000);
        self.set(register::QUEUE_DEVICE_LOW, base as u32 + 0x3000);
        self.set(register::QUEUE_READY, 1);
    }

    fn begin_anew(&mut self) {
        self.set(register::STATUS, 0);
        self.memory
            .write_slice(&vec![0; RX_DATA as usize], GuestAddress(0))
            .unwrap();
        for index in 0..self.pairs.len() {
            self.pairs[index] = Pair::new(&self.memory, index, 64);
        }
        let base = 2 * self.pairs.len() as u64 * GuestQueue::SPAN;
        self.control = GuestQueue::new(&self.memory, base, 64);
    }

    fn notify(&mut self, queue: u32) {
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// Asks until there is an answer, each time after an interrupt.
    fn wait<T>(&mut self, mut ask: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(answer) = ask(self) {
                return answer;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nothing came");
            let mut poll = libc::pollfd {
                fd: self.irq.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one entry.
            unsafe { libc::poll(&raw mut poll, 1, 1000) };
            let _ = self.irq.read();
        }
    }

    fn receive(&mut self, pair: usize) -> Vec<u8> {
        let mut frames = self.wait(|driver| {
            let frames = driver.pairs[pair].receive(&driver.memory);
            (!frames.is_empty()).then_some(frames)
        });
        assert_eq!(frames.len(), 1);
        frames.remove(0).1
    }

    fn send(&mut self, pair: usize, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(TX_DATA)).unwrap();
        self.pairs[pair].tx.add(&[bytes(TX_DATA, frame.len() as u32)]);
        self.notify(2 * pair as u32 + 1);
        self.wait(|driver| driver.pairs[pair].tx.pop());
    }

    fn command(&mut self, queue: u32, pairs: u16) -> u8 {
        let command = [&[4, 0][..], &pairs.to_le_bytes(), &[0xaa]].concat();
        self.memory.write_slice(&command, GuestAddress(TX_DATA)).unwrap();
        self.control.add(&[bytes(TX_DATA, 4), room(TX_DATA + 4, 1)]);
        self.notify(queue);
        self.wait(|driver| driver.control.pop());
        self.memory.read_obj(GuestAddress(TX_DATA + 4)).unwrap()
    }
}

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

#[test]
fn one_pair_is_offered_plainly() {
    let mut driver = Driver::new(1);
    assert_eq!(driver.get(register::DEVICE_ID), 1);
    let offered = driver.offered();
    let has = |feature| offered & bits(&[feature]) != 0;
    for feature in [VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_HOST_USO] {
        assert!(has(feature), "{feature}");
    }
    for feature in [
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_MQ,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_STATUS,
    ] {
        assert!(!has(feature), "{feature}");
    }
    let mut config = [0xff; 12];
    driver.transport.read(register::CONFIG, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [0; 6]);
    driver.set(register::QUEUE_SEL, 2);
    assert_eq!(driver.get(register::QUEUE_NUM_MAX), 0);
}

#[test]
fn several_pairs_are_told() {
    let mut driver = Driver::new(8);
    let several = bits(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
    assert_eq!(driver.offered() & several, several);
    let mut config = [0xff; 12];
    driver.transport.read(register::CONFIG, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [0, 0, 8, 0, 0, 0]);
    for (queue, size) in [(0, 256), (16, 256), (17, 0)] {
        driver.set(register::QUEUE_SEL, queue);
        assert_eq!(driver.get(register::QUEUE_NUM_MAX), size);
    }
}

#[test]
fn frames_move_both_ways_and_again_after_a_reset() {
    let mut driver = Driver::new(1);
    for turn in 0..3u8 {
        let features = match turn {
            0 => driver.offered(),
            1 => VERSION_1 | bits(&[VIRTIO_RING_F_EVENT_IDX]),
            _ => VERSION_1,
        };
        driver.start(features, 1);
        assert_eq!(driver.get(register::STATUS), 15);
        driver.send(0, &frame(500, turn));
        let mut buffer = [0; 2048];
        let length = driver.network[0].recv(&mut buffer).unwrap();
        assert_eq!(body(&buffer[..length]), body(&frame(500, turn)));
        driver.network[0].send(&frame(700, turn)).unwrap();
        driver.pairs[0].post_many(2);
        driver.notify(0);
        assert_eq!(body(&driver.receive(0)), body(&frame(700, turn)));
        driver.begin_anew();
    }
}

#[test]
fn pairs_are_chosen_by_command() {
    let mut driver = Driver::new(2);
    let features = driver.offered();
    driver.start(features, 2);
    for pair in &mut driver.pairs {
        pair.post_many(8);
    }
    driver.notify(0);
    driver.notify(2);
    driver.network[1].send(&frame(100, 1)).unwrap();
    assert_eq!(body(&driver.receive(0)), body(&frame(100, 1)));
    assert_eq!(driver.command(4, 3), 1);
    assert_eq!(driver.command(4, 2), 0);
    driver.network[1].send(&frame(100, 2)).unwrap();
    assert_eq!(body(&driver.receive(1)), body(&frame(100, 2)));
    driver.send(1, &frame(100, 3));
    let mut buffer = [0; 2048];
    let length = driver.network[1].recv(&mut buffer).unwrap();
    assert_eq!(body(&buffer[..length]), body(&frame(100, 3)));
    // A driver that knows of no pairs has its queue of commands elsewhere, and no command to give.
    driver.begin_anew();
    driver.start(features & !bits(&[VIRTIO_NET_F_MQ]), 1);
    assert_eq!(driver.get(register::STATUS), 15);
    assert_eq!(driver.command(2, 1), 1);
    driver.pairs[0].post_many(2);
    driver.notify(0);
    driver.network[1].send(&frame(100, 4)).unwrap();
    assert_eq!(body(&driver.receive(0)), body(&frame(100, 4)));
}

#[test]
fn a_driver_that_leaves_out_queues_has_the_others() {
    let mut driver = Driver::new(3);
    let features = driver.offered();
    driver.start(features, 0);
    assert_eq!(
        driver.get(register::STATUS) & status::NEEDS_RESET,
        status::NEEDS_RESET
    );
    driver.begin_anew();
    driver.start(features, 2);
    assert_eq!(driver.get(register::STATUS), 15);
    assert_eq!(driver.command(6, 3), 1);
    assert_eq!(driver.command(6, 2), 0);
}

#[test]
fn a_flood_keeps_no_driver_from_its_reset() {
    let mut driver = Driver::new(1);
    let features = driver.offered();
    driver.start(features, 1);
    let flood = driver.network[0].try_clone().unwrap();
    flood.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| while flood.send(&frame(1500, 0)).is_ok() {});
        for _ in 0..200 {
            if driver.pairs[0].rx.room() > 8 {
                driver.pairs[0].post_many(8);
                driver.notify(0);
            }
            while driver.pairs[0].rx.pop().is_some() {}
        }
        let start = Instant::now();
        driver.begin_anew();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(driver.get(register::STATUS), 0);
        flood.shutdown(std::net::Shutdown::Both).unwrap();
        // What a blocked sender waits for.
        drop(driver);
    });
}

#[test]
fn a_copy_has_all_that_was_saved() {
    let state = State {
        mac: MAC,
        queue_pairs: 3,
        active_pairs: 1,
    };
    let (device, _network) = nic(3);
    assert_eq!(device.save(), state);
    let state = State {
        active_pairs: 2,
        ..state
    };
    let json = serde_json::to_string(&state).unwrap();
    let read: State = serde_json::from_str(&json).unwrap();
    let taps = (0..3).map(|_| tap().0).collect();
    let copy = Net::restore("net0", &read, taps).unwrap();
    assert_eq!(copy.save(), state);
    assert_eq!(copy.config(), device.config());
    assert_eq!(copy.features(), device.features());
    for bad in [
        State {
            queue_pairs: 4,
            ..state.clone()
        },
        State {
            active_pairs: 4,
            ..state.clone()
        },
        State {
            active_pairs: 0,
            ..state.clone()
        },
        State {
            mac: [0; 6],
            ..state.clone()
        },
        State {
            mac: [1, 2, 3, 4, 5, 6],
            ..state
        },
    ] {
        let taps = (0..3).map(|_| tap().0).collect();
        let refused = Net::restore("net0", &bad, taps).unwrap_err();
        assert!(
            matches!(
                refused,
                RestoreError::Device {
                    device: "network",
                    ..
                }
            ),
            "{bad:?}: {refused}"
        );
    }
}

#[test]
fn a_guest_that_was_saved_uses_the_pairs_that_it_has_set_up_and_no_more() {
    let mq = bits(&[VIRTIO_F_VERSION_1, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
    for (features, pairs, possible) in [
        (mq, 2, true),
        (mq, 1, false),
        (bits(&[VIRTIO_F_VERSION_1]), 1, false),
    ] {
        let mut driver = Driver::new(2);
        driver.start(features, pairs);
        let state = State {
            mac: MAC,
            queue_pairs: 2,
            active_pairs: 2,
        };
        let copy = Net::restore("net0", &state, vec![tap().0, tap().0]).unwrap();
        let registers = driver.transport.save();
        let copy = Transport::restore(registers, Box::new(copy), driver.memory.clone(), interrupt().0);
        match copy.map(drop) {
            Ok(()) => assert!(possible),
            Err(RestoreError::Start(StartError::Device(ActivateError::QueueMissing(2)))) => {
                assert!(!possible)
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Without a driver there is nobody who could use several.
    let state = State {
        mac: MAC,
        queue_pairs: 2,
        active_pairs: 2,
    };
    let mut copy = Net::restore("net0", &state, vec![tap().0, tap().0]).unwrap();
    copy.reset();
    assert_eq!(copy.save().active_pairs, 1);
}
