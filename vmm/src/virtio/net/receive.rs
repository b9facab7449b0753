//! Frames from the tap to the guest.

use super::header::{self, MAX_FRAME};
use super::pieces::{Direction, Pieces};
use super::tap::Tap;
use super::used::{Signal, add_used_together};
use crate::memory::Memory;
use crate::virtio::buffers::ChainError;
use crate::virtio::device::ActiveQueue;
use crate::warning;
use crate::worker::WorkerError;
use std::collections::VecDeque;
use std::io;
use virtio_queue::{QueueOwnedT, QueueT};

/// Room for what of a frame does not fit the guest's buffers: more than a tap's largest frame (64 KiB, its Ethernet
/// header, a VLAN tag, and our header).
const SPILL: usize = 66 * 1024;

/// A chain of the guest's that waits for a frame.
#[derive(Clone, Copy, Debug)]
struct Held {
    head: u16,
    pieces: usize,
    len: usize,
}

/// A frame that waits for more buffers: its first `in_place` bytes are in those that are held, the rest in the spill.
#[derive(Clone, Copy, Debug)]
struct Parked {
    in_place: usize,
    len: usize,
}

/// The queue to the guest.
#[derive(Debug)]
pub struct Receiver {
    memory: Memory,
    queue: ActiveQueue,
    /// Whether a frame may go into several chains.
    merge: bool,
    pieces: Pieces,
    /// The chains that `pieces` consist of.
    held: VecDeque<Held>,
    /// Bytes of all of them.
    room: usize,
    /// There is a chain that would make more pieces than there can be.
    full: bool,
    spill: Box<[u8]>,
    parked: Option<Parked>,
    signal: Signal,
}

