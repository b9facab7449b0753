//! The program's own rights and limits: to have more of them, or to undo what holds it.

use super::Attack;
use std::ptr::null;

fn unlimited(resource: libc::__rlimit_resource_t) -> bool {
    let limit = [u64::MAX; 2];
    call!(SYS_setrlimit, resource, limit.as_ptr())
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("setuid", |_| call!(SYS_setresuid, 0, 0, 0)),
    ("setgid", |_| call!(SYS_setresgid, 0, 0, 0)),
    ("setgroups", |_| call!(SYS_setgroups, 0, null::<u8>())),
    ("more-files", |_| {
        // One that may not raise it can lower it, for good.
        let limit = |number: u64| {
            let both = [number, number];
            call!(SYS_prlimit64, 0, libc::RLIMIT_NOFILE, both.as_ptr(), null::<u8>())
        };
        limit(512) && limit(1024)
    }),
    ("core-dumps", |_| unlimited(libc::RLIMIT_CORE)),
    ("more-locked-memory", |_| unlimited(libc::RLIMIT_MEMLOCK)),
    ("more-messages", |_| unlimited(libc::RLIMIT_MSGQUEUE)),
    ("real-time", |_| {
        // SCHED_FIFO, of the lowest priority.
        let priority = 1;
        call!(SYS_sched_setscheduler, 0, libc::SCHED_FIFO, &raw const priority)
    }),
    ("dumpable", |_| {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
    }),
    ("keep-capabilities", |_| {
        call!(SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)
    }),
    ("ambient-capabilities", |_| {
        call!(
            SYS_prctl,
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0
        )
    }),
    ("outlive-the-parent", |_| {
        call!(SYS_prctl, libc::PR_SET_PDEATHSIG, 0, 0, 0, 0)
    }),
    ("another-filter", |_| {
        call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    }),
    ("read-the-time-stamp", |_| {
        call!(SYS_prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE, 0, 0, 0)
    }),
    ("other-handlers", |_| {
        let mut old = [0u64; 8];
        call!(SYS_rt_sigaction, libc::SIGUSR1, null::<u8>(), old.as_mut_ptr(), 8)
    }),
    ("personality", |_| call!(SYS_personality, 0xffff_ffffu32)),
    ("session", |_| call!(SYS_setsid)),
    ("io-ports", |_| call!(SYS_ioperm, 0x80, 1, 1)),
    ("segments", |_| {
        let mut table = [0u8; 16];
        call!(SYS_modify_ldt, 0, table.as_mut_ptr(), table.len())
    }),
    ("all-capabilities", |_| {
        let header = [0x2008_0522u32, 0];
        let all = [u32::MAX, u32::MAX, 0, 0x1ff, 0x1ff, 0];
        call!(SYS_capset, header.as_ptr(), all.as_ptr())
    }),
    ("bounding-set", |_| {
        // That of the clock is taken from it.
        call!(SYS_prctl, libc::PR_CAPBSET_DROP, 25, 0, 0, 0)
    }),
    ("secure-bits", |_| {
        call!(SYS_prctl, libc::PR_SET_SECUREBITS, 0, 0, 0, 0)
    }),
    ("name-of-a-thread", |_| {
        call!(SYS_prctl, libc::PR_SET_NAME, c"husk".as_ptr(), 0, 0, 0)
    }),
];
