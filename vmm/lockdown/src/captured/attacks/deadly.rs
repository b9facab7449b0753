//! Attacks that end the process where its filters hold, whatever handler it has: one at a time, by name.

use std::arch::asm;

type Deadly = (&'static str, fn() -> bool);

/// By their names; each tells whether it got through.
static ATTACKS: &[Deadly] = &[("int80", by_int80), ("x32", by_x32), ("openat", by_openat)];

/// Makes the attack of this name. What is not one does not succeed.
pub(in super::super) fn attack(name: &str) -> bool {
    ATTACKS.iter().any(|(known, attack)| *known == name && attack())
}

/// The numbers of 32-bit programs are others: who compares numbers alone takes them for what they are not.
fn by_int80() -> bool {
    let getpid = 20u64;
    let result: u64;
    unsafe { asm!("int 0x80", inlateout("rax") getpid => result, options(nostack)) };
    result == u64::from(std::process::id())
}

/// A third set of numbers: those of 64 bits with one more.
fn by_x32() -> bool {
    let bit = 0x4000_0000;
    unsafe { libc::syscall(libc::SYS_getppid | bit) >= 0 }
}

/// What none of the VMM's threads may do, and none does by accident.
fn by_openat() -> bool {
    super::opened(c"/", libc::O_PATH)
}
