//! One queue of a tap.

use crate::virtio::buffers::retry;
use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Sets of offloads to try, the best first: UDP segmentation came to taps with Linux 6.2.
pub const OFFLOADS: [u32; 2] = [
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
];

/// Most frames that a drained tap is rid of: more than its queue has by default.
const DRAINED: usize = 4096;

/// One queue of a tap: non-blocking, frames with a header of [`LEN`](super::header::LEN) bytes before each.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// Not a tap but a socket that stands for one.
    #[cfg(any(test, feature = "fuzzing"))]
    socket: bool,
}

impl Tap {
    /// A queue of a tap that is set up as [`husk_vmm_protocol::fds::vmm::TAPS`] says.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            #[cfg(any(test, feature = "fuzzing"))]
            socket: fd
                .try_clone()
                .and_then(|fd| std::fs::File::from(fd).metadata())
                .is_ok_and(|data| std::os::unix::fs::FileTypeExt::is_socket(&data.file_type())),
            fd,
        }
    }

    /// Sets the offloads (`TUN_F_*`) of the whole tap: what frames that are read may leave to the reader.
    ///
    /// # Errors
    /// When the kernel does not know one, or the tap is gone.
    pub fn set_offload(&self, offload: u32) -> io::Result<()> {
        #[cfg(any(test, feature = "fuzzing"))]
        if self.socket {
            return Ok(());
        }
        // SAFETY: the argument of this request is a plain number.
        retry(|| unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, offload) } as isize)?;
        Ok(())
    }

    /// Throws away the frames that wait to be read.
    pub fn drain(&self) {
        let mut byte = 0u8;
        for _ in 0..DRAINED {
            // A buffer that is shorter than the header is refused, after the frame was taken. SAFETY: one byte of
            // room is there.
            let read = unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut byte).cast(), 1) };
            let error = io::Error::last_os_error().raw_os_error();
            if read == 0 || read < 0 && error != Some(libc::EINVAL) && error != Some(libc::EINTR) {
                return;
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
