//! Boot by the PVH protocol: an ELF `vmlinux` and an initramfs are put into guest memory, and the start info that
//! tells the kernel where all is (Xen's `public/arch-x86/hvm/start_info.h`).

use crate::layout;
use crate::memory::{self, LoadError, Memory};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const ELF_HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
/// Most program headers that are looked at; a kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Most bytes of notes that are looked at; a kernel has less than a kilobyte.
const MAX_NOTES: u64 = 64 * 1024;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit physical address where a PVH guest starts.
const PHYS32_ENTRY: u32 = 18;

const START_MAGIC: u32 = 0x336e_c578;
const MEMORY_RAM: u32 = 1;
const MEMORY_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's file cannot be read, or ends too early.
    #[error("the kernel could not be read")]
    ReadKernel(#[source] io::Error),
    /// The kernel is not what it should be.
    #[error("the kernel is not an uncompressed x86_64 vmlinux: {0}")]
    NotKernel(&'static str),
    /// It has no PVH entry.
    #[error("the kernel has no PVH entry; build it with CONFIG_PVH")]
    NoEntry,
    /// A part of it does not fit into the guest's memory.
    #[error("the kernel could not be loaded; the guest may need more memory")]
    LoadKernel(#[source] LoadError),
    /// The initramfs cannot be read.
    #[error("the initramfs could not be read")]
    ReadInitramfs(#[source] io::Error),
    /// The initramfs does not fit between the kernel and the end of low memory.
    #[error("the initramfs of {0} bytes does not fit behind the kernel; the guest needs more memory")]
    InitramfsTooLarge(u64),
    /// The initramfs does not fit.
    #[error("the initramfs could not be loaded")]
    LoadInitramfs(#[source] LoadError),
    /// The boot data does not fit.
    #[error("the boot data could not be written")]
    Write(#[source] LoadError),
}

/// Where a kernel is and where it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Physical address of its PVH entry.
    pub entry: u32,
    /// End of its last segment.
    pub end: u64,
}

/// Puts the kernel's segments into guest memory and finds its entry.
///
/// # Errors
/// When `file` is not an ELF file with a PVH entry, or does not fit between 1 MiB and the end of low memory.
pub fn load_kernel(memory: &Memory, file: &File, memory_size: u64) -> Result<Kernel, BootError> {
    let mut header = [0u8; ELF_HEADER_LEN];
    file.read_exact_at(&mut header, 0)
        .map_err(BootError::ReadKernel)?;
    if !header.starts_with(b"\x7fELF\x02\x01") || u16_at(&header, 18) != Some(EM_X86_64) {
        return Err(BootError::NotKernel(
            "no 64-bit little-endian ELF header for x86_64",
        ));
    }
    let headers_at = u64_at(&header, 32).ok_or(BootError::NotKernel("a short header"))?;
    if u16_at(&header, 54) != Some(PROGRAM_HEADER_LEN as u16) {
        return Err(BootError::NotKernel("program headers of an unknown size"));
    }
    let count = u16_at(&header, 56).unwrap_or(0);
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(BootError::NotKernel("no program headers, or far too many"));
    }

    let ram_end = memory_size.min(layout::GAP_START);
    let mut entry = None;
    let mut segments: Vec<(u64, u64)> = Vec::with_capacity(usize::from(count));
    for index in 0..u64::from(count) {
        let at = index
            .checked_mul(PROGRAM_HEADER_LEN as u64)
            .and_then(|offset| headers_at.checked_add(offset))
            .ok_or(BootError::NotKernel("program headers out of range"))?;
        let segment = read_segment(file, at)?;
        match segment.kind {
            PT_LOAD if segment.memory_size > 0 => {
                let end = segment
                    .address
                    .checked_add(segment.memory_size)
                    .filter(|end| segment.address >= layout::HIGH_RAM_START && *end <= ram_end);
                let Some(end) = end else {
                    return Err(BootError::LoadKernel(LoadError::NoRoom {
                        address: segment.address,
                        length: segment.memory_size,
                    }));
                };
                if segment.file_size > segment.memory_size {
                    return Err(BootError::NotKernel(
                        "a segment larger in the file than in memory",
                    ));
                }
                // What the segment has beyond the file is zero: guest memory is new.
                memory::load(memory, segment.address, file, segment.offset, segment.file_size)
                    .map_err(BootError::LoadKernel)?;
                segments.push((segment.address, end));
            }
            PT_NOTE if entry.is_none() => {
                if segment.file_size > MAX_NOTES {
                    return Err(BootError::NotKernel("far too many notes"));
                }
                let mut notes = vec![0u8; segment.file_size as usize];
                file.read_exact_at(&mut notes, segment.offset)
                    .map_err(BootError::ReadKernel)?;
                entry = find_entry(&notes);
            }
            _ => {}
        }
    }
    let entry = entry.ok_or(BootError::NoEntry)?;
    if !segments
        .iter()
        .any(|(start, end)| (*start..*end).contains(&u64::from(entry)))
    {
        return Err(BootError::NotKernel("the entry lies outside of all segments"));
    }
    let end = segments.iter().map(|(_, end)| *end).max().unwrap_or(0);
    Ok(Kernel { entry, end })
}

/// Puts the initramfs at the end of low memory. Returns where it is and its length in bytes.
///
/// # Errors
/// When it does not fit behind the kernel.
pub fn load_initramfs(
    memory: &Memory,
    file: &File,
    memory_size: u64,
    kernel: Kernel,
) -> Result<(u64, u64), BootError> {
    let length = file.metadata().map_err(BootError::ReadInitramfs)?.len();
    let address = memory_size
        .min(layout::GAP_START)
        .checked_sub(length)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= kernel.end)
        .ok_or(BootError::InitramfsTooLarge(length))?;
    memory::load(memory, address, file, 0, length).map_err(BootError::LoadInitramfs)?;
    Ok((address, length))
}

/// Writes start info, module list, memory map and command line.
///
/// # Errors
/// When guest memory is too small for them.
pub fn write_start_info(
    memory: &Memory,
    memory_size: u64,
    command_line: &str,
    initramfs: (u64, u64),
) -> Result<(), BootError> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, MEMORY_RAM),
        (layout::FIRMWARE_START, layout::HIGH_RAM_START, MEMORY_RESERVED),
    ];
    for (start, length) in memory::regions(memory_size) {
        map.push((
            start.max(layout::HIGH_RAM_START),
            start.saturating_add(length),
            MEMORY_RAM,
        ));
    }
    let mut map_bytes = Vec::with_capacity(map.len().saturating_mul(24));
    for (start, end, kind) in &map {
        map_bytes.extend_from_slice(&start.to_le_bytes());
        map_bytes.extend_from_slice(&end.saturating_sub(*start).to_le_bytes());
        map_bytes.extend_from_slice(&kind.to_le_bytes());
        map_bytes.extend_from_slice(&[0; 4]);
    }

    let mut modules = Vec::with_capacity(32);
    for field in [initramfs.0, initramfs.1, 0, 0] {
        modules.extend_from_slice(&field.to_le_bytes());
    }

    let mut info = Vec::with_capacity(56);
    for field in [START_MAGIC, 1, 0, 1] {
        info.extend_from_slice(&field.to_le_bytes()); // Magic, version, flags, modules.
    }
    for field in [layout::MODULE_LIST, layout::COMMAND_LINE, 0, layout::MEMORY_MAP] {
        info.extend_from_slice(&field.to_le_bytes()); // The 0: no RSDP, no ACPI.
    }
    info.extend_from_slice(&u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    info.extend_from_slice(&[0; 4]);

    let mut line = command_line.as_bytes().to_vec();
    line.push(0);

    for (address, bytes) in [
        (layout::MEMORY_MAP, &map_bytes),
        (layout::MODULE_LIST, &modules),
        (layout::COMMAND_LINE, &line),
        (layout::START_INFO, &info),
    ] {
        memory::store(memory, address, bytes).map_err(BootError::Write)?;
    }
    Ok(())
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn read_segment(file: &File, at: u64) -> Result<Segment, BootError> {
    let mut bytes = [0u8; PROGRAM_HEADER_LEN];
    file.read_exact_at(&mut bytes, at)
        .map_err(BootError::ReadKernel)?;
    let field = |at| u64_at(&bytes, at).ok_or(BootError::NotKernel("a short program header"));
    Ok(Segment {
        kind: u32_at(&bytes, 0).unwrap_or(0),
        offset: field(8)?,
        address: field(24)?,
        file_size: field(32)?,
        memory_size: field(40)?,
    })
}

/// The PVH entry among ELF notes: name and descriptor of each are padded to four bytes.
fn find_entry(notes: &[u8]) -> Option<u32> {
    let mut rest = notes;
    loop {
        let name_len = usize::try_from(u32_at(rest, 0)?).ok()?;
        let value_len = usize::try_from(u32_at(rest, 4)?).ok()?;
        let kind = u32_at(rest, 8)?;
        let name_end = name_len.checked_add(12)?;
        let value_at = name_end.checked_next_multiple_of(4)?;
        let value_end = value_at.checked_add(value_len)?;
        let name = rest.get(12..name_end)?;
        let value = rest.get(value_at..value_end)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            // The kernel writes the value in 4 or 8 bytes.
            return u32_at(value, 0);
        }
        rest = rest.get(value_end.checked_next_multiple_of(4)?..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

#[cfg(test)]
#[path = "pvh_test.rs"]
mod tests;
