//! Taps: what the machine's NICs are plugged into, in the sandbox's network namespace.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use husk_vmm_protocol::fds::vmm::VNET_HEADER_LEN;
use nix::errno::Errno;

/// Where taps come from.
pub const DEVICE: &str = "/dev/net/tun";

/// With it all of their names begin. The number follows.
pub const NAME: &str = "husk-tap";

/// Makes a tap in the calling thread's network namespace, down. It has a descriptor for each of `queues` queues, and is
/// gone when all of them are closed.
///
/// # Errors
/// The kernel's; with what to do when there is no [`DEVICE`].
pub fn make(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    (0..queues).map(|_| open(name, flags)).collect()
}

fn open(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("{DEVICE}: {error}; load the kernel's module tun"),
            )
        })?;
    // SAFETY: all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len().saturating_sub(1);
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The flags are numbers of 16 bits.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let length: libc::c_int = VNET_HEADER_LEN;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })?;
    Ok(file.into())
}

/// What moves frames in the host's kernel.
pub const VHOST: &str = "/dev/vhost-net";

/// By it a host panics when its kernel warns of a fault of its own.
const PANIC_ON_WARN: &str = "/proc/sys/kernel/panic_on_warn";

/// Opens [`VHOST`], for one pair of queues.
///
/// # Errors
/// With what to do when it is not there, or when a guest could end the host by it: a frame whose descriptors add up to
/// 2 GiB or more (of the same memory, again and again) is negative to Linux's tap, which warns in `copy_page_from_iter`.
/// Seen with 6.12 and 7.2. A process that writes to a tap cannot cause it.
pub fn vhost() -> io::Result<OwnedFd> {
    if fs::read_to_string(PANIC_ON_WARN).is_ok_and(|setting| setting.trim() != "0") {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "a guest can make the host's kernel warn by vhost-net, and this host panics then; leave network.vhost out, \
             or sysctl -w kernel.panic_on_warn=0",
        ));
    }
    let opened = File::options().read(true).write(true).open(VHOST);
    opened.map(OwnedFd::from).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{VHOST}: {error}; load the kernel's module vhost_net, or leave network.vhost out"),
        )
    })
}

/// Whether this host has taps.
///
/// # Errors
/// Why not.
pub fn check() -> io::Result<()> {
    File::options()
        .read(true)
        .write(true)
        .open(Path::new(DEVICE))
        .map(drop)
}
