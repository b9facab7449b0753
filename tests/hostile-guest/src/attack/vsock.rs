//! The socket device: packets that lie about who sends them, how long they are and how much room there is, and more
//! connections than there can be.

use crate::boot::Boot;
use crate::machine::{BUFFERS, fill, load, store};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const HOST: u64 = 2;
/// The port that the guest's agent dials.
const AGENT_PORT: u32 = 1024;
const HEADER: u64 = 44;

/// Buffers for packets from the host, 8 KiB each.
const INCOMING: u64 = BUFFERS + 0x10_0000;
const INCOMING_SIZE: u32 = 8192;
/// The packet to the host.
pub const OUTGOING: u64 = BUFFERS + 0x80_0000;

mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

#[derive(Clone, Copy)]
struct Packet {
    source: u64,
    target: u64,
    source_port: u32,
    target_port: u32,
    length: u32,
    kind: u16,
    op: u16,
    flags: u32,
    allocated: u32,
    forwarded: u32,
}

struct Socket {
    device: Device,
    receive: Ring,
    transmit: Ring,
    cid: u64,
}

impl Socket {
    fn new(device: Device) -> Option<Self> {
        let [Some(receive), Some(transmit), ..] = device.bring_up(FEATURES) else {
            return None;
        };
        let mut socket = Self {
            device,
            receive,
            transmit,
            cid: load(device.base + reg::CONFIG),
        };
        for head in 0..64 {
            socket.give(head);
        }
        device.notify(RECEIVE.into());
        Some(socket)
    }

    fn give(&mut self, head: u16) {
        let buffer = INCOMING + u64::from(head) * u64::from(INCOMING_SIZE);
        self.receive.put(head, buffer, INCOMING_SIZE, WRITE, 0);
        self.receive.offer(head);
    }

    /// A packet that keeps the rules.
    fn packet(&self, op: u16, source_port: u32, target_port: u32) -> Packet {
        Packet {
            source: self.cid,
            target: HOST,
            source_port,
            target_port,
            length: 0,
            kind: 1,
            op,
            flags: 0,
            allocated: 0x4_0000,
            forwarded: 0,
        }
    }

    /// Sends it in a buffer of `room` bytes, and waits for the buffer to come back.
    fn send(&mut self, packet: Packet, room: u32) -> bool {
        let at = OUTGOING;
        store(at, packet.source);
        store(at + 8, packet.target);
        store(at + 16, packet.source_port);
        store(at + 20, packet.target_port);
        store(at + 24, packet.length);
        store(at + 28, packet.kind);
        store(at + 30, packet.op);
        store(at + 32, packet.flags);
        store(at + 36, packet.allocated);
        store(at + 40, packet.forwarded);
        self.transmit.put(0, at, room, 0, 0);
        self.transmit.offer(0);
        self.device.notify(TRANSMIT.into());
        self.transmit.wait_used(1)
    }

    /// The next packet from the host: its operation and the ports it bears, this guest's first.
    fn answer(&mut self, patience: u64) -> Option<(u16, u32, u32)> {
        if !self.receive.wait_fresh(1, patience) {
            return None;
        }
        let (head, _) = self.receive.take()?;
        let at = INCOMING + u64::from(head) * u64::from(INCOMING_SIZE);
        let answer = (load(at + 30), load(at + 20), load(at + 16));
        self.give(head as u16);
        self.device.notify(RECEIVE.into());
        Some(answer)
    }

    /// Forgets all that the host sends now.
    fn drain(&mut self) {
        while self.answer(20_000_000).is_some() {}
    }
}

const LONG: u64 = 60_000_000_000;

/// Whether a connection to a port without a listener is refused.
pub fn alive(device: Device) -> bool {
    let Some(mut socket) = Socket::new(device) else {
        return false;
    };
    let request = socket.packet(op::REQUEST, 5000, 7);
    socket.send(request, HEADER as u32) && socket.answer(LONG) == Some((op::RST, 5000, 7))
}

