//! READ and WRITE: between an open file and the guest's buffers, without a copy.

use super::files::Files;
use super::wire::{DataArgs, WRITE_CACHE};
use crate::virtio::buffers::{Buffers, retry};
use husk_vmm_protocol::fs::MAX_DATA_LEN;
use std::io;
use std::os::fd::AsRawFd;

/// Most pieces handed to the kernel in one call: a request of the longest kind in single pages, with its first and
/// last page in parts. Below the kernel's own IOV_MAX (1024).
const PIECES_PER_CALL: usize = 258;

/// An error number.
pub type Errno = i32;

fn errno(error: &io::Error) -> Errno {
    match error.raw_os_error() {
        Some(e @ 1..512) => e,
        _ => libc::EIO,
    }
}

/// Where a request's data is in its file: both ends are offsets.
fn start(arguments: &DataArgs) -> Result<libc::off_t, Errno> {
    let end = arguments
        .offset
        .checked_add(arguments.size as u64)
        .ok_or(libc::EINVAL)?;
    libc::off_t::try_from(end).map_err(|_| libc::EINVAL)?;
    libc::off_t::try_from(arguments.offset).map_err(|_| libc::EINVAL)
}

/// Reads into `room`, the part of the reply after its header. How many bytes: fewer than asked for at the file's end.
///
/// # Errors
/// The error number for the guest.
pub fn read(files: &Files, arguments: &DataArgs, room: &mut Buffers<'_>) -> Result<usize, Errno> {
    let file = files.get(arguments.handle).ok_or(libc::EBADF)?;
    let offset = start(arguments)?;
    if arguments.size > MAX_DATA_LEN || arguments.size > room.len() {
        return Err(libc::EINVAL);
    }
    room.truncate(arguments.size);
    transfer(room, offset, |vector, count, at| {
        // SAFETY: the vector describes guest memory that is mapped as long as `room` lives and that no reference of
        // Rust's points to.
        unsafe { libc::preadv2(file.as_raw_fd(), vector, count, at, 0) }
    })
}

/// Writes `data`, what follows a WRITE's arguments. How many bytes were written.
///
/// # Errors
/// The error number for the guest.
pub fn write(files: &Files, arguments: &DataArgs, data: &mut Buffers<'_>) -> Result<usize, Errno> {
    let file = files.get(arguments.handle).ok_or(libc::EBADF)?;
    let offset = start(arguments)?;
    if arguments.size > MAX_DATA_LEN || arguments.size != data.len() {
        return Err(libc::EINVAL);
    }
    let flags = write_flags(arguments);
    // The VMM has no CAP_FSETID, so the host's kernel clears set-id bits and file capabilities, whether the guest's
    // kernel asks for it (FUSE_WRITE_KILL_SUIDGID) or not. Linux would let the guest's root keep the bits.
    transfer(data, offset, |vector, count, at| {
        // SAFETY: as above; the kernel only reads the memory.
        unsafe { libc::pwritev2(file.as_raw_fd(), vector, count, at, flags) }
    })
}

/// Flags of pwritev2(2): what the guest's program asked of its descriptor, which it can change at any time.
fn write_flags(arguments: &DataArgs) -> libc::c_int {
    let open_flags = arguments.open_flags as libc::c_int;
    let mut flags = 0;
    // The end of the file is the host's to know: others may be appending. Pages written back have their place.
    if open_flags & libc::O_APPEND != 0 && arguments.write_flags & WRITE_CACHE == 0 {
        flags |= libc::RWF_APPEND;
    }
    // O_SYNC includes O_DSYNC's bit.
    if open_flags & libc::O_SYNC == libc::O_SYNC {
        flags |= libc::RWF_SYNC;
    } else if open_flags & libc::O_DSYNC != 0 {
        flags |= libc::RWF_DSYNC;
    }
    flags
}

/// Moves all of `buffers` by as many calls as it takes. Ends early where a call moves nothing, or fails after others
/// have moved something.
fn transfer(
    buffers: &mut Buffers<'_>,
    mut offset: libc::off_t,
    mut call: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> Result<usize, Errno> {
    let mut moved = 0usize;
    while !buffers.is_empty() {
        let mut vector = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; PIECES_PER_CALL];
        let mut count: libc::c_int = 0;
        for (piece, entry) in buffers.pieces().zip(&mut vector) {
            entry.iov_base = piece.ptr_guard_mut().as_ptr().cast();
            entry.iov_len = piece.len();
            count = count.saturating_add(1);
        }
        let n = match retry(|| call(vector.as_ptr(), count, offset)) {
            Ok(0) => break,
            Ok(n) => n,
            Err(_) if moved > 0 => break,
            Err(e) => return Err(errno(&e)),
        };
        moved = moved.saturating_add(n);
        offset = offset.saturating_add(n as libc::off_t);
        buffers.advance(n);
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(open_flags: libc::c_int, write_flags: u32) -> DataArgs {
        DataArgs {
            handle: 1,
            offset: 0,
            size: 0,
            write_flags,
            open_flags: open_flags as u32,
        }
    }

    #[test]
    fn writes_go_where_the_guests_descriptor_says() {
        assert_eq!(write_flags(&arguments(libc::O_RDWR, 0)), 0);
        assert_eq!(write_flags(&arguments(libc::O_APPEND, 0)), libc::RWF_APPEND);
        assert_eq!(write_flags(&arguments(libc::O_APPEND, WRITE_CACHE)), 0);
        assert_eq!(write_flags(&arguments(libc::O_DSYNC, 0)), libc::RWF_DSYNC);
        assert_eq!(write_flags(&arguments(libc::O_SYNC, 0)), libc::RWF_SYNC);
    }

    #[test]
    fn offsets_stay_within_those_of_files() {
        let at = |offset, size| {
            start(&DataArgs {
                offset,
                size,
                ..arguments(0, 0)
            })
        };
        assert_eq!(at(i64::MAX as u64 - 1, 1), Ok(i64::MAX - 1));
        for (offset, size) in [(i64::MAX as u64, 1), (u64::MAX, 1), (u64::MAX, 0), (1 << 63, 0)] {
            assert_eq!(at(offset, size), Err(libc::EINVAL));
        }
    }
}
