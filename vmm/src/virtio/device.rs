//! What a virtio device is to its transport.

use crate::memory::Memory;
use crate::warning;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// Bit of the interrupt status register: a queue has used buffers (virtio 1.3, 4.2.2).
pub const INTERRUPT_QUEUE: u32 = 1;
/// Bit of the interrupt status register: the device's configuration changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// One virtio device, its control side. The transport calls it on a vCPU thread, never from two threads at once.
///
/// The order of calls: any number of [`features`](Self::features), [`config`](Self::config) and
/// [`write_config`](Self::write_config) at any time; [`activate`](Self::activate) once the driver is ready, then
/// [`reset`](Self::reset) before the next [`activate`](Self::activate). `reset` may also come to a device that is
/// not active. Queues are served on the device's own thread (see [`crate::worker`]), never in these calls.
pub trait Device: Send {
    /// The device's virtio id, `VIRTIO_ID_*` of [`virtio_bindings::virtio_ids`].
    fn kind(&self) -> u32;

    /// Largest size of each queue, a power of two; as many queues as entries.
    fn queue_max_sizes(&self) -> &'static [u16];

    /// The feature bits that the device offers. The transport adds `VIRTIO_F_VERSION_1` and none besides.
    fn features(&self) -> u64;

    /// The configuration space as the driver would read it now. The transport bounds reads to it.
    fn config(&self) -> &[u8];

    /// The driver wrote to the configuration space. The range may lie outside of it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: starts to serve the queues.
    ///
    /// # Errors
    /// When it cannot; the transport then marks the device as in need of a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops to serve the queues before it returns and forgets what the driver did, so that the device can be
    /// activated again.
    fn reset(&mut self);
}

/// All that an active device works with.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// The device's queues, as many as [`Device::queue_max_sizes`] has entries. A queue that the driver did not
    /// set up is there, but not [`ready`](virtio_queue::QueueT::ready).
    pub queues: Vec<ActiveQueue>,
    /// How to tell the driver.
    pub interrupt: Interrupt,
    /// The feature bits that the driver accepted: a subset of those offered, and `VIRTIO_F_VERSION_1`.
    pub features: u64,
}

/// A queue that the driver set up. The transport has checked that its rings lie in guest memory.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings.
    pub queue: Queue,
    /// Becomes readable when the driver has notified the queue. Non-blocking.
    pub notify: Arc<EventFd>,
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The device's thread could not be started.
    #[error("the device's thread could not be started")]
    Worker(#[source] io::Error),
    /// The driver left out a queue without which the device cannot work.
    #[error("queue {0} is needed and was not set up")]
    QueueMissing(usize),
    /// It is active already.
    #[error("the device is active already")]
    Active,
    /// The device's host end is gone, as when an earlier worker of it was lost.
    #[error("the device's host end is gone")]
    HostEnd,
    /// The device's host end does not do what the driver wants.
    #[error("the device's host end refuses")]
    Host(#[source] io::Error),
}

/// The line by which a device tells its driver that something happened.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    irq: Arc<EventFd>,
}

impl Interrupt {
    /// A line that is raised by writing `irq`, non-blocking.
    pub fn new(irq: EventFd) -> Self {
        Self {
            status: Arc::new(AtomicU32::new(0)),
            irq: Arc::new(irq),
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn signal_queue(&self) {
        self.signal(INTERRUPT_QUEUE);
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.signal(INTERRUPT_CONFIG);
    }

    /// The interrupt status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen the given bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the interrupt status register, as when the machine is restored.
    pub fn restore(&self, bits: u32) {
        self.status
            .store(bits & (INTERRUPT_QUEUE | INTERRUPT_CONFIG), Ordering::SeqCst);
    }

    /// Raises the line once more if there is something that the driver has not acknowledged.
    pub fn raise_again(&self) {
        if self.status() != 0 {
            self.raise();
        }
    }

    fn signal(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.raise();
    }

    fn raise(&self) {
        if let Err(e) = self.irq.write(1) {
            warning!("an interrupt was lost: {e}");
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    #[test]
    fn bits_gather_until_they_are_acknowledged() {
        let irq = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        let line = Interrupt::new(irq.try_clone().unwrap());
        line.signal_queue();
        line.clone().signal_config();
        assert_eq!(line.status(), INTERRUPT_QUEUE | INTERRUPT_CONFIG);
        assert_eq!(irq.read().unwrap(), 2);
        line.acknowledge(INTERRUPT_QUEUE);
        assert_eq!(line.status(), INTERRUPT_CONFIG);
    }
}
