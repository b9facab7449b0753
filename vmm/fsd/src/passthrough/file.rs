//! Regular files: opening, making and closing them, and what READ and WRITE (the VMM's part) leave over.

use super::lookup::Found;
use super::{Answer, Call, Passthrough};
use crate::credentials::without_fsetid;
use crate::fuse::{Body, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FSYNC_FDATASYNC, OPEN_KILL_SUIDGID};
use crate::handle::{Handle, OpenFile};
use crate::node::{Pinned, Stamp};
use crate::sys::{self, Errno, Result};
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The guest's open flags that reach the host. O_APPEND does not: the descriptor also serves the guest's page cache,
/// whose writes have their place; the VMM appends write by write. O_DIRECT's alignment is between the guest's
/// program and its kernel. All others (O_CREAT, O_EXCL, O_NOFOLLOW, …) the guest's kernel has dealt with.
const HOST_FLAGS: libc::c_int =
    libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;

/// Most bytes of one COPY_FILE_RANGE, so that none holds a thread for long. The caller goes on with the rest.
const MAX_COPY: u64 = 64 << 20;

/// Attempts at opening a name that comes and goes while it is opened.
const ATTEMPTS: u32 = 16;

/// `fuse_create_in`.
struct Create {
    flags: libc::c_int,
    mode: u32,
    umask: u32,
    open_flags: u32,
}

impl Create {
    fn read(call: &mut Call<'_>) -> Result<Self> {
        let args = &mut call.args;
        Ok(Self {
            flags: args.u32()? as libc::c_int,
            mode: args.u32()? & 0o7777,
            umask: args.u32()?,
            open_flags: args.u32()?,
        })
    }
}

impl Passthrough {
    pub(super) fn open(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let (flags, open_flags) = (call.args.u32()? as libc::c_int, call.args.u32()?);
        call.args.end()?;
        let node = self.nodes.get(call.node)?;
        let file = self.open_as_asked(&node, flags, open_flags)?;
        let stat = sys::stat(file.as_fd())?;
        let keep_cache = node.note_open(Stamp::settled(&stat, now()));
        self.put_open(body, &node, file, flags, keep_cache)
    }

    pub(super) fn create(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let asked = Create::read(&mut call)?;
        let name = call.args.name()?;
        call.args.end()?;
        let parent = self.nodes.get(call.node)?;
        let (file, found) = self.make_or_open(&call, &parent, name, &asked)?;
        self.put_created(body, &parent, file, &found, asked.flags)
    }

    pub(super) fn tmpfile(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        // The name that follows is the guest's own, of an entry that is none.
        let asked = Create::read(&mut call)?;
        let parent = self.nodes.get(call.node)?;
        let flags = asked.flags & HOST_FLAGS;
        let file = call
            .caller
            .act(asked.umask, || sys::open_tmpfile(parent.fd(), flags, asked.mode))?;
        let found = self.adopt_open(&file, None)?;
        self.put_created(body, &parent, file, &found, asked.flags)
    }

    pub(super) fn release(&self, mut call: Call<'_>) -> Result<Answer> {
        self.handles.release(call.args.u64()?)?;
        Ok(Answer::Body)
    }

    pub(super) fn flush(&self, mut call: Call<'_>) -> Result<Answer> {
        sys::flush(self.handles.file(call.args.u64()?)?.fd())?;
        Ok(Answer::Body)
    }

    pub(super) fn fsync(&self, mut call: Call<'_>) -> Result<Answer> {
        let (handle, flags) = (call.args.u64()?, call.args.u32()?);
        sys::sync(self.handles.file(handle)?.fd(), flags & FSYNC_FDATASYNC != 0)?;
        Ok(Answer::Body)
    }

    pub(super) fn fallocate(&self, mut call: Call<'_>) -> Result<Answer> {
        let args = &mut call.args;
        let (handle, offset, len, mode) = (args.u64()?, args.offset()?, args.offset()?, args.u32()?);
        let file = self.handles.file(handle)?;
        // FUSE does not say whether set-id bits are to be cleared here, so they always are.
        without_fsetid(|| sys::allocate(file.fd(), mode as libc::c_int, offset, len))?;
        Ok(Answer::Body)
    }

    pub(super) fn lseek(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let (handle, offset, whence) = (call.args.u64()?, call.args.offset()?, call.args.u32()?);
        let whence = match whence as libc::c_int {
            w @ (libc::SEEK_DATA | libc::SEEK_HOLE) => w,
            _ => return Err(Errno(libc::EINVAL)),
        };
        body.u64(sys::seek(self.handles.file(handle)?.fd(), offset, whence)?)?;
        Ok(Answer::Body)
    }

