//! Buffers, tables and queues at the ends of memory: where the gap for devices begins and ends, and where all memory
//! ends. What lies in memory is served, in pieces on both sides of the gap, too; what leaves it is refused.

use crate::attack::messages::{Message, Shape, message, ready, shape};
use crate::attack::rings::alive;
use crate::boot::{Boot, GAP};
use crate::machine::{BUFFERS, HIGH, load, map_high, store, store_bytes};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

/// Where a message lies that is not the buffer in question, and where the answer to one goes.
const SENT: u64 = BUFFERS + 0x50_0000;
const ROOM: u64 = BUFFERS + 0x60_0000;
/// Bytes of a buffer at an end: more than any message here has.
const SIZE: u32 = 256;
const HALF: u32 = SIZE / 2;

/// Memory behind the first gap of a PC, which this machine has as any other.
const VIDEO: u64 = 0xa_0000;

/// A buffer of one or two pieces, and whether all of it is memory.
type Case = (&'static str, [(u64, u32); 2], bool);

fn cases(end: u64) -> [Case; 17] {
    let none = (0, 0);
    let (size, half) = (u64::from(SIZE), u64::from(HALF));
    let gap = (HIGH - GAP) as u32;
    [
        ("up to the gap", [(GAP - size, SIZE), none], true),
        ("from the gap's end on", [(HIGH, SIZE), none], true),
        ("up to the end", [(end - size, SIZE), none], true),
        (
            "on both sides of the gap",
            [(GAP - half, HALF), (HIGH, HALF)],
            true,
        ),
        ("at both ends", [(end - half, HALF), (GAP - half, HALF)], true),
        ("across 640 KiB", [(VIDEO - half, SIZE), none], true),
        ("across the gap's start", [(GAP - half, SIZE), none], false),
        (
            "across the gap's start by a byte",
            [(GAP - size + 1, SIZE), none],
            false,
        ),
        ("across the gap's end", [(HIGH - half, SIZE), none], false),
        ("across the gap's end by a byte", [(HIGH - 1, SIZE), none], false),
        ("across all of the gap", [(GAP - half, gap + SIZE), none], false),
        ("across the end", [(end - half, SIZE), none], false),
        ("across the end by a byte", [(end - size + 1, SIZE), none], false),
        ("behind the end", [(end, SIZE), none], false),
        ("in the gap", [(0xd000_0000, SIZE), none], false),
        (
            "half in memory, half in the gap",
            [(GAP - half, HALF), (GAP, HALF)],
            false,
        ),
        (
            "half above the gap, half in it",
            [(HIGH, HALF), (HIGH - half, HALF)],
            false,
        ),
    ]
}

/// All of it, for the first device of every kind.
pub fn all(boot: &Boot, report: &mut Report) {
    if boot.ram_end != GAP || boot.end <= HIGH {
        return wrong!(
            report,
            "memory ends at {:#x}, then at {:#x}",
            boot.ram_end,
            boot.end
        );
    }
    map_high(HIGH);
    for device in boot.kinds() {
        report.attacks(device);
        say!(report, "regions: buffers of {}", device.name());
        for case in cases(boot.end) {
            for queue in 0..device.queues.min(FIRST as u16) {
                buffers(device, queue, boot.end, &case, report);
            }
            check(device, report, case.0);
        }
        say!(report, "regions: tables and queues of {}", device.name());
        tables(device, boot.end, report);
        queues(device, boot.end, report);
        check(device, report, "queues at the ends of memory");
    }
    say!(report, "regions: a queue above the gap");
    for base in [HIGH, boot.end - 0x1_0000, GAP - 0x1_0000] {
        if boot.device(RNG).is_none_or(|rng| !works_at(rng, base)) {
            wrong!(report, "no entropy by a queue at {base:#x}");
        }
    }
}

fn check(device: Device, report: &mut Report, after: &str) {
    if device.kind == CONSOLE {
        report.give_up_console();
    }
    if !alive(device) {
        wrong!(report, "{} does not work after: {after}", device.name());
    }
    if device.kind == CONSOLE {
        report.give_up_console();
    }
}

/// Writes a message over the pieces of a buffer, as far as they are memory.
fn scatter(message: &Message, pieces: &[(u64, u32)], end: u64) {
    let places = pieces
        .iter()
        .flat_map(|(address, length)| (0..u64::from((*length).min(SIZE))).map(move |at| address + at));
    for (place, byte) in places.zip(message.bytes) {
        if place < GAP || (HIGH..end).contains(&place) {
            store(place, byte);
        }
    }
}

/// One buffer, as what the device reads and as what it writes.
fn buffers(device: Device, queue: u16, end: u64, (name, pieces, is_memory): &Case, report: &mut Report) {
    let pieces: &[(u64, u32)] = if pieces[1].1 == 0 { &pieces[..1] } else { pieces };
    let shape = shape(device, queue);
    for write in [false, true] {
        if (write && shape == Shape::Read) || (!write && shape == Shape::Write) {
            continue;
        }
        if device.kind == CONSOLE {
            report.give_up_console();
        }
        let Some(mut ready) = ready(device, FEATURES) else {
            return wrong!(report, "{} does not start", device.name());
        };
        let message = message(device, ready.handle);
        let Some(ring) = ready.rings.get_mut(usize::from(queue)).and_then(Option::as_mut) else {
            return;
        };
        let flag = if write { WRITE } else { 0 };
        let mut chain = [(0, 0, 0); 3];
        let mut count = 0;
        let mut add = |part| {
            chain[count] = part;
            count += 1;
        };
        if write && shape == Shape::Both {
            store_bytes(SENT, &message.bytes);
            add((SENT, message.length, 0));
        }
        if !write {
            scatter(&message, pieces, end);
        }
        for (address, length) in pieces {
            add((*address, *length, flag));
        }
        if !write && shape == Shape::Both {
            add((ROOM, 4096, WRITE));
        }
        for (index, (address, length, flags)) in (0u16..).zip(&chain[..count]) {
            let last = usize::from(index) + 1 == count;
            ring.put(
                index,
                *address,
                *length,
                flags | if last { 0 } else { NEXT },
                index + 1,
            );
        }
        ring.offer(0);
        device.notify(queue.into());
        // The others answer when something comes, or never say what they wrote.
        if device.kind != RNG && shape == Shape::Write {
            crate::machine::wait(2_000_000);
            continue;
        }
        let tells = device.kind == RNG || device.kind == FS;
        // Where the host's kernel serves the queue, it stands still after what is refused.
        let patience = if tells || *is_memory {
            60_000_000_000
        } else {
            10_000_000_000
        };
        ring.wait_fresh(1, patience);
        let Some((_, used)) = ring.take() else {
            wrong!(report, "{} stands still: a buffer {name}", device.name());
            continue;
        };
        if tells && (used > 0) != *is_memory {
            wrong!(report, "{}: a buffer {name}: {used} bytes", device.name());
        }
        // A READ of an empty file: it says 0.
        let told = if write { pieces[0].0 } else { ROOM };
        if device.kind == FS && *is_memory && load::<i32>(told + 4) != 0 {
            wrong!(report, "fs: a request with a buffer {name} fails");
        }
    }
}

/// Indirect tables at the ends.
fn tables(device: Device, end: u64, report: &mut Report) {
    if device.offered & 1 << 28 == 0 {
        return;
    }
    for (table, is_memory) in [
        (GAP - 32, true),
        (HIGH, true),
        (end - 32, true),
        (GAP - 16, false),
        (HIGH - 16, false),
        (end - 16, false),
        (end, false),
    ] {
        for queue in 0..device.queues.min(FIRST as u16) {
            if device.kind == CONSOLE {
                report.give_up_console();
            }
            let Some(mut ready) = ready(device, FEATURES) else {
                return wrong!(report, "{} does not start", device.name());
            };
            let message = message(device, ready.handle);
            let Some(ring) = ready.rings.get_mut(usize::from(queue)).and_then(Option::as_mut) else {
                return;
            };
            store_bytes(SENT, &message.bytes);
            let shape = shape(device, queue);
            let (one, other) = match shape {
                Shape::Read => ((SENT, 16, 0), (SENT + 16, message.length - 16, 0)),
                Shape::Write => ((ROOM, 64, WRITE), (ROOM + 64, 4096, WRITE)),
                Shape::Both => ((SENT, message.length, 0), (ROOM, 4096, WRITE)),
            };
            let parts = [(one.0, one.1, one.2 | NEXT), other];
            for (at, (address, length, flags)) in [table, table + 16].into_iter().zip(parts) {
                if at < GAP || (HIGH..end).contains(&at) {
                    descriptor(at, address, length, flags, 1);
                }
            }
            ring.put(0, table, 32, INDIRECT, 0);
            ring.offer(0);
            device.notify(queue.into());
            if device.kind != RNG && shape == Shape::Write {
                continue;
            }
            let tells = device.kind == RNG || device.kind == FS;
            match ring.wait_take() {
                Some((_, used)) if tells && (used > 0) != is_memory => {
                    wrong!(report, "{}: a table at {table:#x}: {used} bytes", device.name());
                }
                Some(_) => {}
                None => wrong!(report, "{} stands still: a table at {table:#x}", device.name()),
            }
        }
    }
}

/// Queues whose rings lie at the ends: 16 places have 256 bytes of descriptors, 38 of what is available and 134 of what
/// is used.
fn queues(device: Device, end: u64, report: &mut Report) {
    for edge in [GAP, end] {
        for (name, descriptors, available, used, is_memory) in [
            ("descriptors up to", edge - 256, 0, 0, true),
            ("available up to", 0, edge - 38, 0, true),
            ("used up to", 0, 0, edge - 136, true),
            ("descriptors across", edge - 128, 0, 0, false),
            ("available across", 0, edge - 20, 0, false),
            ("used across", 0, 0, edge - 64, false),
            ("descriptors behind", edge, 0, 0, false),
        ] {
            if device.kind == CONSOLE {
                report.give_up_console();
            }
            device.negotiate(FEATURES);
            for queue in 0..device.queues {
                let size = device.max_size(queue).min(16) as u16;
                let ring = Ring::new(device.memory(queue.min(FIRST as u16 - 1)), size);
                if size < 16 {
                    device.set_queue(queue, &ring);
                    continue;
                }
                let or = |address, own| if address == 0 { own } else { address };
                device.set_registers(
                    queue,
                    16,
                    or(descriptors, ring.descriptors()),
                    or(available, ring.available()),
                    or(used, ring.used_ring()),
                );
            }
            device.start();
            if device.runs() != is_memory {
                wrong!(
                    report,
                    "{}: {name} {edge:#x}: runs is {}",
                    device.name(),
                    !is_memory
                );
            }
            for queue in 0..device.queues.min(FIRST as u16) {
                device.notify(queue.into());
            }
            device.reset();
        }
    }
}

/// Whether a device without messages serves a queue at an address, which has 64 KiB.
fn works_at(device: Device, base: u64) -> bool {
    device.negotiate(FEATURES);
    let mut ring = Ring::new(base, 16);
    device.set_queue(0, &ring);
    device.start();
    ring.put(0, base + 0x4000, 64, WRITE, 0);
    ring.offer(0);
    device.notify(0);
    ring.wait_take().is_some_and(|(_, used)| used > 0) && load::<[u8; 64]>(base + 0x4000) != [0; 64]
}
