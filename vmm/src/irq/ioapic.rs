//! The IOAPIC (Intel 82093AA) of a machine whose other half, the local APICs, is in KVM.
//!
//! It moves no interrupts itself: each unmasked pin becomes a route in KVM from the device's irqfd to the message
//! that the pin's redirection entry asks for. All lines are edge-triggered.

use crate::error;
use crate::layout::IOAPIC_PINS;
use crate::virtio::device::Interrupt;
use serde::{Deserialize, Serialize};
use std::io;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_ENTRIES: u8 = 0x10;

/// Version 0x11 (no EOI register) and the last pin's number.
const VERSION: u32 = 0x11 | ((IOAPIC_PINS as u32 - 1) << 16);

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const LOGICAL: u64 = 1 << 11;
/// Delivery status and remote IRR: always 0 for edges.
const READ_ONLY: u64 = (1 << 12) | (1 << 14);
/// Its id has four bits.
const MAX_ID: u8 = 0x0f;
/// Bits of an entry that exist.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !READ_ONLY;

/// An interrupt message as a local APIC takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Low 32 bits of its address; the high ones are 0.
    pub address: u32,
    /// Its data.
    pub data: u32,
}

/// Where the routes go.
pub trait Router: Send {
    /// Replaces all routes: from interrupt line (GSI) to message.
    ///
    /// # Errors
    /// When they could not be set; the old ones are still in force then.
    fn set_routes(&mut self, routes: &[(u32, Message)]) -> io::Result<()>;
}

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    select: u8,
    id: u8,
    entries: [u64; IOAPIC_PINS],
}

/// An IOAPIC of [`IOAPIC_PINS`] pins.
pub struct IoApic {
    state: State,
    lines: Vec<(u32, Interrupt)>,
    router: Box<dyn Router>,
}

/// Why an IOAPIC is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It has more than the bits that there are.
    #[error("no IOAPIC has the id {0:#x}")]
    Id(u8),
    /// The same.
    #[error("the entry of pin {pin} cannot be {entry:#x}")]
    Entry {
        /// Which.
        pin: usize,
        /// What it would be.
        entry: u64,
    },
    /// The routes could not be set.
    #[error("the interrupt routes could not be set")]
    Routes(#[source] io::Error),
}

impl IoApic {
    /// All pins masked. `lines` are those of the devices: an edge that comes while its pin is masked would be lost, so
    /// at unmasking a line whose device still has something to tell is raised again.
    pub fn new(router: Box<dyn Router>, lines: Vec<(u32, Interrupt)>) -> Self {
        let state = State {
            select: 0,
            id: 0,
            entries: [MASKED; IOAPIC_PINS],
        };
        Self { state, lines, router }
    }

    /// Its registers.
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// One with these registers, its routes set.
    ///
    /// # Errors
    /// When it cannot have come to these registers, or the routes could not be set.
    pub fn restore(
        state: State,
        router: Box<dyn Router>,
        lines: Vec<(u32, Interrupt)>,
    ) -> Result<Self, RestoreError> {
        if state.id > MAX_ID {
            return Err(RestoreError::Id(state.id));
        }
        let mut entries = state.entries.iter().copied().enumerate();
        if let Some((pin, entry)) = entries.find(|(_, entry)| entry & !WRITABLE != 0) {
            return Err(RestoreError::Entry { pin, entry });
        }
        let mut io_apic = Self { state, lines, router };
        io_apic.route().map_err(RestoreError::Routes)?;
        Ok(io_apic)
    }

