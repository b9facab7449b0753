//! What changes after it was sent: while a device reads what the first processor has sent it, a second one writes other
//! values there, all the time. A device that reads a thing twice reads two things.

use crate::attack::messages::{DATA, Message, Shape, message, ready, shape};
use crate::attack::rings::alive;
use crate::attack::{net, vsock};
use crate::boot::Boot;
use crate::machine::{BUFFERS, load, store_bytes, wait};
use crate::report::{Report, say, wrong};
use crate::second::Second;
use crate::virtio::*;

/// Where a message lies that is sent.
const SENT: u64 = BUFFERS + 0x50_0000;
/// Where a queue's device may write.
const ROOM: u64 = BUFFERS + 0x60_0000;
/// Indirect tables.
const TABLES: u64 = BUFFERS + 0x48_0000;

/// How often everything is sent while one kind of thing changes; after so many times on queues that are new.
const TIMES: u32 = 40;
const TIMES_ON_A_QUEUE: u32 = 8;

/// The chains of each queue: one that lies in the queue, and one in a table if there can be any.
const DIRECT: u16 = 0;
const INDIRECT_HEAD: u16 = 2;

/// What is being attacked.
struct Target {
    device: Device,
    message: Message,
    handle: u64,
    ram_end: u64,
}

/// A descriptor: where it is, and what it says when it is sent.
struct Sent {
    at: u64,
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Target {
    /// The two descriptors of a queue's chain, from `first` on in a table.
    fn chain(&self, queue: u16, table: u64, first: u16) -> [Sent; 2] {
        let (front, length) = (self.message.front, self.message.length);
        let room = ROOM + u64::from(queue) * 0x1_0000;
        let [one, other] = match shape(self.device, queue) {
            Shape::Read => [(SENT, front, 0), (SENT + u64::from(front), length - front, 0)],
            Shape::Write => [(room, 64, WRITE), (room + 64, 4096, WRITE)],
            Shape::Both => [(SENT, length, 0), (room, 4096, WRITE)],
        };
        let sent = |number: u16, (address, length, flags), next| Sent {
            at: table + u64::from(number) * 16,
            address,
            length,
            flags,
            next,
        };
        let (one, second) = ((one.0, one.1, one.2 | NEXT), first + 1);
        [sent(first, one, second), sent(second, other, 0)]
    }

    /// All descriptors of a queue.
    fn descriptors(&self, queue: u16) -> [Option<Sent>; 5] {
        let ring = self.device.memory(queue);
        let [a, b] = self.chain(queue, ring, DIRECT);
        if self.device.offered & 1 << 28 == 0 {
            let [c, d] = self.chain(queue, ring, INDIRECT_HEAD);
            return [Some(a), Some(b), Some(c), Some(d), None];
        }
        let table = TABLES + u64::from(queue) * 4096;
        let [c, d] = self.chain(queue, table, 0);
        let head = Sent {
            at: ring + u64::from(INDIRECT_HEAD) * 16,
            address: table,
            length: 32,
            flags: INDIRECT,
            next: 0,
        };
        [Some(a), Some(b), Some(c), Some(d), Some(head)]
    }

    fn all_descriptors(&self) -> impl Iterator<Item = Sent> + '_ {
        let queues = 0..self.device.queues.min(FIRST as u16);
        queues.flat_map(|queue| self.descriptors(queue)).flatten()
    }

    /// Where the rings of each queue are, and its size.
    fn queues(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let queues = 0..self.device.queues.min(FIRST as u16);
        queues.map(|queue| {
            let size = self.device.max_size(queue).min(256);
            (self.device.memory(queue), u64::from(size))
        })
    }

    /// Sends all there is, once.
    fn send(&self, rings: &mut [Option<Ring>; FIRST]) {
        store_bytes(SENT, &self.message.bytes);
        for (queue, ring) in (0u16..).zip(rings) {
            let Some(ring) = ring else { continue };
            for sent in self.descriptors(queue).into_iter().flatten() {
                descriptor(sent.at, sent.address, sent.length, sent.flags, sent.next);
            }
            ring.offer(DIRECT);
            ring.offer(INDIRECT_HEAD);
            self.device.notify(queue.into());
        }
    }
}

