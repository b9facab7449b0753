//! The registers of a transport as they are saved, and which of them there can be.
//!
//! What was saved may come from anywhere by the time that it is read. A transport is restored only with registers that a
//! driver could have brought it to, so that nothing behind it has to doubt them.

use super::device::{ActivateError, INTERRUPT_CONFIG, INTERRUPT_QUEUE};
use super::mmio::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use serde::{Deserialize, Serialize};
use std::io;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// A driver that has found and taken its device.
pub(super) const TAKEN: u32 = ACKNOWLEDGE | DRIVER;
/// It may set up the queues.
pub(super) const NEGOTIATED: u32 = TAKEN | FEATURES_OK;
/// It has done so, and the device is to work.
pub(super) const RUNNING: u32 = NEGOTIATED | DRIVER_OK;

/// The ways of the status register that a driver may go, besides setting FAILED and writing 0 (a reset).
pub(super) const TRANSITIONS: [(u32, u32); 4] = [
    (0, ACKNOWLEDGE),
    (ACKNOWLEDGE, TAKEN),
    (TAKEN, NEGOTIATED),
    (NEGOTIATED, RUNNING),
];

/// One queue's registers, as the driver wrote them: unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRegisters {
    pub size: u32,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl QueueRegisters {
    /// Those of a queue of which no driver has said anything.
    pub fn new(max_size: u16) -> Self {
        Self {
            size: max_size.into(),
            ..Self::default()
        }
    }
}

/// The transport's registers. How far an active device has come is in the rings themselves, what else it has to know in
/// the device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub(super) status: u32,
    pub(super) driver_features: u64,
    // A driver may select what is not there; that reads as nothing.
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
    pub(super) interrupt_status: u32,
    pub(super) generation: u32,
}

/// Why a queue cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Sizes have 16 bits.
    #[error("it has a size of {0}")]
    Size(u32),
    /// Its size is not allowed, or a ring is not aligned.
    #[error("its registers are wrong")]
    Registers(#[source] virtio_queue::Error),
    /// A ring is not in guest memory.
    #[error("its rings are not in guest memory")]
    Outside,
}

/// Why a device does not work, though its driver is ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It works already.
    #[error("it is active already")]
    Active,
    /// One of its queues is no good.
    #[error("queue {index} cannot be served")]
    Queue {
        /// Which.
        index: usize,
        /// The cause.
        #[source]
        source: QueueError,
    },
    /// It refuses itself.
    #[error("the device refuses")]
    Device(#[from] ActivateError),
}

/// Why a device or its transport is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No driver can bring the status register there.
    #[error("there is no status {0:#x}")]
    Status(u32),
    /// The driver could not accept these features, or not yet.
    #[error("a driver in status {status:#x} cannot have accepted features {features:#x}")]
    Features {
        /// The driver's status.
        status: u32,
        /// What it has accepted.
        features: u64,
    },
    /// The device has other queues.
    #[error("the state has {found} queues, the device {expected}")]
    QueueCount {
        /// As many as the state has.
        found: usize,
        /// As many as the device has.
        expected: usize,
    },
    /// The queue was set up before the driver could do so.
    #[error("a driver in status {status:#x} cannot have set up queue {index}")]
    QueueEarly {
        /// The driver's status.
        status: u32,
        /// Which queue.
        index: usize,
    },
    /// There are no such interrupts, or not yet.
    #[error("a device whose driver is in status {status:#x} cannot have interrupts {bits:#x}")]
    Interrupts {
        /// The driver's status.
        status: u32,
        /// The interrupt status register.
        bits: u32,
    },
    /// The device should work and cannot.
    #[error("the device cannot go on")]
    Start(#[from] StartError),
    /// What the device itself has to know is nothing that a device of its kind can know.
    #[error("no {device} device can be like this: {what}")]
    Device {
        /// Its kind.
        device: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The host has no threads or descriptors, or its end of the device does not do what is asked of it.
    #[error("the host does not do its part")]
    Host(#[from] io::Error),
}

impl From<RestoreError> for io::Error {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Host(error) => error,
            other => Self::new(io::ErrorKind::InvalidInput, other),
        }
    }
}

/// Whether a driver may accept these features of those that are offered.
pub(super) fn is_acceptable(features: u64, offered: u64) -> bool {
    features & !offered == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
}

impl State {
    /// Those of a device that was reset, with queues of at most these sizes.
    pub(super) fn new(max_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: max_sizes.iter().copied().map(QueueRegisters::new).collect(),
            interrupt_status: 0,
            generation: 0,
        }
    }

    /// Whether the device works, if it can work at all: it needs a reset where it could not start.
    pub(super) fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & NEEDS_RESET == 0
    }

    /// Sees to it that a driver can have come here, in front of a device that offers these features and has queues of at
    /// most these sizes. The queues of an active device are checked when it starts again.
    pub(super) fn check(&self, offered: u64, max_sizes: &[u16]) -> Result<(), RestoreError> {
        let status = self.status;
        // How far the driver got, whether it gave up then or not.
        let stage = status & !(FAILED | NEEDS_RESET);
        let is_stage = stage == 0 || TRANSITIONS.iter().any(|(_, to)| stage == *to);
        if !is_stage || (status & NEEDS_RESET != 0 && stage != RUNNING) {
            return Err(RestoreError::Status(status));
        }
        let features = self.driver_features;
        let can_have_accepted = if stage & FEATURES_OK != 0 {
            is_acceptable(features, offered)
        } else {
            // Until they are settled a driver may write what it likes.
            stage == TAKEN || features == 0
        };
        if !can_have_accepted {
            return Err(RestoreError::Features { status, features });
        }
        if self.queues.len() != max_sizes.len() {
            return Err(RestoreError::QueueCount {
                found: self.queues.len(),
                expected: max_sizes.len(),
            });
        }
        if stage & FEATURES_OK == 0 {
            let mut queues = self.queues.iter().zip(max_sizes);
            let set_up = queues.position(|(queue, max)| *queue != QueueRegisters::new(*max));
            if let Some(index) = set_up {
                return Err(RestoreError::QueueEarly { status, index });
            }
        }
        let bits = self.interrupt_status;
        let possible = if stage == RUNNING {
            INTERRUPT_QUEUE | INTERRUPT_CONFIG
        } else {
            0
        };
        if bits & !possible != 0 {
            return Err(RestoreError::Interrupts { status, bits });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "registers_test.rs"]
mod tests;
