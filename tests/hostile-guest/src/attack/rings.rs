//! Malformed queues and chains, against every queue of every device. After every few the device is asked for something
//! ordinary, which it must do.

use crate::attack::{console, fs, net, vsock};
use crate::boot::Boot;
use crate::machine::{BUFFERS, load, store};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

/// One malformation: made on a queue that is good and empty.
type Make = fn(&mut Ring, &Places);

/// Addresses that matter.
pub struct Places {
    /// The end of memory.
    ram_end: u64,
    /// A device's registers.
    registers: u64,
}

/// A page for indirect tables, and one behind.
const TABLE: u64 = BUFFERS + 0x40_0000;

/// One descriptor, offered.
fn single(ring: &mut Ring, address: u64, length: u32, flags: u16) {
    ring.put(0, address, length, flags, 0);
    ring.offer(0);
}

/// The same buffer as readable and as writable for the device, as two chains.
fn both(ring: &mut Ring, address: u64, length: u32) {
    ring.put(0, address, length, 0, 0);
    ring.put(1, address, length, WRITE, 0);
    ring.offer(0);
    ring.offer(1);
}

/// An indirect table of `length` bytes at `table`, with more flags.
fn indirect(ring: &mut Ring, table: u64, length: u32, flags: u16) {
    single(ring, table, length, INDIRECT | flags);
}

/// Fills a table with `count` chained descriptors of `length` bytes each.
fn chain(table: u64, count: u32, length: u32, flags: u16) {
    for index in 0..count {
        let next = if index + 1 < count { NEXT } else { 0 };
        let at = table + u64::from(index) * 16;
        descriptor(at, BUFFERS, length, flags | next, (index + 1) as u16);
    }
}

