//! Which system calls each thread may make: nothing that it has no use for once it runs. The table in the README is made
//! from these lists.

use crate::virtio::net::vhost;
use husk_lockdown::seccomp::{self, Allowed, Rule, RuleError, Rules, SeccompError, equal};
use husk_vmm_protocol::fds::vmm as table;
use std::ops::Range;
use std::os::fd::RawFd;

/// What a thread is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first one, which waits for the end.
    Main,
    /// Runs a vCPU.
    Vcpu {
        /// The vCPU's descriptor.
        vcpu: RawFd,
        /// The VM's.
        vm: RawFd,
        /// How many NICs the host's kernel serves by vhost-net.
        vhost: usize,
    },
    /// Serves a device.
    Device(Device),
}

/// The kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // What they are stands with the devices.
pub enum Device {
    Console,
    Fs,
    Net,
    Rng,
    Vsock,
}

/// All threads: memory (see [`conditional_rules`] as well), locks, the clock, the log, the eventfds, the end.
const ALL: Allowed = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_sched_yield,
    libc::SYS_write,
];

const MAIN: Allowed = &[
    libc::SYS_poll,
    libc::SYS_recvfrom,
    // After the process was stopped or frozen.
    libc::SYS_restart_syscall,
    libc::SYS_sendto,
    // The C library's and Rust's own at the end of main.
    libc::SYS_sigaltstack,
];

const VCPU: Allowed = &[libc::SYS_read];

/// All devices: waiting, and the end of a thread.
const DEVICE: Allowed = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_madvise,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
];

const CONSOLE: Allowed = &[];

const FS: Allowed = &[
    libc::SYS_fstat,
    // Hash maps are keyed at random.
    libc::SYS_getrandom,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
];

const NET: Allowed = &[libc::SYS_readv, libc::SYS_writev];

const RNG: Allowed = &[libc::SYS_getrandom];

const VSOCK: Allowed = &[
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// KVM's requests (`linux/kvm.h`), of type 0xae.
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;

impl Role {
    /// The system calls that are allowed whatever their arguments.
    pub fn plain(&self) -> impl Iterator<Item = libc::c_long> + use<> {
        let (kind, own): (Allowed, Allowed) = match self {
            Self::Main => (MAIN, &[]),
            Self::Vcpu { .. } => (VCPU, &[]),
            Self::Device(device) => (
                DEVICE,
                match device {
                    Device::Console => CONSOLE,
                    Device::Fs => FS,
                    Device::Net => NET,
                    Device::Rng => RNG,
                    Device::Vsock => VSOCK,
                },
            ),
        };
        [ALL, kind, own].into_iter().flatten().copied()
    }

    /// Requests of ioctl(2), each with the descriptors it may be made of.
    pub fn requests(&self) -> Vec<(Range<RawFd>, u32)> {
        let Self::Vcpu { vcpu, vm, vhost } = self else {
            return Vec::new();
        };
        let one = |fd: RawFd| fd..fd.saturating_add(1);
        let mut requests = vec![
            (one(*vcpu), KVM_RUN),
            (one(*vcpu), KVM_GET_REGS),
            (one(*vm), KVM_SET_GSI_ROUTING),
            // A driver that starts or resets its NIC chooses the tap's offloads.
            (table::TAPS..table::VHOST, libc::TUNSETOFFLOAD as u32),
        ];
        let served = RawFd::try_from(*vhost).unwrap_or(RawFd::MAX);
        let end = table::VHOST.saturating_add(served).min(table::END);
        if end > table::VHOST {
            requests.extend(vhost::request::RUNNING.map(|request| (table::VHOST..end, request as u32)));
        }
        requests
    }

    /// The system calls that are allowed if one of their rules holds.
    fn rules(&self) -> Result<Rules, RuleError> {
        let mut rules = seccomp::memory(matches!(self, Self::Device(_)))?;
        let requests = self.requests();
        if !requests.is_empty() {
            let requests = requests.into_iter().map(|(descriptors, request)| {
                let mut conditions = seccomp::within(0, &descriptors)?;
                conditions.push(equal(1, request.into())?);
                Rule::new(conditions)
            });
            rules.push((libc::SYS_ioctl, requests.collect::<Result<_, _>>()?));
        }
        Ok(rules)
    }
}

/// Limits the calling thread, called `name`, to what `role` needs, for good. Threads that it starts are limited alike,
/// but it may start none.
///
/// # Errors
/// When the kernel refuses; the thread must not go on then.
pub fn limit(name: &str, role: &Role) -> Result<(), SeccompError> {
    seccomp::limit(name, role.plain(), role.rules())
}

#[cfg(test)]
#[path = "seccomp_test.rs"]
mod tests;
