//! The file system: FUSE requests that lie about their length, name what no directory has, and use nodes and handles that
//! there are not.

use crate::boot::Boot;
use crate::machine::{BUFFERS, fill, load, store, store_bytes};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

/// The queues: of urgent requests and of all others. The device serves both alike.
const URGENT: u16 = 0;
const REQUESTS: u16 = 1;
const ROOT: u64 = 1;
const HEADER: u64 = 40;

const REQUEST: u64 = BUFFERS + 0x20_0000;
const REPLY: u64 = BUFFERS + 0x30_0000;
/// Bytes for a reply.
const REPLY_SIZE: u32 = 0x1_0000;

mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const TMPFILE: u32 = 51;
}

struct Share {
    device: Device,
    /// Which of its queues the requests go to.
    queue: u16,
    rings: [Option<Ring>; FIRST],
    unique: u64,
}

impl Share {
    fn new(device: Device, features: u64, queue: u16) -> Option<Self> {
        let rings = device.bring_up(features);
        rings.get(usize::from(queue))?.as_ref()?;
        Some(Self {
            device,
            queue,
            rings,
            unique: 0,
        })
    }

    /// The queue that the requests go to.
    fn ring(&mut self) -> Option<&mut Ring> {
        self.rings.get_mut(usize::from(self.queue))?.as_mut()
    }

    /// Begins a session as Linux does. Whether the server agrees.
    fn begin(&mut self) -> bool {
        let mut init = [0u8; 64];
        init[0] = 7;
        init[4] = 38;
        init[8..12].copy_from_slice(&0x2_0000u32.to_le_bytes());
        self.call(op::INIT, 0, &[&init]) == Some(0)
    }

    /// Writes a request; its length.
    fn write(&mut self, opcode: u32, node: u64, arguments: &[&[u8]]) -> u32 {
        self.unique += 2;
        let mut length = HEADER;
        for argument in arguments {
            store_bytes(REQUEST + length, argument);
            length += argument.len() as u64;
        }
        fill(REQUEST, HEADER, 0);
        store(REQUEST, length as u32);
        store(REQUEST + 4, opcode);
        store(REQUEST + 8, self.unique);
        store(REQUEST + 16, node);
        length as u32
    }

    /// Sends what was written, `length` bytes of it, with so many bytes for the reply. How many were used.
    fn send(&mut self, length: u32, room: u32) -> Option<u32> {
        store(REPLY + 4, 0x5555_5555u32);
        let (device, queue) = (self.device, self.queue);
        let ring = self.ring()?;
        ring.put(0, REQUEST, length, NEXT, 1);
        ring.put(1, REPLY, room, WRITE, 0);
        ring.offer(0);
        device.notify(queue.into());
        ring.wait_take().map(|(_, used)| used)
    }

    /// Sends a request; the error of its reply, 0 if it was done, `None` if there is none.
    fn call(&mut self, opcode: u32, node: u64, arguments: &[&[u8]]) -> Option<i32> {
        let length = self.write(opcode, node, arguments);
        let used = self.send(length, REPLY_SIZE)?;
        (used >= 16).then(|| load::<i32>(REPLY + 4))
    }
}

/// Whether a session can begin and the root be asked for.
pub fn alive(device: Device) -> bool {
    let Some(mut share) = Share::new(device, FEATURES, REQUESTS) else {
        return false;
    };
    share.begin() && share.call(op::GETATTR, ROOT, &[&[0; 16]]) == Some(0)
}

/// Begins a session and opens a file that has no name: the queues and the file's handle.
pub fn opened(device: Device, features: u64) -> Option<([Option<Ring>; FIRST], u64)> {
    let mut share = Share::new(device, features, REQUESTS)?;
    if !share.begin() {
        return None;
    }
    let mut arguments = [0u8; 16];
    arguments[0] = 2; // O_RDWR
    arguments[4..8].copy_from_slice(&0o100_600u32.to_le_bytes());
    let made = share.call(op::TMPFILE, ROOT, &[&arguments, b"none\0"]) == Some(0);
    // Behind the reply's header and its entry.
    made.then(|| (share.rings, load(REPLY + 16 + 128)))
}

