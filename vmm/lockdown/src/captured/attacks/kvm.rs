//! KVM: other machines than the program's own, and requests of its own that are not the guest's business. Without a
//! lock-down they are made of a machine that was made for it. KVM_RUN, KVM_GET_REGS and KVM_SET_GSI_ROUTING are not among
//! them: a vCPU's thread makes these of its own.

use super::{Attack, kept, made, open};
use std::ptr::null_mut;

const CREATE_VM: u64 = 0xae01;
const CREATE_VCPU: u64 = 0xae41;
const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const CREATE_IRQCHIP: u64 = 0xae60;

fn request(fd: i32, number: u64, argument: usize) -> libc::c_long {
    unsafe { libc::syscall(libc::SYS_ioctl, fd, number, argument) }
}

fn devices() -> Vec<i32> {
    kept(open(c"/dev/kvm", libc::O_RDWR))
}

fn new_vm() -> Option<i32> {
    devices()
        .into_iter()
        .find_map(|fd| made(request(fd, CREATE_VM, 0)))
}

fn device_takes(number: u64, argument: usize) -> bool {
    devices().into_iter().any(|fd| request(fd, number, argument) >= 0)
}

fn new_vm_takes(number: u64, argument: usize, prepare: impl FnOnce(i32)) -> bool {
    let vm = new_vm();
    if let Some(vm) = vm {
        prepare(vm);
    }
    kept(vm).into_iter().any(|fd| request(fd, number, argument) >= 0)
}

fn vm_takes(number: u64, argument: usize) -> bool {
    new_vm_takes(number, argument, |_| {})
}

fn vm_with_chips_takes(number: u64, argument: usize) -> bool {
    new_vm_takes(number, argument, |vm| {
        request(vm, CREATE_IRQCHIP, 0);
        request(vm, CREATE_VCPU, 0);
    })
}

/// With the interrupt controllers: without them there are fewer requests.
fn vcpus() -> Vec<i32> {
    kept(new_vm().and_then(|vm| {
        request(vm, CREATE_IRQCHIP, 0);
        made(request(vm, CREATE_VCPU, 0))
    }))
}

fn vcpu_takes(number: u64, argument: usize) -> bool {
    vcpus().into_iter().any(|fd| request(fd, number, argument) >= 0)
}

/// Asks for something, and sets it as it is.
fn vcpu_takes_back(get: u64, set: u64, argument: usize) -> bool {
    vcpus().into_iter().any(|fd| {
        request(fd, get, argument);
        request(fd, set, argument) >= 0
    })
}

/// Room for a structure of KVM's, of words of 64 bits, which begins with these.
struct Words([u64; 1024]);

impl Words {
    fn new<const N: usize>(start: [u64; N]) -> Self {
        let mut words = [0; 1024];
        for (to, from) in words.iter_mut().zip(start) {
            *to = from;
        }
        Self(words)
    }

    fn at(&mut self) -> usize {
        self.0.as_mut_ptr() as usize
    }
}

/// Two numbers of 32 bits as they lie in a structure.
const fn halves(first: u32, second: u32) -> u64 {
    (second as u64) << 32 | first as u64
}

fn page() -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    unsafe { libc::mmap(null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) as u64 }
}

/// A page of memory in a slot that none uses, whose changes are logged.
fn region() -> Words {
    Words::new([halves(30, 1), 0x7000_0000, 4096, page()])
}