impl Receiver {
    /// The queue of a driver that merges buffers or does not.
    pub fn new(memory: Memory, queue: ActiveQueue, merge: bool) -> Self {
        Self {
            pieces: Pieces::new(memory.clone()),
            memory,
            held: VecDeque::with_capacity(usize::from(queue.queue.size())),
            signal: Signal::new(&queue.queue),
            queue,
            merge,
            room: 0,
            full: false,
            spill: vec![0; SPILL].into_boxed_slice(),
            parked: None,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Moves frames from the taps that `next` names to the guest; each is named until it has said to be empty. It
    /// ends when none is named any more, when the guest has no buffer (it notifies the queue when it has), or when
    /// the budget of frames is used up.
    ///
    /// # Errors
    /// When the queue cannot be used any more.
    pub fn serve<'t>(
        &mut self,
        budget: &mut u32,
        mut next: impl FnMut(Source) -> Option<&'t Tap>,
    ) -> Result<(), WorkerError> {
        let mut tap = next(Source::First);
        if tap.is_some() || self.parked.is_some() {
            self.queue.queue.disable_notification(&self.memory)?;
        }
        while tap.is_some() || self.parked.is_some() {
            if !self.prepare(budget)? || *budget == 0 {
                return Ok(());
            }
            let Some(from) = tap else { return Ok(()) };
            let pieces = if self.merge {
                self.pieces.count()
            } else {
                self.held.front().map_or(0, |held| held.pieces)
            };
            tap = match self.pieces.read_from(from, pieces, &mut self.spill) {
                // A tap has a header at least; were it to end, it must not be asked again and again.
                Ok(0) => next(Source::Empty),
                Ok(length) => {
                    *budget = budget.saturating_sub(1);
                    self.received(length)?;
                    next(Source::More)
                }
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        warning!("net: the tap cannot be read: {e}");
                    }
                    next(Source::Empty)
                }
            };
        }
        Ok(())
    }

    /// Whether the guest is to be told of what was returned since the last time.
    ///
    /// # Errors
    /// When the ring is out of reach.
    pub fn is_signal_due(&mut self) -> Result<bool, WorkerError> {
        self.signal.is_due(&self.queue.queue, &self.memory)
    }

    /// Sees to it that a frame can be read; `false` if the guest has to give buffers first, or the budget is used up.
    fn prepare(&mut self, budget: &mut u32) -> Result<bool, WorkerError> {
        loop {
            self.fill(budget)?;
            if let Some(parked) = self.parked {
                if self.room >= parked.len {
                    let rest = parked.len.saturating_sub(parked.in_place);
                    self.pieces
                        .store(parked.in_place, self.spill.get(..rest).unwrap_or_default());
                    self.parked = None;
                    self.complete(parked.len)?;
                    continue;
                }
                if self.full || self.held.len() >= usize::from(self.queue.queue.size()) {
                    warning!(
                        "net: a frame of {} bytes was dropped: all buffers of the guest together have {}",
                        parked.len,
                        self.room
                    );
                    self.parked = None;
                    continue;
                }
            } else if !self.held.is_empty() {
                return Ok(true);
            }
            // Only now, when buffers are missing, is the guest to say that it has added some.
            if *budget == 0 || !self.queue.queue.enable_notification(&self.memory)? {
                return Ok(false);
            }
            *budget = budget.saturating_sub(1);
            self.queue.queue.disable_notification(&self.memory)?;
        }
    }

    /// Takes chains of the guest's, as many as the largest frame needs. One that is of no use is returned, and
    /// counts as a frame.
    fn fill(&mut self, budget: &mut u32) -> Result<(), WorkerError> {
        let wanted = match (self.merge, self.parked) {
            (true, None) => MAX_FRAME,
            (true, Some(parked)) => parked.len,
            (false, _) => 1,
        };
        let (queue, memory) = (&mut self.queue.queue, &self.memory);
        while self.room < wanted && !self.full && *budget > 0 {
            let Some(chain) = queue.iter(memory)?.next() else {
                return Ok(());
            };
            // Each is in use until it is returned, and there are no more than the queue has places.
            if self.held.len() >= usize::from(queue.size()) {
                return Err(WorkerError::Protocol("more buffers than the queue has places"));
            }
            let head = chain.head_index();
            match self.pieces.append(chain, Direction::ToGuest) {
                Ok(run) if run.len >= header::LEN => {
                    self.room = self.room.saturating_add(run.len);
                    self.held.push_back(Held {
                        head,
                        pieces: run.pieces,
                        len: run.len,
                    });
                    continue;
                }
                Ok(run) => {
                    self.pieces.drop_back(run.pieces);
                    warning!("net: a buffer of the guest has no room for a header");
                }
                Err(ChainError::TooLong) if !self.held.is_empty() => {
                    queue.go_to_previous_position();
                    self.full = true;
                    return Ok(());
                }
                Err(e) => warning!("net: a buffer of the guest is of no use: {e}"),
            }
            *budget = budget.saturating_sub(1);
            queue.add_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// A frame of `length` bytes, header included, was read.
    fn received(&mut self, length: usize) -> Result<(), WorkerError> {
        let room = if self.merge {
            self.room
        } else {
            self.held.front().map_or(0, |held| held.len)
        };
        if length < header::LEN {
            warning!("net: the tap gave {length} bytes, which is no frame");
        } else if length <= room {
            self.complete(length)?;
        } else if self.merge && length < room.saturating_add(self.spill.len()) {
            self.parked = Some(Parked {
                in_place: room,
                len: length,
            });
        } else {
            warning!("net: a frame of {length} bytes was dropped: the guest's buffer has {room}");
        }
        Ok(())
    }

    /// Returns the chains that the first `length` bytes fill.
    fn complete(&mut self, length: usize) -> Result<(), WorkerError> {
        let (mut count, mut pieces, mut room) = (0usize, 0usize, 0usize);
        for held in &self.held {
            count = count.saturating_add(1);
            pieces = pieces.saturating_add(held.pieces);
            room = room.saturating_add(held.len);
            if room >= length {
                break;
            }
        }
        // The tap leaves this field of the header as it was.
        let buffers = u16::try_from(count).unwrap_or(u16::MAX);
        self.pieces.store(header::NUM_BUFFERS, &buffers.to_le_bytes());
        let last = count.saturating_sub(1);
        let unused = room.saturating_sub(length);
        let chains = self.held.iter().take(count).enumerate().map(|(index, held)| {
            let used = if index == last {
                held.len.saturating_sub(unused)
            } else {
                held.len
            };
            (held.head, u32::try_from(used).unwrap_or(u32::MAX))
        });
        add_used_together(&mut self.queue.queue, &self.memory, chains)?;
        self.held.drain(..count);
        self.pieces.drop_front(pieces);
        self.room = self.room.saturating_sub(room);
        self.full = false;
        Ok(())
    }
}

/// Which tap is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The first that may have a frame.
    First,
    /// The next after one that may have more.
    More,
    /// The next after one that has none.
    Empty,
}
