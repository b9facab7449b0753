//! The transport's registers: accesses of every width, orders that are not allowed, features that are not offered.

use crate::attack::rings::alive;
use crate::boot::Boot;
use crate::machine::{load, store, string_move};
use crate::report::{Report, say, wrong};
use crate::virtio::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use crate::virtio::*;

/// All of it, for the first device of every kind.
pub fn all(boot: &Boot, report: &mut Report) {
    for device in boot.kinds() {
        report.attacks(device);
        say!(report, "registers of {} in slot {}", device.name(), device.slot);
        report.give_up_console();
        features(device, report);
        statuses(device, report);
        queues_of_a_running_device(device, report);
        before_ready(device, report);
        report.give_up_console();
        widths(device);
        report.give_up_console();
        if !alive(device) {
            wrong!(report, "{} does not work after all this", device.name());
        }
        report.give_up_console();
    }
}

fn features(device: Device, report: &mut Report) {
    let offered = device.offered;
    for bit in (0..64).step_by(3) {
        let wild = 1 << bit;
        if offered & wild == 0 && device.negotiate_exactly(1 << 32 | wild) {
            wrong!(report, "{} takes feature {bit}, never offered", device.name());
        }
    }
    if device.negotiate_exactly(0) {
        wrong!(report, "{} takes a driver without VERSION_1", device.name());
    }
    if device.negotiate_exactly(u64::MAX) {
        wrong!(report, "{} takes all features", device.name());
    }
    // A feature that comes after FEATURES_OK is none.
    device.negotiate(FEATURES);
    device.write(reg::DRIVER_FEATURES_SEL, 0);
    device.write(reg::DRIVER_FEATURES, u32::MAX);
    for select in [2, 3, 31, u32::MAX] {
        device.write(reg::DRIVER_FEATURES_SEL, select);
        device.write(reg::DRIVER_FEATURES, u32::MAX);
        device.write(reg::DEVICE_FEATURES_SEL, select);
        if device.read(reg::DEVICE_FEATURES) != 0 {
            wrong!(report, "{} offers features of word {select}", device.name());
        }
    }
}

fn statuses(device: Device, report: &mut Report) {
    for wild in [
        DRIVER_OK,
        FEATURES_OK,
        DRIVER,
        ACKNOWLEDGE | DRIVER_OK,
        ACKNOWLEDGE | FEATURES_OK | DRIVER_OK,
        0x20,
        0x10,
        !0x80,
        0x100,
        NEEDS_RESET,
    ] {
        device.reset();
        device.write(reg::STATUS, wild);
        if device.read(reg::STATUS) & DRIVER_OK != 0 {
            wrong!(report, "{} runs by status {wild:#x}", device.name());
        }
    }
    // No way back but a reset.
    device.negotiate(FEATURES);
    device.write(reg::STATUS, ACKNOWLEDGE);
    if device.read(reg::STATUS) & FEATURES_OK == 0 {
        wrong!(report, "{} goes back from FEATURES_OK", device.name());
    }
    // FAILED, and on.
    device.write(reg::STATUS, 0x80);
    device.start();
    if device.runs() {
        wrong!(report, "{} runs after it failed", device.name());
    }
    // DRIVER_OK without a queue, and twice.
    device.negotiate(FEATURES);
    device.start();
    device.start();
    for status in (0..512).step_by(13) {
        device.write(reg::STATUS, status);
    }
    device.reset();
}

fn queues_of_a_running_device(device: Device, report: &mut Report) {
    device.bring_up(FEATURES);
    if !device.runs() {
        wrong!(report, "{} does not start", device.name());
    }
    for queue in 0..device.queues {
        device.write(reg::QUEUE_SEL, queue.into());
        device.write(reg::QUEUE_READY, 0);
        if device.read(reg::QUEUE_READY) == 0 {
            wrong!(
                report,
                "{}: queue {queue} is taken from a running device",
                device.name()
            );
        }
        device.set_registers(queue, u32::MAX, u64::MAX, u64::MAX, u64::MAX);
        device.notify(queue.into());
    }
    // Queues that are not there.
    for queue in [64, 255, 256, 0x7fff, 0xffff] {
        device.set_registers(queue, 16, 0, 0, 0);
        device.notify(queue.into());
        device.notify(u32::from(queue) << 16);
    }
    device.write(reg::QUEUE_SEL, u32::MAX);
    if device.read(reg::QUEUE_NUM_MAX) != 0 {
        wrong!(report, "{} has a queue 4294967295", device.name());
    }
}

fn before_ready(device: Device, report: &mut Report) {
    device.reset();
    for queue in 0..8 {
        device.notify(queue);
    }
    // Queues before FEATURES_OK are none.
    device.write(reg::STATUS, ACKNOWLEDGE);
    device.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
    device.set_registers(0, 16, 0, 0, 0);
    if device.read(reg::QUEUE_READY) != 0 {
        wrong!(report, "{} has a queue before FEATURES_OK", device.name());
    }
    for queue in 0..8 {
        device.notify(queue);
        store(device.base + reg::QUEUE_NOTIFY, queue as u8);
        store(device.base + reg::QUEUE_NOTIFY, queue as u16);
        store(device.base + reg::QUEUE_NOTIFY, u64::from(queue));
    }
}

/// Reads and writes of 1, 2, 4 or 8 bytes at every offset; status and notify get values of all kinds by this, too.
fn widths(device: Device) {
    let junk = 0xa5a5_5a5a_ff00_c3c3u64;
    for offset in (0..0x140).chain([0x7ff, 0xffc, 0xfff]) {
        let at = device.base + offset;
        match (offset + offset / 4) % 4 {
            0 => store(at, load::<u8>(at) ^ junk as u8),
            1 => store(at, load::<u16>(at) ^ junk as u16),
            2 => store(at, load::<u32>(at) ^ junk as u32),
            _ => store(at, load::<u64>(at) ^ junk),
        }
    }
    // With a driver that is there, so that the configuration is written.
    device.negotiate(FEATURES);
    for offset in (reg::CONFIG..reg::CONFIG + 0x40).step_by(3) {
        store(device.base + offset, junk);
        store(device.base + offset, junk as u16);
    }
    string_move(device.base, device.base + reg::CONFIG, 64);
    string_move(
        device.base + reg::CONFIG,
        crate::machine::BUFFERS,
        4096 - reg::CONFIG,
    );
    crate::machine::wide_access(device.base + reg::CONFIG);
    crate::machine::wide_access(device.base + reg::CONFIG + 0xff9);
    crate::machine::locked_access(device.base + reg::CONFIG);
}
