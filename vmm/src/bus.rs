//! Where a vCPU's accesses to ports and to memory-mapped registers go.
//!
//! Whatever is not there reads as ones, as on a real bus, and takes writes without effect.

use crate::irq::ioapic::IoApic;
use crate::layout;
use crate::virtio::mmio::Transport;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Status and command port of the keyboard controller.
const KEYBOARD_COMMAND: u16 = 0x64;
/// Its command that pulses the machine's reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// What the guest asked for by a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The vCPU goes on.
    Continue,
    /// The machine is to be reset.
    Reset,
}

/// The devices by their addresses.
pub struct Bus {
    io_apic: Option<Mutex<IoApic>>,
    virtio: Vec<Mutex<Transport>>,
}

impl Bus {
    /// A bus of these: the transport at index `n` is in slot `n` of the layout.
    pub fn new(io_apic: Option<IoApic>, virtio: Vec<Transport>) -> Self {
        Self {
            io_apic: io_apic.map(Mutex::new),
            virtio: virtio.into_iter().map(Mutex::new).collect(),
        }
    }

    /// A read at guest address `address`.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, offset)) = self.virtio_at(address) {
            lock(slot).read(offset, data);
        } else if let Some((io_apic, offset)) = self.io_apic_at(address) {
            lock(io_apic).read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write at guest address `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.virtio_at(address) {
            lock(slot).write(offset, data);
        } else if let Some((io_apic, offset)) = self.io_apic_at(address) {
            lock(io_apic).write(offset, data);
        }
    }

    /// A read of a port: one access, or several of a string instruction.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        // The keyboard controller's buffers are always empty: a kernel that is to reset the machine waits for that.
        data.fill(if port == KEYBOARD_COMMAND { 0 } else { 0xff });
    }

    /// A write to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Outcome {
        if port == KEYBOARD_COMMAND && data.contains(&KEYBOARD_RESET) {
            Outcome::Reset
        } else {
            Outcome::Continue
        }
    }

    fn virtio_at(&self, address: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_START)?;
        let slot = usize::try_from(offset / layout::VIRTIO_SIZE).ok()?;
        Some((self.virtio.get(slot)?, offset % layout::VIRTIO_SIZE))
    }

    fn io_apic_at(&self, address: u64) -> Option<(&Mutex<IoApic>, u64)> {
        let offset = address
            .checked_sub(layout::IOAPIC)
            .filter(|offset| *offset < layout::IOAPIC_SIZE)?;
        Some((self.io_apic.as_ref()?, offset))
    }
}

/// No thread leaves registers half-written: each access is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Bus, Outcome};
    use proptest::prelude::*;

    #[test]
    fn the_keyboard_controller_resets_the_machine() {
        let bus = Bus::new(None, vec![]);
        assert_eq!(bus.port_write(0x64, &[0xfe]), Outcome::Reset);
        assert_eq!(bus.port_write(0x64, &[0xd1]), Outcome::Continue);
        assert_eq!(bus.port_write(0x60, &[0xfe]), Outcome::Continue);
        let mut status = [0xaa];
        bus.port_read(0x64, &mut status);
        assert_eq!(status, [0]);
    }

    proptest! {
        #[test]
        fn what_is_not_there_reads_as_ones(address: u64, port in 0u16..0x60, length in 0usize..9) {
            let bus = Bus::new(None, vec![]);
            let mut data = vec![0; length];
            bus.mmio_read(address, &mut data);
            prop_assert_eq!(&data, &vec![0xff; length]);
            bus.mmio_write(address, &data);
            bus.port_read(port, &mut data);
            prop_assert_eq!(&data, &vec![0xff; length]);
        }
    }
}