/// All that needs no connection.
pub fn all(boot: &Boot, report: &mut Report) {
    let Some(device) = boot.device(VSOCK) else {
        return wrong!(report, "there is no vsock");
    };
    report.attacks(device);
    say!(report, "vsock: headers that lie");
    let Some(mut socket) = Socket::new(device) else {
        return wrong!(report, "vsock does not start");
    };
    lies(&mut socket);
    check(device, report, "headers that lie");
    for length in [0, 1, 43, 44, 45] {
        small_buffers(device, report, length);
    }
    say!(report, "vsock: more connections than there can be");
    flood(device, report);
    check(device, report, "a flood of connections");
    say!(report, "vsock: answers that are not taken");
    not_taken(device, report);
    check(device, report, "answers that are not taken");
}

fn check(device: Device, report: &mut Report, after: &str) {
    if !alive(device) {
        wrong!(report, "vsock does not work after {after}");
    }
}

fn lies(socket: &mut Socket) {
    let good = socket.packet(op::REQUEST, 6000, 8);
    let cid = socket.cid;
    for packet in [
        Packet { source: 0, ..good },
        Packet { source: HOST, ..good },
        Packet {
            source: cid + 1,
            ..good
        },
        Packet {
            source: u64::MAX,
            ..good
        },
        Packet {
            source: cid | 1 << 32,
            ..good
        },
        Packet { target: 0, ..good },
        Packet { target: 1, ..good },
        Packet { target: cid, ..good },
        Packet {
            target: cid + 1,
            ..good
        },
        Packet {
            target: u64::MAX,
            ..good
        },
        Packet {
            target: HOST | 1 << 32,
            ..good
        },
        Packet { kind: 0, ..good },
        Packet { kind: 2, ..good },
        Packet {
            kind: u16::MAX,
            ..good
        },
        Packet { op: 0, ..good },
        Packet { op: 8, ..good },
        Packet { op: u16::MAX, ..good },
        Packet { length: 1, ..good },
        Packet {
            length: u32::MAX,
            ..good
        },
        Packet {
            length: u32::MAX - 43,
            ..good
        },
        Packet {
            flags: u32::MAX,
            ..good
        },
        Packet {
            allocated: u32::MAX,
            forwarded: u32::MAX,
            ..good
        },
        Packet {
            allocated: 0,
            forwarded: 0x8000_0000,
            ..good
        },
        Packet {
            source_port: u32::MAX,
            target_port: u32::MAX,
            ..good
        },
        Packet {
            source_port: 0,
            target_port: 0,
            ..good
        },
    ] {
        socket.send(packet, HEADER as u32);
        socket.send(Packet { op: op::RW, ..packet }, HEADER as u32 + 100);
    }
    // Of connections that there are not.
    for op in 2..=7 {
        for length in [0, 1, 100, 4096, u32::MAX] {
            let packet = socket.packet(op, 6001, 1024);
            socket.send(Packet { length, ..packet }, HEADER as u32 + 100);
        }
    }
    for room in [0, 1, 43] {
        socket.send(good, room);
    }
    socket.drain();
}

/// Places for the host's packets that are too small.
fn small_buffers(device: Device, report: &mut Report, length: u32) {
    let [Some(mut receive), Some(transmit), ..] = device.bring_up(FEATURES) else {
        return;
    };
    for head in 0..receive.size {
        receive.put(head, INCOMING, length, WRITE, 0);
        receive.offer(head);
    }
    device.notify(RECEIVE.into());
    let mut socket = Socket {
        device,
        cid: load(device.base + reg::CONFIG),
        receive,
        transmit,
    };
    let request = socket.packet(op::REQUEST, 5001, 7);
    for _ in 0..4 {
        if !socket.send(request, HEADER as u32) {
            wrong!(report, "vsock stands still with buffers of {length} bytes");
        }
    }
    moment();
    check(device, report, "buffers that are too small");
}

/// Asks for more connections than there can be, to ports of all kinds; the answers are taken.
fn flood(device: Device, report: &mut Report) {
    let Some(mut socket) = Socket::new(device) else {
        return;
    };
    let mut refused = 0;
    for number in 0..400u32 {
        let request = socket.packet(op::REQUEST, 10_000 + number, 2000 + number % 100);
        if !socket.send(request, HEADER as u32) {
            return wrong!(report, "vsock stands still in a flood");
        }
        while let Some((op::RST, ..)) = socket.answer(0) {
            refused += 1;
        }
    }
    while refused < 400 {
        match socket.answer(LONG) {
            Some((op::RST, ..)) => refused += 1,
            _ => return wrong!(report, "vsock refused {refused} of 400 connections"),
        }
    }
}

