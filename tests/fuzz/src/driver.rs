//! A driver in a guest, played by a fuzzer: it starts a device as it should be started, or writes what it likes where
//! it likes, and so it goes on.

use crate::input::Input;
use crate::ram::{DATA, REGIONS, Ram};
use husk_vmm::bus::Bus;
use husk_vmm::irq::ioapic::{IoApic, Message, Router};
use husk_vmm::layout;
use husk_vmm::virtio::device::{Device, Interrupt};
use husk_vmm::virtio::mmio::{Transport, register as reg};
use husk_vmm::worker::inline;
use std::collections::BTreeMap;
use std::io;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most operations of one input.
const MAX_OPERATIONS: usize = 400;

/// Most rounds of events after an operation. What goes on for longer goes on after the next one.
const ROUNDS: usize = 16;

/// From one queue's rings to those of the next.
const SPAN: u64 = 0x7000;
const AVAILABLE: u64 = 0x4000;
/// Behind the available ring of the largest queue and the event index at its end.
const USED: u64 = 0x4810;

/// Indirect tables lie at the end of the second region, one for each head.
const TABLES: u64 = REGIONS[1].0 + REGIONS[1].1 as u64 - 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The registers that lie together at the start.
const REGISTERS: [u64; 22] = [
    reg::DEVICE_FEATURES_SEL,
    reg::DRIVER_FEATURES,
    reg::DRIVER_FEATURES_SEL,
    reg::QUEUE_SEL,
    reg::QUEUE_NUM,
    reg::QUEUE_READY,
    reg::QUEUE_NOTIFY,
    reg::INTERRUPT_ACK,
    reg::STATUS,
    reg::QUEUE_DESC_LOW,
    reg::QUEUE_DESC_HIGH,
    reg::QUEUE_DRIVER_LOW,
    reg::QUEUE_DRIVER_HIGH,
    reg::QUEUE_DEVICE_LOW,
    reg::QUEUE_DEVICE_HIGH,
    reg::SHM_SEL,
    reg::CONFIG,
    reg::MAGIC,
    reg::DEVICE_FEATURES,
    reg::QUEUE_NUM_MAX,
    reg::INTERRUPT_STATUS,
    reg::CONFIG_GENERATION,
];

