//! A guest that owns its kernel and attacks its machine: booted by PVH in place of husk's kernel, it brings every device
//! and the vCPU every malformed input that it knows.
//!
//! A word on the kernel's command line, `hostile=WORD`, chooses what is attacked. Progress is told on the console, a
//! line for each step, so that whoever looks knows which step was reached; what should not have been possible is told
//! by a line with `WRONG`. The last line is `WORD: all was tried, N wrong`, then the machine is reset, unless WORD is one
//! of the ways not to end.
//!
//! It is a kernel only when it is built with `panic = "abort"` (the release profile). Otherwise it is checked and linted
//! like any program.
#![cfg_attr(panic = "abort", no_std, no_main)]
// Its own tables of constant sizes; a wrong index ends the guest, as it should.
#![allow(clippy::indexing_slicing)]

#[cfg(panic = "abort")]
mod entry;
mod attack {
    pub mod console;
    pub mod cpu;
    pub mod fetches;
    pub mod fs;
    pub mod messages;
    pub mod net;
    pub mod regions;
    pub mod registers;
    pub mod rings;
    pub mod vsock;
}
mod boot;
mod machine;
mod report;
mod second;
mod virtio;

use boot::Boot;
use report::{Report, say};

/// Runs what the command line asks for.
fn run(start_info: u64) -> ! {
    machine::set_up();
    let boot = Boot::read(start_info);
    let mut report = Report::new(&boot);
    let word = boot.word();
    say!(report, "{word}: {} devices", boot.devices().len());
    match word {
        "registers" => attack::registers::all(&boot, &mut report),
        "rings" => attack::rings::all(&boot, &mut report),
        "vsock" => attack::vsock::all(&boot, &mut report),
        "vsock-agent" => attack::vsock::agent(&boot, &mut report),
        "fetches" => attack::fetches::all(&boot, &mut report),
        "fetches-agent" => attack::fetches::agent(&boot, &mut report),
        "regions" => attack::regions::all(&boot, &mut report),
        "fs" => attack::fs::all(&boot, &mut report),
        "net" => attack::net::all(&boot, &mut report),
        "console" => attack::console::all(&boot, &mut report),
        "cpu" => attack::cpu::all(&boot, &mut report),
        end => attack::cpu::end(end, &mut report),
    }
    report.end(word);
    machine::reset();
}

/// Called by the entry, with the address of PVH's start info.
#[cfg(panic = "abort")]
#[unsafe(no_mangle)]
extern "C" fn hostile_main(start_info: u64) -> ! {
    run(start_info)
}

#[cfg(panic = "abort")]
#[panic_handler]
fn panicked(_: &core::panic::PanicInfo<'_>) -> ! {
    // The console may be what is broken. A triple fault would look like one of the attacks.
    machine::write_port(0x64, 0xfeu8);
    machine::halt()
}

#[cfg(not(panic = "abort"))]
fn main() {
    run(0)
}
