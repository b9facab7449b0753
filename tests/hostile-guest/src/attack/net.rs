//! NICs: frames that are none, headers that lie, other guests' addresses.

use crate::boot::Boot;
use crate::machine::{BUFFERS, fill, load, store, store_bytes};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// `struct virtio_net_hdr` with its number of buffers.
const HEADER: u64 = 12;
const FRAME: u64 = BUFFERS + 0x20_0000;

/// The address that frames of others bear.
pub const SPOOFED: [u8; 6] = [0x02, 0xba, 0xad, 0xba, 0xad, 0x01];
const BROADCAST: [u8; 6] = [0xff; 6];

/// Whether it takes a frame.
pub fn alive(device: Device) -> bool {
    let [_, Some(mut ring), ..] = device.bring_up(FEATURES) else {
        return false;
    };
    fill(FRAME, 256, 0);
    send(device, &mut ring, HEADER as u32 + 60)
}

/// Sends what lies at [`FRAME`].
fn send(device: Device, ring: &mut Ring, length: u32) -> bool {
    ring.put(0, FRAME, length, 0, 0);
    ring.offer(0);
    device.notify(TRANSMIT as u32);
    ring.wait_used(1)
}

/// All of it, for each NIC.
pub fn all(boot: &Boot, report: &mut Report) {
    if boot.device(NET).is_none() {
        return wrong!(report, "there is no NIC");
    }
    for device in boot.devices().iter().copied().filter(|device| device.kind == NET) {
        say!(report, "net: NIC in slot {}", device.slot);
        report.attacks(device);
        for features in [FEATURES, u64::MAX] {
            frames(device, report, features);
            spoofed(device, report, features);
            receive(device, report, features);
            commands(device, report, features);
        }
        if !alive(device) {
            wrong!(report, "net does not work at the end");
        }
    }
}

/// An Ethernet frame of IPv4's, to everybody.
fn write_frame(source: [u8; 6]) {
    fill(FRAME, 2048, 0);
    store_bytes(FRAME + HEADER, &BROADCAST);
    store_bytes(FRAME + HEADER + 6, &source);
    store_bytes(
        FRAME + HEADER + 12,
        &[
            8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 66, 255, 255, 255, 255,
        ],
    );
}

/// The machine's own address.
pub fn own_address(device: Device) -> [u8; 6] {
    core::array::from_fn(|at| load(device.base + reg::CONFIG + at as u64))
}

fn frames(device: Device, report: &mut Report, features: u64) {
    let [_, Some(mut ring), ..] = device.bring_up(features) else {
        return wrong!(report, "net does not start");
    };
    write_frame(own_address(device));
    for length in (0..80).chain([
        1514,
        1526,
        9000,
        65535,
        65536,
        65547,
        65548,
        65549,
        70_000,
        1 << 20,
        16 << 20,
    ]) {
        if !send(device, &mut ring, length) {
            return wrong!(report, "net stands still after a frame of {length} bytes");
        }
    }
    // A frame in pieces of one byte, and its header split.
    for index in 0..74u16 {
        let flags = if index < 73 { NEXT } else { 0 };
        ring.put(index, FRAME + u64::from(index), 1, flags, index + 1);
    }
    ring.offer(0);
    device.notify(TRANSMIT as u32);
    if !ring.wait_used(1) {
        wrong!(report, "net stands still after a frame in pieces");
    }
    for flags in [0u8, 1, 2, 4, 0xff] {
        for kind in [0u8, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0xff] {
            for (header, segment, start, offset) in [
                (0u16, 0u16, 0u16, 0u16),
                (0xffff, 0xffff, 0xffff, 0xffff),
                (54, 1, 34, 16),
                (1, 0, 0xffff, 2),
                (60, 1460, 60, 0xffff),
                (0, 1, 14, 0),
            ] {
                write_frame(own_address(device));
                store(FRAME, flags);
                store(FRAME + 1, kind);
                store(FRAME + 2, header);
                store(FRAME + 4, segment);
                store(FRAME + 6, start);
                store(FRAME + 8, offset);
                store(FRAME + 10, u16::MAX);
                if !send(device, &mut ring, HEADER as u32 + 60) || !send(device, &mut ring, 4096) {
                    return wrong!(
                        report,
                        "net stands still after a header of flags {flags:#x}, kind {kind:#x}"
                    );
                }
            }
        }
    }
}

/// Frames under other addresses: nobody may see them.
fn spoofed(device: Device, report: &mut Report, features: u64) {
    let [_, Some(mut ring), ..] = device.bring_up(features) else {
        return;
    };
    for source in [SPOOFED, BROADCAST, [0; 6], [1, 0, 0x5e, 0, 0, 1]] {
        write_frame(source);
        store_bytes(FRAME + HEADER + 14 + 12, &[192, 0, 2, 66]);
        for _ in 0..50 {
            if !send(device, &mut ring, HEADER as u32 + 60) {
                return wrong!(report, "net stands still after another's frames");
            }
        }
    }
}

/// Places for frames that are too small, far too large, or nowhere.
fn receive(device: Device, report: &mut Report, features: u64) {
    for length in [0u32, 1, 11, 12, 13, 100, 1 << 24] {
        let [Some(mut ring), ..] = device.bring_up(features) else {
            return;
        };
        for head in 0..ring.size {
            ring.put(head, BUFFERS + 0x40_0000, length, WRITE, 0);
            ring.offer(head);
        }
        device.notify(RECEIVE as u32);
        moment();
    }
    if !alive(device) {
        wrong!(report, "net does not work after bad places for frames");
    }
}

/// What may be a queue of commands: one of those behind the first pair.
fn commands(device: Device, report: &mut Report, features: u64) {
    for queue in 2..FIRST {
        let Some(mut ring) = device.bring_up(features).into_iter().nth(queue).flatten() else {
            return;
        };
        if all_commands(device, &mut ring, queue as u32) {
            say!(report, "net: commands of all kinds to queue {queue}");
        }
    }
}

/// Whether anybody looked at them.
fn all_commands(device: Device, ring: &mut Ring, queue: u32) -> bool {
    for class in [0u8, 1, 2, 3, 4, 5, 0xff] {
        for command in [0u8, 1, 2, 0xff] {
            for value in [0u16, 1, 2, 9, 0x8000, 0xffff] {
                for length in [0, 1, 2, 4, 6, 4096] {
                    store(FRAME, class);
                    store(FRAME + 1, command);
                    store(FRAME + 2, value);
                    ring.put(0, FRAME, length, NEXT, 1);
                    ring.put(1, FRAME + 0x1000, 1, WRITE, 0);
                    ring.offer(0);
                    device.notify(queue);
                    if !ring.wait_fresh(1, 100_000_000) {
                        return false;
                    }
                    ring.take();
                }
            }
        }
    }
    true
}
