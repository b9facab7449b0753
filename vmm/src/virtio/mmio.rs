//! The virtio-mmio transport, version 2 (virtio 1.3, 4.2.2): the registers by which a driver finds, configures and
//! starts a device.

use super::device::{Activation, ActiveQueue, Device, Interrupt};
use super::registers::{
    NEGOTIATED, QueueError, QueueRegisters, RestoreError, StartError, TAKEN, TRANSITIONS, is_acceptable,
};
use crate::memory::Memory;
use crate::{log, warning};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[allow(missing_docs)] // The standard's names.
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}
use register as reg;

pub use super::registers::State;

#[allow(missing_docs)] // The standard's names.
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}
use status::{DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HUSK".
const VENDOR: u32 = 0x4b53_5548;

/// A device behind its registers.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    interrupt: Interrupt,
    notifiers: Vec<Arc<EventFd>>,
    active: bool,
    /// The configuration space as of the last look, to tell when it changed.
    config_seen: Vec<u8>,
    state: State,
}

impl Transport {
    /// `device`, reset, whose line is `interrupt`.
    ///
    /// # Errors
    /// When no descriptors are to be had.
    pub fn new(device: Box<dyn Device>, memory: Memory, interrupt: Interrupt) -> io::Result<Self> {
        let sizes = device.queue_max_sizes();
        let notifiers = sizes
            .iter()
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let config_seen = device.config().to_vec();
        Ok(Self {
            device,
            memory,
            interrupt,
            notifiers,
            active: false,
            config_seen,
            state: State::new(sizes),
        })
    }

    /// The registers.
    pub fn save(&self) -> State {
        State {
            interrupt_status: self.interrupt.status(),
            ..self.state.clone()
        }
    }

    /// A transport with these registers, in front of a `device` that was restored before. If the device was active it
    /// goes on where its used rings end: what it had taken and not returned it takes once more.
    ///
    /// # Errors
    /// When no driver can have come to these registers in front of such a device, or no descriptors are to be had.
    pub fn restore(
        state: State,
        device: Box<dyn Device>,
        memory: Memory,
        interrupt: Interrupt,
    ) -> Result<Self, RestoreError> {
        let mut transport = Self::new(device, memory, interrupt)?;
        state.check(transport.offered(), transport.device.queue_max_sizes())?;
        transport.interrupt.restore(state.interrupt_status);
        transport.state = state;
        if transport.state.is_active() {
            transport.activate(Rings::Old)?;
        } else {
            // What it brings along from an earlier driver is nobody's.
            transport.device.reset();
        }
        Ok(transport)
    }

    /// The descriptors to be written when the driver notifies a queue, in the queues' order.
    pub fn notifiers(&self) -> &[Arc<EventFd>] {
        &self.notifiers
    }