/// All of it.
pub fn all(boot: &Boot, report: &mut Report) {
    let Some(device) = boot.device(FS) else {
        return wrong!(report, "there is no file system");
    };
    report.attacks(device);
    if device.queues <= REQUESTS {
        return wrong!(report, "the file system has {} queues", device.queues);
    }
    for queue in [REQUESTS, URGENT] {
        queue_of(device, queue, report);
    }
    say!(report, "fs: one session, both queues");
    both(device, report);
    if !alive(device) {
        wrong!(report, "the file system does not work at the end");
    }
}

/// A session of both queues: what one is told holds for the other.
fn both(device: Device, report: &mut Report) {
    let Some(mut share) = Share::new(device, FEATURES, URGENT) else {
        return;
    };
    if !share.begin() {
        return wrong!(report, "fs: no session by the urgent queue");
    }
    for queue in [REQUESTS, URGENT, REQUESTS] {
        share.queue = queue;
        // Forgotten far more often than looked for, then forgotten in a batch that is cut short.
        share.call(op::FORGET, ROOT, &[&u64::MAX.to_le_bytes()]);
        share.call(op::FORGET, u64::MAX, &[&u64::MAX.to_le_bytes()]);
        share.call(op::BATCH_FORGET, 0, &[&[0xff; 24]]);
        share.call(op::INTERRUPT, 0, &[&[0xff; 8]]);
        if share.call(op::GETATTR, ROOT, &[&[0; 16]]) != Some(0) {
            wrong!(report, "fs: queue {queue} has lost the session");
        }
        let opened = share.call(op::OPENDIR, ROOT, &[&[0; 8]]) == Some(0);
        let handle = load::<[u8; 8]>(REPLY + 16);
        // Closed by the other queue, twice.
        share.queue = URGENT + REQUESTS - queue;
        for _ in 0..2 {
            share.call(op::RELEASEDIR, ROOT, &[&handle, &[0; 16]]);
        }
        let mut arguments = [0u8; 40];
        arguments[..8].copy_from_slice(&handle);
        arguments[16..20].copy_from_slice(&4096u32.to_le_bytes());
        if opened && share.call(op::READDIR, ROOT, &[&arguments]) == Some(0) {
            wrong!(report, "fs: a directory closed by queue {} is open", share.queue);
        }
    }
}

/// All of it that goes to one queue.
fn queue_of(device: Device, queue: u16, report: &mut Report) {
    let Some(mut share) = Share::new(device, FEATURES, queue) else {
        return wrong!(report, "the file system does not start");
    };
    say!(report, "fs: queue {queue}: requests before the session");
    // Some are answered: there is no harm in it.
    for opcode in (0..60).filter(|opcode| *opcode != op::INIT) {
        share.call(opcode, ROOT, &[&[0; 128]]);
    }
    if !share.begin() {
        return wrong!(report, "the file system takes no session");
    }
    say!(report, "fs: names");
    names(&mut share, report);
    say!(report, "fs: nodes and handles that there are not");
    stale(&mut share, report);
    say!(report, "fs: lengths and counts");
    lengths(&mut share, report);
    if !alive(device) {
        wrong!(report, "the file system does not work after lengths that lie");
    }
    say!(report, "fs: unknown operations, junk");
    junk(device, queue, report);
    if !alive(device) {
        wrong!(report, "the file system does not work after junk");
    }
    say!(report, "fs: nodes without end");
    many(device, queue, report);
    if !alive(device) {
        wrong!(report, "the file system does not work after queue {queue}");
    }
}

/// A request that must not be carried out: the reply is an error, or there is none.
fn silent_or_refused(share: &mut Share, report: &mut Report, opcode: u32, node: u64, arguments: &[&[u8]]) {
    if share.call(opcode, node, arguments) == Some(0) {
        wrong!(report, "fs: operation {opcode} of node {node:#x} was done");
    }
}

