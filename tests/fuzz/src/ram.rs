//! Guest memory with a fence around it.

use std::cell::RefCell;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use husk_vmm::memory::Memory;

/// Start and length of each region, in bytes: two that touch, and one behind the gap.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x2_8000), (0x2_8000, 0x1_8000), (1 << 32, 0x1_0000)];

/// From here to the end of the second region there are no rings, in a guest that keeps to its own plan.
pub const DATA: u64 = 0x2_4000;

/// Bytes on each side of a region that belong to nobody.
const FENCE: usize = 0x1000;

/// What is in them.
const MARK: u8 = 0xa5;

/// A guest's memory.
#[derive(Clone, Debug)]
pub struct Ram {
    /// As the devices have it.
    pub memory: Memory,
    /// Where the host has the regions.
    starts: Vec<(*mut u8, usize)>,
}

thread_local! {
    static RAM: RefCell<Option<Ram>> = const { RefCell::new(None) };
}

impl Ram {
    /// This thread's, all zero. There is but one for each thread: to map it takes longer than most inputs.
    pub fn new() -> Self {
        let ram = RAM.with_borrow_mut(|ram| ram.get_or_insert_with(Self::map).clone());
        for (start, length) in &ram.starts {
            // SAFETY: the region is mapped, and no device has it now.
            unsafe { start.write_bytes(0, *length) };
        }
        ram
    }

    fn map() -> Self {
        let mut starts = vec![];
        let mut regions = vec![];
        for (address, length) in REGIONS {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let whole = length + 4 * FENCE;
            // SAFETY: a new mapping, of which nobody knows yet. Its ends cannot be touched at all.
            let start = unsafe {
                let start = libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0);
                assert_ne!(start, libc::MAP_FAILED);
                let start = start.cast::<u8>().add(FENCE);
                let inner = libc::PROT_READ | libc::PROT_WRITE;
                assert_eq!(libc::mprotect(start.cast(), length + 2 * FENCE, inner), 0);
                start.write_bytes(MARK, FENCE);
                start.add(FENCE + length).write_bytes(MARK, FENCE);
                start.add(FENCE)
            };
            starts.push((start, length));
            // SAFETY: the mapping is `length` bytes long and never unmapped.
            let region =
                unsafe { MmapRegion::build_raw(start, length, libc::PROT_READ | libc::PROT_WRITE, flags) };
            let region = region.expect("a mapping of whole pages");
            regions.push(GuestRegionMmap::new(region, GuestAddress(address)).expect("no region wraps"));
        }
        Self {
            memory: Memory::from_regions(regions).expect("the regions do not overlap"),
            starts,
        }
    }

    /// Writes what fits.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    /// Reads `length` bytes; zero where there is no memory.
    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let _ = self.memory.read(&mut bytes, GuestAddress(address));
        bytes
    }

    /// Sees to it that nobody wrote beside the guest's memory.
    pub fn check(&self) {
        for (start, length) in &self.starts {
            // SAFETY: the fences are mapped, and only ever written here.
            let (before, behind) = unsafe {
                (
                    std::slice::from_raw_parts(start.sub(FENCE), FENCE),
                    std::slice::from_raw_parts(start.add(*length), FENCE),
                )
            };
            assert!(
                before.iter().chain(behind).all(|byte| *byte == MARK),
                "a device wrote beside the guest's memory"
            );
        }
    }
}

impl Default for Ram {
    fn default() -> Self {
        Self::new()
    }
}
