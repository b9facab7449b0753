//! Frames from the guest to the tap.

use super::header::{self, HeaderError, MAX_FRAME};
use super::pieces::{Direction, Pieces};
use super::tap::Tap;
use crate::memory::Memory;
use crate::virtio::buffers::ChainError;
use crate::virtio::device::ActiveQueue;
use crate::warning;
use crate::worker::WorkerError;
use std::io;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};

/// Why a frame of the guest is dropped.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("it has {0} bytes, which is less than its header")]
    Short(usize),
    #[error("it has {0} bytes; at most {MAX_FRAME} can be")]
    Long(usize),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the tap refuses it: {0}")]
    Tap(#[source] io::Error),
}

/// The queue from the guest.
#[derive(Debug)]
pub struct Transmitter {
    memory: Memory,
    queue: ActiveQueue,
    /// What the driver accepted.
    features: u64,
    pieces: Pieces,
    /// The guest may have frames.
    pending: bool,
    /// The tap takes no more for now.
    blocked: bool,
    /// The last frame was refused by the tap, for this reason: it is told once, not for each.
    refused: Option<i32>,
}

impl Transmitter {
    /// The queue of a driver that accepted `features`.
    pub fn new(memory: Memory, queue: ActiveQueue, features: u64) -> Self {
        Self {
            pieces: Pieces::new(memory.clone()),
            memory,
            queue,
            features,
            pending: true,
            blocked: false,
            refused: None,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// The guest says that it has frames.
    pub fn notified(&mut self) {
        self.pending = true;
    }

    /// The tap says that it takes frames.
    pub fn unblocked(&mut self) {
        self.blocked = false;
    }

    /// Whether frames wait for the tap.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether there is something to do.
    pub fn is_ready(&self) -> bool {
        self.pending && !self.blocked
    }

    /// Moves the guest's frames to the tap until there are none, the tap takes none, or the budget of frames is used
    /// up. Whether the guest is to be told of returned buffers.
    ///
    /// # Errors
    /// When the queue cannot be used any more. A frame that is of no use is logged and returned.
    pub fn serve(&mut self, tap: &Tap, budget: &mut u32) -> Result<bool, WorkerError> {
        let mut used = false;
        while self.is_ready() && *budget > 0 {
            self.queue.queue.disable_notification(&self.memory)?;
            used |= self.send_all(tap, budget)?;
            if self.blocked || *budget == 0 {
                break;
            }
            self.pending = self.queue.queue.enable_notification(&self.memory)?;
            *budget = budget.saturating_sub(1);
        }
        Ok(used && self.queue.queue.needs_notification(&self.memory)?)
    }

    fn send_all(&mut self, tap: &Tap, budget: &mut u32) -> Result<bool, WorkerError> {
        let mut used = false;
        // The chains borrow it, and it is but a counted reference.
        let memory = self.memory.clone();
        while *budget > 0 {
            let Some(chain) = self.queue.queue.iter(&memory)?.next() else {
                break;
            };
            *budget = budget.saturating_sub(1);
            let head = chain.head_index();
            match self.send(chain, tap) {
                Ok(()) => self.refused = None,
                Err(Refused::Tap(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.queue.go_to_previous_position();
                    self.blocked = true;
                    break;
                }
                Err(Refused::Tap(e)) if self.refused == e.raw_os_error() => {}
                Err(e) => {
                    if let Refused::Tap(e) = &e {
                        self.refused = e.raw_os_error();
                    }
                    warning!("net: a frame of the guest was dropped: {e}");
                }
            }
            self.queue.queue.add_used(&memory, head, 0)?;
            used = true;
        }
        Ok(used)
    }

    fn send(&mut self, chain: DescriptorChain<&Memory>, tap: &Tap) -> Result<(), Refused> {
        self.pieces.clear();
        let run = self.pieces.append(chain, Direction::FromGuest)?;
        if run.len > MAX_FRAME {
            return Err(Refused::Long(run.len));
        }
        // A copy, which the guest cannot change once it is checked.
        let mut header = [0; header::LEN];
        if !self.pieces.take(&mut header) {
            return Err(Refused::Short(run.len));
        }
        header::check(&mut header, self.features)?;
        self.pieces.write_to(&mut header, tap).map_err(Refused::Tap)?;
        Ok(())
    }
}
