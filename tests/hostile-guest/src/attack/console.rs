//! The console: floods, control characters, what looks like a panic.

use crate::boot::Boot;
use crate::machine::{BUFFERS, fill, store_bytes};
use crate::report::{Report, say, wrong};
use crate::virtio::*;

const TRANSMIT: usize = 1;

/// Bytes of the flood, in all.
const FLOOD: u64 = 24 << 20;
/// And of one chain.
const PIECE: u64 = 1 << 20;

/// Whether it takes a byte.
pub fn alive(device: Device) -> bool {
    let [_, Some(mut ring), ..] = device.bring_up(FEATURES) else {
        return false;
    };
    write(device, &mut ring, b".\n")
}

fn write(device: Device, ring: &mut Ring, text: &[u8]) -> bool {
    store_bytes(BUFFERS, text);
    ring.put(0, BUFFERS, text.len() as u32, 0, 0);
    ring.offer(0);
    device.notify(TRANSMIT as u32);
    ring.wait_used(1)
}

/// All of it.
pub fn all(boot: &Boot, report: &mut Report) {
    let Some(device) = boot.device(CONSOLE) else {
        return wrong!(report, "there is no console");
    };
    report.attacks(device);
    report.give_up_console();
    let [_, Some(mut ring), ..] = device.bring_up(FEATURES) else {
        return;
    };
    for text in [
        &b"\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\x1b[6n\x1bP+q544e\x1b\\\n"[..],
        b"\0\x01\x02\x7f\x80\xff\xfe\xc3\x28\xed\xa0\x80\n",
        b"\r\r\r\x08\x08\x08\n\n\n\n",
    ] {
        if !write(device, &mut ring, text) {
            wrong!(report, "the console does not take odd bytes");
        }
    }
    say!(report, "console: a flood of {} MiB", FLOOD >> 20);
    report.give_up_console();
    let [_, Some(mut ring), ..] = device.bring_up(FEATURES) else {
        return;
    };
    fill(BUFFERS, PIECE, b'x');
    for _ in 0..FLOOD / PIECE {
        ring.put(0, BUFFERS, PIECE as u32, 0, 0);
        ring.offer(0);
        device.notify(TRANSMIT as u32);
        if !ring.wait_used(1) {
            return wrong!(report, "the console stands still in a flood");
        }
    }
    report.give_up_console();
    say!(report, "console: a flood of refused requests, for the log");
    refusals(boot);
    report.give_up_console();
    for round in 0..3 {
        say!(report, "console: after the floods, {round}");
    }
}

/// Requests that each device refuses and may complain of, many times.
fn refusals(boot: &Boot) {
    for device in boot.devices() {
        let mut rings = device.bring_up(FEATURES);
        for (queue, ring) in rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            for head in 0..ring.size {
                ring.put(head, 1 << 52, 64, 0, 0);
            }
            for _ in 0..10 {
                for head in 0..ring.size {
                    ring.offer(head);
                }
                device.notify(queue as u32);
                let size = ring.size;
                // Some queues are only read on other occasions.
                if ring.wait_fresh(size, 50_000_000) {
                    ring.wait_used(size);
                }
            }
        }
        for _ in 0..500 {
            device.write(reg::STATUS, 0x33);
        }
        device.reset();
    }
}
