//! The recipe: from descriptors and a configuration to a running guest, top to bottom.

use crate::boot::pvh::{self, BootError, Kernel};
use crate::boot::{cmdline, mptable};
use crate::bus::Bus;
use crate::control::{Control, ControlError, Wake};
use crate::cpu::cpuid;
use crate::cpu::start::StartLine;
use crate::cpu::vcpu::{self, SetUpError, Stop};
use crate::fds::Fds;
use crate::irq::ioapic::{IoApic, Router};
use crate::irq::{self, CONTROLLERS, Controllers};
use crate::lockdown::seccomp::{self, Role};
use crate::lockdown::{self, LockdownError};
use crate::memory::{self, Memory, MemoryError};
use crate::virtio::device::{Device, Interrupt};
use crate::virtio::mmio::{Transport, register};
use crate::virtio::{console, fs, net, rng, vsock};
use crate::{info, layout, log};
use husk_vmm_protocol::config::{MAX_NICS, MachineConfig, NicConfig};
use husk_vmm_protocol::control::{EndReason, Report};
use husk_vmm_protocol::vsock::GUEST_CID;
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Tag of the share's file system.
pub const SHARE_TAG: &str = "share";

/// Why there is no machine, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// This is not the KVM that is needed.
    #[error("/dev/kvm is not KVM with API version {KVM_API_VERSION} (it says {0})")]
    KvmVersion(i32),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}; a newer kernel is needed")]
    KvmLacks(&'static str),
    /// A call of KVM failed.
    #[error("KVM: {what} failed")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// The cause.
        source: kvm_ioctls::Error,
    },
    /// No guest memory.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// More memory than the CPU can address.
    #[error("{memory_mib} MiB of guest memory are more than this host's CPU can address ({bits} bits)")]
    TooMuchMemory {
        /// Configured.
        memory_mib: u32,
        /// Bits of a physical address.
        bits: u32,
    },
    /// The guest cannot be booted.
    #[error("boot")]
    Boot(#[from] BootError),
    /// The command line is too long.
    #[error(transparent)]
    CommandLine(#[from] cmdline::TooLong),
    /// A device could not be made.
    #[error("the {name} device could not be made")]
    Device {
        /// Which.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Taps and NICs do not go together.
    #[error(
        "{found} taps are open, the configuration's NICs have {expected} queue pairs; shim and VMM must be of one version"
    )]
    Taps {
        /// Descriptors in the table.
        found: usize,
        /// Queue pairs of all NICs.
        expected: usize,
    },
    /// Some NICs would have vhost-net, others not.
    #[error("{found} of /dev/vhost-net are open for {expected} NICs; shim and VMM must be of one version")]
    Vhost {
        /// Descriptors in the table.
        found: usize,
        /// NICs.
        expected: usize,
    },
    /// The CPU's leaves do not fit.
    #[error(transparent)]
    CpuId(#[from] cpuid::Full),
    /// A vCPU could not be set up.
    #[error(transparent)]
    Vcpu(#[from] SetUpError),
    /// The rights could not be given up.
    #[error("the VMM cannot give up its rights")]
    Lockdown(#[from] LockdownError),
    /// No thread.
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] io::Error),
    /// No descriptor.
    #[error("an event descriptor could not be made")]
    Event(#[source] io::Error),
    /// A vCPU cannot go on.
    #[error("vCPU {index}")]
    Stopped {
        /// Which.
        index: u8,
        /// The cause.
        source: Stop,
    },
    /// The share's file server is gone: without its files a machine is of no use.
    #[error("the file server (husk-fsd) is gone")]
    FileServerGone,
    /// All vCPU threads are gone without a word.
    #[error("the vCPUs are gone")]
    VcpusGone,
}

/// For `map_err`.
fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

/// How a machine's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended; the engine has been told.
    Guest(EndReason),
    /// The engine is gone.
    EngineGone,
}

/// Makes the machine, runs it, as `user` if one is given, and returns when it has ended. Threads may still be running then:
/// the process is to exit.
///
/// # Errors
/// When the machine cannot be made or go on. The engine has not been told yet.
pub fn run(fds: Fds, control: &Control, user: Option<u32>) -> Result<End, MachineError> {
    // All that is needed was opened by the engine. From here on all threads are born without rights.
    lockdown::enter(user)?;

    let config = match control.receive_config() {
        Err(ControlError::EngineGone) => return Ok(End::EngineGone),
        config => config?,
    };
    let memory_size = u64::from(config.memory_mib) << 20;

    let (kvm, vm) = create_vm(fds.kvm)?;
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("reading the CPUID leaves"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    // Whoever takes this process over makes no other VM.
    drop(kvm);
    check_address_bits(&config, cpuid::physical_address_bits(&supported))?;

    let guest_memory = memory::map(fds.memory, memory_size)?;
    add_memory(&vm, &guest_memory)?;

    // Before the vCPUs: each is given its local APIC when it is made.
    irq::create(&vm).map_err(kvm_error("making the interrupt controllers"))?;

    let file_server = fs::watch(&fds.fs).map_err(|source| MachineError::Device { name: "fs", source })?;
    let panicked = Arc::new(AtomicBool::new(false));
    let mut devices: Vec<(&'static str, Box<dyn Device>)> = vec![
        boxed("vsock", vsock::Vsock::new(GUEST_CID, fds.vsock))?,
        boxed("fs", fs::Fs::new(SHARE_TAG, fds.fs))?,
        boxed(
            "console",
            console::Console::new(fds.console, Arc::clone(&panicked)),
        )?,
        boxed("rng", rng::Rng::new())?,
    ];
    let vhost = fds.vhost.len();
    for nic in nics(&config.nics, fds.taps, fds.vhost)? {
        devices.push(("net", Box::new(nic)));
    }
    let device_count = devices.len();
    let bus = Arc::new(plug(&vm, &guest_memory, devices)?);

    let kernel = pvh::load_kernel(&guest_memory, &fds.kernel, memory_size)?;
    let initramfs = pvh::load_initramfs(&guest_memory, &fds.initramfs, memory_size, kernel)?;
    let line = cmdline::build(device_count, &config.kernel_params)?;
    pvh::write_start_info(&guest_memory, memory_size, &line, initramfs)?;
    let irqs = (0..device_count).filter_map(|slot| u8::try_from(layout::virtio_irq(slot)).ok());
    memory::store(
        &guest_memory,
        layout::MP_TABLE,
        &mptable::build(config.vcpus, irqs),
    )
    .map_err(BootError::Write)?;

    let mut vcpus = Vec::with_capacity(usize::from(config.vcpus));
    for index in 0..config.vcpus {
        vcpus.push(create_vcpu(
            &vm,
            &cpuid::build(&supported, index, config.vcpus, tsc_deadline)?,
            index,
            kernel,
        )?);
    }
    drop((fds.kernel, fds.initramfs));

    let ended = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(MachineError::Event)?;
    let (stopped, stops) = mpsc::channel();
    // No vCPU runs before all threads are limited. Those of the devices are by now.
    let start = Arc::new(StartLine::new(vcpus.len().saturating_add(1)));
    for (index, vcpu) in (0u8..).zip(vcpus) {
        let thread = VcpuThread {
            vcpu,
            vm: vm.as_raw_fd(),
            vhost,
            bus: Arc::clone(&bus),
            start: Arc::clone(&start),
            stopped: stopped.clone(),
            ended: ended.try_clone().map_err(MachineError::Event)?,
        };
        thread.spawn(index)?;
    }
    drop(stopped);
    seccomp::limit("main", &Role::Main).map_err(LockdownError::from)?;
    // If one is not limited, none runs, and that one tells why: see below.
    if start.pass(true) {
        control.report(&Report::Running)?;
    }

    // SAFETY: `ended` lives to the end of this function.
    let ended_fd = unsafe { BorrowedFd::borrow_raw(ended.as_raw_fd()) };
    match control.wait(ended_fd, file_server.as_fd())? {
        Wake::MachineEnded => {}
        Wake::FileServerGone => return Err(MachineError::FileServerGone),
        Wake::EngineGone => return Ok(End::EngineGone),
    }
    let (index, stop) = stops.try_recv().map_err(|_| MachineError::VcpusGone)?;
    let reason = match stop {
        Stop::Ended(EndReason::Reset) if panicked.load(Ordering::SeqCst) => EndReason::Panic,
        Stop::Ended(reason) => reason,
        source => return Err(MachineError::Stopped { index, source }),
    };
    control.report(&Report::Ended { reason })?;
    Ok(End::Guest(reason))
}

fn create_vm(fd: OwnedFd) -> Result<(Kvm, Arc<VmFd>), MachineError> {
    // SAFETY: the descriptor is owned and given up here. That it is KVM's is checked next: on another character device
    // the call fails.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(MachineError::KvmVersion(version));
    }
    if CONTROLLERS == Controllers::Split && !kvm.check_extension(Cap::SplitIrqchip) {
        return Err(MachineError::KvmLacks("a split interrupt controller"));
    }
    let vm = loop {
        match kvm.create_vm() {
            // KVM gives up when a signal comes; none is meant for us.
            Err(e) if e.errno() == libc::EINTR => {}
            made => break made.map_err(kvm_error("making the VM"))?,
        }
    };
    // Intel needs these for real mode, in which the other vCPUs start. AMD ignores them.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm_error("placing the identity map"))?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
    vm.set_tss_address(tss).map_err(kvm_error("placing the TSS"))?;
    // A guest has no performance counters; without them KVM need not emulate any. Older ones cannot do without.
    if vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) & KVM_PMU_CAP_DISABLE as i32 != 0 {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        cap.args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
        vm.enable_cap(&cap)
            .map_err(kvm_error("switching the performance counters off"))?;
    }
    Ok((kvm, Arc::new(vm)))
}

