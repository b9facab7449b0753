//! Buffers returned to the driver several at once: those of a frame must not be seen one by one.

use crate::memory::Memory;
use crate::worker::WorkerError;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Returns `chains` (head and bytes written of each) to the driver, which sees all of them or none.
///
/// # Errors
/// When the ring is out of reach, or a head is none of the queue's.
pub fn add_used_together(
    queue: &mut Queue,
    memory: &Memory,
    chains: impl DoubleEndedIterator<Item = (u16, u32)>,
) -> Result<(), WorkerError> {
    let mut chains = chains;
    let Some((last, last_length)) = chains.next_back() else {
        return Ok(());
    };
    let mut next = queue.next_used();
    for (head, length) in chains {
        if head >= queue.size() {
            return Err(Error::InvalidDescriptorIndex.into());
        }
        let place = u64::from(next.checked_rem(queue.size()).unwrap_or(0));
        // Behind flags and index, 8 bytes each: head and length.
        let address = at(queue.used_ring(), 4 + 8 * place)?;
        let element = u64::from(head) | u64::from(length) << 32;
        memory
            .write_slice(&element.to_le_bytes(), address)
            .map_err(WorkerError::Memory)?;
        next = next.wrapping_add(1);
    }
    // This one's index tells of all.
    queue.set_next_used(next);
    queue.add_used(memory, last, last_length)?;
    Ok(())
}

/// When the driver is to be told of returned buffers. In place of the queue's own, which counts each call of
/// `add_used` as one buffer.
#[derive(Debug)]
pub struct Signal {
    /// Up to where the driver was told, or did not want to be.
    told: u16,
}

impl Signal {
    /// For a queue that is as it is now.
    pub fn new(queue: &Queue) -> Self {
        Self {
            told: queue.next_used(),
        }
    }

    /// Whether the driver is to be told of what was returned since the last time.
    ///
    /// # Errors
    /// When the ring is out of reach.
    pub fn is_due(&mut self, queue: &Queue, memory: &Memory) -> Result<bool, WorkerError> {
        let now = queue.next_used();
        let before = std::mem::replace(&mut self.told, now);
        if now == before {
            return Ok(false);
        }
        // What was returned must be seen before what the driver says is looked at.
        fence(Ordering::SeqCst);
        let load = |offset| -> Result<u16, WorkerError> {
            memory
                .load::<u16>(at(queue.avail_ring(), offset)?, Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(WorkerError::Memory)
        };
        if queue.event_idx_enabled() {
            // Behind flags, index and the ring: the index that the driver waits for.
            let event = load(4 + 2 * u64::from(queue.size()))?;
            let beyond = now.wrapping_sub(event).wrapping_sub(1);
            return Ok(beyond < now.wrapping_sub(before));
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn at(ring: u64, offset: u64) -> Result<GuestAddress, WorkerError> {
    ring.checked_add(offset)
        .map(GuestAddress)
        .ok_or(WorkerError::Memory(GuestMemoryError::GuestAddressOverflow))
}
