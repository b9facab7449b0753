//! Just enough of a driver to bring a device into any state, allowed or not.

use crate::machine::{fill, load, store, wait};

/// Names of the device kinds.
pub const KINDS: [(u32, &str); 5] = [
    (NET, "net"),
    (CONSOLE, "console"),
    (RNG, "rng"),
    (VSOCK, "vsock"),
    (FS, "fs"),
];

/// Device kinds.
pub const NET: u32 = 1;
/// Console.
pub const CONSOLE: u32 = 3;
/// Entropy.
pub const RNG: u32 = 4;
/// Sockets.
pub const VSOCK: u32 = 19;
/// File system.
pub const FS: u32 = 26;

/// `VIRTIO_F_VERSION_1` and `VIRTIO_RING_F_INDIRECT_DESC`; the latter only where it is offered.
pub const FEATURES: u64 = 1 << 32 | 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const EVENTS: u64 = 1 << 29;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

/// Registers of virtio-mmio.
pub mod reg {
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register.
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}

/// Cycles to wait for what must come: many seconds on any machine.
const PATIENCE: u64 = 60_000_000_000;

/// How many queues of a device are brought up: all of a NIC's with two pairs.
pub const FIRST: usize = 5;

/// A device's registers.
#[derive(Clone, Copy, Default)]
pub struct Device {
    /// Their address.
    pub base: u64,
    /// Its kind.
    pub kind: u32,
    /// Its number on the command line.
    pub slot: usize,
    /// All features on offer.
    pub offered: u64,
    /// Number of its queues.
    pub queues: u16,
    /// Largest size of each of the first queues.
    max_sizes: [u32; FIRST],
}

impl Device {
    /// The device at an address. What it says of itself is asked once: each access to a register takes long.
    pub fn at(base: u64, slot: usize) -> Self {
        let mut device = Self {
            base,
            kind: load(base + reg::DEVICE_ID),
            slot,
            ..Self::default()
        };
        device.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = device.read(reg::DEVICE_FEATURES);
        device.write(reg::DEVICE_FEATURES_SEL, 1);
        device.offered = u64::from(device.read(reg::DEVICE_FEATURES)) << 32 | u64::from(low);
        while device.queues < 64 {
            device.write(reg::QUEUE_SEL, device.queues.into());
            let max = device.read(reg::QUEUE_NUM_MAX);
            if max == 0 {
                break;
            }
            if let Some(place) = device.max_sizes.get_mut(usize::from(device.queues)) {
                *place = max;
            }
            device.queues += 1;
        }
        device
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        let found = KINDS.iter().find(|(kind, _)| *kind == self.kind);
        found.map_or("unknown", |(_, name)| name)
    }

    /// Reads a register.
    pub fn read(&self, register: u64) -> u32 {
        load(self.base + register)
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        store(self.base + register, value);
    }

    /// Writes a pair of registers.
    pub fn write_long(&self, register: u64, value: u64) {
        self.write(register, value as u32);
        // After a reset it is 0.
        if value >> 32 != 0 {
            self.write(register + 4, (value >> 32) as u32);
        }
    }

    /// Resets it.
    pub fn reset(&self) {
        self.write(reg::STATUS, 0);
    }

    /// From reset to FEATURES_OK with those of `features` that are on offer. Whether the device takes them.
    pub fn negotiate(&self, features: u64) -> bool {
        self.negotiate_exactly(features & self.offered)
    }