/// As before, but takes no answer: the device has to stop taking packets at some time. Then it is reset.
fn not_taken(device: Device, report: &mut Report) {
    let [_, Some(mut transmit), ..] = device.bring_up(FEATURES) else {
        return;
    };
    let cid: u64 = load(device.base + reg::CONFIG);
    let mut taken = 0u32;
    for number in 0..20_000u32 {
        let at = OUTGOING;
        fill(at, HEADER, 0);
        store(at, cid);
        store(at + 8, HOST);
        store(at + 16, number);
        store(at + 20, 9u32);
        store(at + 28, 1u16);
        store(at + 30, op::REQUEST);
        transmit.put(0, at, HEADER as u32, 0, 0);
        transmit.offer(0);
        device.notify(TRANSMIT.into());
        if !transmit.wait_fresh(1, 200_000_000) {
            break;
        }
        transmit.take();
        taken += 1;
    }
    if taken >= 20_000 {
        wrong!(report, "vsock keeps answers without end");
    }
}

/// A connection in place of the agent's.
fn connected(boot: &Boot, report: &mut Report) -> Option<Socket> {
    let device = boot.device(VSOCK);
    let Some(mut socket) = device.and_then(Socket::new) else {
        wrong!(report, "there is no vsock");
        return None;
    };
    report.attacks(socket.device);
    let request = socket.packet(op::REQUEST, 1030, AGENT_PORT);
    socket.send(request, HEADER as u32);
    if socket.answer(LONG) != Some((op::RESPONSE, 1030, AGENT_PORT)) {
        wrong!(report, "no connection to the agent's port");
        return None;
    }
    Some(socket)
}

/// Data on a connection in place of the agent's, of which `change` has the headers changed. The engine may end the
/// machine meanwhile.
pub fn agent_changed(boot: &Boot, report: &mut Report, change: impl FnOnce()) {
    let Some(mut socket) = connected(boot, report) else {
        return;
    };
    say!(report, "fetches-agent: connected");
    fill(OUTGOING + HEADER, 65536, 0xff);
    let data = Packet {
        op: op::RW,
        length: 64,
        ..socket.packet(op::RW, 1030, AGENT_PORT)
    };
    change();
    for _ in 0..2000 {
        if !socket.send(data, HEADER as u32 + 65536) {
            break;
        }
        while socket.answer(0).is_some() {}
    }
}

/// A connection in place of the agent's, and what can be wrong with it. The engine may end the machine meanwhile.
pub fn agent(boot: &Boot, report: &mut Report) {
    let Some(mut socket) = connected(boot, report) else {
        return;
    };
    say!(report, "vsock-agent: connected");
    // Forged credit, in both directions.
    let update = socket.packet(op::CREDIT_UPDATE, 1030, AGENT_PORT);
    for (allocated, forwarded) in [
        (0, 0),
        (u32::MAX, 0),
        (0, u32::MAX),
        (1, 0x8000_0000),
        (u32::MAX, u32::MAX),
        (0x4_0000, 0),
    ] {
        socket.send(
            Packet {
                allocated,
                forwarded,
                ..update
            },
            HEADER as u32,
        );
        socket.send(
            Packet {
                op: op::CREDIT_REQUEST,
                ..update
            },
            HEADER as u32,
        );
    }
    say!(report, "vsock-agent: credit was forged");
    // More than there is credit for, of what is no frame.
    fill(OUTGOING + HEADER, 65536, 0xff);
    let data = Packet {
        op: op::RW,
        length: 65536,
        ..update
    };
    for _ in 0..2000 {
        socket.send(data, HEADER as u32 + 65536);
        while socket.answer(0).is_some() {}
    }
    say!(report, "vsock-agent: 125 MiB were sent");
    for op in [
        op::SHUTDOWN,
        op::SHUTDOWN,
        op::RESPONSE,
        op::REQUEST,
        op::RST,
        op::RST,
    ] {
        socket.send(
            Packet {
                op,
                flags: u32::MAX,
                ..update
            },
            HEADER as u32,
        );
    }
    socket.drain();
}
