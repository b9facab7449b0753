//! The queue of commands: how many pairs the guest uses.

use super::pairs::Pairs;
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::requests;
use crate::worker::WorkerError;
use std::sync::Arc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Class and number of the only command.
const SET_PAIRS: [u8; 2] = [VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8];

/// The queue of commands.
#[derive(Debug)]
pub struct Control {
    queue: ActiveQueue,
    memory: Memory,
    interrupt: Interrupt,
    pairs: Option<Arc<Pairs>>,
}

impl Control {
    /// The queue of a driver that may choose among `pairs`, or has but one.
    pub fn new(queue: ActiveQueue, memory: Memory, interrupt: Interrupt, pairs: Option<Arc<Pairs>>) -> Self {
        Self {
            queue,
            memory,
            interrupt,
            pairs,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Carries out the commands that the driver has made available.
    ///
    /// # Errors
    /// When the queue cannot be used any more.
    pub fn serve(&mut self) -> Result<(), WorkerError> {
        let pairs = self.pairs.as_deref();
        requests::serve(
            "net",
            &mut self.queue,
            &self.memory,
            &self.interrupt,
            |command, mut answer| {
                let done = if run(command, pairs) {
                    VIRTIO_NET_OK
                } else {
                    VIRTIO_NET_ERR
                };
                u32::try_from(answer.write(&[done as u8])).unwrap_or(0)
            },
        )
    }
}

/// Whether the command was carried out.
fn run(mut command: Buffers<'_>, pairs: Option<&Pairs>) -> bool {
    match (
        command.read_object::<[u8; 2]>(),
        command.read_object::<u16>(),
        pairs,
    ) {
        (Some(SET_PAIRS), Some(count), Some(pairs)) if command.is_empty() => {
            pairs.set_active(usize::from(u16::from_le(count)))
        }
        _ => false,
    }
}
