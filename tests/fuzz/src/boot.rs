//! What a machine is made of: the kernel's file, the initramfs, the command line, the MP table, and the message that
//! tells of them.

use crate::descriptors::memory_file;
use crate::input::Input;
use husk_vmm::boot::{cmdline, mptable, pvh};
use husk_vmm::layout;
use husk_vmm::memory::Memory;
use husk_vmm_protocol::config::{MAX_VCPUS, MachineConfig};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::GuestAddress;

/// The guest's memory, in bytes: 2 MiB, so that there is something above the first.
const SIZE: usize = 2 << 20;

thread_local! {
    /// Made once: nobody reads what inputs before have left in it.
    static MEMORY: RefCell<Option<(Memory, File)>> = const { RefCell::new(None) };
}

/// A kernel as the input has it, and an initramfs of the length that its first bytes say.
pub fn kernel(bytes: &[u8]) {
    MEMORY.with_borrow_mut(|place| {
        let (memory, file) = place.get_or_insert_with(|| {
            let ranges = [(GuestAddress(0), SIZE)];
            let memory = Memory::from_ranges(&ranges).expect("two megabytes");
            (memory, File::from(memory_file()))
        });
        let mut input = Input::new(bytes);
        let length = u64::from(input.u16()) * 64;
        let params = input.text(64);
        let kernel = input.rest();
        file.set_len(kernel.len() as u64).expect("a file in memory can");
        file.write_all_at(kernel, 0).expect("a file in memory can");
        let Ok(kernel) = pvh::load_kernel(memory, file, SIZE as u64) else {
            return;
        };
        assert!(kernel.end <= SIZE as u64, "the kernel ends behind memory");
        assert!(
            (layout::HIGH_RAM_START..kernel.end).contains(&u64::from(kernel.entry)),
            "the entry lies outside"
        );
        file.set_len(length).expect("a file in memory can");
        let Ok(initramfs) = pvh::load_initramfs(memory, file, SIZE as u64, kernel) else {
            return;
        };
        assert!(initramfs.0 >= kernel.end && initramfs.0 + initramfs.1 <= SIZE as u64);
        let params = String::from_utf8_lossy(params);
        let line = cmdline::build(4, &params).expect("so much fits");
        pvh::write_start_info(memory, SIZE as u64, &line, initramfs).expect("it fits");
    });
}

/// The configuration message, and what follows from it.
pub fn config(bytes: &[u8]) {
    let Ok(config) = MachineConfig::decode(bytes) else {
        return;
    };
    let message = config.encode().expect("what was taken can be sent");
    assert_eq!(
        MachineConfig::decode(&message).expect("it was taken before"),
        config
    );
    let devices = 5 + config.nics.len();
    if let Ok(line) = cmdline::build(devices, &config.kernel_params) {
        assert!(line.len() < layout::COMMAND_LINE_MAX && !line.contains('\0'));
    }
    assert!((1..=MAX_VCPUS).contains(&config.vcpus));
    let table = mptable::build(config.vcpus, 0..layout::IOAPIC_PINS as u8);
    assert!(table.len() < 0x1000, "the MP table has {} bytes", table.len());
    for part in [&table[..16], &table[16..]] {
        assert_eq!(part.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }
}
