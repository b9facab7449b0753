//! What the host says once, before anything else: the share, the clock, entropy, the name, the network.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::fd::AsRawFd,
    path::Path,
    time::Duration,
};

use husk_agent_protocol::{
    limits::MAX_ENTROPY_LEN,
    messages::{SetupRequest, SetupResponse},
};
use nix::{
    mount::{MsFlags, mount},
    time::{ClockId, clock_settime},
};

use crate::sandbox::{Error, Sandbox};

/// Longest tag of a virtio-fs device, in bytes.
const MAX_TAG: usize = 36;

/// Does what `request` says. There is no await in it, so that a CreateContainer sent right behind finds it done.
///
/// # Errors
///
/// It has been done before, or the machine refuses.
pub fn set_up(sandbox: &Sandbox, request: &mut SetupRequest) -> Result<SetupResponse, Error> {
    if sandbox.is_set_up() {
        return Err(Error::FailedPrecondition(
            "the sandbox has been set up already".into(),
        ));
    }
    let failed = |what: &'static str| move |error: io::Error| Error::System { what, error };
    if request.hostname.len() > 64 || request.share_tag.len() > MAX_TAG {
        return Err(Error::InvalidArgument("hostname or share_tag is too long".into()));
    }
    if request.entropy.len() > MAX_ENTROPY_LEN {
        return Err(Error::InvalidArgument("too much entropy".into()));
    }
    if !request.stream_secret.is_empty() {
        let kept = sandbox.config().dial.keep_secret(&mut request.stream_secret);
        kept.map_err(failed("keep stream_secret"))?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy).map_err(failed("add entropy"))?;
    }
    if request.realtime_ns > 0 {
        let time = Duration::from_nanos(request.realtime_ns.unsigned_abs());
        clock_settime(ClockId::CLOCK_REALTIME, time.into())
            .map_err(|error| failed("set the clock")(error.into()))?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(|error| failed("set the hostname")(error.into()))?;
    }
    if !request.share_tag.is_empty() {
        mount_share(&request.share_tag, &sandbox.config().share).map_err(failed("mount the share"))?;
    }
    if let Some(network) = request.network.as_ref() {
        sandbox.set_network(network.clone())?;
    }
    sandbox.set_up();
    let kernel = nix::sys::utsname::uname().map_err(|error| failed("uname")(error.into()))?;
    Ok(SetupResponse {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        ..Default::default()
    })
}

fn mount_share(tag: &str, place: &Path) -> io::Result<()> {
    fs::create_dir_all(place)?;
    mount(Some(tag), place, Some("virtiofs"), MsFlags::empty(), None::<&str>)?;
    Ok(())
}

/// Credits `entropy` to the kernel's pool, so that its random numbers are good from here on.
fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; MAX_ENTROPY_LEN],
    }
    // _IOW('R', 0x03, int[2])
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let mut file = OpenOptions::new().write(true).open("/dev/urandom")?;
    let mut info = PoolInfo {
        bits: 0,
        size: 0,
        bytes: [0; MAX_ENTROPY_LEN],
    };
    let Some(bytes) = info.bytes.get_mut(..entropy.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    bytes.copy_from_slice(entropy);
    info.size = entropy.len() as libc::c_int;
    info.bits = info.size.saturating_mul(8);
    // SAFETY: the request reads the two numbers and `size` bytes after them, which are within `info`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Not the owner of the machine: mix it in without credit.
        Some(libc::EPERM) => file.write_all(entropy),
        _ => Err(error),
    }
}