    /// A read of the registers, `offset` into them.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.state.select),
            WINDOW => self.register(),
            _ => 0,
        };
        for (byte, value) in data
            .iter_mut()
            .zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0)))
        {
            *byte = value;
        }
    }

    /// A write to the registers, `offset` into them.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, [select, ..]) => self.state.select = *select,
            (WINDOW, [a, b, c, d]) => self.set_register(u32::from_le_bytes([*a, *b, *c, *d])),
            _ => {}
        }
    }

    /// Pin and half (`true`: the high one) of the entry register selected.
    fn selected(&self) -> Option<(usize, bool)> {
        let index = self.state.select.checked_sub(REG_ENTRIES)?;
        Some((usize::from(index / 2), index % 2 == 1)).filter(|(pin, _)| *pin < IOAPIC_PINS)
    }

    fn register(&self) -> u32 {
        match self.state.select {
            REG_ID | REG_ARBITRATION => u32::from(self.state.id) << 24,
            REG_VERSION => VERSION,
            _ => {
                let entry = self
                    .selected()
                    .and_then(|(pin, high)| self.state.entries.get(pin).map(|entry| (entry, high)));
                match entry {
                    Some((entry, false)) => *entry as u32,
                    Some((entry, true)) => (*entry >> 32) as u32,
                    None => 0,
                }
            }
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.state.select == REG_ID {
            self.state.id = (value >> 24) as u8 & MAX_ID;
            return;
        }
        let Some((pin, high)) = self.selected() else {
            return;
        };
        let Some(entry) = self.state.entries.get_mut(pin) else {
            return;
        };
        let old = *entry;
        *entry = WRITABLE
            & if high {
                (old & 0xffff_ffff) | (u64::from(value) << 32)
            } else {
                (old & !0xffff_ffff) | u64::from(value)
            };
        let new = *entry;
        // Setting routes is dear in KVM, and kernels write masked entries many times over.
        if message(old) != message(new) {
            if let Err(e) = self.route() {
                error!("interrupt routes could not be set: {e}");
            }
        }
        if old & MASKED != 0 && new & MASKED == 0 {
            for (_, line) in self.lines.iter().filter(|(irq, _)| *irq as usize == pin) {
                line.raise_again();
            }
        }
    }

    fn route(&mut self) -> io::Result<()> {
        let routes: Vec<_> = (0u32..)
            .zip(self.state.entries)
            .filter_map(|(gsi, entry)| Some((gsi, message(entry)?)))
            .collect();
        self.router.set_routes(&routes)
    }
}