    pub(super) fn copy_file_range(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let args = &mut call.args;
        let (from, from_at) = (args.u64()?, args.offset()?);
        let (_to_node, to, to_at) = (args.u64()?, args.u64()?, args.offset()?);
        let (len, flags) = (args.u64()?, args.u64()?);
        if flags != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let (from, to) = (self.handles.file(from)?, self.handles.file(to)?);
        let len = len.min(MAX_COPY) as usize;
        let copied = without_fsetid(|| sys::copy_range(from.fd(), from_at, to.fd(), to_at, len))?;
        body.u32(u32::try_from(copied).map_err(|_| Errno(libc::EIO))?)?;
        body.u32(0)?;
        Ok(Answer::Body)
    }

    /// Opens a node's regular file. Devices, FIFOs and sockets are the guest's kernel's, never opened on the host.
    pub(super) fn open_node(&self, node: &Pinned, flags: libc::c_int) -> Result<OwnedFd> {
        match node.kind() {
            libc::S_IFREG => sys::reopen(self.proc_fds(), node.fd(), flags),
            libc::S_IFDIR => Err(Errno(libc::EISDIR)),
            libc::S_IFLNK => Err(Errno(libc::ELOOP)),
            _ => Err(Errno(libc::ENXIO)),
        }
    }

    fn open_as_asked(&self, node: &Pinned, flags: libc::c_int, open_flags: u32) -> Result<OwnedFd> {
        let open = || self.open_node(node, flags & HOST_FLAGS);
        if flags & libc::O_TRUNC != 0 && open_flags & OPEN_KILL_SUIDGID != 0 {
            without_fsetid(open)
        } else {
            open()
        }
    }

    /// Makes the file, or opens the one that is there. The guest asks because it saw none, but the host may have
    /// made one since; O_CREAT is never used on an existing file, lest the host's `fs.protected_regular`, which
    /// knows nothing of the guest's users, refuse it.
    fn make_or_open(
        &self,
        call: &Call<'_>,
        parent: &Pinned,
        name: &CStr,
        asked: &Create,
    ) -> Result<(OwnedFd, Found)> {
        let make_flags = (asked.flags & HOST_FLAGS) | libc::O_CREAT | libc::O_EXCL;
        for _ in 0..ATTEMPTS {
            let made = call.caller.act(asked.umask, || {
                sys::open_beneath(parent.fd(), name, make_flags, asked.mode)
            });
            match made {
                Ok(file) => {
                    let found = self.adopt_open(&file, Some((parent, name)))?;
                    return Ok((file, found));
                }
                Err(Errno(libc::EEXIST)) if asked.flags & libc::O_EXCL == 0 => {}
                Err(error) => return Err(error),
            }
            let found = match self.find(parent, name) {
                Ok(found) => found,
                Err(Errno(libc::ENOENT)) => continue,
                Err(error) => return Err(error),
            };
            return match self.open_as_asked(&found.node, asked.flags, asked.open_flags) {
                Ok(file) => Ok((file, found)),
                Err(error) => {
                    self.unfind(&found);
                    Err(error)
                }
            };
        }
        Err(Errno(libc::EBUSY))
    }

    fn put_created(
        &self,
        body: &mut Body,
        parent: &Pinned,
        file: OwnedFd,
        found: &Found,
        flags: libc::c_int,
    ) -> Result<Answer> {
        self.put_entry(body, parent, found)?;
        self.put_open(body, &found.node, file, flags, false)
            .inspect_err(|_| self.unfind(found))
    }

    /// Enters the handle and adds a `fuse_open_out`.
    fn put_open(
        &self,
        body: &mut Body,
        node: &Pinned,
        file: OwnedFd,
        flags: libc::c_int,
        keep_cache: bool,
    ) -> Result<Answer> {
        let writable = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let file = Arc::new(OpenFile::new(file, writable, node.clone()));
        let handle = self.handles.enter(Handle::File(file.clone()))?;
        let mut open_flags = 0;
        if keep_cache {
            open_flags |= FOPEN_KEEP_CACHE;
        }
        if !writable {
            // Nothing to report at close: saves a request for each file read.
            open_flags |= FOPEN_NOFLUSH;
        }
        let written = body
            .u64(handle)
            .and_then(|()| body.u32(open_flags))
            .and_then(|()| body.u32(0));
        if let Err(error) = written {
            self.handles.release(handle)?;
            return Err(error);
        }
        Ok(Answer::Opened(file))
    }
}

fn now() -> libc::timespec {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` lives through the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    now
}
