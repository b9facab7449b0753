//! Directories: OPENDIR, READDIR, READDIRPLUS, FSYNCDIR.
//!
//! Offsets are the file system's own cookies, so a position that the guest keeps stays good while entries come and
//! go, as far as the host's file system sees to that.

use super::{Answer, Call, Passthrough};
use crate::fuse::{Body, DIRENT_LEN, ENTRY_LEN, FSYNC_FDATASYNC, NAME_MAX};
use crate::handle::{Handle, OpenDir};
use crate::node::Pinned;
use crate::sys::{self, Errno, Result};
use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Most bytes of a reply with entries.
const MAX_ENTRIES_LEN: usize = 64 * 1024;

/// Shortest buffer for getdents64: one entry with the longest name, and room to spare.
const MIN_RAW_LEN: usize = 512;

/// Bytes of `struct linux_dirent64` before its name.
const RAW_NAME_AT: usize = 19;

/// An entry as getdents64 gives it.
struct Raw<'a> {
    inode: u64,
    next: u64,
    kind: u8,
    name: &'a CStr,
}

impl<'a> Raw<'a> {
    /// Takes one entry off the front of `bytes`; `None` at the end.
    fn take(bytes: &mut &'a [u8]) -> Option<Self> {
        let inode = u64::from_ne_bytes(*bytes.first_chunk()?);
        let next = u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
        let len = usize::from(u16::from_ne_bytes(*bytes.get(16..)?.first_chunk()?));
        let kind = *bytes.get(18)?;
        let (entry, rest) = bytes.split_at_checked(len)?;
        let name = CStr::from_bytes_until_nul(entry.get(RAW_NAME_AT..)?).ok()?;
        *bytes = rest;
        Some(Self {
            inode,
            next,
            kind,
            name,
        })
    }

    fn is_dot(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }

    /// Bytes as a `fuse_dirent`, with its padding.
    fn len(&self) -> usize {
        DIRENT_LEN
            .saturating_add(self.name.count_bytes())
            .next_multiple_of(8)
    }

    fn put(&self, body: &mut Body, inode: u64) -> Result<()> {
        let name = self.name.to_bytes();
        body.u64(inode)?;
        body.u64(self.next)?;
        body.u32(u32::try_from(name.len()).map_err(|_| Errno(libc::ENAMETOOLONG))?)?;
        body.u32(u32::from(self.kind))?;
        body.bytes(name)?;
        body.zeros(self.len().saturating_sub(DIRENT_LEN + name.len()))
    }
}

impl Passthrough {
    pub(super) fn opendir(&self, call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let directory = self.open_directory(&self.nodes.get(call.node)?)?;
        let handle = self
            .handles
            .enter(Handle::Directory(Arc::new(OpenDir::new(directory))))?;
        let written = body.u64(handle).and_then(|()| body.u64(0));
        if let Err(error) = written {
            self.handles.release(handle)?;
            return Err(error);
        }
        Ok(Answer::Body)
    }

    pub(super) fn fsyncdir(&self, mut call: Call<'_>) -> Result<Answer> {
        let (handle, flags) = (call.args.u64()?, call.args.u32()?);
        sys::sync(self.handles.directory(handle)?.fd(), flags & FSYNC_FDATASYNC != 0)?;
        Ok(Answer::Body)
    }

    pub(super) fn readdir(&self, mut call: Call<'_>, body: &mut Body, plus: bool) -> Result<Answer> {
        let (handle, offset, size) = (call.args.u64()?, call.args.u64()?, call.args.u32()?);
        let node = self.nodes.get(call.node)?;
        let directory = self.handles.directory(handle)?;
        body.reset(body.room().min(size as usize).min(MAX_ENTRIES_LEN));

        let mut position = directory.position();
        if *position != Some(offset) {
            // Unknown until the seek has succeeded.
            *position = None;
            sys::seek(directory.fd(), offset as i64, libc::SEEK_SET)?;
        }
        // An entry takes about this many times the room in the reply; what was read too much is read again.
        let expected = if plus { body.room() / 5 } else { body.room() };
        let mut raw = [0u8; MAX_ENTRIES_LEN];
        let raw = raw
            .get_mut(..expected.clamp(MIN_RAW_LEN, MAX_ENTRIES_LEN))
            .unwrap_or_default();
        *position = None;
        let len = sys::read_dir(directory.fd(), raw)?;
        let mut entries = raw.get(..len).unwrap_or_default();
        let mut at = offset;
        let mut all = true;
        while let Some(entry) = Raw::take(&mut entries) {
            if !self.put_dir_entry(body, (&node, directory.fd()), &entry, plus)? {
                all = false;
                break;
            }
            at = entry.next;
        }
        if all {
            *position = Some(at);
        } else if body.is_empty() {
            return Err(Errno(libc::EINVAL));
        }
        Ok(Answer::Body)
    }

    /// Adds one entry; whether there was room for it.
    fn put_dir_entry(
        &self,
        body: &mut Body,
        (parent, directory): (&Pinned, BorrowedFd<'_>),
        entry: &Raw<'_>,
        plus: bool,
    ) -> Result<bool> {
        let len = entry.len().saturating_add(if plus { ENTRY_LEN } else { 0 });
        if entry.name.count_bytes() > NAME_MAX {
            // No Linux file system has such a name; the guest could not use it.
            return Ok(true);
        }
        if len > body.room() {
            return Ok(false);
        }
        let inode = if entry.name == c".." {
            inode_above(directory)?
        } else {
            entry.inode
        };
        if plus {
            // A node of 0 tells the guest to look it up itself if it cares, and to learn why it cannot be.
            let found = if entry.is_dot() {
                None
            } else {
                self.find(parent, entry.name).ok()
            };
            match found {
                Some(found) => self.put_entry(body, parent, &found)?,
                None => body.zeros(ENTRY_LEN)?,
            }
        }
        entry.put(body, inode)?;
        Ok(true)
    }
}

/// The number of a directory's `..`. What the file system says of it may lie above the share: it knows neither where the
/// share begins, nor where it is mounted. A directory without a way up within the share is above itself, as a root is.
fn inode_above(directory: BorrowedFd<'_>) -> Result<u64> {
    let above = sys::stat_above(directory).or_else(|_| sys::stat(directory))?;
    Ok(above.stx_ino)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::Raw;
    use proptest::prelude::*;

    #[test]
    fn entries_are_read_as_the_kernel_writes_them() {
        let mut bytes = vec![];
        bytes.extend(7u64.to_ne_bytes());
        bytes.extend(9u64.to_ne_bytes());
        bytes.extend(24u16.to_ne_bytes());
        bytes.push(libc::DT_DIR);
        bytes.extend(b"ab\0\0\0");
        let mut rest = &bytes[..];
        let entry = Raw::take(&mut rest).unwrap();
        assert_eq!(
            (entry.inode, entry.next, entry.kind, entry.name),
            (7, 9, libc::DT_DIR, c"ab")
        );
        assert_eq!(entry.len(), 32);
        assert!(Raw::take(&mut rest).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut rest = &bytes[..];
            let mut last = rest.len() + 1;
            while Raw::take(&mut rest).is_some() {
                prop_assert!(rest.len() < last);
                last = rest.len();
            }
        }
    }
}
