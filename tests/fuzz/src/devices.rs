//! Each virtio device behind its transport, a driver in front of it and a host behind it that the input plays.

use crate::driver::{Driver, Host, Nobody};
use crate::input::Input;
use crate::ram::Ram;
use husk_vmm::virtio::console::Console;
use husk_vmm::virtio::device::Device;
use husk_vmm::virtio::rng::Rng;
use husk_vmm::worker::inline;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

mod fs;
mod net;
mod state;
mod vsock;

pub use fs::fs;
pub use net::net;
pub use state::state;
pub use vsock::vsock;

fn drive(input: &mut Input<'_>, devices: Vec<Box<dyn Device>>, host: &mut dyn Host) {
    let ram = Ram::new();
    let mut driver = Driver::new(&ram, devices);
    driver.play(input, host);
    // The device ends as it does at a reset.
    drop(driver);
    ram.check();
}

/// The entropy device.
pub fn rng(bytes: &[u8]) {
    inline::enter();
    let device = Rng::new().expect("descriptors");
    drive(&mut Input::new(bytes), vec![Box::new(device)], &mut Nobody);
}

/// Somebody who reads the console, or does not.
struct Reader(Option<File>);

impl Host for Reader {
    fn request(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        match input.u8() {
            0 => b"Kernel panic - not syncing".to_vec(),
            times @ 1..8 => input.text(64).repeat(usize::from(times) * 16),
            _ => input.text(4096).to_vec(),
        }
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let mut bytes = [0; 0x2000];
        match (input.u8(), &mut self.0) {
            (0, reader) => *reader = None,
            (count, Some(reader)) => {
                let count = usize::from(count) * 0x20;
                // There may be nothing.
                let _ = reader.read(&mut bytes[..count]);
            }
            _ => {}
        }
    }
}

/// A pipe that waits for nobody. The smallest there is: a guest fills it soon.
fn reader() -> (OwnedFd, Reader) {
    let (reader, writer) = crate::descriptors::pipe();
    // SAFETY: no pointers are involved.
    unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    (writer, Reader(Some(File::from(reader))))
}

fn console_with_reader() -> (Console, Reader) {
    let (output, reader) = reader();
    (Console::new(output, Arc::default()).expect("descriptors"), reader)
}

/// The console.
pub fn console(bytes: &[u8]) {
    inline::enter();
    let (console, mut reader) = console_with_reader();
    drive(&mut Input::new(bytes), vec![Box::new(console)], &mut reader);
}

/// The bus: two devices and the IOAPIC. Most accesses are to be of no use.
pub fn bus(bytes: &[u8]) {
    inline::enter();
    let (console, mut reader) = console_with_reader();
    let rng = Rng::new().expect("descriptors");
    drive(
        &mut Input::new(bytes),
        vec![Box::new(console), Box::new(rng)],
        &mut reader,
    );
}
