//! What the VMM gives up before it runs a guest (`husk-lockdown` has the means): the host's namespaces and files, all
//! capabilities and the chance to get any back, being looked into, files, ports and other processes, and at last, thread
//! by thread, all system calls that are not needed ([`seccomp`]).

pub mod seccomp;

use crate::{info, warning};
use caps::CapSet;
use husk_lockdown::namespaces::{self, NamespaceError};
use husk_lockdown::seccomp::SeccompError;
use husk_lockdown::violation::{self, Witness};
use husk_lockdown::{landlock, limits};
use husk_vmm_protocol::fds::vmm as table;
use std::io;

/// Why the VMM could not give up a right.
#[derive(Debug, thiserror::Error)]
pub enum LockdownError {
    /// A set of capabilities could not be emptied.
    #[error("the capabilities could not be dropped")]
    Capabilities(#[from] caps::errors::CapsError),
    /// A `prctl` failed.
    #[error("{what} could not be set")]
    Prctl {
        /// What was to be set.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The host could not be left.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// Landlock refuses.
    #[error("Landlock could not be used")]
    Landlock(#[source] io::Error),
    /// Violations could not be watched for.
    #[error("the handler of SIGSYS could not be set")]
    Violation(#[source] io::Error),
    /// A thread could not be limited.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// A resource limit could not be set.
    #[error("a resource limit could not be set")]
    Limit(#[source] io::Error),
}

/// Gives up all that this process has not to do with, but for system calls, and becomes `user` if one is given. There must
/// be but one thread: it is each thread's own, and those to come have it from this one.
///
/// # Errors
/// When any of it cannot be given up; the VMM must not run then.
pub fn enter(user: Option<u32>) -> Result<(), LockdownError> {
    #[cfg(feature = "captured")]
    if husk_lockdown::captured::is_free() {
        return Ok(());
    }
    limits::nothing_but_files().map_err(LockdownError::Limit)?;
    limits::limit(libc::RLIMIT_NPROC, limits::MAX_THREADS).map_err(LockdownError::Limit)?;
    namespaces::leave_host(user)?;
    prctl("PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, 0)?;
    prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1)?;
    drop_bounding()?;
    caps::clear(None, CapSet::Ambient)?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    match landlock::deny(landlock::Files::All).map_err(LockdownError::Landlock)? {
        0 => warning!("this host's kernel has no Landlock to lock the VMM in with"),
        abi => info!("locked in by Landlock, ABI {abi}"),
    }
    limits::one_heap();
    watch_violations()
}

/// Has a forbidden system call end the VMM with a report to the engine.
///
/// # Errors
/// The kernel's.
pub(crate) fn watch_violations() -> Result<(), LockdownError> {
    violation::watch(Witness {
        program: "husk-vmm",
        log: table::LOG,
        reports: Some(table::CONTROL),
    })
    .map_err(LockdownError::Violation)
}

/// The bounding set can only be lowered with CAP_SETPCAP; a VMM that was started without it has nothing to lower
/// that `no_new_privs` does not already keep it from.
fn drop_bounding() -> Result<(), LockdownError> {
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    Ok(())
}

fn prctl(what: &'static str, option: i32, value: libc::c_ulong) -> Result<(), LockdownError> {
    // SAFETY: these options take plain numbers.
    match unsafe {
        libc::prctl(
            option,
            value,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
        )
    } {
        0 => Ok(()),
        _ => Err(LockdownError::Prctl {
            what,
            source: io::Error::last_os_error(),
        }),
    }
}
