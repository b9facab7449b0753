//! Where it stands: the namespaces that it was handed, and new ones.

use std::io;

use crate::{NAMESPACES, wire::Step};

/// Joins the namespaces of the descriptors and makes those of `unshare`. Their descriptors are closed.
///
/// # Errors
/// At which step, and the system's error.
pub fn enter(unshare: i32) -> Result<(), (Step, io::Error)> {
    for index in 0..=u8::MAX {
        let fd = NAMESPACES + i32::from(index);
        // SAFETY: F_GETFD looks at a descriptor's number, whatever it is.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            break;
        }
        // SAFETY: setns takes a descriptor, which was found open, and no memory.
        if unsafe { libc::setns(fd, 0) } != 0 {
            return Err((Step::Join(index), io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was handed to this process, and nothing else here knows it.
        unsafe { libc::close(fd) };
    }
    // SAFETY: unshare takes flags and no memory; this process has one thread.
    if unshare != 0 && unsafe { libc::unshare(unshare) } != 0 {
        return Err((Step::Unshare, io::Error::last_os_error()));
    }
    Ok(())
}
