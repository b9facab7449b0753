//! The descriptors that the engine handed over: each is taken once, and checked to be of the kind that its number
//! stands for.

use husk_vmm_protocol::fds::vmm as table;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Why the descriptors are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// Nothing is open at this number.
    #[error("descriptor {fd} ({name}) is not open; husk-vmm is started by husk, not by hand")]
    Missing {
        /// The number.
        fd: RawFd,
        /// What should be there.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Something else is open at this number.
    #[error("descriptor {fd} ({name}) is not {expected}")]
    WrongKind {
        /// The number.
        fd: RawFd,
        /// What should be there.
        name: &'static str,
        /// The kind that it should have.
        expected: &'static str,
    },
    /// More descriptors are open than there should be.
    #[error("descriptor {0} is open, but the table ends before it; shim and VMM must be of one version")]
    TooMany(RawFd),
    /// Those beyond the table could not be closed.
    #[error("the descriptors beyond the table could not be closed")]
    Close(#[source] io::Error),
}

/// The table but for log and control socket, each descriptor of its kind.
#[derive(Debug)]
pub struct Fds {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The memfd of guest memory; size and seals are checked when it is mapped.
    pub memory: File,
    /// The kernel.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: File,
    /// The console's pipe.
    pub console: OwnedFd,
    /// The file server's channel.
    pub fs: OwnedFd,
    /// The streams' channel.
    pub vsock: OwnedFd,
    /// The NICs' taps, in order.
    pub taps: Vec<OwnedFd>,
    /// What moves the NICs' frames: one for each, or none.
    pub vhost: Vec<OwnedFd>,
}

#[derive(Clone, Copy)]
enum Kind {
    PacketSocket,
    CharacterDevice,
    ReadableFile,
    SharedFile,
    NonBlockingPipe,
    Tap,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::PacketSocket => "a unix socket of sequenced packets",
            Self::CharacterDevice => "a character device, open for reading and writing",
            Self::ReadableFile => "a regular file, open for reading",
            Self::SharedFile => "a memfd, open for reading and writing",
            Self::NonBlockingPipe => "a pipe, open for writing without blocking",
            Self::Tap => {
                "a tap with IFF_NO_PI, IFF_VNET_HDR and headers of 12 bytes, open for reading and writing without blocking"
            }
        }
    }
}

/// Takes the control socket alone, the first that is needed: errors are reported on it.
///
/// # Errors
/// When it is not there.
///
/// # Safety
/// To be called once, at the start of the process, before anything else made descriptors.
pub unsafe fn take_control() -> Result<OwnedFd, FdError> {
    // SAFETY: by the caller's promise nobody else owns it.
    unsafe { take(table::CONTROL, "control socket", Kind::PacketSocket) }
}

/// Takes the other descriptors of the table and closes all beyond it.
///
/// # Errors
/// When one is missing or of another kind, or when there are more.
///
/// # Safety
/// To be called once, at the start of the process, before anything else made descriptors.
pub unsafe fn take_rest() -> Result<Fds, FdError> {
    let (taps, vhost) = close_rest()?;
    // SAFETY: by the caller's promise nobody else owns them, and no number is taken twice.
    unsafe {
        Ok(Fds {
            kvm: take(table::KVM, "/dev/kvm", Kind::CharacterDevice)?,
            memory: take(table::MEMORY, "guest memory", Kind::SharedFile)?.into(),
            kernel: take(table::KERNEL, "kernel", Kind::ReadableFile)?.into(),
            initramfs: take(table::INITRAMFS, "initramfs", Kind::ReadableFile)?.into(),
            console: take(table::CONSOLE, "console", Kind::NonBlockingPipe)?,
            fs: take(table::FS, "file server's channel", Kind::PacketSocket)?,
            vsock: take(table::VSOCK, "streams' channel", Kind::PacketSocket)?,
            taps: taps
                .map(|fd| take(fd, "tap", Kind::Tap))
                .collect::<Result<_, _>>()?,
            vhost: vhost
                .map(|fd| take(fd, "/dev/vhost-net", Kind::CharacterDevice))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// # Safety
/// `fd` is nobody else's.
unsafe fn take(fd: RawFd, name: &'static str, kind: Kind) -> Result<OwnedFd, FdError> {
    // SAFETY: no pointers are involved.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(FdError::Missing {
            fd,
            name,
            source: io::Error::last_os_error(),
        });
    }
    // SAFETY: it is open, and by the caller's promise nobody else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    if is_kind(&file, flags, kind) {
        Ok(file)
    } else {
        Err(FdError::WrongKind {
            fd,
            name,
            expected: kind.name(),
        })
    }
}

