//! Devices, and what the kernel shows as files.

use super::{Attack, opened};
use std::ffi::CStr;

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("own-memory-by-proc", |_| opened(c"/proc/self/mem", libc::O_RDWR)),
    ("own-maps", |_| opened(c"/proc/self/maps", libc::O_RDONLY)),
    ("own-environment", |_| {
        opened(c"/proc/self/environ", libc::O_RDONLY)
    }),
    ("hosts-kernel-log", |_| opened(c"/dev/kmsg", libc::O_RDONLY)),
    ("hosts-memory", |_| opened(c"/dev/mem", libc::O_RDONLY)),
    ("another-kvm", |_| opened(c"/dev/kvm", libc::O_RDWR)),
    ("another-tap", |_| opened(c"/dev/net/tun", libc::O_RDWR)),
    ("sysrq", |_| opened(c"/proc/sysrq-trigger", libc::O_WRONLY)),
    ("core-pattern", |_| {
        opened(c"/proc/sys/kernel/core_pattern", libc::O_WRONLY)
    }),
    ("cgroups", |_| {
        opened(c"/sys/fs/cgroup/cgroup.procs", libc::O_WRONLY)
    }),
    ("another-vhost", |_| opened(c"/dev/vhost-net", libc::O_RDWR)),
    ("disks", |_| {
        let disk = |name: &CStr| opened(name, libc::O_RDONLY);
        [c"/dev/vda", c"/dev/sda", c"/dev/nvme0n1"].into_iter().any(disk)
    }),
    ("descriptors-by-dev", |_| opened(c"/dev/fd/0", libc::O_RDONLY)),
    ("kernels-symbols", |_| opened(c"/proc/kallsyms", libc::O_RDONLY)),
    ("modules-path", |_| {
        opened(c"/proc/sys/kernel/modprobe", libc::O_WRONLY)
    }),
    ("processes-of-the-host", |_| opened(c"/proc", libc::O_DIRECTORY)),
];