fn names(share: &mut Share, report: &mut Report) {
    let long = [b'n'; 5000];
    let names: [&[u8]; 12] = [
        b"..\0",
        b".\0",
        b"/\0",
        b"\0",
        b"",
        b"../../../../etc/shadow\0",
        b"/etc/shadow\0",
        b"a/b\0",
        b"name without an end",
        b"a\0b\0c",
        b"..\0..\0",
        &long,
    ];
    for name in names {
        // In front of the name what the operation has there; zeroes.
        for (opcode, front) in [
            (op::LOOKUP, 0),
            (op::MKDIR, 8),
            (op::MKNOD, 16),
            (op::CREATE, 16),
            (op::UNLINK, 0),
            (op::RMDIR, 0),
            (op::LINK, 8),
        ] {
            let front = &[0u8; 16][..front];
            // "a\0b\0c" begins with a name that is one, of what is not there; it may be made, or looked for in vain.
            let may_be = name.starts_with(b"a\0")
                && [op::MKDIR, op::MKNOD, op::CREATE, op::UNLINK, op::RMDIR].contains(&opcode);
            let error = share.call(opcode, ROOT, &[front, name]);
            if error == Some(0) && !may_be && load::<u64>(REPLY + 16) != 0 {
                wrong!(
                    report,
                    "fs: operation {opcode} of the name {:?} was done",
                    core::str::from_utf8(&name[..name.len().min(30)])
                );
            }
        }
        for (from, to) in [(name, &b"x\0"[..]), (b"x\0", name)] {
            let target = ROOT.to_le_bytes();
            silent_or_refused(share, report, op::RENAME, ROOT, &[&target, from, to]);
            silent_or_refused(share, report, op::RENAME2, ROOT, &[&target, &[0xff; 8], from, to]);
        }
        silent_or_refused(share, report, op::SYMLINK, ROOT, &[name, b"/etc/shadow\0"]);
    }
}

