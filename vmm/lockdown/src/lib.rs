//! What a program of husk's that serves a guest gives up before it does: being the host's user, seeing the host's
//! namespaces and files ([`namespaces`]), resources ([`limits`]), files, ports and other processes ([`landlock`]), and at
//! last, thread by thread, all system calls that are not needed ([`seccomp`]). What it then tries all the same is told
//! by [`violation`], and what goes wrong by [`panics`].

#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

#[cfg(feature = "captured")]
pub mod captured;
pub mod landlock;
pub mod limits;
pub mod namespaces;
pub mod panics;
pub mod seccomp;
pub mod violation;

use std::io;

/// What a system call gave, as an error if that is negative.
fn check(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        result @ 0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