/// A device with its name.
fn boxed<D: Device + 'static>(
    name: &'static str,
    device: io::Result<D>,
) -> Result<(&'static str, Box<dyn Device>), MachineError> {
    match device {
        Ok(device) => Ok((name, Box::new(device))),
        Err(source) => Err(MachineError::Device { name, source }),
    }
}

/// The most devices that a machine has: those that all have, and NICs.
const MAX_DEVICES: usize = 4 + MAX_NICS;
const _: () = assert!(MAX_DEVICES <= layout::VIRTIO_SLOTS);

/// The NICs, each with its share of the taps and of what moves their frames.
fn nics(
    configs: &[NicConfig],
    taps: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
) -> Result<Vec<net::Net>, MachineError> {
    let expected = configs.iter().map(|nic| usize::from(nic.queue_pairs)).sum();
    if taps.len() != expected {
        return Err(MachineError::Taps {
            found: taps.len(),
            expected,
        });
    }
    if !vhost.is_empty() && vhost.len() != configs.len() {
        return Err(MachineError::Vhost {
            found: vhost.len(),
            expected: configs.len(),
        });
    }
    let (mut taps, mut vhost) = (taps.into_iter(), vhost.into_iter());
    configs
        .iter()
        .enumerate()
        .map(|(index, nic)| {
            let taps = taps.by_ref().take(usize::from(nic.queue_pairs)).collect();
            let device = net::Net::new(&format!("net{index}"), nic, taps);
            let device = match vhost.next() {
                Some(vhost) => device.and_then(|device| device.with_vhost(vhost)),
                None => device,
            };
            device.map_err(|source| MachineError::Device { name: "net", source })
        })
        .collect()
}

