//! One virtual CPU: how it starts, and what its exits mean.

use crate::bus::{Bus, Outcome};
use crate::layout;
use husk_vmm_protocol::control::EndReason;
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// MTRRs on, all memory write-back. Linux switches PAT off if they are off.
const MTRR_ON_WRITE_BACK: u64 = (1 << 11) | 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const RFLAGS_RESERVED: u64 = 2;

/// Offsets of the local APIC's local interrupt registers.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MASKED: u32 = 1 << 16;
const APIC_NMI: u32 = 4 << 8;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{what} of a vCPU could not be set")]
pub struct SetUpError {
    what: &'static str,
    source: kvm_ioctls::Error,
}

/// For `map_err`.
fn setting(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SetUpError {
    move |source| SetUpError { what, source }
}

/// Why a vCPU stops, and with it the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// The guest ended.
    #[error("the guest has ended")]
    Ended(EndReason),
    /// Its thread's system calls could not be limited.
    #[error("{0}")]
    NotLimited(String),
    /// KVM could not enter the guest.
    #[error("KVM could not enter the guest: hardware reason {reason:#x} on CPU {cpu}, rip {rip:#x}")]
    FailEntry {
        /// As the hardware says.
        reason: u64,
        /// The host's CPU.
        cpu: u32,
        /// Where the guest was.
        rip: u64,
    },
    /// KVM gave up, as on an instruction that it cannot emulate.
    #[error("KVM gave up: internal error {suberror}, data {data:x?}, rip {rip:#x}")]
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// What KVM says of it.
        data: Vec<u64>,
        /// Where the guest was.
        rip: u64,
    },
    /// The guest's memory is out of order on the host's side, as when no huge page is left.
    #[error("the host has no memory for guest address {gpa:#x} ({size} bytes)")]
    MemoryFault {
        /// Guest address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// An exit that this machine should never see.
    #[error("an unexpected exit of the vCPU: {0}")]
    Unexpected(String),
    /// KVM ended the machine, which it does without a word of its own. Known for a guest that sends itself a system
    /// management interrupt: the processor's state is saved to memory that only this mode sees, and no machine here has
    /// any (`enter_smm` in arch/x86/kvm/smm.c).
    #[error("KVM has ended the machine, as it does when the guest asks for system management mode")]
    Dead(#[source] kvm_ioctls::Error),
    /// The call itself failed.
    #[error("the vCPU cannot run")]
    Run(#[source] kvm_ioctls::Error),
}

/// Sets up what all vCPUs have in common. Those other than the first then wait for the guest to start them.
///
/// # Errors
/// When KVM refuses.
pub fn set_up(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), SetUpError> {
    vcpu.set_cpuid2(cpuid).map_err(setting("CPUID"))?;

    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let wanted = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT, MTRR_ON_WRITE_BACK),
    ];
    let invalid = || kvm_ioctls::Error::new(libc::EINVAL);
    let msrs = Msrs::from_entries(&wanted).map_err(|_| setting("MSRs")(invalid()))?;
    let set = vcpu.set_msrs(&msrs).map_err(setting("MSRs"))?;
    if set != wanted.len() {
        return Err(setting("MSRs")(invalid()));
    }

    let mut lapic = vcpu.get_lapic().map_err(setting("local APIC"))?;
    // No PIC is wired to LINT0; LINT1 is the NMI, as the MP table says.
    for (at, value) in [(APIC_LVT0, APIC_MASKED), (APIC_LVT1, APIC_NMI)] {
        for (byte, value) in lapic.regs.iter_mut().skip(at).zip(value.to_le_bytes()) {
            *byte = value as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(setting("local APIC"))
}

/// Sets the first vCPU's registers as PVH wants them: 32-bit protected mode, flat segments, no paging, `ebx` at the
/// start info.
///
/// # Errors
/// When KVM refuses.
pub fn set_entry(vcpu: &VcpuFd, entry: u32) -> Result<(), SetUpError> {
    let mut sregs = vcpu.get_sregs().map_err(setting("segments"))?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3, // Read, write, accessed.
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x8,
        type_: 0xb,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: 0x18,
        limit: 0x67,
        type_: 0xb,
        s: 0,
        db: 0,
        g: 0,
        ..data
    };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(setting("segments"))?;
    let regs = kvm_regs {
        rip: u64::from(entry),
        rbx: layout::START_INFO,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(setting("registers"))
}

/// Runs the vCPU until the machine ends.
pub fn run(vcpu: &mut VcpuFd, bus: &Bus) -> Stop {
    loop {
        if let Some(stop) = run_once(vcpu, bus) {
            return stop;
        }
    }
}

/// Enters the guest once and deals with the exit.
fn run_once(vcpu: &mut VcpuFd, bus: &Bus) -> Option<Stop> {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        // A signal, or a vCPU that was reset meanwhile.
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return None,
        Err(e) if e.errno() == libc::EIO => return Some(Stop::Dead(e)),
        Err(e) => return Some(Stop::Run(e)),
    };
    match exit {
        VcpuExit::MmioRead(address, data) => bus.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.mmio_write(address, data),
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => match bus.port_write(port, data) {
            Outcome::Continue => {}
            Outcome::Reset => return Some(Stop::Ended(EndReason::Reset)),
        },
        VcpuExit::Shutdown => return Some(Stop::Ended(EndReason::TripleFault)),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(Stop::FailEntry {
                reason,
                cpu,
                rip: instruction_pointer(vcpu),
            });
        }
        VcpuExit::InternalError => return Some(internal_error(vcpu)),
        VcpuExit::MemoryFault { gpa, size, .. } => return Some(Stop::MemoryFault { gpa, size }),
        // A signal; the end of a level-triggered interrupt, of which there are none to pass on.
        VcpuExit::Intr | VcpuExit::IoapicEoi(_) => {}
        other => return Some(Stop::Unexpected(format!("{other:?}"))),
    }
    None
}

fn internal_error(vcpu: &mut VcpuFd) -> Stop {
    let rip = instruction_pointer(vcpu);
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the union's member; it is plain data.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal
        .data
        .iter()
        .take(internal.ndata as usize)
        .copied()
        .collect();
    Stop::InternalError {
        suberror: internal.suberror,
        data,
        rip,
    }
}

/// For messages; 0 if it cannot be told.
fn instruction_pointer(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |regs| regs.rip)
}
