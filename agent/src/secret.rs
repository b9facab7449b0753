//! What proves to the host that a stream is the agent's: any process of the guest can dial the host's ports, but only the
//! agent knows this. It is in a page that a fork does not copy, for a child is in its container before it has let go
//! of the agent's memory by its exec.

use std::{io, ptr::NonNull};

use husk_agent_protocol::limits::SECRET_LEN;

/// The secret, until the end of the process.
#[derive(Debug)]
pub struct Secret(NonNull<u8>);

// SAFETY: the page is written before there is a value of this type, and only read from then on.
unsafe impl Send for Secret {}
// SAFETY: as above.
unsafe impl Sync for Secret {}

impl Secret {
    /// Keeps `secret`, and wipes it where it was.
    ///
    /// # Errors
    /// It has another length, or there is no memory.
    pub fn keep(secret: &mut [u8]) -> io::Result<Self> {
        if secret.len() != SECRET_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SECRET_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let place = match NonNull::new(page.cast::<u8>()) {
            Some(place) if page != libc::MAP_FAILED => place,
            _ => return Err(io::Error::last_os_error()),
        };
        for advice in [libc::MADV_WIPEONFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the mapping was just made, begins at a page and has at least this length.
            if unsafe { libc::madvise(page, SECRET_LEN, advice) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: both have the length, which was checked, and are different memory.
        unsafe { std::ptr::copy_nonoverlapping(secret.as_ptr(), place.as_ptr(), SECRET_LEN) };
        secret.fill(0);
        // Otherwise the compiler may leave the wiping out: nobody reads it.
        std::hint::black_box(secret);
        Ok(Self(place))
    }

    /// The secret; zeroes in a forked child.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the page is mapped until the end of the process, and nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), SECRET_LEN) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_once_and_not_by_children() {
        let mut given = [7; SECRET_LEN];
        let secret = Secret::keep(&mut given).unwrap();
        assert_eq!((given, secret.bytes()), ([0; SECRET_LEN], &[7; SECRET_LEN][..]));
        // SAFETY: the child makes no calls but that which ends it, and takes no lock.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let wiped = secret.bytes().iter().all(|byte| *byte == 0);
            // SAFETY: ends the child without running what belongs to the test's process.
            unsafe { libc::_exit(i32::from(!wiped)) }
        }
        let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).unwrap();
        assert!(
            matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)),
            "{ended:?}"
        );
        assert!(Secret::keep(&mut [1; 3]).is_err());
    }
}