/// What is on the other side of the device, and knows what the device is.
pub trait Host {
    /// What a driver has to say on the queue, from the input.
    fn request(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8>;

    /// Something happens on the host's side.
    fn act(&mut self, input: &mut Input<'_>);

    /// The device has returned a chain of the queue into which it has written these bytes. Not called once the driver
    /// has broken the rules.
    fn returned(&mut self, queue: usize, bytes: &[u8]) {
        let _ = (queue, bytes);
    }
}

/// Nothing at all.
#[derive(Clone, Copy, Debug)]
pub struct Nobody;

impl Host for Nobody {
    fn request(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        input.text(64).to_vec()
    }

    fn act(&mut self, _input: &mut Input<'_>) {}
}

/// What the interrupt controller asks of KVM.
#[derive(Clone, Copy, Debug)]
pub struct Routes;

impl Router for Routes {
    fn set_routes(&mut self, routes: &[(u32, Message)]) -> io::Result<()> {
        assert!(routes.len() <= layout::IOAPIC_PINS);
        for (line, message) in routes {
            assert!((*line as usize) < layout::IOAPIC_PINS);
            assert_eq!(message.address & 0xfff0_0000, 0xfee0_0000);
        }
        Ok(())
    }
}

/// A queue as its driver keeps it.
#[derive(Clone, Debug, Default)]
pub struct Rings {
    base: u64,
    size: u16,
    free: Vec<u16>,
    available: u16,
    used: u16,
    chains: BTreeMap<u16, Chain>,
}

impl Rings {
    /// Queue `number`, with all of its `size` places free.
    pub fn new(number: u32, size: u16) -> Self {
        Self {
            base: u64::from(number) * SPAN,
            size,
            free: (0..size).rev().collect(),
            ..Self::default()
        }
    }

    /// Guest addresses of the table, the available ring and the used ring.
    pub fn places(&self) -> [u64; 3] {
        [self.base, self.base + AVAILABLE, self.base + USED]
    }

    /// Both rings stand at `position`: so much was asked for, and all of that is done.
    pub fn stand_at(&mut self, ram: &Ram, position: u16) {
        self.available = position;
        self.used = position;
        for ring in [AVAILABLE, USED] {
            let mut head = [0; 6];
            head[2..4].copy_from_slice(&position.to_le_bytes());
            ram.write(self.base + ring, &head);
        }
    }
}

/// A chain under way.
#[derive(Clone, Debug, Default)]
struct Chain {
    descriptors: Vec<u16>,
    /// Where it may be written: addresses and lengths.
    room: Vec<(u64, u32)>,
    /// Nobody else has had any of that since.
    alone: bool,
    /// Address of its indirect table.
    table: Option<u64>,
}

fn overlap(one: &[(u64, u32)], other: &[(u64, u32)]) -> bool {
    one.iter().any(|(at, length)| {
        let end = at + u64::from(*length);
        other
            .iter()
            .any(|(start, length)| *start < end && *at < start + u64::from(*length))
    })
}

/// The driver of one of the devices on a bus.
pub struct Driver {
    bus: Bus,
    ram: Ram,
    slot: usize,
    queues: Vec<Rings>,
    /// The driver has kept all rules since the device was reset.
    honest: bool,
    event_idx: bool,
}

impl Driver {
    /// A bus with an IOAPIC and these devices, of which the first is driven.
    pub fn new(ram: &Ram, devices: Vec<Box<dyn Device>>) -> Self {
        let mut transports = vec![];
        let mut lines = vec![];
        for (slot, device) in devices.into_iter().enumerate() {
            let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("descriptors");
            let line = Interrupt::new(event);
            lines.push((layout::virtio_irq(slot), line.clone()));
            transports.push(Transport::new(device, ram.memory.clone(), line).expect("descriptors"));
        }
        Self {
            bus: Bus::new(Some(IoApic::new(Box::new(Routes), lines)), transports),
            ram: ram.clone(),
            slot: 0,
            queues: vec![],
            honest: true,
            event_idx: false,
        }
    }

    /// A driver that was started before: it has these queues in the first device of the bus, which has just come back, and
    /// has kept all rules or not.
    pub fn midway(ram: &Ram, bus: Bus, queues: Vec<Rings>, honest: bool, event_idx: bool) -> Self {
        inline::run(ROUNDS);
        Self {
            bus,
            ram: ram.clone(),
            slot: 0,
            queues,
            honest,
            event_idx,
        }
    }

    fn write(&self, register: u64, value: u32) {
        let address = layout::virtio_base(self.slot) + register;
        self.bus.mmio_write(address, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        let address = layout::virtio_base(self.slot) + register;
        self.bus.mmio_read(address, &mut value);
        u32::from_le_bytes(value)
    }

    /// Does what the input says until it is used up.
    pub fn play(&mut self, input: &mut Input<'_>, host: &mut dyn Host) {
        // Most inputs are about what comes after that.
        self.start(input);
        self.go_on(input, host);
    }

    /// The same, with a device that was started before or not.
    pub fn go_on(&mut self, input: &mut Input<'_>, host: &mut dyn Host) {
        for _ in 0..MAX_OPERATIONS {
            if input.is_empty() {
                break;
            }
            self.operation(input, host);
            self.take_used(host);
        }
        self.ram.check();
    }

    fn operation(&mut self, input: &mut Input<'_>, host: &mut dyn Host) {
        match input.below(16) {
            0..=4 => self.request(input, host),
            5..=7 => {
                host.act(input);
                inline::run(ROUNDS);
            }
            8 => {
                self.write(reg::QUEUE_NOTIFY, u32::from(input.u8()) % 6);
                inline::run(ROUNDS);
            }
            9 => drop(inline::run(ROUNDS)),
            10 => self.tamper(input),
            11 => {
                let register = input.one_of(&REGISTERS);
                // The driver forgets what it has done.
                self.honest = false;
                self.write(register, input.number() as u32);
            }
            12 => self.access(input),
            13 => {
                let address = address(input);
                self.honest = false;
                self.ram.write(address, input.text(256));
            }
            14 => {
                self.write(reg::STATUS, 0);
                self.queues.clear();
                if input.u8() & 1 == 0 {
                    self.start(input);
                }
            }
            _ => {
                self.write(reg::INTERRUPT_ACK, 3);
                let _ = self.read(reg::CONFIG_GENERATION);
            }
        }
    }

    /// Starts the device as the standard says, with features and queues of the input's choice.
    fn start(&mut self, input: &mut Input<'_>) {
        self.queues.clear();
        self.honest = true;
        for status in [0, 1, 3] {
            self.write(reg::STATUS, status);
        }
        let mut features = 0;
        for word in [1, 0] {
            self.write(reg::DEVICE_FEATURES_SEL, word);
            features = features << 32 | u64::from(self.read(reg::DEVICE_FEATURES));
        }
        let choice = input.u8();
        if choice & 1 != 0 {
            features &= input.u64() | 1 << 32;
        }
        self.event_idx = features & 1 << 29 != 0;
        for word in [0, 1] {
            self.write(reg::DRIVER_FEATURES_SEL, word);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
        self.write(reg::STATUS, 0xb);
        let plain = choice & 2 == 0;
        for number in 0u32..5 {
            self.write(reg::QUEUE_SEL, number);
            let most = self.read(reg::QUEUE_NUM_MAX);
            if most == 0 {
                break;
            }
            let how = if plain { 0 } else { input.u8() };
            let size = match how & 0xf {
                0 => most.min(32),
                bits => 1 << (u32::from(bits) - 1),
            };
            let ready = how & 0x80 == 0;
            let mut rings = Rings::new(number, if ready && size <= most { size as u16 } else { 0 });
            if ready {
                let [table, available, used] = rings.places();
                self.write(reg::QUEUE_NUM, size);
                self.write(reg::QUEUE_DESC_LOW, table as u32);
                self.write(reg::QUEUE_DRIVER_LOW, available as u32);
                self.write(reg::QUEUE_DEVICE_LOW, used as u32);
                self.write(reg::QUEUE_READY, 1);
                rings.stand_at(&self.ram, 0);
            }
            self.queues.push(rings);
        }
        self.write(reg::STATUS, 0xf);
        inline::run(ROUNDS);
    }

    /// Makes a chain and makes it available.
    fn request(&mut self, input: &mut Input<'_>, host: &mut dyn Host) {
        let how = input.u8();
        let number = usize::from(how & 7) % self.queues.len().max(1);
        let bytes = host.request(number, input);
        let mut parts: Vec<(u64, u32, bool)> = vec![];
        let pieces = match how >> 3 & 3 {
            0 | 1 => 1,
            pieces => usize::from(pieces) + 1,
        };
        // What it says, in pieces; none of them overlap unless the input wants it.
        let mut at = DATA + u64::from(input.u8()) * 0x100;
        for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
            self.ram.write(at, piece);
            parts.push((at, piece.len() as u32, false));
            at += piece.len() as u64 + u64::from(how >> 7);
        }
        // Room for the answer: before the end of memory, or in the other region.
        let rooms = input.u8();
        let mut at = match rooms & 0x30 {
            0x30 => REGIONS[2].0,
            0x20 => REGIONS[1].0 - 40,
            _ => DATA + 0x1_0000 + u64::from(rooms & 0xf) * 0x1000,
        };
        for index in 0..rooms >> 6 {
            let length = match input.u8() {
                long @ 0xf0.. => u32::from(long & 0xf) * 0x800,
                length => u32::from(length) * 4,
            };
            parts.push((at, length, true));
            at += u64::from(length) + u64::from(index);
        }
        self.chain(number, &parts, how & 0x20 != 0);
        if how & 0x40 == 0 {
            self.write(reg::QUEUE_NOTIFY, number as u32);
            inline::run(ROUNDS);
        }
    }

    fn chain(&mut self, number: usize, parts: &[(u64, u32, bool)], indirect: bool) {
        // What the driver has written for it, and what the device may write, takes the room of earlier chains.
        let places: Vec<_> = parts.iter().map(|(at, length, _)| (*at, *length)).collect();
        let tables = [(TABLES, 0x1000)];
        self.honest &= !overlap(&places, &tables);
        let mut alone = true;
        for chain in self.queues.iter_mut().flat_map(|queue| queue.chains.values_mut()) {
            if overlap(&places, &chain.room) {
                chain.alone = false;
                alone = false;
            }
        }
        let chains = self.queues.iter().flat_map(|queue| queue.chains.values());
        let taken: Vec<u64> = chains.filter_map(|chain| chain.table).collect();
        let Some(queue) = self.queues.get_mut(number) else {
            return;
        };
        let wanted = if indirect { 1 } else { parts.len() };
        if parts.is_empty() || queue.free.len() < wanted {
            return;
        }
        let place = match queue.free.get(queue.free.len() - wanted) {
            Some(head) if indirect => TABLES + u64::from(head % 32) * 0x80,
            _ => queue.base,
        };
        // A driver that keeps the rules leaves a table alone that a chain of another queue is in.
        if indirect && taken.contains(&place) {
            return;
        }
        let indices = queue.free.split_off(queue.free.len() - wanted);
        let table: Vec<u16> = if indirect {
            (0..parts.len() as u16).collect()
        } else {
            indices.clone()
        };
        let head = indices[0];
        let mut room = vec![];
        for (at, (address, length, write)) in parts.iter().enumerate() {
            let next = table.get(at + 1).copied();
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let bytes = descriptor(*address, *length, flags, next.unwrap_or(0));
            self.ram.write(place + 16 * u64::from(table[at]), &bytes);
            if *write {
                room.push((*address, *length));
            }
        }
        if indirect {
            let bytes = descriptor(place, 16 * parts.len() as u32, INDIRECT, 0);
            self.ram.write(queue.base + 16 * u64::from(head), &bytes);
        }
        let chain = Chain {
            table: indirect.then_some(place),
            descriptors: indices,
            alone: alone && !overlap(&room, &places[..places.len() - room.len()]),
            room,
        };
        queue.chains.insert(head, chain);
        let slot = queue.base + AVAILABLE + 4 + 2 * u64::from(queue.available % queue.size);
        self.ram.write(slot, &head.to_le_bytes());
        queue.available = queue.available.wrapping_add(1);
        self.ram
            .write(queue.base + AVAILABLE + 2, &queue.available.to_le_bytes());
    }

    /// Takes back what the device has done with. A driver that keeps the rules checks that the device does too.
    fn take_used(&mut self, host: &mut dyn Host) {
        for (number, queue) in self.queues.iter_mut().enumerate() {
            if queue.size == 0 {
                continue;
            }
            for _ in 0..queue.size {
                let index = self.ram.read(queue.base + USED + 2, 2);
                if index == queue.used.to_le_bytes() {
                    break;
                }
                let at = queue.base + USED + 4 + 8 * u64::from(queue.used % queue.size);
                let element = self.ram.read(at, 8);
                let (head, length) = element.split_at(4);
                let head = u32::from_le_bytes(head.try_into().expect("four bytes"));
                let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
                queue.used = queue.used.wrapping_add(1);
                // With EVENT_IDX: the next one is to be told of.
                let event = queue.base + AVAILABLE + 4 + 2 * u64::from(queue.size);
                if self.event_idx {
                    self.ram.write(event, &queue.used.to_le_bytes());
                }
                let chain = u16::try_from(head)
                    .ok()
                    .and_then(|head| queue.chains.remove(&head));
                if let Some(Chain {
                    descriptors,
                    room,
                    alone,
                    table: _,
                }) = chain
                {
                    queue.free.extend(descriptors);
                    if self.honest {
                        let space: u64 = room.iter().map(|(_, length)| u64::from(*length)).sum();
                        assert!(
                            u64::from(length) <= space,
                            "the device says that it wrote {length} bytes of {space}"
                        );
                        let mut bytes = vec![];
                        for (address, room) in room {
                            let room = (length as usize - bytes.len()).min(room as usize);
                            bytes.extend(self.ram.read(address, room));
                        }
                        if alone {
                            host.returned(number, &bytes);
                        }
                    }
                } else {
                    assert!(
                        !self.honest,
                        "the device returned chain {head}, which it did not have"
                    );
                }
            }
        }
    }

    /// Breaks the rules of the rings.
    fn tamper(&mut self, input: &mut Input<'_>) {
        self.honest = false;
        let number = input.below(self.queues.len());
        let Some(queue) = self.queues.get_mut(number) else {
            return;
        };
        let base = queue.base;
        match input.below(6) {
            0 => {
                let index = u64::from(input.u16() % 1024);
                let flags = u16::from(input.u8());
                let next = input.number() as u16;
                let length = input.number() as u32;
                let address = address(input);
                let bytes = descriptor(address, length, flags, next);
                self.ram.write(base + 16 * index, &bytes);
            }
            1 => {
                let index = input.number() as u16;
                self.ram.write(base + AVAILABLE + 2, &index.to_le_bytes());
                queue.available = index;
            }
            2 => {
                queue.available = queue.available.wrapping_add(input.number() as u16);
                self.ram
                    .write(base + AVAILABLE + 2, &queue.available.to_le_bytes());
            }
            3 => {
                let at = base + AVAILABLE + 4 + 2 * u64::from(input.u8());
                self.ram.write(at, &(input.number() as u16).to_le_bytes());
            }
            4 => {
                // Flags, or the used event.
                let at = input.one_of(&[0, 4 + 2 * u64::from(queue.size)]);
                self.ram
                    .write(base + AVAILABLE + at, &(input.number() as u16).to_le_bytes());
            }
            _ => {
                self.ram
                    .write(base + USED + u64::from(input.u8()), &input.u16().to_le_bytes());
            }
        }
    }

    /// An access of any width to any of the bus's addresses.
    fn access(&mut self, input: &mut Input<'_>) {
        let how = input.u8();
        let offset = u64::from(input.u16());
        let address = match how & 3 {
            0 => layout::virtio_base(self.slot) + offset % 0x200,
            1 => layout::virtio_base(usize::from(how >> 5)) + offset % layout::VIRTIO_SIZE,
            2 => {
                layout::IOAPIC
                    + if how & 0x20 == 0 {
                        (offset & 1) * 16
                    } else {
                        offset
                    }
            }
            _ => input.number(),
        };
        let mut bytes = input.text(8).to_vec();
        match how >> 2 & 3 {
            0 => self.bus.mmio_read(address, &mut bytes),
            1 => {
                let _ = self.bus.port_write(offset as u16, &bytes);
                self.bus.port_read(offset as u16, &mut bytes);
            }
            _ => {
                self.honest = false;
                self.bus.mmio_write(address, &bytes);
            }
        }
    }
}

/// A guest address as such addresses are interesting: in the rings, in the data, at an end of memory, or anywhere.
pub fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        0..=0x7f => u64::from(input.u16()) * 8,
        0x80..=0xbf => DATA + u64::from(input.u16()),
        0xc0..=0xcf => REGIONS[1].0 - u64::from(input.u8()),
        0xd0..=0xdf => REGIONS[2].0 + u64::from(input.u16()),
        0xe0..=0xef => REGIONS[2].0 + REGIONS[2].1 as u64 - u64::from(input.u8()),
        _ => input.number(),
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}