/// What changes: a name, and the places with their values.
type Changes = (&'static str, fn(&mut Second, &Target));

fn addresses(second: &mut Second, target: &Target, sent: &Sent) {
    let (registers, end) = (target.device.base, target.ram_end);
    second.add(sent.at, 8, [sent.address, registers, end - 16, u64::MAX - 10]);
}

fn lengths(second: &mut Second, sent: &Sent) {
    let length = u64::from(sent.length);
    second.add(sent.at + 8, 4, [length, 0, 0x1_0000, u32::MAX.into()]);
}

fn flags(second: &mut Second, sent: &Sent) {
    let others = [
        sent.flags,
        sent.flags ^ NEXT,
        sent.flags ^ WRITE,
        sent.flags ^ INDIRECT,
    ];
    second.add(sent.at + 12, 2, others.map(u64::from));
}

fn nexts(second: &mut Second, sent: &Sent) {
    second.add(sent.at + 14, 2, [sent.next.into(), 0, 256, 0xffff]);
}

/// What changes of every device.
const OF_QUEUES: &[Changes] = &[
    ("addresses of buffers", |second, target| {
        target
            .all_descriptors()
            .for_each(|sent| addresses(second, target, &sent));
    }),
    ("lengths of buffers", |second, target| {
        target.all_descriptors().for_each(|sent| lengths(second, &sent));
    }),
    ("flags of buffers", |second, target| {
        target.all_descriptors().for_each(|sent| flags(second, &sent));
    }),
    ("what comes next in a chain", |second, target| {
        target.all_descriptors().for_each(|sent| nexts(second, &sent));
    }),
    ("all of the buffers", |second, target| {
        for sent in target.all_descriptors() {
            addresses(second, target, &sent);
            lengths(second, &sent);
            flags(second, &sent);
            nexts(second, &sent);
        }
    }),
    ("heads of chains", |second, target| {
        for (ring, size) in target.queues() {
            for place in 0..2 * u64::from(TIMES_ON_A_QUEUE) {
                second.add(ring + 0x8004 + 2 * place, 2, [DIRECT.into(), 1, size, 0xffff]);
            }
        }
    }),
    ("how many chains there are", |second, target| {
        for (ring, size) in target.queues() {
            second.add(ring + 0x8002, 2, [1, 2, 3, size]);
        }
    }),
    ("how many chains there are, beyond the size", |second, target| {
        for (ring, size) in target.queues() {
            second.add(ring + 0x8002, 2, [2, size + 1, 0x8000, 0xffff]);
        }
    }),
    (
        "what is wanted of interrupts, and what was used",
        |second, target| {
            for (ring, size) in target.queues() {
                second.add(ring + 0x8000, 2, [0, 1, 2, 0xffff]);
                second.add(ring + 0x8004 + 2 * size, 2, [0, 1, 0x7fff, 0xffff]);
                second.add(ring + 0xc000, 2, [0, 1, 2, 0xffff]);
                second.add(ring + 0xc002, 2, [0, 1, 0x7fff, 0xffff]);
                second.add(ring + 0xc004 + 8 * size, 2, [0, 1, 0x7fff, 0xffff]);
            }
        },
    ),
];

const OF_CONSOLES: &[Changes] = &[("text", |second, _| {
    for word in 0..8 {
        let text = [*b"........", *b"\x1b]0;\x07\x1b[m", [0; 8], [0xff; 8]];
        second.add(SENT + 8 * word, 8, text.map(u64::from_le_bytes));
    }
})];

const OF_FILES: &[Changes] = &[
    ("lengths of requests", |second, target| {
        let whole = u64::from(target.message.length);
        second.add(SENT, 4, [80, whole, 39, u32::MAX.into()]);
        second.add(SENT + 4, 4, [15, 15, 16, 16]);
        second.add(SENT + 56, 4, [DATA.into(), 0, 1 << 20, u32::MAX.into()]);
    }),
    ("operations, nodes and handles", |second, target| {
        // READ, WRITE, GETATTR, FORGET.
        second.add(SENT + 4, 4, [15, 16, 3, 2]);
        second.add(SENT + 8, 8, [1 << 40, 0, 1, u64::MAX]);
        second.add(SENT + 16, 8, [1, 0, 2, u64::MAX]);
        second.add(SENT + 40, 8, [target.handle, target.handle, 0, u64::MAX]);
        second.add(SENT + 48, 8, [0, 4096, 1 << 20, 1 << 63]);
    }),
    ("sessions, and all else", |second, target| {
        // READ, OPENDIR, INIT, DESTROY.
        second.add(SENT + 4, 4, [15, 27, 26, 38]);
        second.add(SENT, 4, [80, u64::from(target.message.length), 40, 0]);
        second.add(SENT + 16, 8, [1, 1, 0, u64::MAX]);
    }),
];

const OF_SOCKETS: &[Changes] = &[
    ("lengths and room of packets", |second, _| {
        second.add(SENT + 24, 4, [0, 100, 4096, u32::MAX.into()]);
        // REQUEST and RW.
        second.add(SENT + 30, 2, [1, 5, 5, 5]);
        second.add(SENT + 36, 4, [0x4_0000, 0, 1, u32::MAX.into()]);
        second.add(SENT + 40, 4, [0, 1, 0x8000_0000, u32::MAX.into()]);
    }),
    ("ports and addresses of packets", |second, target| {
        let cid: u64 = load(target.device.base + reg::CONFIG);
        second.add(SENT, 8, [cid, cid, 2, cid | 1 << 32]);
        second.add(SENT + 8, 8, [2, 2, cid, 1 << 32]);
        second.add(SENT + 16, 4, [5002, 5003, 0, u32::MAX.into()]);
        second.add(SENT + 20, 4, [7, 8, 0, u32::MAX.into()]);
    }),
    ("operations of packets", |second, _| {
        second.add(SENT + 28, 2, [1, 1, 2, 0xffff]);
        second.add(SENT + 30, 2, [1, 3, 4, 7]);
        second.add(SENT + 32, 4, [0, 1, 3, u32::MAX.into()]);
    }),
];

const OF_NICS: &[Changes] = &[
    ("headers of frames", |second, _| {
        second.add(SENT, 1, [0, 1, 1, 0xff]);
        second.add(SENT + 1, 1, [0, 1, 4, 0x85]);
        second.add(SENT + 2, 2, [0, 42, 1500, 0xffff]);
        second.add(SENT + 4, 2, [0, 1, 1460, 0xffff]);
        second.add(SENT + 6, 2, [0, 14, 60, 0xffff]);
        second.add(SENT + 8, 2, [0, 16, 60, 0xffff]);
        second.add(SENT + 10, 2, [0, 1, 2, 0xffff]);
    }),
    ("who sends a frame", |second, target| {
        let bytes = |address: [u8; 6]| {
            let [a, b, c, d, e, f] = address;
            u64::from_le_bytes([a, b, c, d, e, f, 8, 6])
        };
        let (own, other) = (bytes(net::own_address(target.device)), bytes(net::SPOOFED));
        second.add(SENT + 12 + 6, 8, [own, own, other, other]);
    }),
];

fn of_kind(kind: u32) -> &'static [Changes] {
    match kind {
        CONSOLE => OF_CONSOLES,
        FS => OF_FILES,
        VSOCK => OF_SOCKETS,
        NET => OF_NICS,
        // Nothing is sent to it.
        _ => &[],
    }
}

