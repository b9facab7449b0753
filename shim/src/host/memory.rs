//! The guest's memory: a memfd that can change its size no more.

use std::{fs::File, io, os::fd::OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

/// MFD_NOEXEC_SEAL (Linux 6.3): hosts may refuse memfds without it (sysctl vm.memfd_noexec).
const NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(8);

/// Makes `mib` MiB of memory for a guest. Nothing of it is allocated yet.
///
/// # Errors
/// When the kernel refuses.
pub fn guest_memory(mib: u32) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match memfd_create(c"husk-guest", flags | NOEXEC_SEAL) {
        Err(Errno::EINVAL) => memfd_create(c"husk-guest", flags)?,
        other => other?,
    };
    let file = File::from(fd);
    file.set_len(u64::from(mib) << 20)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_exact_and_fixed() {
        let file = File::from(guest_memory(65).unwrap());
        assert_eq!(file.metadata().unwrap().len(), 65 << 20);
        for size in [64 << 20, 66 << 20] {
            assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM));
        }
        assert!(fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }
}
