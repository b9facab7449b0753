use super::*;
use proptest::prelude::*;
use std::io::Write;
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 4 << 20;
const BASE: u64 = 0x10_0000;

fn guest() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend((name.len() as u32).to_le_bytes());
    note.extend((value.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    for part in [name, value] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

fn program_header(kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(7u32.to_le_bytes());
    for field in [offset, 0, address, file_size, memory_size, 4096] {
        header.extend(field.to_le_bytes());
    }
    header
}

/// A kernel of one segment: `code` at 1 MiB, with an entry note.
fn kernel(entry: u64, load: Vec<u8>, code: &[u8]) -> Vec<u8> {
    let notes = [
        note(b"GNU\0", 3, &[1; 5]),
        note(b"Xen\0", PHYS32_ENTRY, &entry.to_le_bytes()),
    ]
    .concat();
    let mut bytes = vec![0u8; ELF_HEADER_LEN];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
    bytes[56..58].copy_from_slice(&2u16.to_le_bytes());
    bytes.extend(program_header(PT_NOTE, 0x100, 0, notes.len() as u64, 0));
    bytes.extend(load);
    bytes.resize(0x100, 0);
    bytes.extend(notes);
    bytes.resize(0x200, 0);
    bytes.extend(code);
    bytes
}

fn plain_kernel() -> Vec<u8> {
    kernel(BASE + 2, program_header(PT_LOAD, 0x200, BASE, 4, 0x1000), b"code")
}

#[test]
fn a_kernel_is_loaded_and_its_entry_found() {
    let memory = guest();
    let kernel = load_kernel(&memory, &file(&plain_kernel()), SIZE).unwrap();
    assert_eq!(
        kernel,
        Kernel {
            entry: BASE as u32 + 2,
            end: BASE + 0x1000
        }
    );
    let mut found = [0; 5];
    memory.read_slice(&mut found, GuestAddress(BASE)).unwrap();
    assert_eq!(&found, b"code\0");
}

#[test]
fn kernels_that_do_not_fit_are_refused() {
    for (address, file_size, memory_size) in [
        (BASE - 1, 4, 4),          // Over the boot data.
        (SIZE - 3, 4, 4),          // Over the end.
        (BASE, 4, SIZE),           // Likewise by its zeroes.
        (u64::MAX - 1, 4, 4),      // Wraps.
        (BASE, 4, u64::MAX),       // Wraps.
        (BASE, 8, 4),              // Larger in the file than in memory.
        (BASE, 4096, 4096),        // Longer than the file.
        (layout::GAP_START, 4, 4), // In the gap.
        (u64::MAX, u64::MAX, u64::MAX),
    ] {
        let bytes = kernel(
            BASE,
            program_header(PT_LOAD, 0x200, address, file_size, memory_size),
            b"code",
        );
        assert!(
            load_kernel(&guest(), &file(&bytes), SIZE).is_err(),
            "{address:#x} {file_size} {memory_size}"
        );
    }
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    let good = plain_kernel();
    for length in [0, 4, 63, 64, 100, 0x120, 0x202] {
        assert!(
            load_kernel(&guest(), &file(&good[..length]), SIZE).is_err(),
            "{length}"
        );
    }
    let outside = kernel(
        BASE + 0x1000,
        program_header(PT_LOAD, 0x200, BASE, 4, 0x1000),
        b"code",
    );
    assert!(matches!(
        load_kernel(&guest(), &file(&outside), SIZE),
        Err(BootError::NotKernel(_))
    ));
    let mut other = good.clone();
    other[18] = 183; // aarch64
    assert!(matches!(
        load_kernel(&guest(), &file(&other), SIZE),
        Err(BootError::NotKernel(_))
    ));
    let mut noteless = good;
    noteless[64] = 0;
    assert!(matches!(
        load_kernel(&guest(), &file(&noteless), SIZE),
        Err(BootError::NoEntry)
    ));
}

#[test]
fn the_initramfs_is_at_the_end_of_memory_and_not_over_the_kernel() {
    let memory = guest();
    let kernel = Kernel {
        entry: 0,
        end: SIZE - 0x2000,
    };
    assert_eq!(
        load_initramfs(&memory, &file(b"070701"), SIZE, kernel).unwrap(),
        (SIZE - 0x1000, 6)
    );
    let large = file(&vec![1; 0x2001]);
    assert!(matches!(
        load_initramfs(&memory, &large, SIZE, kernel),
        Err(BootError::InitramfsTooLarge(0x2001))
    ));
}

#[test]
fn the_memory_map_covers_all_memory_but_the_rom_area() {
    let memory = guest();
    write_start_info(&memory, 5 << 30, "a=b", (0x3000, 6)).unwrap();
    let mut info = [0u64; 7];
    for (i, word) in info.iter_mut().enumerate() {
        *word = memory
            .read_obj(GuestAddress(layout::START_INFO + 8 * i as u64))
            .unwrap();
    }
    assert_eq!(info[0] as u32, START_MAGIC);
    assert_eq!(info[6], 4);
    let mut map = Vec::new();
    for i in 0..4 {
        let at = layout::MEMORY_MAP + 24 * i;
        let word = |offset| memory.read_obj::<u64>(GuestAddress(at + offset)).unwrap();
        map.push((word(0), word(8), word(16)));
    }
    assert_eq!(
        map,
        [
            (0, 0xa_0000, 1),
            (0xf_0000, 0x1_0000, 2),
            (0x10_0000, layout::GAP_START - 0x10_0000, 1),
            (1 << 32, 2 << 30, 1)
        ]
    );
    let mut line = [1; 4];
    memory
        .read_slice(&mut line, GuestAddress(layout::COMMAND_LINE))
        .unwrap();
    assert_eq!(&line, b"a=b\0");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_notes_are_read_without_panic(notes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = find_entry(&notes);
    }

    #[test]
    fn damaged_kernels_are_read_without_panic(at in 0usize..0x160, value in any::<u64>()) {
        let mut bytes = plain_kernel();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let _ = load_kernel(&guest(), &file(&bytes), SIZE);
    }
}
