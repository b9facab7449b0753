//! The share as a FUSE file system: each request is carried out on the host's files beneath the share, with the
//! semantics of the host's file system.
//!
//! What stays with the guest's kernel: permission checks (`default_permissions`), file locks (neither POSIX_LOCKS
//! nor FLOCK_LOCKS are offered, so that locks hold among the guest's processes and are unknown to the host),
//! device nodes, FIFOs and sockets (the server makes and names them, and never opens one).

mod attr;
mod dir;
mod file;
mod lookup;
mod names;
mod xattr;

use crate::credentials::Caller;
use crate::fuse::{Args, Body, InHeader, MAJOR, MINOR, init, op};
use crate::handle::{Handles, OpenFile};
use crate::node::{Limits, Nodes, Pinned};
use crate::sys::{self, Errno, Result};
use husk_vmm_protocol::fs::MAX_DATA_LEN;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long the guest may go without asking whether a name or an attribute is still as it was. It bounds how long
/// a change on the host (by `docker cp`, a secret's update, another pod on the same volume) can go unseen.
const VALID: Duration = Duration::from_secs(1);

/// Requests that the guest sends on its own account (readahead, writeback) at a time, and from how many on it
/// considers the device congested.
const MAX_BACKGROUND: u16 = 128;
const CONGESTION_THRESHOLD: u16 = 96;

/// What is asked of the guest's kernel, as far as it offers it. Not among it: WRITEBACK_CACHE (the host sees
/// writes at once, and the host's times and sizes are the truth), locks (see above), EXPORT_SUPPORT.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// A request that could be carried out.
#[derive(Debug)]
pub enum Answer {
    /// FUSE has no reply to it.
    Nothing,
    /// The reply's body is what was added to [`Body`].
    Body,
    /// The same, and the file opened is for the VMM too.
    Opened(Arc<OpenFile>),
}

/// The share.
#[derive(Debug)]
pub struct Passthrough {
    nodes: Nodes,
    handles: Handles,
    proc_fds: OwnedFd,
    /// Whether the guest mounts a file system of its own for each mount beneath the share.
    submounts: AtomicBool,
    /// Whether SETXATTR has its extended form.
    long_setxattr: AtomicBool,
}

/// One request under way.
struct Call<'a> {
    node: u64,
    caller: Caller,
    args: Args<'a>,
}

impl Passthrough {
    /// Serves what is beneath the directory `root`. `proc_fds` is a descriptor of this process's /proc/self/fd; the guest
    /// makes the server keep no more than `limits`.
    ///
    /// # Errors
    /// When `root` cannot be looked at.
    pub fn new(root: OwnedFd, proc_fds: OwnedFd, limits: Limits) -> Result<Self> {
        let stat = sys::stat(root.as_fd())?;
        Ok(Self {
            nodes: Nodes::new(root, &stat, limits),
            handles: Handles::default(),
            proc_fds,
            submounts: AtomicBool::new(false),
            long_setxattr: AtomicBool::new(false),
        })
    }

