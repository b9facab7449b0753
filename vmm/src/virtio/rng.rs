//! The entropy device: the host's random numbers for the guest.

use super::buffers::retry;
use super::device::{ActivateError, Activation, ActiveQueue, Device, Interrupt};
use super::registers::RestoreError;
use super::requests;
use crate::lockdown::seccomp;
use crate::memory::Memory;
use crate::warning;
use crate::worker::{Handler, Poll, READABLE, Thread, Worker, WorkerError};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

/// Most bytes for one request; the driver asks again if it wants more.
const MAX_PER_REQUEST: usize = 4096;

const QUEUE_SIZES: [u16; 1] = [16];

/// Nothing: what the device gives does not depend on what it gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    thread: Thread,
    worker: Option<Worker<RngWorker>>,
}

impl Rng {
    /// A device that is not active.
    ///
    /// # Errors
    /// When it cannot have a thread.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            thread: Thread::new("rng", seccomp::Device::Rng)?,
            worker: None,
        })
    }

    /// What a copy of the device has to know.
    pub fn save(&self) -> State {
        State {}
    }

    /// A copy of a saved device.
    ///
    /// # Errors
    /// See [`new`](Self::new).
    pub fn restore(State {}: State) -> Result<Self, RestoreError> {
        Ok(Self::new()?)
    }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Active);
        }
        let mut queue = activation
            .queues
            .into_iter()
            .next()
            .filter(|queue| queue.queue.ready())
            .ok_or(ActivateError::QueueMissing(0))?;
        queue
            .queue
            .set_event_idx(activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let worker = RngWorker {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
        };
        let worker = self.thread.serve(|| Ok(worker)).map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

/// What runs on the thread.
#[derive(Debug)]
struct RngWorker {
    memory: Memory,
    queue: ActiveQueue,
    interrupt: Interrupt,
}

impl Handler for RngWorker {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        // SAFETY: the worker owns the descriptor, and its thread ends before it is dropped.
        let notify = unsafe { BorrowedFd::borrow_raw(self.queue.notify.as_raw_fd()) };
        poll.add(notify, 0, READABLE)?;
        // What is there already, as after a restore, gets no notification.
        self.queue.notify.write(1)
    }

    fn handle(&mut self, _token: u32, _events: u32, _poll: &Poll) -> Result<(), WorkerError> {
        requests::serve(
            "rng",
            &mut self.queue,
            &self.memory,
            &self.interrupt,
            |_, mut room| {
                let mut bytes = [0u8; MAX_PER_REQUEST];
                let wanted = room.len().min(MAX_PER_REQUEST);
                // SAFETY: `bytes` has room for `wanted`.
                let got = retry(|| unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), wanted, 0) });
                match got {
                    Ok(count) => {
                        let count = room.write(bytes.get(..count).unwrap_or_default());
                        u32::try_from(count).unwrap_or(0)
                    }
                    Err(e) => {
                        warning!("rng: the host has no random numbers: {e}");
                        0
                    }
                }
            },
        )
    }
}

#[cfg(test)]
#[path = "rng_test.rs"]
mod rng_test;