    /// As [`negotiate`](Self::negotiate), with these features whether on offer or not.
    pub fn negotiate_exactly(&self, features: u64) -> bool {
        self.reset();
        self.write(reg::STATUS, status::ACKNOWLEDGE);
        self.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.write(reg::DRIVER_FEATURES_SEL, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(reg::STATUS, wanted);
        self.read(reg::STATUS) == wanted
    }

    /// DRIVER_OK.
    pub fn start(&self) {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(reg::STATUS, all);
    }

    /// Whether it runs, as far as it says.
    pub fn runs(&self) -> bool {
        self.read(reg::STATUS) & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Largest size of one of the first queues; that of the last of them for all others.
    pub fn max_size(&self, queue: u16) -> u32 {
        self.max_sizes[usize::from(queue).min(FIRST - 1)]
    }

    /// Tells a queue's registers, whatever they are.
    pub fn set_registers(&self, queue: u16, size: u32, descriptors: u64, available: u64, used: u64) {
        self.write(reg::QUEUE_SEL, queue.into());
        self.write(reg::QUEUE_NUM, size);
        self.write_long(reg::QUEUE_DESC, descriptors);
        self.write_long(reg::QUEUE_DRIVER, available);
        self.write_long(reg::QUEUE_DEVICE, used);
        self.write(reg::QUEUE_READY, 1);
    }

    /// Tells where a queue is.
    pub fn set_queue(&self, queue: u16, ring: &Ring) {
        self.set_registers(
            queue,
            ring.size.into(),
            ring.descriptors(),
            ring.available(),
            ring.used_ring(),
        );
    }

    /// Notifies a queue.
    pub fn notify(&self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// Where this program has a queue of the device's.
    pub fn memory(&self, queue: u16) -> u64 {
        crate::machine::RINGS + self.slot as u64 * 0x10_0000 + u64::from(queue) * 0x1_0000
    }

    /// Resets the device and starts it with good queues, empty ones: at most the [first](FIRST).
    pub fn bring_up(&self, features: u64) -> [Option<Ring>; FIRST] {
        self.negotiate(features);
        let mut rings = [const { None }; FIRST];
        for (queue, place) in (0..self.queues).zip(&mut rings) {
            let size = self.max_size(queue).min(256) as u16;
            let ring = Ring::new(self.memory(queue), size);
            self.set_queue(queue, &ring);
            *place = Some(ring);
        }
        self.start();
        rings
    }
}

/// A queue in memory: the descriptors, 32 KiB behind them what is available, 48 KiB behind what is used.
pub struct Ring {
    base: u64,
    /// Places.
    pub size: u16,
    next: u16,
    seen: u16,
}

impl Ring {
    /// An empty queue.
    pub fn new(base: u64, size: u16) -> Self {
        fill(base, 0x1_0000, 0);
        Self {
            base,
            size,
            next: 0,
            seen: 0,
        }
    }

    /// Address of the descriptors.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Address of what is available.
    pub fn available(&self) -> u64 {
        self.base + 0x8000
    }

    /// Address of what is used.
    pub fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// Where the driver says which used buffer it is to be told of: `used_event`.
    pub fn wanted_event(&self) -> u64 {
        self.available() + 4 + 2 * u64::from(self.size)
    }

    /// Where the device says which available buffer it is to be told of: `avail_event`.
    pub fn offered_event(&self) -> u64 {
        self.used_ring() + 4 + 8 * u64::from(self.size)
    }

    /// Writes a descriptor.
    pub fn put(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        descriptor(self.base + u64::from(index) * 16, address, length, flags, next);
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        let place = self.next % self.size.max(1);
        store(self.available() + 4 + u64::from(place) * 2, head);
        self.next = self.next.wrapping_add(1);
        self.set_index(self.next);
    }

    /// Says that the next chain to come is this one.
    pub fn set_index(&self, index: u16) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        store(self.available() + 2, index);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }

    /// How many chains came back since they were last taken.
    pub fn fresh(&self) -> u16 {
        load::<u16>(self.used_ring() + 2).wrapping_sub(self.seen)
    }

    /// The next chain that came back: its head and the bytes written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.fresh() == 0 {
            return None;
        }
        let place = self.used_ring() + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        Some((load(place), load(place + 4)))
    }

    /// Waits for a number of chains to come back, long, and takes them. Whether they did.
    pub fn wait_used(&mut self, count: u16) -> bool {
        let there = self.wait_fresh(count, PATIENCE);
        if there {
            self.seen = self.seen.wrapping_add(count);
        }
        there
    }

    /// Waits for the next chain to come back, long, and takes it.
    pub fn wait_take(&mut self) -> Option<(u32, u32)> {
        self.wait_fresh(1, PATIENCE);
        self.take()
    }

    /// Waits a number of cycles for that many chains to be back.
    pub fn wait_fresh(&self, count: u16, cycles: u64) -> bool {
        let start = crate::machine::cycles();
        while self.fresh() < count {
            if crate::machine::cycles().wrapping_sub(start) > cycles {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    }
}

/// Writes a descriptor anywhere.
pub fn descriptor(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    store(at, address);
    store(at + 8, length);
    store(at + 12, flags);
    store(at + 14, next);
}

/// Leaves a device some time to do what it should not.
pub fn moment() {
    wait(10_000_000);
}