const MALFORMATIONS: &[(&str, Make)] = &[
    ("a head of the queue's size", |ring, _| ring.offer(ring.size)),
    ("a head of 65535", |ring, _| ring.offer(u16::MAX)),
    ("an index beyond the size", |ring, _| {
        ring.set_index(ring.size + 1)
    }),
    ("an index 32768 on", |ring, _| ring.set_index(0x8000)),
    ("an index one back", |ring, _| {
        single(ring, BUFFERS, 64, 0);
        ring.set_index(u16::MAX);
    }),
    ("a chain to itself", |ring, _| single(ring, BUFFERS, 64, NEXT)),
    ("a chain to itself, writable", |ring, _| {
        single(ring, BUFFERS, 64, NEXT | WRITE)
    }),
    ("a loop of two", |ring, _| {
        ring.put(0, BUFFERS, 64, NEXT, 1);
        ring.put(1, BUFFERS, 64, NEXT, 0);
        ring.offer(0);
    }),
    ("a chain out of the table", |ring, _| {
        ring.put(0, BUFFERS, 64, NEXT, u16::MAX);
        ring.offer(0);
    }),
    ("a chain of all places, each twice offered", |ring, _| {
        for index in 0..ring.size {
            ring.put(index, BUFFERS, 64, NEXT, (index + 1) % ring.size);
        }
        for _ in 0..2 * ring.size {
            ring.offer(0);
        }
    }),
    ("nested indirect tables", |ring, _| {
        descriptor(TABLE, TABLE, 16, INDIRECT, 0);
        indirect(ring, TABLE, 16, 0);
    }),
    ("an indirect table that loops", |ring, _| {
        descriptor(TABLE, BUFFERS, 64, NEXT, 0);
        indirect(ring, TABLE, 16, 0);
    }),
    ("an indirect table that leads out of itself", |ring, _| {
        descriptor(TABLE, BUFFERS, 64, NEXT, 1000);
        indirect(ring, TABLE, 16, 0);
    }),
    ("indirect and next", |ring, _| {
        chain(TABLE, 2, 64, 0);
        indirect(ring, TABLE, 32, NEXT);
    }),
    ("indirect and writable", |ring, _| {
        chain(TABLE, 2, 64, WRITE);
        indirect(ring, TABLE, 32, WRITE);
    }),
    ("an indirect table of no bytes", |ring, _| {
        indirect(ring, TABLE, 0, 0)
    }),
    ("an indirect table of 15 bytes", |ring, _| {
        indirect(ring, TABLE, 15, 0)
    }),
    ("an indirect table of 17 bytes", |ring, _| {
        indirect(ring, TABLE, 17, 0)
    }),
    ("an indirect table of 4 GiB", |ring, _| {
        indirect(ring, TABLE, 0xffff_fff0, 0)
    }),
    ("an indirect table at an odd address", |ring, _| {
        chain(TABLE + 1, 2, 64, 0);
        indirect(ring, TABLE + 1, 32, 0);
    }),
    ("an indirect table across the end of memory", |ring, places| {
        descriptor(places.ram_end - 16, BUFFERS, 64, NEXT, 1);
        indirect(ring, places.ram_end - 16, 32, 0);
    }),
    ("an indirect table in registers", |ring, places| {
        indirect(ring, places.registers, 4096, 0)
    }),
    ("an indirect table at the end of addresses", |ring, _| {
        indirect(ring, u64::MAX - 15, 32, 0)
    }),
    ("65536 readable pieces", |ring, _| {
        chain(TABLE, 65536, 1, 0);
        indirect(ring, TABLE, 65536 * 16, 0);
    }),
    ("4096 writable pieces of 16 MiB", |ring, _| {
        chain(TABLE, 4096, 16 << 20, WRITE);
        indirect(ring, TABLE, 4096 * 16, 0);
    }),
    ("512 readable pieces of 16 MiB", |ring, _| {
        chain(TABLE, 512, 16 << 20, 0);
        indirect(ring, TABLE, 512 * 16, 0);
    }),
    ("no bytes", |ring, _| both(ring, BUFFERS, 0)),
    ("no bytes nowhere", |ring, _| both(ring, u64::MAX, 0)),
    ("one byte", |ring, _| both(ring, BUFFERS, 1)),
    ("a length that wraps", |ring, _| both(ring, u64::MAX - 10, 100)),
    ("4 GiB from the first address", |ring, _| both(ring, 0, u32::MAX)),
    ("a buffer across the end of memory", |ring, places| {
        both(ring, places.ram_end - 16, 4096)
    }),
    ("a buffer at the end of memory", |ring, places| {
        both(ring, places.ram_end, 1)
    }),
    ("a buffer in registers", |ring, places| {
        both(ring, places.registers, 4096)
    }),
    ("a buffer in the local APIC", |ring, _| {
        both(ring, 0xfee0_0000, 4096)
    }),
    ("a buffer above 2^52", |ring, _| both(ring, 1 << 52, 4096)),
    ("writable, then readable", |ring, _| {
        ring.put(0, BUFFERS, 64, WRITE | NEXT, 1);
        ring.put(1, BUFFERS, 64, 0, 0);
        ring.offer(0);
    }),
    ("all memory as one buffer", |ring, places| {
        both(ring, 0, places.ram_end as u32)
    }),
    ("the queue itself as a buffer", |ring, _| {
        ring.put(0, ring.descriptors(), 0x1_0000, WRITE, 0);
        ring.offer(0);
    }),
    ("unknown flags", |ring, _| single(ring, BUFFERS, 64, 0xfff8)),
    ("no interrupts wanted, a wild used_event", |ring, _| {
        store(ring.available(), 0xffffu16);
        store(ring.wanted_event(), 0x8000u16);
        both(ring, BUFFERS, 64);
    }),
    ("a used index of its own", |ring, _| {
        store(ring.used_ring() + 2, 0x7fffu16);
        both(ring, BUFFERS, 64);
    }),
];

/// What the registers say of a queue: its size, then offsets of the rings from where they belong.
type Registers = fn(&Ring, u32, &Places) -> (u32, u64, u64, u64);

