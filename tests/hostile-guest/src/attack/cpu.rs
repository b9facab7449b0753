//! What a CPU can do by itself: ports, addresses where nothing is, registers, calls of the hypervisor, and the ways not
//! to end.

use crate::boot::Boot;
use crate::machine::*;
use crate::report::{Report, say, wrong};

const IOAPIC: u64 = 0xfec0_0000;
const JUNK: u64 = 0xa5a5_5a5a_c3c3_3c3c;

/// All of it.
pub fn all(boot: &Boot, report: &mut Report) {
    say!(report, "cpu: ports");
    ports(report);
    say!(report, "cpu: addresses");
    addresses(boot);
    say!(report, "cpu: interrupt controllers");
    interrupt_controllers();
    say!(report, "cpu: model-specific registers");
    model_specific_registers();
    say!(report, "cpu: calls of the hypervisor");
    for number in (0..16).chain([u64::MAX, 1 << 31]) {
        hypercall(number, JUNK, JUNK);
    }
    say!(report, "cpu: other processors");
    other_processors(boot);
}

fn ports(report: &mut Report) {
    // All that a PC has, then a sample; 0x64 takes anything but the reset.
    for port in (0..0x400)
        .step_by(5)
        .chain((0x400..=0xffff).step_by(997))
        .chain([0x61, 0x64, 0x70, 0xcf8, 0xcfc, 0xffff])
    {
        let byte = read_port::<u8>(port);
        if port > 0x3ff && byte != 0xff {
            wrong!(report, "port {port:#x} reads as {byte:#x}");
        }
        if port % 3 == 0 {
            read_port::<u16>(port);
            read_port::<u32>(port);
            write_port(port, 0x5a5au16);
            write_port(port, 0xa5a5_a5a5u32);
        }
        write_port(port, 0xd1u8);
    }
    for port in [0x60, 0x64, 0x80, 0x3f8, 0x505, 0xcf8] {
        fill(BUFFERS, 4096, 0x11);
        string_port(port, true, BUFFERS, 4096);
        string_port(port, false, BUFFERS, 4096);
    }
}

fn access(address: u64) {
    load::<u8>(address);
    load::<u64>(address);
    store(address, JUNK as u8);
    store(address, JUNK);
}

fn addresses(boot: &Boot) {
    // The gap: a place in each 16 MiB, and what is between devices.
    for address in (0xc000_0000u64..0x1_0000_0000).step_by(16 << 20) {
        if boot.devices().iter().all(|device| device.base != address) {
            access(address);
        }
    }
    for address in [
        boot.ram_end,
        boot.ram_end + 0xff9,
        0xbfff_fff8,
        0xbfff_fffd,
        0xc001_3000,
        0xc001_2ffc,
        IOAPIC - 4,
        IOAPIC + 0x1000,
        LOCAL_APIC - 4,
        0xfffb_c000,
        0xffff_fff8,
    ] {
        access(address);
        wide_access(address & !15);
        locked_access(address & !3);
    }
    string_move(0xd000_0000, 0xd800_0000, 4096);
    string_move(0xd000_0000, BUFFERS, 4096);
    string_move(BUFFERS, 0xd000_0ff0, 64);
    // Above 4 GiB: where a larger guest has memory, and to the end of what there can be.
    for bits in 32..40 {
        map_high(1 << bits);
        for offset in [0, 0x1000, 0xfff, 0x3fff_fff8] {
            access(HIGH + offset);
        }
    }
}

fn interrupt_controllers() {
    for offset in (0..0x1000).step_by(52) {
        load::<u32>(IOAPIC + offset);
    }
    for offset in 0..0x44 {
        access(IOAPIC + offset);
    }
    // Every register of the IOAPIC, with values of all kinds: each changes where an interrupt goes.
    for value in [
        0u32,
        u32::MAX,
        0x8000,
        0x1_0000,
        0x700,
        0x400,
        0xfee0_0000,
        0xff00_0000,
    ] {
        for register in (0..0x44).chain([0x80, 0xff]) {
            store(IOAPIC, register);
            store(IOAPIC + 0x10, value);
            load::<u32>(IOAPIC + 0x10);
        }
    }
    store(IOAPIC, u32::MAX);
    store(IOAPIC + 0x10, u32::MAX);
    store(IOAPIC + 0x40, u32::MAX);
    for offset in (0..0x400).step_by(4) {
        load::<u32>(LOCAL_APIC + offset);
    }
    for offset in (0x400..0x1000).step_by(0x44) {
        access(LOCAL_APIC + offset);
    }
    // Timers, tasks, errors; not the command register, which is for the other processors.
    for offset in (0x80..0x3f0)
        .step_by(16)
        .filter(|at| !(0x300..0x320).contains(at))
    {
        store(LOCAL_APIC + offset, 0x1_0000u32 | offset as u32);
    }
}

fn model_specific_registers() {
    for msr in (0..0x1000)
        .chain(0x4000_0000..0x4000_0120)
        .chain(0x4b56_4d00..0x4b56_4d10)
        .chain(0xc000_0080..0xc000_0110)
        .chain(0xc001_0000..0xc001_1040)
    {
        let value = read_msr(msr);
        let own = matches!(
            msr,
            0x10 | 0x1b | 0x3b | 0x6e0 | 0x830 | 0xc000_0080 | 0xc000_0100..=0xc000_0102
        );
        if own {
            continue;
        }
        for wild in [u64::MAX, 0, JUNK, 1 << 40 | 1, 0xfee0_0001] {
            write_msr(msr, wild);
        }
        if let Some(value) = value {
            write_msr(msr, value);
        }
    }
}

/// Starts what other processors there are, where there is nothing to run.
fn other_processors(boot: &Boot) {
    for vector in [0u32, 0x90] {
        for command in [0xc_4500, 0xc_4600 | vector, 0xc_0400, 0xc_0200, 0xc_0000 | vector] {
            store(LOCAL_APIC + 0x310, 0u32);
            store(LOCAL_APIC + 0x300, command);
        }
        wait(50_000_000);
    }
    // One that runs in a circle: jmp $.
    store(0x9_0000, 0xfeebu16);
    for command in [0xc_4500, 0xc_4690u32] {
        store(LOCAL_APIC + 0x300, command);
    }
    wait(50_000_000);
    let _ = boot;
}

/// A way not to end as a guest should.
pub fn end(word: &str, report: &mut Report) {
    say!(report, "{word}: now");
    match word {
        "triple-fault" => triple_fault(),
        "halt" => halt(),
        "loop" => jump_to_self(),
        "smi" => system_management(),
        "run-registers" => jump(0xc000_0000),
        "run-nothing" => jump(0xd000_0000),
        _ => wrong!(report, "there is no attack of that name"),
    }
}

/// Interrupts itself into system management mode.
fn system_management() -> ! {
    store(LOCAL_APIC + 0x310, 0u32);
    store(LOCAL_APIC + 0x300, 0x0_0200u32);
    jump_to_self()
}

fn jump_to_self() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