fn is_kind(file: &OwnedFd, flags: i32, kind: Kind) -> bool {
    // SAFETY: all zeroes is a valid stat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` has the size that the call writes.
    if unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) } != 0 {
        return false;
    }
    let format = stat.st_mode & libc::S_IFMT;
    let access = flags & libc::O_ACCMODE;
    match kind {
        Kind::PacketSocket => {
            format == libc::S_IFSOCK
                && option(file, libc::SO_DOMAIN) == Some(libc::AF_UNIX)
                && option(file, libc::SO_TYPE) == Some(libc::SOCK_SEQPACKET)
        }
        Kind::CharacterDevice => format == libc::S_IFCHR && access == libc::O_RDWR,
        Kind::ReadableFile => {
            format == libc::S_IFREG && access != libc::O_WRONLY && flags & libc::O_PATH == 0
        }
        Kind::SharedFile => format == libc::S_IFREG && access == libc::O_RDWR,
        Kind::NonBlockingPipe => {
            format == libc::S_IFIFO && access == libc::O_WRONLY && flags & libc::O_NONBLOCK != 0
        }
        Kind::Tap => {
            format == libc::S_IFCHR
                && access == libc::O_RDWR
                && flags & libc::O_NONBLOCK != 0
                && is_set_up_tap(file)
        }
    }
}

/// Whether this is a tap, set up as the table says.
pub(crate) fn is_set_up_tap(file: &OwnedFd) -> bool {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let mut header = 0i32;
    // SAFETY: the requests write an ifreq and an int, for which there is room.
    let known = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) == 0
            && libc::ioctl(file.as_raw_fd(), libc::TUNGETVNETHDRSZ as _, &raw mut header) == 0
    };
    // SAFETY: the kernel wrote the flags, and any bits are some.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    known && flags & wanted == wanted && header == table::VNET_HEADER_LEN
}

fn option(socket: &OwnedFd, name: i32) -> Option<i32> {
    let mut value = 0i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` has the `length` bytes that the call may write.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some(value)
}

/// The engine leaves nothing open beyond the taps and beyond the table; if the next few numbers say otherwise, it is of
/// another version. The numbers of the taps and of what moves their frames.
fn close_rest() -> Result<(Range<RawFd>, Range<RawFd>), FdError> {
    // SAFETY: no pointers are involved.
    let is_open = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
    let open = |from: RawFd, behind: RawFd| {
        let end = (from..behind).find(|fd| !is_open(fd)).unwrap_or(behind);
        from..end
    };
    let taps = open(table::TAPS, table::VHOST);
    let vhost = open(table::VHOST, table::END);
    let end = vhost.end;
    let mut strays = (taps.end..table::VHOST).chain(end..table::END.saturating_add(8));
    if let Some(fd) = strays.find(is_open) {
        return Err(FdError::TooMany(fd));
    }
    // SAFETY: nothing in this process owns a descriptor beyond the table yet.
    match unsafe { libc::syscall(libc::SYS_close_range, end, u32::MAX, 0) } {
        0 => Ok((taps, vhost)),
        _ => Err(FdError::Close(io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    fn kind_of(file: impl Into<OwnedFd>, kind: Kind) -> Result<OwnedFd, FdError> {
        let fd = file.into().into_raw_fd();
        // SAFETY: it was just given up by its owner.
        unsafe { take(fd, "test", kind) }
    }

    fn pair(kind: i32) -> (OwnedFd, OwnedFd) {
        let mut fds = [0; 2];
        // SAFETY: room for the two descriptors that are written; they are owned by nobody else.
        unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
            (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        assert!(kind_of(pair(libc::SOCK_SEQPACKET).0, Kind::PacketSocket).is_ok());
        assert!(kind_of(pair(libc::SOCK_STREAM).0, Kind::PacketSocket).is_err());
        assert!(kind_of(pair(libc::SOCK_SEQPACKET).0, Kind::ReadableFile).is_err());
        assert!(kind_of(tempfile::tempfile().unwrap(), Kind::ReadableFile).is_ok());
        assert!(kind_of(tempfile::tempfile().unwrap(), Kind::SharedFile).is_ok());
        assert!(kind_of(File::open("/proc/self/exe").unwrap(), Kind::SharedFile).is_err());
        assert!(kind_of(File::open("/dev/null").unwrap(), Kind::ReadableFile).is_err());
        assert!(kind_of(File::open("/dev/null").unwrap(), Kind::CharacterDevice).is_err());
        assert!(
            kind_of(
                File::options().read(true).write(true).open("/dev/null").unwrap(),
                Kind::CharacterDevice
            )
            .is_ok()
        );
        let mut pipe = [0; 2];
        // SAFETY: room for the two descriptors that are written; they are owned by nobody else.
        let (_reader, writer) = unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            (OwnedFd::from_raw_fd(pipe[0]), OwnedFd::from_raw_fd(pipe[1]))
        };
        assert!(
            kind_of(writer.try_clone().unwrap(), Kind::NonBlockingPipe).is_err(),
            "it blocks"
        );
        // SAFETY: no pointers are involved.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        assert!(kind_of(writer, Kind::NonBlockingPipe).is_ok());
    }

    #[test]
    fn a_missing_descriptor_is_named() {
        // SAFETY: nothing is open at that number.
        let error = unsafe { take(1_000_000, "kernel", Kind::ReadableFile) }.unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("descriptor 1000000 (kernel) is not open"),
            "{error}"
        );
    }
}
