//! A queue whose chains are each answered at once, in order: what the simple devices have.

use super::buffers::{Buffers, split};
use super::device::{ActiveQueue, Interrupt};
use crate::memory::Memory;
use crate::warning;
use crate::worker::WorkerError;
use virtio_queue::{QueueOwnedT, QueueT};

/// Most chains answered before the worker looks at its other descriptors.
const CHAINS_PER_PASS: u32 = 256;

/// Answers the chains that the driver has made available: `answer` gets what the device may read and write, and
/// returns how many bytes it wrote. The driver is told once, at the end. To be called when the queue was notified;
/// if there is more than fits in one pass, this sees to it that the queue is again.
///
/// # Errors
/// When the queue cannot be used any more. A chain that is of no use is logged as one of `device`'s and returned.
pub fn serve(
    device: &str,
    queue: &mut ActiveQueue,
    memory: &Memory,
    interrupt: &Interrupt,
    mut answer: impl FnMut(Buffers<'_>, Buffers<'_>) -> u32,
) -> Result<(), WorkerError> {
    // Fails only when it was read before; what matters is the queue.
    let _ = queue.notify.read();
    let ActiveQueue { queue, notify } = queue;
    let mut used = false;
    let mut budget = CHAINS_PER_PASS;
    loop {
        queue.disable_notification(memory)?;
        while budget > 0 {
            let Some(chain) = queue.iter(memory)?.next() else {
                break;
            };
            budget = budget.saturating_sub(1);
            let head = chain.head_index();
            let length = match split(chain, memory) {
                Ok((readable, writable)) => answer(readable, writable),
                Err(e) => {
                    warning!("{device}: a request was refused: {e}");
                    0
                }
            };
            queue.add_used(memory, head, length)?;
            used = true;
        }
        if budget == 0 {
            notify
                .write(1)
                .map_err(WorkerError::io("calling for another pass"))?;
            break;
        }
        if !queue.enable_notification(memory)? {
            break;
        }
        budget = budget.saturating_sub(1);
    }
    if used && queue.needs_notification(memory)? {
        interrupt.signal_queue();
    }
    Ok(())
}
