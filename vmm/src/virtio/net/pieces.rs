//! Pieces of guest memory as the kernel takes them, for frames to be read and written in place. Each chain is
//! followed and checked once; what the guest does to its descriptors then is of no effect.

use super::tap::Tap;
use crate::memory::Memory;
use crate::virtio::buffers::{ChainError, MAX_PIECES, retry};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

/// Entries, so that none is ever allocated: one before the first piece, used-up ones (see [`Pieces::make_room`]), the
/// pieces, and one behind them.
const CAPACITY: usize = 2 * MAX_PIECES + 2;

/// Whose a chain's buffers are to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device's.
    ToGuest,
    /// The driver's.
    FromGuest,
}

/// What a chain came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Pieces of memory.
    pub pieces: usize,
    /// Bytes in them.
    pub len: usize,
}

/// The pieces of some chains, one after the other; [`MAX_PIECES`] at most.
#[derive(Debug)]
pub struct Pieces {
    /// Keeps mapped what the entries point to.
    memory: Memory,
    /// Entries before `first` are free to be overwritten, and there is at least one.
    vector: Vec<libc::iovec>,
    first: usize,
}

// SAFETY: the entries point into `memory`, which may be reached from any thread and goes with them.
unsafe impl Send for Pieces {}

impl Pieces {
    /// None yet.
    pub fn new(memory: Memory) -> Self {
        let mut vector = Vec::with_capacity(CAPACITY);
        vector.push(entry(&mut []));
        Self {
            memory,
            vector,
            first: 1,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.vector.len().saturating_sub(self.first)
    }

    /// Adds the pieces of `chain`, all of whose buffers must be of this direction.
    ///
    /// # Errors
    /// See [`ChainError`]; nothing is added then. [`ChainError::TooLong`] means: with those that were there before.
    pub fn append<M>(&mut self, chain: DescriptorChain<M>, direction: Direction) -> Result<Run, ChainError>
    where
        M: Deref<Target = Memory>,
    {
        self.make_room();
        let before = self.vector.len();
        let appended = self.append_all(chain, direction);
        if appended.is_err() {
            self.vector.truncate(before);
        }
        appended
    }

    fn append_all<M>(&mut self, chain: DescriptorChain<M>, direction: Direction) -> Result<Run, ChainError>
    where
        M: Deref<Target = Memory>,
    {
        let access = match direction {
            Direction::ToGuest => Permissions::Write,
            Direction::FromGuest => Permissions::Read,
        };
        let mut run = Run { pieces: 0, len: 0 };
        let mut more = None;
        for descriptor in chain {
            more = Some(descriptor.has_next());
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(ChainError::Direction);
            }
            let length = usize::try_from(descriptor.len()).map_err(|_| ChainError::Memory)?;
            let slices = self
                .memory
                .get_slices(descriptor.addr(), length, access)
                .map_err(|_| ChainError::Memory)?;
            for slice in slices {
                let slice = slice.map_err(|_| ChainError::Memory)?;
                if self.vector.len().saturating_sub(self.first) >= MAX_PIECES {
                    return Err(ChainError::TooLong);
                }
                run.pieces = run.pieces.saturating_add(1);
                run.len = run.len.checked_add(slice.len()).ok_or(ChainError::Memory)?;
                self.vector.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        match more {
            None => Err(ChainError::Empty),
            // The iterator ends without a word where the chain cannot be followed.
            Some(true) => Err(ChainError::Broken),
            Some(false) => Ok(run),
        }
    }

    /// Moves the pieces down when more entries than there can be pieces are used up: then all fit in, and it is done
    /// once in [`MAX_PIECES`] at most.
    fn make_room(&mut self) {
        if self.first > MAX_PIECES {
            self.vector.drain(1..self.first);
            self.first = 1;
        }
    }

    /// Leaves out the first `count`.
    pub fn drop_front(&mut self, count: usize) {
        self.first = self.first.saturating_add(count).min(self.vector.len());
        if self.count() == 0 {
            self.clear();
        }
    }

    /// Leaves out the last `count`.
    pub fn drop_back(&mut self, count: usize) {
        let keep = self.vector.len().saturating_sub(count).max(self.first);
        self.vector.truncate(keep);
    }

    /// Leaves out all.
    pub fn clear(&mut self) {
        self.vector.truncate(1);
        self.first = 1;
    }

    /// The pieces as memory that the guest may change at any time.
    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.vector.iter().skip(self.first).map(|entry| {
            // SAFETY: the entry is a slice of `memory`, which keeps it mapped as long as `self` is borrowed; nobody
            // makes a reference of it.
            unsafe { VolatileSlice::new(entry.iov_base.cast(), entry.iov_len) }
        })
    }

    /// Copies the first bytes out and leaves them out here; `false` if there are too few.
    pub fn take<const N: usize>(&mut self, target: &mut [u8; N]) -> bool {
        let mut rest = target.as_mut_slice();
        for slice in self.slices() {
            let count = slice.copy_to(rest);
            rest = std::mem::take(&mut rest).get_mut(count..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
        if !rest.is_empty() {
            return false;
        }
        let mut left = N;
        while let Some(entry) = self.vector.get_mut(self.first) {
            if left < entry.iov_len {
                // SAFETY: this is within the entry's memory.
                entry.iov_base = unsafe { entry.iov_base.byte_add(left) };
                entry.iov_len = entry.iov_len.saturating_sub(left);
                break;
            }
            left = left.saturating_sub(entry.iov_len);
            self.first = self.first.saturating_add(1);
        }
        true
    }

    /// Copies `bytes` to `offset` bytes from the start of the pieces, as far as these go.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let (mut skip, mut rest) = (offset, bytes);
        for slice in self.slices() {
            let Ok(room) = slice.offset(skip.min(slice.len())) else {
                return;
            };
            skip = skip.saturating_sub(slice.len());
            let count = room.len().min(rest.len());
            room.copy_from(rest);
            rest = rest.get(count..).unwrap_or_default();
            if rest.is_empty() {
                return;
            }
        }
    }

    /// Writes a frame to the tap: `header` and all pieces.
    ///
    /// # Errors
    /// Those of writev(2) and of the tap.
    pub fn write_to(&mut self, header: &mut [u8], tap: &Tap) -> io::Result<usize> {
        let at = self.first.saturating_sub(1);
        if let Some(free) = self.vector.get_mut(at) {
            *free = entry(header);
        }
        let frame = self.vector.get(at..).unwrap_or_default();
        // SAFETY: the first entry is `header`, the others are mapped guest memory; they are only read.
        retry(|| unsafe { libc::writev(tap.as_fd().as_raw_fd(), frame.as_ptr(), count(frame)) })
    }

    /// Reads a frame from the tap into the first `pieces`, and what does not fit there into `spill`.
    ///
    /// # Errors
    /// Those of readv(2) and of the tap.
    pub fn read_from(&mut self, tap: &Tap, pieces: usize, spill: &mut [u8]) -> io::Result<usize> {
        let behind = self.first.saturating_add(pieces).min(self.vector.len());
        let spill = entry(spill);
        // Either takes the place of the next piece for the time of the call, or stands behind them all.
        let replaced = match self.vector.get_mut(behind) {
            Some(next) => Some(std::mem::replace(next, spill)),
            None => {
                self.vector.push(spill);
                None
            }
        };
        let room = self.vector.get(self.first..=behind).unwrap_or_default();
        // SAFETY: the last entry is `spill`, the others are mapped guest memory that no reference points to.
        let result = retry(|| unsafe { libc::readv(tap.as_fd().as_raw_fd(), room.as_ptr(), count(room)) });
        match (replaced, self.vector.get_mut(behind)) {
            (Some(piece), Some(next)) => *next = piece,
            _ => self.vector.truncate(behind),
        }
        result
    }
}

fn entry(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn count(vector: &[libc::iovec]) -> libc::c_int {
    // At most MAX_PIECES and one, which is below the kernel's limit of 1024.
    libc::c_int::try_from(vector.len()).unwrap_or(libc::c_int::MAX)
}
