//! The buffers of one descriptor chain: guest memory that a device reads or writes, checked once.

use crate::memory::Memory;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestMemory, Permissions, VolatileSlice};

/// Most pieces of memory that a chain has to read, and as many to write: a file-system request has one for each
/// page of its 1 MiB and a few more. A chain of more is refused.
pub const MAX_PIECES: usize = 512;

/// Most pieces handed to the kernel in one call, to bound what stands on the stack. A call that moves less than
/// there is has to be expected anyway.
const PIECES_PER_CALL: usize = 64;

/// Why a chain is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No descriptor at all: the head's index lies outside of the table.
    #[error("the chain is empty")]
    Empty,
    /// It goes on where no further descriptor can be: looped, longer than the queue, or an indirect table that is
    /// nested, of an odd size or out of memory.
    #[error("the chain is cut off or looped")]
    Broken,
    /// A device-readable descriptor after a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A device-writable descriptor where the driver has something to say, or a readable one where it has not.
    #[error("a buffer is of the wrong direction")]
    Direction,
    /// A buffer, or a part of one, is not in guest memory.
    #[error("a buffer is not in guest memory")]
    Memory,
    /// More than [`MAX_PIECES`].
    #[error("the chain has more than {MAX_PIECES} pieces")]
    TooLong,
}

/// A run of bytes scattered over guest memory. The guest can change them at any time: what is decided by them is
/// copied first.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// Pieces before this one are used up.
    first: usize,
    /// Bytes left.
    len: usize,
}

/// Splits a chain into what the device reads and what it writes.
///
/// # Errors
/// See [`ChainError`]; the chain then has to be returned unused.
pub fn split<'m, M>(
    chain: DescriptorChain<M>,
    memory: &'m Memory,
) -> Result<(Buffers<'m>, Buffers<'m>), ChainError>
where
    M: Deref<Target = Memory>,
{
    let mut readable = Buffers::default();
    let mut writable = Buffers::default();
    let mut more = None;
    for descriptor in chain {
        more = Some(descriptor.has_next());
        let (buffers, access) = if descriptor.is_write_only() {
            (&mut writable, Permissions::Write)
        } else if writable.pieces.is_empty() {
            (&mut readable, Permissions::Read)
        } else {
            return Err(ChainError::Order);
        };
        let length = usize::try_from(descriptor.len()).map_err(|_| ChainError::Memory)?;
        let slices = memory
            .get_slices(descriptor.addr(), length, access)
            .map_err(|_| ChainError::Memory)?;
        for slice in slices {
            buffers.push(slice.map_err(|_| ChainError::Memory)?)?;
        }
    }
    match more {
        None => Err(ChainError::Empty),
        // The iterator ends without a word where the chain cannot be followed.
        Some(true) => Err(ChainError::Broken),
        Some(false) => Ok((readable, writable)),
    }
}

impl<'m> Buffers<'m> {
    /// A run of memory that no chain describes.
    #[cfg(test)]
    pub fn at(memory: &'m Memory, address: vm_memory::GuestAddress, length: usize) -> Self {
        let mut buffers = Self::default();
        for slice in memory.get_slices(address, length, Permissions::Write).unwrap() {
            buffers.push(slice.unwrap()).unwrap();
        }
        buffers
    }

    fn push(&mut self, slice: VolatileSlice<'m>) -> Result<(), ChainError> {
        if self.pieces.len() >= MAX_PIECES {
            return Err(ChainError::TooLong);
        }
        self.len = self.len.checked_add(slice.len()).ok_or(ChainError::Memory)?;
        self.pieces.push(slice);
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces that are left, together [`len`](Self::len) bytes.
    pub(super) fn pieces(&self) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut left = self.len;
        self.pieces.iter().skip(self.first).map_while(move |piece| {
            let count = piece.len().min(left);
            left = left.saturating_sub(count);
            if count == 0 && left == 0 {
                return None;
            }
            piece.subslice(0, count).ok()
        })
    }

    /// Leaves out the first `count` bytes, or all if there are fewer.
    pub fn advance(&mut self, count: usize) {
        let mut count = count.min(self.len);
        self.len = self.len.saturating_sub(count);
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if count < piece.len() {
                // `count` lies within the piece, so that this does not fail.
                if let Ok(rest) = piece.offset(count) {
                    *piece = rest;
                }
                return;
            }
            count = count.saturating_sub(piece.len());
            self.first = self.first.saturating_add(1);
        }
    }

    /// The first `count` bytes, or all if there are fewer; this goes on after them.
    pub fn split_front(&mut self, count: usize) -> Self {
        let mut front = self.clone();
        front.truncate(count);
        self.advance(count);
        front
    }

    /// Leaves out all after the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        self.len = self.len.min(count);
    }

    /// Copies the first bytes to `target`, as many as both have, and advances past them. How many there were.
    pub fn read(&mut self, target: &mut [u8]) -> usize {
        let mut rest = &mut *target;
        let mut count = 0usize;
        for piece in self.pieces() {
            let n = piece.copy_to(rest);
            count = count.saturating_add(n);
            rest = match std::mem::take(&mut rest).split_at_mut_checked(n) {
                Some((_, rest)) if !rest.is_empty() => rest,
                _ => break,
            };
        }
        self.advance(count);
        count
    }

    /// Copies the first bytes of `source` here, as many as both have, and advances past them. How many there were.
    pub fn write(&mut self, source: &[u8]) -> usize {
        let mut rest = source;
        let mut count = 0usize;
        for piece in self.pieces() {
            let n = piece.len().min(rest.len());
            piece.copy_from(rest);
            count = count.saturating_add(n);
            rest = match rest.split_at_checked(n) {
                Some((_, rest)) if !rest.is_empty() => rest,
                _ => break,
            };
        }
        self.advance(count);
        count
    }

    /// Copies an object out and advances past it; `None` if there are too few bytes.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Option<T> {
        if self.len < size_of::<T>() {
            return None;
        }
        let mut object = T::default();
        self.read(object.as_mut_slice());
        Some(object)
    }

    /// Sends from here to a socket, without waiting and without SIGPIPE, and advances past what was sent.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the message's vector describes guest memory that is mapped as long as `self` lives; sendmsg only
        // reads it.
        let sent = self.transfer(|message| unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        })?;
        self.advance(sent);
        Ok(sent)
    }

    /// Receives from a stream socket into this, without waiting, and advances past what was received. 0 is the
    /// stream's end.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the message's vector describes guest memory that is mapped as long as `self` lives and that no
        // reference of Rust's points to.
        let received = self
            .transfer(|message| unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) })?;
        self.advance(received);
        Ok(received)
    }

    fn transfer(&self, mut call: impl FnMut(*mut libc::msghdr) -> isize) -> io::Result<usize> {
        let mut vector = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; PIECES_PER_CALL];
        let mut count = 0usize;
        for (piece, entry) in self.pieces().zip(&mut vector) {
            entry.iov_base = piece.ptr_guard_mut().as_ptr().cast();
            entry.iov_len = piece.len();
            count = count.saturating_add(1);
        }
        // SAFETY: all fields of msghdr are plain numbers and pointers, for which zero is a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vector.as_mut_ptr();
        message.msg_iovlen = count;
        retry(|| call(&raw mut message))
    }
}

/// Repeats a system call that a signal interrupts; its result, or the error that errno tells.
pub fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
