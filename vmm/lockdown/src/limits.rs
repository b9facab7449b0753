//! Resource limits (setrlimit(2)), each for good: the hard limit is lowered with the soft one.

use crate::check;
use std::io;

/// Limits `resource` to `value`, or to its present hard limit if that is lower.
///
/// # Errors
/// None that the kernel documents for this use.
pub fn limit(resource: libc::__rlimit_resource_t, value: libc::rlim_t) -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives through the call.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    let value = value.min(limit.rlim_max);
    limit = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: `limit` lives through the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) })?;
    Ok(())
}

/// Most descriptors of a process that has one for each file that its guest has open.
pub const MAX_FILES: libc::rlim_t = 1 << 20;

/// More than the threads of all vCPUs and devices of a VMM, and those that KVM and vhost start in the kernel on its user's
/// account.
pub const MAX_THREADS: libc::rlim_t = 1024;

/// What no program that serves a guest has a use for: core dumps, which would hold the guest's data, memory that is
/// locked, and messages and signals that wait.
///
/// # Errors
/// As [`limit`].
pub fn nothing_but_files() -> io::Result<()> {
    limit(libc::RLIMIT_NOFILE, MAX_FILES)?;
    for resource in [
        libc::RLIMIT_CORE,
        libc::RLIMIT_MEMLOCK,
        libc::RLIMIT_MSGQUEUE,
        libc::RLIMIT_NICE,
        libc::RLIMIT_RTPRIO,
    ] {
        limit(resource, 0)?;
    }
    Ok(())
}

/// Has all threads use one heap: those of their own need mprotect(2), open a file of /proc when they shrink, and cost
/// memory. To be called before there are other threads.
pub fn one_heap() {
    // SAFETY: the option takes a plain number. Without it a thread would be ended when its heap grows or shrinks.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