/// The message that an entry asks for; none while it is masked. Destination, destination mode, delivery mode and
/// vector are where the local APIC wants them. A level-triggered entry is sent as an edge: no line here is ever
/// level-triggered, and KVM would wait for its end of interrupt to be passed on.
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
    let data = (entry & 0x7ff & !LEVEL) as u32;
    Some(Message {
        address: 0xfee0_0000 | (destination << 12) | logical,
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    type Routes = Arc<Mutex<(usize, Vec<(u32, Message)>)>>;

    struct Recorder(Routes);

    impl Router for Recorder {
        fn set_routes(&mut self, routes: &[(u32, Message)]) -> io::Result<()> {
            let mut seen = self.0.lock().unwrap();
            *seen = (seen.0 + 1, routes.to_vec());
            Ok(())
        }
    }

    fn io_apic(lines: Vec<(u32, Interrupt)>) -> (IoApic, Routes) {
        let routes = Routes::default();
        (
            IoApic::new(Box::new(Recorder(Arc::clone(&routes))), lines),
            routes,
        )
    }

    fn set(io_apic: &mut IoApic, register: u8, value: u32) {
        io_apic.write(SELECT, &u32::from(register).to_le_bytes());
        io_apic.write(WINDOW, &value.to_le_bytes());
    }

    fn get(io_apic: &mut IoApic, register: u8) -> u32 {
        io_apic.write(SELECT, &[register]);
        let mut data = [0xff; 4];
        io_apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_tells_its_version_and_pins() {
        let (mut io_apic, _) = io_apic(vec![]);
        assert_eq!(get(&mut io_apic, 1), 0x0017_0011);
        set(&mut io_apic, 0, 0x0200_0000);
        assert_eq!(get(&mut io_apic, 0), 0x0200_0000);
        assert_eq!(get(&mut io_apic, 0x10 + 2 * 23), MASKED as u32);
        assert_eq!(get(&mut io_apic, 0x10 + 2 * 24), 0);
    }

    #[test]
    fn an_unmasked_pin_is_a_route_and_a_masked_one_is_none() {
        let (mut io_apic, routes) = io_apic(vec![]);
        set(&mut io_apic, 0x1b, 3 << 24);
        set(&mut io_apic, 0x1a, 0x1_0031);
        assert_eq!(routes.lock().unwrap().0, 0);
        set(&mut io_apic, 0x1a, 0x31);
        assert_eq!(
            routes.lock().unwrap().1,
            [(
                5,
                Message {
                    address: 0xfee0_3000,
                    data: 0x31
                }
            )]
        );
        set(&mut io_apic, 0x1c, 0x0932);
        let second = Message {
            address: 0xfee0_0004,
            data: 0x132,
        };
        assert_eq!(routes.lock().unwrap().1.last(), Some(&(6, second)));
        set(&mut io_apic, 0x1a, 0x1_0031);
        assert_eq!(*routes.lock().unwrap(), (3, vec![(6, second)]));
    }

    #[test]
    fn what_came_while_masked_is_raised_at_unmasking() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let line = Interrupt::new(event.try_clone().unwrap());
        let (mut io_apic, _) = io_apic(vec![(5, line.clone())]);
        set(&mut io_apic, 0x1a, 0x31);
        assert!(event.read().is_err());
        set(&mut io_apic, 0x1a, 0x1_0031);
        line.signal_queue();
        event.read().unwrap();
        set(&mut io_apic, 0x1a, 0x31);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn state_round_trip() {
        let (mut first, routes) = io_apic(vec![]);
        set(&mut first, 0x1a, 0x31);
        let state: State = serde_json::from_slice(&serde_json::to_vec(&first.save()).unwrap()).unwrap();
        assert_eq!(state, first.save());
        let again = Routes::default();
        IoApic::restore(state, Box::new(Recorder(Arc::clone(&again))), vec![]).unwrap();
        assert_eq!(again.lock().unwrap().1, routes.lock().unwrap().1);
    }

    #[test]
    fn registers_that_there_are_not_are_refused() {
        let good = io_apic(vec![]).0.save();
        let restore = |state| IoApic::restore(state, Box::new(Recorder(Routes::default())), vec![]).map(drop);
        restore(good.clone()).unwrap();
        for bit in (0..64).filter(|bit| WRITABLE >> bit & 1 == 0) {
            let mut state = good.clone();
            state.entries[7] |= 1 << bit;
            let refused = restore(state).unwrap_err();
            assert!(
                matches!(refused, RestoreError::Entry { pin: 7, .. }),
                "{bit}: {refused}"
            );
        }
        let state = State { id: 0x10, ..good };
        assert!(matches!(restore(state), Err(RestoreError::Id(0x10))));
    }

    proptest! {
        #[test]
        fn any_access_is_taken(
            accesses in proptest::collection::vec((0u64..0x1000, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let (mut io_apic, routes) = io_apic(vec![]);
            for (offset, write, mut data) in accesses {
                // Half of the accesses go to the two registers that matter.
                let offset = if offset % 2 == 0 { offset } else { (offset & 2) * 8 };
                if write { io_apic.write(offset, &data) } else { io_apic.read(offset, &mut data) }
            }
            let routes = routes.lock().unwrap();
            prop_assert!(routes.1.len() <= IOAPIC_PINS);
            // And wherever it has come to, a copy can go on from there.
            let again = Routes::default();
            let copy = IoApic::restore(io_apic.save(), Box::new(Recorder(Arc::clone(&again))), vec![]).unwrap();
            prop_assert_eq!(copy.save(), io_apic.save());
            prop_assert_eq!(&again.lock().unwrap().1, &routes.1);
        }
    }
}
