//! What the guest's CPUs say of themselves.
//!
//! The base is all that KVM supports on this host. Changed are: the topology (one package, one thread per core, the
//! local APIC's id is the vCPU's index), caches shared accordingly, and what a container's guest has no use for:
//! nested virtualization, performance counters, and paravirtual features whose other half this VMM does not have.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The list of leaves has no room for the topology's.
#[derive(Debug, thiserror::Error)]
#[error("KVM's list of CPUID leaves has no room for the guest's topology")]
pub struct Full;

const AMD: (u32, u32, u32) = (0x6874_7541, 0x444d_4163, 0x6974_6e65);
const HYGON: (u32, u32, u32) = (0x6f67_7948, 0x656e_6547, 0x6e69_756e);

const EXTENDED: u32 = 0x8000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;

/// KVM_FEATURE_* bits that are left: kvmclock in both forms, no port 0x80 delay, steal time, PV EOI, PV unhalt, PV TLB
/// flush, PV send IPI, poll control, PV sched yield, stable clock. Not there: asynchronous page faults (they tie a
/// guest to its host's swap), the extended MSI destination (the IOAPIC has none), SEV's.
const KVM_FEATURES_KEPT: u32 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 24;

/// Type of a topology level in leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The leaves of vCPU `index` of `cpus`, from those that KVM supports. `tsc_deadline`: whether KVM has that timer.
///
/// # Errors
/// When there are too many leaves.
pub fn build(supported: &CpuId, index: u8, cpus: u8, tsc_deadline: bool) -> Result<CpuId, Full> {
    let vendor = supported
        .as_slice()
        .iter()
        .find(|e| e.function == 0)
        .map_or((0, 0, 0), |e| (e.ebx, e.edx, e.ecx));
    let amd = vendor == AMD || vendor == HYGON;
    let topology = Topology {
        apic_id: u32::from(index),
        cores: u32::from(cpus.max(1)),
    };

    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        // Topology is written anew; 0x80000026 is AMD's second way to tell it, the others are kept to one.
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026))
        .map(|e| adjust(e, topology, amd, tsc_deadline))
        .collect();
    let max_leaf = leaves.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if max_leaf >= 0xb {
        leaves.extend(topology.levels(0xb));
    }
    if max_leaf >= 0x1f && !amd {
        leaves.extend(topology.levels(0x1f));
    }
    CpuId::from_entries(&leaves).map_err(|_| Full)
}

#[derive(Clone, Copy)]
struct Topology {
    apic_id: u32,
    cores: u32,
}

impl Topology {
    /// Bits of the APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        self.cores.next_power_of_two().trailing_zeros()
    }

    /// Leaf 0xb or 0x1f.
    fn levels(self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index, kind: u32, shift, count| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: (kind << 8) | index,
            edx: self.apic_id,
            ..Default::default()
        };
        [
            level(0, LEVEL_SMT, 0, 1),
            level(1, LEVEL_CORE, self.core_bits(), self.cores),
            level(2, 0, 0, 0),
        ]
    }

    /// Numbers of CPUs that share a cache of `level`, less one: the third is the package's, the others a core's.
    fn sharing(self, level: u32) -> u32 {
        if level >= 3 {
            (1u32 << self.core_bits()).saturating_sub(1)
        } else {
            0
        }
    }
}

fn adjust(mut e: kvm_cpuid_entry2, topology: Topology, amd: bool, tsc_deadline: bool) -> kvm_cpuid_entry2 {
    let set = |register: &mut u32, bit: u32, on: bool| {
        *register = (*register & !(1 << bit)) | (u32::from(on) << bit);
    };
    match e.function {
        0x1 => {
            // Brand index and CLFLUSH size stay.
            let count = 1u32 << topology.core_bits();
            e.ebx = (e.ebx & 0xffff) | (topology.apic_id << 24) | (count.min(255) << 16);
            set(&mut e.ecx, 3, false); // MONITOR
            set(&mut e.ecx, 5, false); // VMX
            set(&mut e.ecx, 15, false); // PDCM: performance counters
            set(&mut e.ecx, 24, tsc_deadline);
            set(&mut e.ecx, 31, true); // There is a hypervisor.
            set(&mut e.edx, 28, topology.cores > 1); // HTT: more than one logical CPU.
        }
        // Intel's caches.
        0x4 if e.eax & 0x1f != 0 => {
            let level = (e.eax >> 5) & 7;
            let cores = (1u32 << topology.core_bits()).saturating_sub(1);
            e.eax = (e.eax & 0x3fff) | (topology.sharing(level) << 14) | (cores.min(63) << 26);
        }
        0x7 if e.index == 0 => {
            set(&mut e.ebx, 2, false); // SGX
            set(&mut e.ebx, 14, false); // MPX
        }
        // Performance counters; SGX; processor trace.
        0xa | 0x12 | 0x14 => clear(&mut e),
        KVM_FEATURES => {
            e.eax &= KVM_FEATURES_KEPT;
            e.edx = 0;
        }
        0x8000_0001 => {
            set(&mut e.ecx, 1, amd && topology.cores > 1); // CmpLegacy
            set(&mut e.ecx, 2, false); // SVM
            set(&mut e.ecx, 23, false); // PerfCtrExtCore
            set(&mut e.ecx, 24, false); // PerfCtrExtNB
            set(&mut e.ecx, 28, false); // PerfCtrExtLLC
        }
        // Bits of the APIC id that number the cores, and the number of cores less one.
        0x8000_0008 => {
            e.ecx = if amd {
                (topology.core_bits() << 12) | topology.cores.saturating_sub(1)
            } else {
                0
            };
        }
        // SVM; performance counters; memory encryption.
        0x8000_000a | 0x8000_0022 | 0x8000_001f => clear(&mut e),
        // AMD's caches.
        0x8000_001d if e.eax & 0x1f != 0 => {
            let level = (e.eax >> 5) & 7;
            e.eax = (e.eax & 0x3fff) | (topology.sharing(level) << 14);
        }
        // AMD's topology: APIC id, core id with one thread each, node.
        0x8000_001e => {
            e.eax = topology.apic_id;
            e.ebx = topology.apic_id & 0xff;
            e.ecx = 0;
            e.edx = 0;
        }
        _ => {}
    }
    e
}

