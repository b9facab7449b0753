//! GETATTR, STATX and SETATTR.

use super::{Answer, Call, Passthrough, put_valid_nanos, put_valid_seconds};
use crate::credentials::without_fsetid;
use crate::fuse::{Body, fattr, put_attr, put_statx};
use crate::node::Pinned;
use crate::sys::{self, Errno, Result};
use std::os::fd::AsFd;

/// `fuse_setattr_in`.
struct Change {
    valid: u32,
    handle: u64,
    size: u64,
    times: [libc::timespec; 2],
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn read(call: &mut Call<'_>) -> Result<Self> {
        let args = &mut call.args;
        let valid = args.u32()?;
        args.skip(4)?;
        let (handle, size, _lock_owner) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (args.u32()?, args.u32()?, args.u32()?);
        let mode = args.u32()?;
        args.skip(4)?;
        let (uid, gid) = (args.u32()?, args.u32()?);
        args.skip(4)?;
        args.end()?;
        let time = |set, now, seconds: u64, nanos: u32| -> Result<libc::timespec> {
            let tv_nsec = match valid {
                v if v & now != 0 => libc::UTIME_NOW,
                v if v & set == 0 => libc::UTIME_OMIT,
                // The kernel's own marks are numbers above, which the guest must not reach.
                _ if nanos >= 1_000_000_000 => return Err(Errno(libc::EINVAL)),
                _ => i64::from(nanos),
            };
            Ok(libc::timespec {
                tv_sec: seconds as i64,
                tv_nsec,
            })
        };
        let times = [
            time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_ns)?,
            time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_ns)?,
        ];
        Ok(Self {
            valid,
            handle,
            size,
            times,
            mode,
            uid,
            gid,
        })
    }

    fn has(&self, bits: u32) -> bool {
        self.valid & bits != 0
    }
}

impl Passthrough {
    pub(super) fn getattr(&self, call: Call<'_>, body: &mut Body) -> Result<Answer> {
        // The node's own descriptor serves for unlinked files too, so the handle that may come along is not needed.
        let node = self.nodes.get(call.node)?;
        self.put_attributes(body, &node)
    }

    pub(super) fn statx(&self, call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let stat = sys::stat(self.nodes.get(call.node)?.fd())?;
        put_valid_seconds(body)?;
        put_valid_nanos(body)?;
        body.zeros(20)?;
        put_statx(body, &stat)?;
        Ok(Answer::Body)
    }

    pub(super) fn setattr(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let change = Change::read(&mut call)?;
        let node = self.nodes.get(call.node)?;
        if change.has(fattr::MODE) {
            if node.kind() == libc::S_IFLNK {
                return Err(Errno(libc::EOPNOTSUPP));
            }
            sys::chmod(self.proc_fds(), node.fd(), change.mode & 0o7777)?;
        }
        if change.has(fattr::UID | fattr::GID) {
            let uid = if change.has(fattr::UID) {
                change.uid
            } else {
                u32::MAX
            };
            let gid = if change.has(fattr::GID) {
                change.gid
            } else {
                u32::MAX
            };
            sys::chown(node.fd(), uid, gid)?;
        }
        if change.has(fattr::SIZE) {
            if change.has(fattr::KILL_SUIDGID) {
                without_fsetid(|| self.resize(&node, &change))?;
            } else {
                self.resize(&node, &change)?;
            }
        }
        if change.has(fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW) {
            sys::set_times(node.fd(), &change.times)?;
        }
        self.put_attributes(body, &node)
    }

    fn resize(&self, node: &Pinned, change: &Change) -> Result<()> {
        let size = i64::try_from(change.size).map_err(|_| Errno(libc::EFBIG))?;
        if change.has(fattr::FH) {
            return sys::truncate(self.handles.file(change.handle)?.fd(), size);
        }
        let file = self.open_node(node, libc::O_WRONLY)?;
        sys::truncate(file.as_fd(), size)
    }

    fn put_attributes(&self, body: &mut Body, node: &Pinned) -> Result<Answer> {
        let stat = sys::stat(node.fd())?;
        put_valid_seconds(body)?;
        put_valid_nanos(body)?;
        body.u32(0)?;
        put_attr(body, &stat, 0)?;
        Ok(Answer::Body)
    }
}
