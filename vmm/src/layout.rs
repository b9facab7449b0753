//! The guest's physical address space: every address, once.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | 640 KiB | memory; the boot data of this file lies in it |
//! | 960 KiB | 1 MiB | memory, reserved: the MP table |
//! | 1 MiB | at most 3 GiB | memory; the kernel at its start, the initramfs at its end |
//! | 3 GiB | 4 GiB | the MMIO gap |
//! | 4 GiB | | the rest of memory |

/// End of the memory below the video and ROM area: 640 KiB.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// Start of the area where firmware would be and a kernel looks for the MP table: 960 KiB.
pub const FIRMWARE_START: u64 = 0xf_0000;
/// End of that area, and where the kernel may be loaded: 1 MiB.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// PVH start info (56 bytes), in a page of its own together with the list of modules.
pub const START_INFO: u64 = 0x6000;
/// PVH list of modules (32 bytes for each; there is one).
pub const MODULE_LIST: u64 = 0x6100;
/// PVH memory map (24 bytes for each entry).
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line, NUL at its end.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of the command line, NUL included: x86's `COMMAND_LINE_SIZE`.
pub const COMMAND_LINE_MAX: usize = 2048;
/// The MP floating pointer and the MP table behind it; it is shorter than 4 KiB.
pub const MP_TABLE: u64 = FIRMWARE_START;

/// Start of the MMIO gap: 3 GiB.
pub const GAP_START: u64 = 0xc000_0000;
/// End of the MMIO gap: 4 GiB.
pub const GAP_END: u64 = 0x1_0000_0000;

/// Registers of the first virtio-mmio device.
pub const VIRTIO_START: u64 = GAP_START;
/// Size of one device's registers: 4 KiB.
pub const VIRTIO_SIZE: u64 = 0x1000;
/// Most virtio-mmio devices: one interrupt line for each.
pub const VIRTIO_SLOTS: usize = 19;
/// Interrupt line (IOAPIC pin, GSI and Linux's interrupt number alike) of the first device.
pub const VIRTIO_IRQ: u32 = 5;

/// IOAPIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Size of the IOAPIC's registers: 4 KiB.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: usize = 24;
/// Local APIC registers, inside KVM.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// A page that KVM on Intel needs for real mode, in the gap.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel needs for real mode, behind it.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Where the registers of the device in `slot` are.
pub fn virtio_base(slot: usize) -> u64 {
    VIRTIO_START.saturating_add((slot as u64).saturating_mul(VIRTIO_SIZE))
}

/// The interrupt line of the device in `slot`.
pub fn virtio_irq(slot: usize) -> u32 {
    VIRTIO_IRQ.saturating_add(u32::try_from(slot).unwrap_or(u32::MAX))
}

const _: () = assert!(VIRTIO_IRQ as usize + VIRTIO_SLOTS <= IOAPIC_PINS);
const _: () = assert!(VIRTIO_START + VIRTIO_SLOTS as u64 * VIRTIO_SIZE <= IOAPIC);
const _: () = assert!(COMMAND_LINE + COMMAND_LINE_MAX as u64 <= LOW_RAM_END);
