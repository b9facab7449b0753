//! Processes that are not the program's own: somebody's, and the shim and the VMM of another sandbox, a neighbour.

use super::{Attack, Ground, Victim, opened};
use std::mem::{size_of_val, zeroed};
use std::ptr::null;

/// Reads eight bytes of its memory, or writes them as they are.
fn memory(victim: &Victim, write: bool) -> bool {
    let mut own = [0u8; 8];
    let local = libc::iovec {
        iov_base: own.as_mut_ptr().cast(),
        iov_len: own.len(),
    };
    let there = libc::iovec {
        iov_base: victim.memory as *mut _,
        iov_len: own.len(),
    };
    let copy = |call| unsafe {
        libc::syscall(
            call,
            victim.pid,
            &raw const local,
            1usize,
            &raw const there,
            1usize,
            0usize,
        ) == 8
    };
    copy(libc::SYS_process_vm_readv) && (!write || copy(libc::SYS_process_vm_writev))
}

fn memory_by_proc(victim: &Victim) -> bool {
    opened(&victim.file("mem"), libc::O_RDWR)
}

/// It has /dev/null or a pipe there.
fn descriptor_by_proc(victim: &Victim) -> bool {
    opened(&victim.file("fd/0"), libc::O_RDONLY | libc::O_NONBLOCK)
}

fn root_by_proc(victim: &Victim) -> bool {
    opened(&victim.file("root/."), libc::O_PATH)
}

/// A signal that does nothing to who runs.
fn kill(victim: &Victim) -> bool {
    call!(SYS_kill, victim.pid, libc::SIGCONT)
}

fn pidfd(victim: &Victim) -> Option<i32> {
    super::made(unsafe { libc::syscall(libc::SYS_pidfd_open, victim.pid, 0) })
}

fn pidfd_signal(victim: &Victim) -> bool {
    let fd = pidfd(victim).unwrap_or(-1);
    call!(SYS_pidfd_send_signal, fd, libc::SIGCONT, null::<u8>(), 0)
}

fn pidfd_descriptor(victim: &Victim) -> bool {
    opens!(SYS_pidfd_getfd, pidfd(victim).unwrap_or(-1), 0, 0)
}

/// The end of this process lets go of it.
fn ptrace(victim: &Victim) -> bool {
    call!(SYS_ptrace, libc::PTRACE_SEIZE, victim.pid, 0, 0)
}

fn limits(victim: &Victim) -> bool {
    let mut limit = [0u64; 2];
    call!(
        SYS_prlimit64,
        victim.pid,
        libc::RLIMIT_NOFILE,
        null::<u8>(),
        limit.as_mut_ptr()
    )
}

fn shim(g: &Ground) -> &Victim {
    let [_, shim, _] = &g.victims;
    shim
}

fn vmm(g: &Ground) -> &Victim {
    let [.., vmm] = &g.victims;
    vmm
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("victims-memory-by-proc", |g| memory_by_proc(g.victim())),
    ("victims-descriptors", |g| descriptor_by_proc(g.victim())),
    ("victims-root", |g| root_by_proc(g.victim())),
    ("kill", |g| kill(g.victim())),
    ("pidfd", |g| pidfd(g.victim()).is_some()),
    ("pidfd-signal", |g| pidfd_signal(g.victim())),
    ("pidfd-descriptor", |g| pidfd_descriptor(g.victim())),
    ("ptrace", |g| ptrace(g.victim())),
    ("victims-memory-read", |g| memory(g.victim(), false)),
    ("victims-limits", |g| limits(g.victim())),
    ("victims-memory-written", |g| memory(g.victim(), true)),
    ("kill-all", |_| call!(SYS_kill, -1, 0)),
    ("tgkill", |g| {
        call!(SYS_tgkill, g.victim().pid, g.victim().pid, libc::SIGCONT)
    }),
    ("queue-a-signal", |g| {
        let mut info: libc::siginfo_t = unsafe { zeroed() };
        info.si_code = -1;
        call!(
            SYS_rt_sigqueueinfo,
            g.victim().pid,
            libc::SIGCONT,
            &raw const info
        )
    }),
    ("victims-priority", |g| {
        call!(SYS_setpriority, libc::PRIO_PROCESS, g.victim().pid, 0)
    }),
    ("victims-processors", |g| {
        let mut set = [0u64; 16];
        call!(
            SYS_sched_getaffinity,
            g.victim().pid,
            size_of_val(&set),
            set.as_mut_ptr()
        )
    }),
    ("victims-scheduler", |g| {
        call!(SYS_sched_getscheduler, g.victim().pid)
    }),
    ("victims-group", |g| call!(SYS_getpgid, g.victim().pid)),
    ("victims-pages", |g| {
        call!(
            SYS_move_pages,
            g.victim().pid,
            0,
            null::<u8>(),
            null::<u8>(),
            null::<u8>(),
            0
        )
    }),
    ("compare-with-victim", |g| {
        call!(SYS_kcmp, g.victim().pid, g.victim().pid, 0, 0, 0)
    }),
    ("robust-list", |g| {
        let (mut head, mut length) = (0usize, 0usize);
        call!(
            SYS_get_robust_list,
            g.victim().pid,
            &raw mut head,
            &raw mut length
        )
    }),
    ("kill-the-parent", |g| {
        // 0 is nobody: a parent in another pid namespace.
        g.parent > 0 && call!(SYS_kill, g.parent, 0)
    }),
    ("memory-by-proc-of-a-neighbours-shim", |g| memory_by_proc(shim(g))),
    ("descriptors-of-a-neighbours-shim", |g| {
        descriptor_by_proc(shim(g))
    }),
    ("root-of-a-neighbours-shim", |g| root_by_proc(shim(g))),
    ("kill-of-a-neighbours-shim", |g| kill(shim(g))),
    ("pidfd-of-a-neighbours-shim", |g| pidfd(shim(g)).is_some()),
    ("pidfd-signal-of-a-neighbours-shim", |g| pidfd_signal(shim(g))),
    ("pidfd-descriptor-of-a-neighbours-shim", |g| {
        pidfd_descriptor(shim(g))
    }),
    ("ptrace-of-a-neighbours-shim", |g| ptrace(shim(g))),
    ("memory-read-of-a-neighbours-shim", |g| memory(shim(g), false)),
    ("limits-of-a-neighbours-shim", |g| limits(shim(g))),
    ("memory-by-proc-of-a-neighbours-vmm", |g| memory_by_proc(vmm(g))),
    ("descriptors-of-a-neighbours-vmm", |g| descriptor_by_proc(vmm(g))),
    ("root-of-a-neighbours-vmm", |g| root_by_proc(vmm(g))),
    ("kill-of-a-neighbours-vmm", |g| kill(vmm(g))),
    ("pidfd-of-a-neighbours-vmm", |g| pidfd(vmm(g)).is_some()),
    ("pidfd-signal-of-a-neighbours-vmm", |g| pidfd_signal(vmm(g))),
    ("pidfd-descriptor-of-a-neighbours-vmm", |g| {
        pidfd_descriptor(vmm(g))
    }),
    ("ptrace-of-a-neighbours-vmm", |g| ptrace(vmm(g))),
    ("memory-read-of-a-neighbours-vmm", |g| memory(vmm(g), false)),
    ("limits-of-a-neighbours-vmm", |g| limits(vmm(g))),
    ("memory-of-a-neighbours-guest", |g| {
        // Where its VMM has that.
        opened(&vmm(g).file("fd/5"), libc::O_RDWR)
    }),
];
