//! What else the kernel does for those who may ask.

use super::{Attack, last_error, open};
use std::mem::{size_of_val, zeroed};
use std::ptr::{null, null_mut};

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("bpf", |_| {
        let attributes: [u32; 18] = {
            let mut map = [0; 18];
            // An array of one value of four bytes.
            (map[0], map[1], map[2], map[3]) = (2, 4, 4, 1);
            map
        };
        opens!(SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes))
    }),
    ("perf", |_| {
        let mut attributes = [0u32; 32];
        // Software, of this length, the processor's clock.
        (attributes[0], attributes[1]) = (1, 128);
        opens!(SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0)
    }),
    ("userfaultfd", |_| opens!(SYS_userfaultfd, 0)),
    ("io-uring", |_| {
        let mut parameters = [0u32; 30];
        opens!(SYS_io_uring_setup, 1, parameters.as_mut_ptr())
    }),
    ("keys", |_| {
        call!(
            SYS_add_key,
            c"user".as_ptr(),
            c"husk".as_ptr(),
            c"x".as_ptr(),
            1,
            -2
        )
    }),
    ("keyring", |_| call!(SYS_keyctl, 0, -3, 1)),
    ("kernel-messages", |_| call!(SYS_syslog, 10, null_mut::<u8>(), 0)),
    ("module", |_| {
        // Nothing to load: an error other than that it is not allowed.
        !call!(SYS_init_module, null::<u8>(), 0, c"".as_ptr()) && last_error() == libc::ENOEXEC
    }),
    ("kexec", |_| call!(SYS_kexec_load, 0, 0, null::<u8>(), 0)),
    ("reboot", |_| {
        call!(SYS_reboot, 0xfee1_deadu32, 672_274_793, 0, null::<u8>())
    }),
    ("set-the-clock", |_| unsafe {
        // The length of its ticks, as it is.
        let mut clock: libc::timex = zeroed();
        libc::syscall(libc::SYS_adjtimex, &raw mut clock);
        clock.modes = libc::ADJ_TICK;
        libc::syscall(libc::SYS_adjtimex, &raw const clock) >= 0
    }),
    ("accounting", |_| call!(SYS_acct, null::<u8>())),
    ("timers", |_| {
        let mut timer = 0i32;
        call!(
            SYS_timer_create,
            libc::CLOCK_MONOTONIC,
            null::<u8>(),
            &raw mut timer
        )
    }),
    ("listen-to-signals", |_| {
        let mask = 0u64;
        opens!(SYS_signalfd4, -1, &raw const mask, 8, 0)
    }),
    ("filter-with-a-listener", |_| {
        // Allow all; a second filter could tell another process of each call.
        let program = [libc::sock_filter {
            code: 6,
            jt: 0,
            jf: 0,
            k: 0x7fff_0000,
        }];
        let program = libc::sock_fprog {
            len: 1,
            filter: program.as_ptr().cast_mut(),
        };
        opens!(SYS_seccomp, 1, 8, &raw const program)
    }),
    ("module-by-a-descriptor", |_| {
        // Not a module: an error other than that it is not allowed.
        let fd = open(c"/proc/self/exe", libc::O_RDONLY).unwrap_or(0);
        !call!(SYS_finit_module, fd, c"".as_ptr(), 0) && last_error() == libc::ENOEXEC
    }),
    ("landlock", |_| {
        call!(SYS_landlock_create_ruleset, null::<u8>(), 0, 1)
    }),
];