const BAD_REGISTERS: &[(&str, Registers)] = &[
    ("size 0", |r, _, _| {
        (0, r.descriptors(), r.available(), r.used_ring())
    }),
    ("size 3", |r, _, _| {
        (3, r.descriptors(), r.available(), r.used_ring())
    }),
    ("twice the largest size", |r, max, _| {
        (2 * max, r.descriptors(), r.available(), r.used_ring())
    }),
    ("size 65536", |r, _, _| {
        (0x1_0000, r.descriptors(), r.available(), r.used_ring())
    }),
    ("size 65536 and 2", |r, _, _| {
        (0x1_0002, r.descriptors(), r.available(), r.used_ring())
    }),
    ("descriptors at an odd address", |r, _, _| {
        (16, r.descriptors() + 1, r.available(), r.used_ring())
    }),
    ("available at an odd address", |r, _, _| {
        (16, r.descriptors(), r.available() + 1, r.used_ring())
    }),
    ("used at a misaligned address", |r, _, _| {
        (16, r.descriptors(), r.available(), r.used_ring() + 2)
    }),
    ("descriptors across the end of memory", |r, _, places| {
        (16, places.ram_end - 16, r.available(), r.used_ring())
    }),
    ("available across the end of memory", |r, _, places| {
        (16, r.descriptors(), places.ram_end - 2, r.used_ring())
    }),
    ("used across the end of memory", |r, _, places| {
        (16, r.descriptors(), r.available(), places.ram_end - 4)
    }),
    ("used in registers", |r, _, places| {
        (16, r.descriptors(), r.available(), places.registers)
    }),
    ("descriptors at the end of addresses", |r, _, _| {
        (16, u64::MAX - 15, r.available(), r.used_ring())
    }),
    ("used at the end of addresses", |r, _, _| {
        (16, r.descriptors(), r.available(), u64::MAX - 3)
    }),
    ("available above 2^52", |r, _, _| {
        (16, r.descriptors(), 1 << 52, r.used_ring())
    }),
];

/// Registers that are allowed, of rings that lie in each other.
const OVERLAPPING: &[(&str, Registers)] = &[
    ("all rings at one address", |r, _, _| {
        (16, r.descriptors(), r.descriptors(), r.descriptors())
    }),
    ("used over descriptors", |r, _, _| {
        (16, r.descriptors(), r.available(), r.descriptors())
    }),
    ("used over available", |r, _, _| {
        (16, r.descriptors(), r.available(), r.available())
    }),
    ("all at the first address", |_, _, _| (16, 0, 0, 0)),
];

/// Whether a device does what it is for, after a reset.
pub fn alive(device: Device) -> bool {
    match device.kind {
        RNG => entropy(device),
        CONSOLE => console::alive(device),
        VSOCK => vsock::alive(device),
        FS => fs::alive(device),
        NET => net::alive(device),
        _ => true,
    }
}

fn entropy(device: Device) -> bool {
    let [Some(mut ring), ..] = device.bring_up(FEATURES) else {
        return false;
    };
    let buffer = BUFFERS + 0x8000;
    for round in 0..2u64 {
        store(buffer + round * 64, [0u8; 64]);
        ring.put(0, buffer + round * 64, 64, WRITE, 0);
        ring.offer(0);
        device.notify(0);
        if !ring
            .wait_take()
            .is_some_and(|(head, length)| head == 0 && (1..=64).contains(&length))
        {
            return false;
        }
    }
    load::<[u8; 64]>(buffer) != load::<[u8; 64]>(buffer + 64)
}

fn check(device: Device, report: &mut Report, after: &str) {
    if !alive(device) {
        wrong!(
            report,
            "{} does not work after (or up to three before): {after}",
            device.name()
        );
    }
    if device.kind == CONSOLE {
        report.give_up_console();
    }
}

/// All of the above, for the first device of every kind.
pub fn all(boot: &Boot, report: &mut Report) {
    for device in boot.kinds() {
        let places = Places {
            ram_end: boot.ram_end,
            registers: device.base,
        };
        report.attacks(device);
        say!(report, "rings of {} in slot {}", device.name(), device.slot);
        check(device, report, "nothing yet");
        chains(device, report, &places, FEATURES);
        say!(report, "rings of {} with events", device.name());
        if device.offered & EVENTS == 0 || !device.negotiate(FEATURES | EVENTS) {
            wrong!(report, "{} does not offer EVENT_IDX", device.name());
        }
        chains(device, report, &places, FEATURES | EVENTS);
        events(device, report);
        say!(report, "registers of queues of {}", device.name());
        registers(device, report, &places);
        in_flight(device, report);
    }
}