/// All of it, for the first device of every kind.
pub fn all(boot: &Boot, report: &mut Report) {
    let Some(mut second) = Second::start() else {
        return wrong!(report, "the second processor does not start");
    };
    for device in boot.kinds() {
        report.attacks(device);
        for (name, changes) in OF_QUEUES.iter().chain(of_kind(device.kind)) {
            if device.kind == CONSOLE {
                report.give_up_console();
            }
            let changed = attack(boot, device, &mut second, *changes);
            second.rest();
            if device.kind == CONSOLE {
                report.give_up_console();
            }
            match changed {
                Some(0) => wrong!(report, "{} of {} did not change", name, device.name()),
                Some(rounds) => say!(
                    report,
                    "fetches: {name} of {} changed {rounds} times",
                    device.name()
                ),
                None => wrong!(report, "{} does not start while {name} change", device.name()),
            }
            if !alive(device) {
                wrong!(report, "{} does not work after changes of {name}", device.name());
            }
        }
        if device.kind == CONSOLE {
            report.give_up_console();
        }
    }
}

/// Sends messages while the second processor makes changes. How often it made them all; `None` if the device did not
/// start.
fn attack(
    boot: &Boot,
    device: Device,
    second: &mut Second,
    changes: fn(&mut Second, &Target),
) -> Option<u64> {
    let mut changed = 0;
    let mut now = None;
    for time in 0..TIMES {
        if time % TIMES_ON_A_QUEUE == 0 || !device.runs() {
            changed += second.rest();
            let features = if time & TIMES_ON_A_QUEUE == 0 {
                FEATURES
            } else {
                u64::MAX
            };
            let ready = ready(device, features)?;
            let target = Target {
                device,
                message: message(device, ready.handle),
                handle: ready.handle,
                ram_end: boot.ram_end,
            };
            changes(second, &target);
            second.go();
            now = Some((target, ready.rings));
        }
        let (target, rings) = now.as_mut()?;
        target.send(rings);
        wait(6_000_000);
    }
    Some(changed + second.rest())
}

/// Packets on a connection in place of the agent's. The engine may end the machine meanwhile.
pub fn agent(boot: &Boot, report: &mut Report) {
    let Some(mut second) = Second::start() else {
        return wrong!(report, "the second processor does not start");
    };
    let at = vsock::OUTGOING;
    vsock::agent_changed(boot, report, || {
        second.add(at + 24, 4, [64, 65536, 0, u32::MAX.into()]);
        // RW, CREDIT_UPDATE.
        second.add(at + 30, 2, [5, 5, 5, 6]);
        second.add(at + 36, 4, [0x4_0000, 0, 1, u32::MAX.into()]);
        second.add(at + 40, 4, [0, 64, 0x8000_0000, u32::MAX.into()]);
        second.go();
    });
    if second.rest() == 0 {
        wrong!(report, "no packet changed");
    }
}