fn check_address_bits(config: &MachineConfig, bits: u32) -> Result<(), MachineError> {
    let end = memory::regions(u64::from(config.memory_mib) << 20)
        .map(|(start, length)| start.saturating_add(length))
        .max()
        .unwrap_or(0)
        .max(layout::GAP_END);
    if bits < 64 && end.checked_shr(bits).unwrap_or(0) > 0 && end != 1u64 << bits {
        return Err(MachineError::TooMuchMemory {
            memory_mib: config.memory_mib,
            bits,
        });
    }
    Ok(())
}

fn add_memory(vm: &VmFd, memory: &Memory) -> Result<(), MachineError> {
    for (slot, (start, length, host)) in (0u32..).zip(memory::slots(memory)) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: host,
        };
        // SAFETY: the region is mapped, and is unmapped only when the process ends: the bus and with it the
        // transports, each of which has the memory, live until then.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("adding memory"))?;
    }
    Ok(())
}

/// Puts each device into the slot of its index: registers, queue notifications, interrupt line.
fn plug(
    vm: &Arc<VmFd>,
    memory: &Memory,
    devices: Vec<(&'static str, Box<dyn Device>)>,
) -> Result<Bus, MachineError> {
    let mut transports = Vec::with_capacity(devices.len());
    let mut lines: Vec<(u32, Interrupt)> = Vec::with_capacity(devices.len());
    for (slot, (name, device)) in devices.into_iter().enumerate() {
        let failed = |source| MachineError::Device { name, source };
        let irq = layout::virtio_irq(slot);
        let line = irq::line(vm, irq).map_err(failed)?;
        lines.push((irq, line.clone()));
        let transport = Transport::new(device, memory.clone(), line).map_err(failed)?;
        let address = layout::virtio_base(slot).saturating_add(register::QUEUE_NOTIFY);
        for (queue, notifier) in (0u32..).zip(transport.notifiers()) {
            vm.register_ioevent(notifier, &IoEventAddress::Mmio(address), queue)
                .map_err(|e| failed(e.into()))?;
        }
        transports.push(transport);
    }
    let io_apic = match CONTROLLERS {
        Controllers::Split => {
            let router: Box<dyn Router> = Box::new(Arc::clone(vm));
            Some(IoApic::new(router, lines))
        }
        Controllers::Kernel => None,
    };
    Ok(Bus::new(io_apic, transports))
}

fn create_vcpu(
    vm: &VmFd,
    cpuid: &kvm_bindings::CpuId,
    index: u8,
    kernel: Kernel,
) -> Result<VcpuFd, MachineError> {
    let vcpu = vm.create_vcpu(index.into()).map_err(kvm_error("making a vCPU"))?;
    vcpu::set_up(&vcpu, cpuid)?;
    if index == 0 {
        vcpu::set_entry(&vcpu, kernel.entry)?;
    }
    Ok(vcpu)
}

/// What a vCPU's thread works with.
struct VcpuThread {
    vcpu: VcpuFd,
    vm: RawFd,
    /// NICs that the host's kernel serves.
    vhost: usize,
    bus: Arc<Bus>,
    /// Waits for all threads to be limited.
    start: Arc<StartLine>,
    /// Told why the vCPU stopped, before `ended` becomes readable.
    stopped: Sender<(u8, Stop)>,
    ended: EventFd,
}

impl VcpuThread {
    /// Starts it.
    fn spawn(mut self, index: u8) -> Result<(), MachineError> {
        let name = format!("vcpu{index}");
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                let role = Role::Vcpu {
                    vcpu: self.vcpu.as_raw_fd(),
                    vm: self.vm,
                    vhost: self.vhost,
                };
                let limited = seccomp::limit(&name, &role);
                let may_run = self.start.pass(limited.is_ok());
                let stop = match limited {
                    Err(e) => Some(Stop::NotLimited(log::chain(&e))),
                    Ok(()) => may_run.then(|| vcpu::run(&mut self.vcpu, &self.bus)),
                };
                if let Some(stop) = stop {
                    info!("vCPU {index} stops: {stop:?}");
                    // The receiver lives as long as the process, and the counter is far from full.
                    let _ = self.stopped.send((index, stop));
                    let _ = self.ended.write(1);
                }
                // The end of a thread takes system calls that this one has not. That of the process comes.
                loop {
                    std::thread::park();
                }
            })
            .map_err(MachineError::Thread)?;
        Ok(())
    }
}