fn stale(share: &mut Share, report: &mut Report) {
    for node in [0, 2, 0xdead, u32::MAX.into(), 1 << 32, 1 << 63, u64::MAX] {
        for opcode in [
            op::GETATTR,
            op::LOOKUP,
            op::OPEN,
            op::OPENDIR,
            op::MKDIR,
            op::UNLINK,
            op::GETXATTR,
        ] {
            silent_or_refused(share, report, opcode, node, &[&[0; 16], b"x\0"]);
        }
        for handle in [0u64, 1, 0xdead, u64::MAX] {
            // fuse_read_in, and fuse_write_in with four bytes.
            let mut arguments = [0u8; 44];
            arguments[..8].copy_from_slice(&handle.to_le_bytes());
            arguments[16..20].copy_from_slice(&4u32.to_le_bytes());
            for opcode in [op::READ, op::WRITE, op::READDIR, op::READDIRPLUS] {
                silent_or_refused(share, report, opcode, node, &[&arguments]);
            }
            share.call(op::RELEASE, node, &[&arguments[..24]]);
        }
    }
    // The root is forgotten more often than it was looked for, and stays.
    share.call(op::FORGET, ROOT, &[&u64::MAX.to_le_bytes()]);
    let mut many = [0xffu8; 8 + 16 * 16];
    many[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    share.call(op::BATCH_FORGET, 0, &[&many]);
    if share.call(op::GETATTR, ROOT, &[&[0; 16]]) != Some(0) {
        wrong!(report, "fs: the root is gone");
    }
}

fn lengths(share: &mut Share, report: &mut Report) {
    for lie in [0u32, 1, 39, 40, 41, 4096, 1 << 20, u32::MAX, u32::MAX - 39] {
        let length = share.write(op::LOOKUP, ROOT, &[b"none\0"]);
        store(REQUEST, lie);
        if share.send(length, REPLY_SIZE).is_none() {
            wrong!(report, "fs stands still after a length of {lie}");
        }
    }
    for room in [0, 1, 15, 16, 17, 100] {
        let length = share.write(op::GETATTR, ROOT, &[&[0; 16]]);
        if share.send(length, room).is_none() {
            wrong!(report, "fs stands still with room for {room} bytes");
        }
    }
    for length in [0, 1, 39, 40] {
        share.write(op::LOOKUP, ROOT, &[]);
        if share.send(length, REPLY_SIZE).is_none() {
            wrong!(report, "fs stands still after a request of {length} bytes");
        }
    }
    // A directory that is open, and sizes that no buffer has.
    if share.call(op::OPENDIR, ROOT, &[&[0; 8]]) == Some(0) {
        let handle: u64 = load(REPLY + 16);
        for size in [0, 1, 23, 24, 4096, 1 << 20, i32::MAX as u32, u32::MAX] {
            let mut arguments = [0u8; 40];
            arguments[..8].copy_from_slice(&handle.to_le_bytes());
            arguments[8..16].copy_from_slice(&u64::from(size).rotate_left(40).to_le_bytes());
            arguments[16..20].copy_from_slice(&size.to_le_bytes());
            share.call(op::READDIR, ROOT, &[&arguments]);
            share.call(op::READDIRPLUS, ROOT, &[&arguments]);
            share.call(op::READ, ROOT, &[&arguments]);
            share.call(op::WRITE, ROOT, &[&arguments]);
        }
    }
    for size in [0, 1 << 20, u32::MAX] {
        let mut arguments = [0u8; 16];
        arguments[..4].copy_from_slice(&size.to_le_bytes());
        share.call(op::SETXATTR, ROOT, &[&arguments[..8], b"user.x\0y"]);
        share.call(op::GETXATTR, ROOT, &[&arguments[..8], b"user.x\0"]);
    }
    // Requests larger than there may be: the header says so, and they are.
    let length = share.write(op::SETXATTR, ROOT, &[&[0xff; 8]]);
    let whole = 8 << 20;
    store(REQUEST, whole);
    share.send(whole, REPLY_SIZE);
    let _ = length;
}

/// Every operation with arguments of ones, zeroes and noise, of many lengths, on the root and on nodes of noise.
fn junk(device: Device, queue: u16, report: &mut Report) {
    let Some(mut share) = Share::new(device, FEATURES, queue) else {
        return;
    };
    if !share.begin() {
        return wrong!(report, "fs: no second session");
    }
    let mut noise = [0u8; 512];
    let mut state = 0x2545_f491_4f6c_dd1du64;
    // Not those that would make or remove what a container of the same share sees: the names of noise have no end.
    for opcode in (0..64).chain([4096, 0x8000_0000, u32::MAX]) {
        for length in [0usize, 7, 40, 512] {
            for byte in &mut noise {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = state as u8 | 1;
            }
            if opcode == op::INIT || opcode == 38 {
                continue;
            }
            share.call(opcode, ROOT, &[&noise[..length]]);
            share.call(opcode, state, &[&noise[..length]]);
        }
        share.call(opcode, ROOT, &[&[0; 128]]);
    }
    // Sessions in sessions.
    for _ in 0..10 {
        share.call(op::INIT, state, &[&noise]);
        share.begin();
        share.call(38, 0, &[]);
    }
}

/// Directories that are opened and never closed, many at a time, and requests that nobody waits for. All requests are the
/// same memory, and so are their replies.
fn many(device: Device, queue: u16, report: &mut Report) {
    let Some(mut share) = Share::new(device, FEATURES, queue) else {
        return;
    };
    share.begin();
    let length = share.write(op::OPENDIR, ROOT, &[&[0; 8]]);
    let Some(ring) = share.ring() else { return };
    let heads = ring.size / 2;
    for round in 0..40 {
        for head in (0..heads).map(|number| number * 2) {
            ring.put(head, REQUEST, length, NEXT, head + 1);
            ring.put(head + 1, REPLY, REPLY_SIZE, WRITE, 0);
            ring.offer(head);
        }
        device.notify(queue.into());
        // At the end nobody waits, and the device is reset.
        if round < 30 && !ring.wait_used(heads) {
            return wrong!(
                report,
                "fs stands still after {round} times {heads} open directories"
            );
        }
    }
}
