//! Acting for a user of the guest: whose file a new file becomes, and which set-id bits a change clears.
//!
//! The guest's kernel has checked what the caller may do. What is left to do here is what only the file system can:
//! a new file belongs to the caller, gets the group of a set-group-id directory, and its mode is cut by the
//! caller's umask or by the directory's default ACL. The host's kernel does all that when the creating thread
//! bears the caller's file-system ids and umask. Capabilities stay (SECBIT_NO_SETUID_FIXUP, see
//! [`crate::lockdown`]), so the server can still reach what the caller could.

use crate::capabilities::{self, FSETID, set_of};
use crate::sys::{Errno, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Readies a thread for requests: an umask (0) and a working directory (/proc/self/fd, for [`crate::sys::xattr`])
/// of its own.
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn enter(proc_fds: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no pointers are involved; the thread only stops to share umask, root and working directory.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(Errno::last());
    }
    // SAFETY: no pointers are involved.
    if unsafe { libc::fchdir(proc_fds.as_raw_fd()) } < 0 {
        return Err(Errno::last());
    }
    set_umask(0);
    Ok(())
}

fn set_umask(mask: u32) {
    // SAFETY: no pointers are involved; the mask is this thread's own (see `enter`).
    unsafe { libc::umask(mask & 0o777) };
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File-system user id.
    pub uid: u32,
    /// File-system group id.
    pub gid: u32,
}

impl Caller {
    /// Runs `make` with the caller's file-system ids and `umask`, on a thread that has [`enter`]ed.
    ///
    /// # Errors
    /// What `make` returns; EOVERFLOW for ids that name nobody, EPERM if they cannot be taken on.
    pub fn act<T>(self, umask: u32, make: impl FnOnce() -> Result<T>) -> Result<T> {
        // To set an id of -1 changes nothing: the file would become root's.
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err(Errno(libc::EOVERFLOW));
        }
        let _mask = Umask::set(umask);
        let _group = FsId::take(libc::SYS_setfsgid, self.gid)?;
        let _user = FsId::take(libc::SYS_setfsuid, self.uid)?;
        make()
    }
}

/// Runs `change` without CAP_FSETID, so that the host's kernel clears the set-id bits as it does for an ordinary
/// user's change.
///
/// # Errors
/// What `change` returns.
pub fn without_fsetid<T>(change: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = capabilities::get()?;
    capabilities::set(capabilities::Sets {
        effective: before.effective & !set_of(&[FSETID]),
        ..before
    })?;
    let _restore = Restore(before);
    change()
}

struct Restore(capabilities::Sets);

impl Drop for Restore {
    fn drop(&mut self) {
        // Taking up what is still permitted cannot be refused.
        let _ = capabilities::set(self.0);
    }
}

struct Umask;

impl Umask {
    fn set(mask: u32) -> Self {
        set_umask(mask);
        Self
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        set_umask(0);
    }
}

/// A file-system id taken on, until dropped: back to 0.
struct FsId(libc::c_long);

impl FsId {
    fn take(call: libc::c_long, id: u32) -> Result<Option<Self>> {
        if id == 0 {
            return Ok(None);
        }
        let taken = Self(call);
        set_fs_id(call, id);
        // The call reports the old id, never an error; an id of -1 is never taken on.
        if set_fs_id(call, u32::MAX) != i64::from(id) {
            return Err(Errno(libc::EPERM));
        }
        Ok(Some(taken))
    }
}

fn set_fs_id(call: libc::c_long, id: u32) -> i64 {
    // SAFETY: no pointers are involved; setfsuid and setfsgid act on the calling thread alone.
    unsafe { libc::syscall(call, id) & 0xffff_ffff }
}

impl Drop for FsId {
    fn drop(&mut self) {
        set_fs_id(self.0, 0);
    }
}