fn event() -> u32 {
    made(unsafe { libc::syscall(libc::SYS_eventfd2, 0, 0) }).map_or(0, i32::unsigned_abs)
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("another-vm", |_| {
        devices()
            .into_iter()
            .any(|fd| made(request(fd, CREATE_VM, 0)).is_some())
    }),
    ("kvm-version", |_| device_takes(0xae00, 0)),
    ("kvm-extension", |_| {
        // KVM_CAP_USER_MEMORY
        device_takes(0xae03, 3)
    }),
    ("kvm-vcpu-size", |_| device_takes(0xae04, 0)),
    ("kvm-supported-cpuid", |_| {
        device_takes(0xc008_ae05, Words::new([200]).at())
    }),
    ("kvm-msrs", |_| device_takes(0xc004_ae02, Words::new([1000]).at())),
    ("kvm-another-vcpu", |_| vm_takes(CREATE_VCPU, 7)),
    ("kvm-memory", |_| vm_takes(SET_USER_MEMORY_REGION, region().at())),
    ("kvm-memory-attributes", |_| {
        vm_takes(0x4020_aed2, Words::new([0, 4096, 0, 0]).at())
    }),
    ("kvm-memory-file", |_| {
        vm_takes(0xc040_aed4, Words::new([4096]).at())
    }),
    ("kvm-dirty-log", |_| {
        let mut log = [0u64];
        let log = log.as_mut_ptr() as u64;
        new_vm_takes(0x4010_ae42, Words::new([30, log]).at(), |vm| {
            request(vm, SET_USER_MEMORY_REGION, region().at());
        })
    }),
    ("kvm-tss", |_| vm_takes(0xae47, 0xfffb_d000)),
    ("kvm-identity-map", |_| {
        vm_takes(0x4008_ae48, Words::new([0xfffb_c000]).at())
    }),
    ("kvm-boot-cpu", |_| vm_takes(0xae78, 0)),
    ("kvm-clock", |_| vm_takes(0x8030_ae7c, Words::new([]).at())),
    ("kvm-set-clock", |_| vm_takes(0x4030_ae7b, Words::new([1]).at())),
    ("kvm-capability", |_| {
        // KVM_CAP_EXCEPTION_PAYLOAD
        vm_takes(0x4068_aea3, Words::new([164, 1]).at())
    }),
    ("kvm-device", |_| {
        // KVM_DEV_TYPE_VFIO
        vm_takes(0xc00c_aee0, Words::new([4]).at())
    }),
    ("kvm-ioeventfd", |_| {
        let mut event = Words::new([0, 0x7f00_0000, halves(4, event())]);
        vm_takes(0x4040_ae79, event.at())
    }),
    ("kvm-irqfd", |_| {
        let mut event = Words::new([halves(event(), 20)]);
        vm_with_chips_takes(0x4020_ae76, event.at())
    }),
    ("kvm-interrupt-controllers", |_| vm_takes(CREATE_IRQCHIP, 0)),
    ("kvm-timer", |_| {
        vm_with_chips_takes(0x4040_ae77, Words::new([]).at())
    }),
    ("kvm-interrupt-line", |_| {
        vm_with_chips_takes(0x4008_ae61, Words::new([halves(5, 0)]).at())
    }),
    ("kvm-message", |_| {
        // To the first local APIC, a vector that it does not know.
        let mut message = Words::new([0xfee0_0000, 0x41]);
        vm_with_chips_takes(0x4020_aea5, message.at())
    }),
    ("kvm-set-registers", |_| {
        vcpu_takes_back(0x8090_ae81, 0x4090_ae82, Words::new([]).at())
    }),
    ("kvm-system-registers", |_| {
        vcpu_takes(0x8138_ae83, Words::new([]).at())
    }),
    ("kvm-set-system-registers", |_| {
        vcpu_takes_back(0x8138_ae83, 0x4138_ae84, Words::new([]).at())
    }),
    ("kvm-model-registers", |_| {
        // One of them: that of the time stamp.
        vcpu_takes(0xc008_ae88, Words::new([1, 0x10]).at())
    }),
    ("kvm-set-model-registers", |_| {
        vcpu_takes(0x4008_ae89, Words::new([1, 0x10]).at())
    }),
    ("kvm-floating-point", |_| {
        vcpu_takes(0x81a0_ae8c, Words::new([]).at())
    }),
    ("kvm-local-apic", |_| vcpu_takes(0x8400_ae8e, Words::new([]).at())),
    ("kvm-events", |_| vcpu_takes(0x8040_ae9f, Words::new([]).at())),
    ("kvm-run-state", |_| vcpu_takes(0x8004_ae98, Words::new([]).at())),
    ("kvm-cpuid", |_| vcpu_takes(0x4008_ae90, Words::new([]).at())),
    ("kvm-nmi", |_| vcpu_takes(0xae9a, 0)),
    ("kvm-debug", |_| vcpu_takes(0x4048_ae9b, Words::new([]).at())),
    ("kvm-translation", |_| {
        vcpu_takes(0xc018_ae85, Words::new([]).at())
    }),
    ("kvm-signals", |_| vcpu_takes(0x4004_ae8b, 0)),
    ("kvm-state-mapped", |_| {
        vcpus().into_iter().any(|fd| unsafe {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let page = libc::mmap(null_mut(), 4096, both, libc::MAP_SHARED, fd, 0);
            page != libc::MAP_FAILED && libc::munmap(page, 4096) == 0
        })
    }),
];