fn clear(e: &mut kvm_cpuid_entry2) {
    (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
}

/// Bits of a physical address of the guest.
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    supported
        .as_slice()
        .iter()
        .find(|e| e.function == EXTENDED.saturating_add(8))
        .map_or(36, |e| e.eax & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host(vendor: (u32, u32, u32)) -> CpuId {
        CpuId::from_entries(&[
            leaf(0, 0, [0x20, vendor.0, vendor.2, vendor.1]),
            leaf(1, 0, [0, 0x0710_0800, u32::MAX, u32::MAX]),
            leaf(4, 0, [0xfc1f_c121, 1, 2, 3]),
            leaf(4, 3, [0xfc1f_c163, 1, 2, 3]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xa, 0, [7, 7, 7, 7]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(0xb, 1, [9, 9, 9, 9]),
            leaf(KVM_FEATURES, 0, [u32::MAX, 0, 0, u32::MAX]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
            leaf(0x8000_0008, 0, [48, 0, 0x700f, 0]),
            leaf(0x8000_001d, 3, [0x0003_c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [77, 0x0303, 0x0101, 0]),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = cpuid
            .as_slice()
            .iter()
            .filter(|e| (e.function, e.index) == (function, index))
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn every_way_to_ask_for_the_topology_gives_the_same() {
        for (cpus, bits) in [(1u8, 0u32), (2, 1), (3, 2), (6, 3), (64, 6)] {
            for index in 0..cpus {
                let apic = u32::from(index);
                let intel = build(&host((0x756e_6547, 0x4965_6e69, 0x6c65_746e)), index, cpus, true).unwrap();
                assert_eq!(find(&intel, 1, 0).ebx >> 24, apic);
                assert_eq!(find(&intel, 1, 0).edx >> 28 & 1, u32::from(cpus > 1));
                for function in [0xb, 0x1f] {
                    assert_eq!(find(&intel, function, 0).edx, apic);
                    assert_eq!(find(&intel, function, 0).ebx, 1);
                    assert_eq!(find(&intel, function, 1).eax, bits);
                    assert_eq!(find(&intel, function, 1).ebx, u32::from(cpus));
                }
                assert_eq!(find(&intel, 4, 0).eax >> 14 & 0xfff, 0);
                assert_eq!(find(&intel, 4, 3).eax >> 14 & 0xfff, (1 << bits) - 1);
                assert_eq!(find(&intel, 4, 3).eax >> 26, (1 << bits) - 1);
                assert_eq!(find(&intel, 4, 4).eax, 0);

                let amd = build(&host(AMD), index, cpus, true).unwrap();
                assert_eq!(
                    find(&amd, 0x8000_0008, 0).ecx,
                    (bits << 12) | (u32::from(cpus) - 1)
                );
                assert_eq!(find(&amd, 0x8000_001e, 0).eax, apic);
                assert_eq!(find(&amd, 0x8000_001e, 0).ebx, apic);
                assert_eq!(find(&amd, 0x8000_001d, 3).eax >> 14 & 0xfff, (1 << bits) - 1);
            }
        }
    }

    #[test]
    fn what_a_guest_may_not_use_is_not_there() {
        let cpuid = build(&host(AMD), 0, 1, false).unwrap();
        let features = find(&cpuid, 1, 0).ecx;
        assert_eq!(features & (1 << 5), 0, "VMX");
        assert_eq!(features & (1 << 24), 0, "no deadline timer in this KVM");
        assert_ne!(features & (1 << 31), 0, "hypervisor");
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0, "counters");
        let kvm = find(&cpuid, KVM_FEATURES, 0);
        assert_eq!(
            kvm.eax & (1 << 4 | 1 << 10 | 1 << 14 | 1 << 15),
            0,
            "async faults, far MSI destinations"
        );
        assert_eq!(kvm.edx, 0, "no promise of dedicated CPUs");
    }
}
