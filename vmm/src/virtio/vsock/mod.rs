//! The socket device: the guest's vsock connections are joined to unix streams that the engine hands over.
//!
//! Nothing here opens a socket. The engine offers streams over a channel ([`husk_vmm_protocol::vsock`]): for a
//! connection that the guest will make, or to be connected to the guest. Data moves between a stream and the
//! guest's buffers without a copy where both are ready.

pub mod connection;
pub mod credit;
pub mod muxer;
pub mod offers;
pub mod packet;
pub mod worker;

#[cfg(test)]
mod connection_test;
#[cfg(test)]
mod tests;

use crate::lockdown::seccomp;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, Device};
use crate::virtio::registers::RestoreError;
use crate::worker::{Thread, Worker};
use muxer::Muxer;
use offers::Offers;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use worker::{Doorbell, VsockWorker};

/// Queues: to the guest, from the guest, events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Context ids that a guest can have: below are the hypervisor's, the local one and the host's, above that of anybody.
const GUEST_CIDS: std::ops::Range<u64> = 3..u32::MAX as u64;

/// What is kept of the device across a snapshot. Connections are not: their streams belong to an engine of
/// another time. The guest is told by a transport reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Whether the guest has to be told that all its connections are lost.
    pub transport_reset: bool,
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    /// `struct virtio_vsock_config`: the guest's context id.
    config: [u8; 8],
    guest_cid: u64,
    /// The channel, when no worker has it.
    offers: Option<Offers>,
    thread: Thread,
    worker: Option<Worker<VsockWorker>>,
    /// Makes the worker look.
    again: Arc<EventFd>,
    /// The guest is to be told of a transport reset; shared with the worker, which takes it.
    transport_reset: Arc<AtomicBool>,
}

impl Vsock {
    /// A device whose guest is called `guest_cid`, with streams from `offers`, a `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// When it cannot have a thread and descriptors.
    pub fn new(guest_cid: u64, offers: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            config: guest_cid.to_le_bytes(),
            guest_cid,
            offers: Some(Offers::new(offers)),
            thread: Thread::new("vsock", seccomp::Device::Vsock)?,
            worker: None,
            again: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
            transport_reset: Arc::new(AtomicBool::new(false)),
        })
    }

    /// What a copy of the device has to know.
    pub fn save(&self) -> State {
        State {
            guest_cid: self.guest_cid,
            transport_reset: self.worker.is_some() || self.transport_reset.load(Ordering::Acquire),
        }
    }

    /// A copy of a saved device.
    ///
    /// # Errors
    /// As of [`new`](Self::new), and when the state is none that a device can have.
    pub fn restore(state: State, offers: OwnedFd) -> Result<Self, RestoreError> {
        if !GUEST_CIDS.contains(&state.guest_cid) {
            return Err(RestoreError::Device {
                device: "socket",
                what: format!("no guest has the context id {}", state.guest_cid),
            });
        }
        let device = Self::new(state.guest_cid, offers)?;
        device
            .transport_reset
            .store(state.transport_reset, Ordering::Release);
        Ok(device)
    }

    /// Closes all connections and tells the guest that they are lost; streams that wait for the guest go on to.
    /// On a device that is not active the guest is told when it is.
    pub fn transport_reset(&self) {
        self.transport_reset.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the worker is called already.
        let _ = self.again.write(1);
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Active);
        }
        let mut queues: [ActiveQueue; QUEUE_SIZES.len()] = activation
            .queues
            .try_into()
            .map_err(|queues: Vec<_>| ActivateError::QueueMissing(queues.len()))?;
        // The queue of events may be left out: then no event can be told.
        for (number, queue) in queues.iter().take(2).enumerate() {
            if !queue.queue.ready() {
                return Err(ActivateError::QueueMissing(number));
            }
        }
        for queue in &mut queues {
            queue
                .queue
                .set_event_idx(activation.features & self.features() != 0);
        }
        let doorbell = Doorbell {
            again: Arc::clone(&self.again),
            reset: self.transport_reset.clone(),
        };
        let offers = self.offers.take().ok_or(ActivateError::HostEnd)?;
        let (memory, interrupt, guest_cid) = (activation.memory, activation.interrupt, self.guest_cid);
        let worker = self
            .thread
            .serve(move || {
                VsockWorker::new(memory, queues, interrupt, Muxer::new(guest_cid, offers), doorbell)
            })
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.offers = worker.stop().map(|worker| worker.into_muxer().into_offers());
        }
    }
}