    /// A read of the registers, `offset` into them. Whatever is not there reads as zeroes.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            let config = usize::try_from(at)
                .ok()
                .and_then(|at| self.device.config().get(at..));
            for (byte, value) in data.iter_mut().zip(config.unwrap_or(&[])) {
                *byte = *value;
            }
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.register(offset).to_le_bytes();
        }
    }

    /// A write to the registers, `offset` into them. What is not allowed now, or not at all, changes nothing.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if self.state.status & DRIVER != 0 && self.state.status & FAILED == 0 {
                self.device.write_config(at, data);
            }
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.set_register(offset, u32::from_le_bytes(data));
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | (1 << VIRTIO_F_VERSION_1)
    }

    fn register(&mut self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device.kind(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => match self.state.device_features_select {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => {
                let max = self
                    .device
                    .queue_max_sizes()
                    .get(self.state.queue_select as usize);
                max.map_or(0, |max| u32::from(*max))
            }
            reg::QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS => self.state.status,
            // No device has shared memory: all ones says so (4.2.2).
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.generation(),
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            reg::DRIVER_FEATURES => self.set_driver_features(value),
            reg::QUEUE_SEL => self.state.queue_select = value,
            reg::QUEUE_NOTIFY => {
                // Only a notification of unusual width comes here, all others are caught by KVM.
                if let (true, Some(notifier)) = (self.active, self.notifiers.get(value as usize)) {
                    // A full counter means that the device has been told.
                    let _ = notifier.write(1);
                }
            }
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.set_status(value),
            reg::QUEUE_READY => {
                let ready = value & 1 == 1;
                if let Some(queue) = self.configurable_queue() {
                    queue.ready = ready;
                }
            }
            _ => {
                // Size and addresses stay as they are while the queue is ready (4.2.2.2).
                let Some(queue) = self.configurable_queue().filter(|queue| !queue.ready) else {
                    return;
                };
                match offset {
                    reg::QUEUE_NUM => queue.size = value,
                    reg::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
                    reg::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
                    reg::QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
                    reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
                    reg::QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
                    reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
                    _ => {}
                }
            }
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.state.queues.get(self.state.queue_select as usize)
    }

    /// The selected queue, if its registers may be written now: after FEATURES_OK and before DRIVER_OK.
    fn configurable_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.state.status != NEGOTIATED {
            return None;
        }
        self.state.queues.get_mut(self.state.queue_select as usize)
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.state.status != TAKEN {
            return;
        }
        match self.state.driver_features_select {
            0 => set_low(&mut self.state.driver_features, value),
            1 => set_high(&mut self.state.driver_features, value),
            // Features of which none is offered.
            _ if value == 0 => {}
            select => warning!("a driver accepts features {value:#x} of word {select}, none are offered"),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // The device's own bit; the driver writes it back with the others.
        let device_bits = self.state.status & NEEDS_RESET;
        let now = self.state.status & !NEEDS_RESET;
        let wanted = value & !NEEDS_RESET;
        if wanted == now {
            return;
        }
        if wanted & FAILED != 0 {
            self.state.status |= FAILED;
            warning!("the driver of device {} has given up", self.device.kind());
            return;
        }
        if !TRANSITIONS.contains(&(now, wanted)) {
            warning!("a driver goes from status {now:#x} to {wanted:#x}, which is not allowed");
            return;
        }
        if wanted & !now == FEATURES_OK && !is_acceptable(self.state.driver_features, self.offered()) {
            warning!(
                "a driver accepts features {:#x}, which it may not",
                self.state.driver_features
            );
            return;
        }
        self.state.status = wanted | device_bits;
        if wanted & !now == DRIVER_OK {
            if let Err(reason) = self.activate(Rings::New) {
                warning!(
                    "device {} cannot start: {}",
                    self.device.kind(),
                    log::chain(&reason)
                );
                self.state.status |= NEEDS_RESET;
                self.interrupt.signal_config();
            }
        }
    }

    fn activate(&mut self, rings: Rings) -> Result<(), StartError> {
        if self.active {
            return Err(StartError::Active);
        }
        let event_idx = self.state.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.state.queues.len());
        let maxima = self.device.queue_max_sizes();
        for (((index, registers), max), notifier) in self
            .state
            .queues
            .iter()
            .enumerate()
            .zip(maxima)
            .zip(&self.notifiers)
        {
            let queue = checked_queue(registers, *max, event_idx, &self.memory, rings)
                .map_err(|source| StartError::Queue { index, source })?;
            // A notification from before the device was ready is none.
            let _ = notifier.read();
            queues.push(ActiveQueue {
                queue,
                notify: Arc::clone(notifier),
            });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.state.driver_features,
        };
        self.device.activate(activation)?;
        self.active = true;
        Ok(())
    }

    /// Resets the device and all registers.
    pub fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        self.forget();
    }

    fn forget(&mut self) {
        self.state = State {
            // A driver may hold on to what it read before.
            generation: self.state.generation,
            ..State::new(self.device.queue_max_sizes())
        };
        self.interrupt.acknowledge(u32::MAX);
    }

    /// Counts the changes of the configuration space, as far as a driver looks.
    fn generation(&mut self) -> u32 {
        if self.device.config() != self.config_seen {
            self.config_seen = self.device.config().to_vec();
            self.state.generation = self.state.generation.wrapping_add(1);
        }
        self.state.generation
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.device.reset();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

/// Whether a driver has just made its rings, or they have been in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rings {
    New,
    Old,
}

/// The queue that the registers describe, if its size is allowed and its rings are aligned and in guest memory.
fn checked_queue(
    registers: &QueueRegisters,
    max_size: u16,
    event_idx: bool,
    memory: &Memory,
    rings: Rings,
) -> Result<Queue, QueueError> {
    let default = Queue::new(max_size).map_err(QueueError::Registers)?;
    if !registers.ready {
        return Ok(default);
    }
    let state = QueueState {
        event_idx_enabled: event_idx,
        size: u16::try_from(registers.size).map_err(|_| QueueError::Size(registers.size))?,
        ready: true,
        desc_table: registers.descriptors,
        avail_ring: registers.available,
        used_ring: registers.used,
        ..default.state()
    };
    let mut queue = Queue::try_from(state).map_err(QueueError::Registers)?;
    if !queue.is_valid(memory) {
        return Err(QueueError::Outside);
    }
    if rings == Rings::Old {
        let done = queue
            .used_idx(memory, Ordering::Acquire)
            .map_err(QueueError::Registers)?
            .0;
        queue.set_next_avail(done);
        queue.set_next_used(done);
    }
    Ok(queue)
}

#[cfg(test)]
#[path = "mmio_test.rs"]
mod tests;