fn chains(device: Device, report: &mut Report, places: &Places, features: u64) {
    for (number, (name, make)) in MALFORMATIONS.iter().enumerate() {
        if device.kind == CONSOLE {
            report.give_up_console();
        }
        let mut rings = device.bring_up(features);
        for (queue, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            make(ring, places);
            device.notify(queue as u32);
        }
        moment();
        if number % 4 == 3 {
            check(device, report, name);
        }
    }
}

/// EVENT_IDX with indexes of nonsense, before and after requests, many at a time: when an interrupt is wanted, and when
/// a notification. Whatever they say, a driver that looks finds its buffers used.
fn events(device: Device, report: &mut Report) {
    for (number, wild) in [0u16, 1, 2, 0x7ffe, 0x7fff, 0x8000, 0xfffe, 0xffff]
        .into_iter()
        .enumerate()
    {
        if device.kind == CONSOLE {
            report.give_up_console();
        }
        let mut rings = device.bring_up(FEATURES | EVENTS);
        for (queue, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            store(ring.wanted_event(), wild);
            store(ring.offered_event(), wild);
            both(ring, BUFFERS, 64);
            device.notify(queue as u32);
            for _ in 1..ring.size / 2 {
                store(ring.wanted_event(), wild.wrapping_mul(ring.fresh()));
                store(ring.offered_event(), !wild);
                both(ring, BUFFERS, 64);
            }
            device.notify(queue as u32);
        }
        moment();
        for (queue, ring) in rings.iter().enumerate() {
            let Some(ring) = ring else { continue };
            // What these are sent goes back at once.
            let served = matches!((device.kind, queue), (RNG | FS, _) | (CONSOLE, 1));
            if served && !ring.wait_fresh(ring.size, 60_000_000_000) {
                let back = ring.fresh();
                wrong!(
                    report,
                    "{} gave {back} back with an event of {wild}",
                    device.name()
                );
            }
        }
        if number % 4 == 3 {
            check(device, report, "wild events");
        }
    }
}

fn registers(device: Device, report: &mut Report, places: &Places) {
    for (number, (name, make)) in BAD_REGISTERS.iter().chain(OVERLAPPING).enumerate() {
        let allowed = OVERLAPPING.iter().any(|(other, _)| other == name);
        if device.kind == CONSOLE {
            report.give_up_console();
        }
        device.negotiate(FEATURES);
        for queue in 0..device.queues {
            let max = device.max_size(queue);
            let ring = Ring::new(device.memory(queue.min(FIRST as u16 - 1)), max.min(256) as u16);
            let (size, descriptors, available, used) = make(&ring, max, places);
            // A chain that would be served if the queue were.
            ring.put(0, BUFFERS, 64, WRITE, 0);
            ring.set_index(1);
            device.set_registers(queue, size, descriptors, available, used);
        }
        device.start();
        let runs = device.runs();
        for queue in 0..device.queues.min(FIRST as u16) {
            device.notify(queue.into());
        }
        moment();
        if runs && !allowed {
            wrong!(report, "{} runs with queues of {name}", device.name());
        }
        if number % 4 == 3 {
            check(device, report, name);
        }
    }
}

/// Resets while much is under way, and at once.
fn in_flight(device: Device, report: &mut Report) {
    if device.kind == CONSOLE {
        report.give_up_console();
    }
    for round in 0..20u64 {
        let mut rings = device.bring_up(FEATURES);
        for (queue, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            for head in 0..ring.size {
                let flags = if head % 2 == 0 { WRITE } else { 0 };
                ring.put(head, BUFFERS + u64::from(head) * 4096, 4096, flags, 0);
                ring.offer(head);
            }
            device.notify(queue as u32);
        }
        crate::machine::wait(round * 200_000);
    }
    check(device, report, "resets with much under way");
}
