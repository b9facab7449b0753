//! The calling thread's capabilities (capabilities(7)), as far as the server drops and suspends them.

use crate::sys::{Errno, Result};

/// CAP_* numbers of linux/capability.h that the server keeps. It acts for all users of the guest, whose kernel has
/// checked their rights, so it must be able to do what any of them may: nothing more than files.
pub const KEPT: [u32; 9] = [
    CHOWN,
    DAC_OVERRIDE,
    DAC_READ_SEARCH,
    FOWNER,
    FSETID,
    SETGID,
    SETUID,
    MKNOD,
    SETFCAP,
];

const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const FOWNER: u32 = 3;
/// Lets set-id bits survive changes of a file.
pub const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const MKNOD: u32 = 27;
const SETFCAP: u32 = 31;

/// One past the largest number that a 64-bit set can hold.
pub const END: u32 = 64;

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// A thread's capability sets, one bit for each number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sets {
    /// What it may do now.
    pub effective: u64,
    /// What it may take up.
    pub permitted: u64,
    /// What survives exec.
    pub inheritable: u64,
}

/// The set of `numbers`.
pub fn set_of(numbers: &[u32]) -> u64 {
    numbers
        .iter()
        .fold(0, |set, &n| set | 1u64.checked_shl(n).unwrap_or(0))
}

/// The calling thread's sets.
///
/// # Errors
/// None that the kernel documents for this use.
pub fn get() -> Result<Sets> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 takes one header and two data structures, which live through the call.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } < 0 {
        return Err(Errno::last());
    }
    let [low, high] = data;
    let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
    Ok(Sets {
        effective: join(low.effective, high.effective),
        permitted: join(low.permitted, high.permitted),
        inheritable: join(low.inheritable, high.inheritable),
    })
}

/// Sets the calling thread's sets.
///
/// # Errors
/// EPERM when one would gain what it has not.
pub fn set(sets: Sets) -> Result<()> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes one header and two data structures, which live through the call.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) } < 0 {
        return Err(Errno::last());
    }
    Ok(())
}
