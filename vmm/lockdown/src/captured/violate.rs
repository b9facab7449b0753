//! A system call made by whichever thread is told to, by SIGUSR1: one that is forbidden to it shows what follows.

use std::sync::atomic::{AtomicI64, Ordering};

static CALL: AtomicI64 = AtomicI64::new(-1);

/// Has SIGUSR1 make its thread call `number`, with arguments that are all -1.
pub(super) fn on_signal(number: i64) {
    CALL.store(number, Ordering::Relaxed);
    // SAFETY: the handler makes but a system call.
    unsafe { libc::signal(libc::SIGUSR1, call as *const () as libc::sighandler_t) };
}

extern "C" fn call(_signal: i32) {
    let none = -1i64;
    // SAFETY: no pointer among the arguments is valid.
    unsafe { libc::syscall(CALL.load(Ordering::Relaxed), none, none, none, none, none, none) };
}
