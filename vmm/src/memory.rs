//! Guest memory: a sealed memfd, mapped below and above the MMIO gap.

use crate::layout;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

/// The guest's physical memory as every part of the VMM sees it; clones share the mappings.
pub type Memory = vm_memory::GuestMemoryMmap;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The descriptor cannot be asked for its size or its seals.
    #[error("the memory's descriptor is not a memfd")]
    NotMemfd(#[source] io::Error),
    /// The file could be shortened under the guest, which would kill the VMM.
    #[error("the memory's memfd is not sealed against growing and shrinking")]
    NotSealed,
    /// It has another size than the configuration says.
    #[error("the memory's memfd has {found} bytes, the configuration says {expected}")]
    WrongSize {
        /// Size of the memfd in bytes.
        found: u64,
        /// Configured size in bytes.
        expected: u64,
    },
    /// It could not be mapped.
    #[error("the guest's memory could not be mapped")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// Its regions do not fit together.
    #[error("the guest's memory regions do not fit together")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// A region wraps around the address space.
    #[error("a region of the guest's memory wraps around")]
    Wraps,
}

/// The regions of a guest of `size` bytes: start address and length of each.
pub fn regions(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let below = size.min(layout::GAP_START);
    [(0, below), (layout::GAP_END, size - below)]
        .into_iter()
        .filter(|(_, length)| *length > 0)
}

/// Maps `file`, a memfd of `size` bytes that is sealed against growing and shrinking.
///
/// # Errors
/// When it is not such a file or cannot be mapped.
pub fn map(file: File, size: u64) -> Result<Memory, MemoryError> {
    // SAFETY: no pointers are involved; the descriptor is open while `file` lives.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(MemoryError::NotMemfd(io::Error::last_os_error()));
    }
    let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    if seals & wanted != wanted {
        return Err(MemoryError::NotSealed);
    }
    let found = file.metadata().map_err(MemoryError::NotMemfd)?.len();
    if found != size {
        return Err(MemoryError::WrongSize {
            found,
            expected: size,
        });
    }
    let file = Arc::new(file);
    let mut mapped = Vec::with_capacity(2);
    let mut offset = 0u64;
    for (start, length) in regions(size) {
        let mapping = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            usize::try_from(length).map_err(|_| MemoryError::Wraps)?,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )?;
        // A core dump of the VMM must not hold the guest's memory. SAFETY: the range is the mapping just made.
        // It can only fail for want of CONFIG_*, and the process is not dumpable anyway.
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) };
        mapped.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Wraps)?);
        offset = offset.checked_add(length).ok_or(MemoryError::Wraps)?;
    }
    Ok(Memory::from_regions(mapped)?)
}

/// Why something could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It does not fit where it belongs.
    #[error("{length} bytes at {address:#x} do not fit into the guest's memory")]
    NoRoom {
        /// Where it belongs.
        address: u64,
        /// Its size in bytes.
        length: u64,
    },
    /// The file cannot be read, or is shorter than it says.
    #[error("the file could not be read")]
    Read(#[source] io::Error),
}

/// Reads `length` bytes at `offset` of `file` to guest address `address`. The file's own position is not used: the
/// descriptor may be shared.
///
/// # Errors
/// When it does not fit into one region of memory, or the file is too short.
pub fn load(memory: &Memory, address: u64, file: &File, offset: u64, length: u64) -> Result<(), LoadError> {
    let no_room = || LoadError::NoRoom { address, length };
    let count = usize::try_from(length).map_err(|_| no_room())?;
    let slice = GuestMemoryBackend::get_slice(memory, GuestAddress(address), count).map_err(|_| no_room())?;
    let guard = slice.ptr_guard_mut();
    let mut done = 0usize;
    while done < count {
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| libc::off_t::try_from(at).ok())
            .ok_or_else(|| LoadError::Read(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: `slice` is `count` bytes of mapped memory, `done` is less than that, and the memory is only ever
        // accessed as volatile.
        let n = unsafe {
            libc::pread(
                file.as_raw_fd(),
                guard.as_ptr().add(done).cast(),
                count.saturating_sub(done),
                at,
            )
        };
        match usize::try_from(n) {
            Ok(0) => return Err(LoadError::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => done = done.saturating_add(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(LoadError::Read(error));
                }
            }
        }
    }
    Ok(())
}

/// Writes `bytes` to guest address `address`.
///
/// # Errors
/// When they do not fit into the guest's memory.
pub fn store(memory: &Memory, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| LoadError::NoRoom {
            address,
            length: bytes.len() as u64,
        })
}

/// Start, length in bytes and host address of each region, for KVM's memory slots.
pub fn slots(memory: &Memory) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    memory.iter().map(|region| {
        let host: *mut u8 = region.as_ptr();
        (region.start_addr().0, region.len(), host as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::FromRawFd;

    fn memfd(size: u64, seals: i32) -> File {
        // SAFETY: the name is a C string; the new descriptor is owned by nobody else.
        let file = unsafe {
            let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        file.set_len(size).unwrap();
        // SAFETY: no pointers are involved.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0);
        file
    }

    const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

    #[test]
    fn memory_is_split_at_the_gap() {
        let gib = 1u64 << 30;
        assert_eq!(regions(gib).collect::<Vec<_>>(), [(0, gib)]);
        assert_eq!(regions(3 * gib).collect::<Vec<_>>(), [(0, 3 * gib)]);
        assert_eq!(
            regions(5 * gib).collect::<Vec<_>>(),
            [(0, 3 * gib), (4 * gib, 2 * gib)]
        );
        let memory = map(memfd(5 * gib, SEALS), 5 * gib).unwrap();
        memory.write_obj(7u8, GuestAddress(4 * gib)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(3 * gib)).is_err());
        assert!(memory.write_obj(7u8, GuestAddress(6 * gib)).is_err());
        assert!(memory.write_obj(7u64, GuestAddress(3 * gib - 4)).is_err());
    }

    #[test]
    fn a_file_that_could_change_its_size_is_refused() {
        let size = 1 << 20;
        assert!(matches!(map(memfd(size, 0), size), Err(MemoryError::NotSealed)));
        assert!(matches!(
            map(memfd(size, libc::F_SEAL_GROW), size),
            Err(MemoryError::NotSealed)
        ));
        assert!(matches!(
            map(memfd(size, SEALS), size * 2),
            Err(MemoryError::WrongSize { .. })
        ));
        assert!(matches!(
            map(File::open("/dev/null").unwrap(), size),
            Err(MemoryError::NotMemfd(_))
        ));
    }

    #[test]
    fn files_are_loaded_where_they_fit_only() {
        let size = 1u64 << 20;
        let memory = map(memfd(size, SEALS), size).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        load(&memory, 0x1000, &file, 3, 4).unwrap();
        let mut found = [0; 5];
        memory.read_slice(&mut found, GuestAddress(0x1000)).unwrap();
        assert_eq!(&found, b"3456\0");
        assert!(matches!(
            load(&memory, size - 3, &file, 0, 4),
            Err(LoadError::NoRoom { .. })
        ));
        assert!(matches!(
            load(&memory, u64::MAX, &file, 0, 4),
            Err(LoadError::NoRoom { .. })
        ));
        assert!(matches!(
            load(&memory, 0, &file, 0, u64::MAX),
            Err(LoadError::NoRoom { .. })
        ));
        assert!(matches!(load(&memory, 0, &file, 8, 4), Err(LoadError::Read(_))));
        assert!(matches!(
            load(&memory, 0, &file, u64::MAX, 4),
            Err(LoadError::Read(_))
        ));
    }
}
