//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its CPUs, its IOAPIC and
//! which interrupt line is which pin.
//!
//! Every CPU's local APIC id is its index. The one bus is ISA; line `n` is pin `n`, edge-triggered, active high.

use crate::layout;

const FLOATING_POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Version of a local APIC that is inside its CPU.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Interrupt flags: polarity active high (1), trigger mode edge (1).
const EDGE_HIGH: u16 = 1 | (1 << 2);
const INTERRUPT_NORMAL: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ISA: u8 = 0;
const ALL_CPUS: u8 = 0xff;

/// The bytes that belong at [`layout::MP_TABLE`]: for `cpus` CPUs, and interrupt lines `irqs`.
pub fn build(cpus: u8, irqs: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let mut entries = Vec::with_capacity(2048);
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count = count.saturating_add(1);
    };

    for cpu in 0..cpus {
        let flags = CPU_ENABLED | if cpu == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut processor = [0u8; 20];
        for (byte, value) in processor
            .iter_mut()
            .zip([PROCESSOR, cpu, LOCAL_APIC_VERSION, flags])
        {
            *byte = value;
        }
        entry(&processor);
    }
    entry(&[BUS, ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let io_apic = cpus;
    let [a, b, c, d] = (layout::IOAPIC as u32).to_le_bytes();
    entry(&[IO_APIC, io_apic, IO_APIC_VERSION, 1, a, b, c, d]);
    let [low, high] = EDGE_HIGH.to_le_bytes();
    for irq in irqs {
        entry(&[IO_INTERRUPT, INTERRUPT_NORMAL, low, high, ISA, irq, io_apic, irq]);
    }
    entry(&[LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA, 0, ALL_CPUS, 1]);

    let length = HEADER_LEN.saturating_add(entries.len());
    let mut table = Vec::with_capacity(length);
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
    table.extend_from_slice(&[4, 0]); // Version 1.4; the checksum is filled in below.
    table.extend_from_slice(b"HUSK    MICROVM     ");
    table.extend_from_slice(&[0; 6]); // No table of the manufacturer's.
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // No extended table.
    table.extend_from_slice(&entries);
    set_checksum(&mut table, 7);

    let mut pointer = Vec::with_capacity(FLOATING_POINTER_LEN);
    pointer.extend_from_slice(b"_MP_");
    let address = (layout::MP_TABLE as u32).saturating_add(FLOATING_POINTER_LEN as u32);
    pointer.extend_from_slice(&address.to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]); // 16 bytes, version 1.4, checksum, features.
    set_checksum(&mut pointer, 10);
    pointer.extend_from_slice(&table);
    pointer
}

/// Sets the byte at `at`, now 0, so that all bytes add up to 0.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_lengths_and_counts_agree() {
        for cpus in [1, 2, 64] {
            let bytes = build(cpus, 5..24);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(sum(pointer), 0);
            assert_eq!(pointer[4..8], (layout::MP_TABLE as u32 + 16).to_le_bytes());
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(sum(table), 0);
            assert!(bytes.len() < 4096);

            let mut rest = &table[HEADER_LEN..];
            let mut seen = [0u16; 5];
            while let Some(kind) = rest.first() {
                seen[usize::from(*kind)] += 1;
                rest = &rest[if *kind == PROCESSOR { 20 } else { 8 }..];
            }
            assert_eq!(seen, [u16::from(cpus), 1, 1, 19, 2]);
            assert_eq!(
                u16::from_le_bytes([table[34], table[35]]),
                seen.iter().sum::<u16>()
            );
        }
    }

    #[test]
    fn only_the_first_cpu_is_the_bootstrap_processor() {
        let bytes = build(3, []);
        let cpus: Vec<_> = bytes[16 + HEADER_LEN..]
            .chunks(20)
            .take(3)
            .map(|c| (c[1], c[3]))
            .collect();
        assert_eq!(cpus, [(0, 3), (1, 1), (2, 1)]);
    }
}