    /// /proc/self/fd.
    pub fn proc_fds(&self) -> BorrowedFd<'_> {
        self.proc_fds.as_fd()
    }

    /// Carries out one request. `args` is what follows its header; `body` is empty and takes the reply's body, for
    /// which it has as much room as the guest. The calling thread has [`entered`](crate::credentials::enter).
    ///
    /// # Errors
    /// What the guest is to be told. Nothing has then been added to the guest's nodes and handles.
    pub fn handle(&self, header: &InHeader, args: Args<'_>, body: &mut Body) -> Result<Answer> {
        let call = Call {
            node: header.node,
            caller: Caller {
                uid: header.uid,
                gid: header.gid,
            },
            args,
        };
        match header.opcode {
            op::LOOKUP => self.lookup(call, body),
            op::FORGET => self.forget(call),
            op::BATCH_FORGET => self.batch_forget(call),
            op::GETATTR => self.getattr(call, body),
            op::STATX => self.statx(call, body),
            op::SETATTR => self.setattr(call, body),
            op::READLINK => self.readlink(call, body),
            op::SYMLINK => self.symlink(call, body),
            op::MKNOD => self.mknod(call, body),
            op::MKDIR => self.mkdir(call, body),
            op::UNLINK => self.unlink(call, false),
            op::RMDIR => self.unlink(call, true),
            op::RENAME => self.rename(call, false),
            op::RENAME2 => self.rename(call, true),
            op::LINK => self.link(call, body),
            op::OPEN => self.open(call, body),
            op::CREATE => self.create(call, body),
            op::TMPFILE => self.tmpfile(call, body),
            op::RELEASE | op::RELEASEDIR => self.release(call),
            op::FLUSH => self.flush(call),
            op::FSYNC => self.fsync(call),
            op::FALLOCATE => self.fallocate(call),
            op::LSEEK => self.lseek(call, body),
            op::COPY_FILE_RANGE => self.copy_file_range(call, body),
            op::OPENDIR => self.opendir(call, body),
            op::READDIR => self.readdir(call, body, false),
            op::READDIRPLUS => self.readdir(call, body, true),
            op::FSYNCDIR => self.fsyncdir(call),
            op::SETXATTR => self.setxattr(call),
            op::GETXATTR => self.getxattr(call, body),
            op::LISTXATTR => self.listxattr(call, body),
            op::REMOVEXATTR => self.removexattr(call),
            op::STATFS => self.statfs(call, body),
            op::SYNCFS => self.syncfs(call),
            op::INIT => self.init(call, body),
            op::DESTROY => {
                self.clear();
                Ok(Answer::Body)
            }
            // Requests are not interrupted: each ends by itself, and the guest waits for it.
            op::INTERRUPT => Ok(Answer::Nothing),
            _ => Err(Errno(libc::ENOSYS)),
        }
    }

    /// Whether FUSE has no reply to this operation.
    pub fn is_silent(opcode: u32) -> bool {
        matches!(opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT)
    }

    fn clear(&self) {
        self.handles.clear();
        self.nodes.clear();
    }

    fn init(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let args = &mut call.args;
        let (major, minor, max_readahead, flags) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        if major < MAJOR {
            return Err(Errno(libc::EPROTO));
        }
        if major > MAJOR || minor < 36 {
            // A newer guest comes again with our version; there has been no virtio-fs guest of 7.35 or before
            // with all that is relied upon here.
            if major == MAJOR {
                return Err(Errno(libc::EPROTO));
            }
            body.u32(MAJOR)?;
            body.u32(MINOR)?;
            body.zeros(56)?;
            return Ok(Answer::Body);
        }
        let extended = u64::from(flags) & init::INIT_EXT != 0;
        let more_flags = if extended { args.u32()? } else { 0 };
        let agreed = (u64::from(flags) | (u64::from(more_flags) << 32)) & WANTED;
        // A guest that starts anew (its driver was bound again) knows nothing of what it had.
        self.clear();
        self.submounts
            .store(agreed & init::SUBMOUNTS != 0, Ordering::Relaxed);
        self.long_setxattr
            .store(agreed & init::SETXATTR_EXT != 0, Ordering::Relaxed);
        let max_data = MAX_DATA_LEN as u32;
        body.u32(MAJOR)?;
        body.u32(MINOR)?;
        body.u32(max_readahead.min(max_data))?;
        body.u32(agreed as u32)?;
        body.bytes(&MAX_BACKGROUND.to_le_bytes())?;
        body.bytes(&CONGESTION_THRESHOLD.to_le_bytes())?;
        body.u32(max_data)?; // max_write
        body.u32(1)?; // time_gran, ns
        body.bytes(&((max_data / 4096) as u16).to_le_bytes())?; // max_pages
        body.bytes(&0u16.to_le_bytes())?; // map_alignment
        body.u32((agreed >> 32) as u32)?;
        body.zeros(28)?;
        Ok(Answer::Body)
    }

    fn statfs(&self, call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let stat = sys::statfs(self.nodes.get(call.node)?.fd())?;
        for value in [
            stat.f_blocks,
            stat.f_bfree,
            stat.f_bavail,
            stat.f_files,
            stat.f_ffree,
        ] {
            body.u64(value)?;
        }
        for value in [stat.f_bsize, stat.f_namelen, stat.f_frsize] {
            body.u32(u32::try_from(value).unwrap_or(u32::MAX))?;
        }
        body.zeros(28)?;
        Ok(Answer::Body)
    }

    fn syncfs(&self, call: Call<'_>) -> Result<Answer> {
        let node = self.nodes.get(call.node)?;
        let directory = self.open_directory(&node)?;
        sys::sync_file_system(directory.as_fd())?;
        Ok(Answer::Body)
    }

    /// Opens a node's directory for reading. No other kind of file is ever opened for it.
    fn open_directory(&self, node: &Pinned) -> Result<OwnedFd> {
        if node.kind() != libc::S_IFDIR {
            return Err(Errno(libc::ENOTDIR));
        }
        sys::reopen(self.proc_fds(), node.fd(), libc::O_RDONLY | libc::O_DIRECTORY)
    }

    /// The entry `name` of `parent`, whose descriptor names it and nothing more.
    fn entry(&self, parent: &Pinned, name: &CStr) -> Result<OwnedFd> {
        sys::open_entry(parent.fd(), name)
    }
}

/// Adds a validity as FUSE splits it: the seconds come first, the nanoseconds later.
fn put_valid_seconds(body: &mut Body) -> Result<()> {
    body.u64(VALID.as_secs())
}

fn put_valid_nanos(body: &mut Body) -> Result<()> {
    body.u32(VALID.subsec_nanos())
}
