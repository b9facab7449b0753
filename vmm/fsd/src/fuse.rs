//! The FUSE wire (linux/fuse.h, version 7.38 and FUSE_STATX of 7.39): reading requests, building replies.
//!
//! All that is read here was written by the guest. [`Args`] takes fields off the front and never past the end.

use crate::sys::{Errno, Result};
use std::ffi::CStr;

/// Protocol version that the server speaks.
pub const MAJOR: u32 = 7;
/// Its minor version; the guest uses the smaller of both sides'.
pub const MINOR: u32 = 38;
/// The share's root directory.
pub const ROOT_ID: u64 = 1;
/// Longest name of a directory entry, in bytes.
pub const NAME_MAX: usize = 255;
/// Length of `fuse_out_header` in bytes.
pub const OUT_HEADER_LEN: usize = 16;
/// Length of `fuse_entry_out` in bytes.
pub const ENTRY_LEN: usize = 128;
/// Length of `fuse_dirent` without its name, in bytes.
pub const DIRENT_LEN: usize = 24;

/// Operations, as numbered in linux/fuse.h.
#[allow(missing_docs)]
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// What INIT settles (`FUSE_*` of linux/fuse.h without the prefix).
#[allow(missing_docs)]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
}

/// `fuse_setattr_in.valid`.
#[allow(missing_docs)]
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `fuse_open_out.open_flags`: the guest keeps what it has cached of the file.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `fuse_open_out.open_flags`: no FLUSH when the file is closed.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `open_flags` of OPEN and CREATE: truncation clears the set-id bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `setxattr_flags`: setting this ACL clears the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `fuse_attr.flags`: the directory is the root of another mount.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;

/// `fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the request, this header included, in bytes.
    pub len: u32,
    /// One of [`op`].
    pub opcode: u32,
    /// Names the request; its reply bears it.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// The calling process's file-system user id.
    pub uid: u32,
    /// Its file-system group id.
    pub gid: u32,
}

impl InHeader {
    /// Reads a header off the front of `args`.
    ///
    /// # Errors
    /// EINVAL if it is too short.
    pub fn read(args: &mut Args<'_>) -> Result<Self> {
        let header = Self {
            len: args.u32()?,
            opcode: args.u32()?,
            unique: args.u64()?,
            node: args.u64()?,
            uid: args.u32()?,
            gid: args.u32()?,
        };
        // pid, total_extlen and padding: of no concern here.
        args.skip(8)?;
        Ok(header)
    }
}

/// What is left of a request.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    /// The whole of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>().ok_or(Errno(libc::EINVAL))?;
        self.0 = rest;
        Ok(*array)
    }

    /// The next integer.
    ///
    /// # Errors
    /// EINVAL at the end, as for all that follow.
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next integer.
    ///
    /// # Errors
    /// EINVAL at the end.
    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next integer as an offset or length in a file.
    ///
    /// # Errors
    /// EINVAL at the end, or if it is 2^63 or more.
    pub fn offset(&mut self) -> Result<i64> {
        i64::try_from(self.u64()?).map_err(|_| Errno(libc::EINVAL))
    }

    /// Leaves `n` bytes out.
    ///
    /// # Errors
    /// EINVAL if there are fewer.
    pub fn skip(&mut self, n: usize) -> Result<()> {
        self.bytes(n).map(|_| ())
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// EINVAL if there are fewer.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(n).ok_or(Errno(libc::EINVAL))?;
        self.0 = rest;
        Ok(bytes)
    }

    /// The next string, up to its NUL.
    ///
    /// # Errors
    /// EINVAL if there is no NUL.
    pub fn string(&mut self) -> Result<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno(libc::EINVAL))?;
        self.skip(string.count_bytes().saturating_add(1))?;
        Ok(string)
    }

    /// The next string, which must be the name of a directory entry: one path component, and neither `.` nor `..`.
    ///
    /// # Errors
    /// EINVAL for what is no such name, ENAMETOOLONG for one over [`NAME_MAX`] bytes.
    pub fn name(&mut self) -> Result<&'a CStr> {
        let name = self.string()?;
        check_name(name)?;
        Ok(name)
    }

    /// That nothing is left.
    ///
    /// # Errors
    /// EINVAL if something is.
    pub fn end(&self) -> Result<()> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Errno(libc::EINVAL))
        }
    }
}

fn check_name(name: &CStr) -> Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno(libc::EINVAL));
    }
    if bytes.len() > NAME_MAX {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    Ok(())
}

/// A reply's body as it is built; never longer than the guest has room for.
#[derive(Debug)]
pub struct Body {
    bytes: Vec<u8>,
    start: usize,
    limit: usize,
}

impl Body {
    /// An empty body after `start` bytes of headers, in a buffer of at most `capacity` bytes in all.
    pub fn new(start: usize, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity.max(start));
        bytes.resize(start, 0);
        Self {
            bytes,
            start,
            limit: capacity,
        }
    }

    /// Empties the body and sets how many bytes it may have, as far as the buffer goes.
    pub fn reset(&mut self, limit: usize) {
        self.bytes.truncate(self.start);
        self.limit = limit.saturating_add(self.start).min(self.bytes.capacity());
    }

    /// Bytes of the body so far.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    /// Whether the body is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that may still be added.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// EIO if there is no room, as for all that follow: the guest gave too little for the answer.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.room() {
            return Err(Errno(libc::EIO));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Adds an integer.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn u32(&mut self, value: u32) -> Result<()> {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds an integer.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn u64(&mut self, value: u64) -> Result<()> {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds zeros.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn zeros(&mut self, n: usize) -> Result<()> {
        if n > self.room() {
            return Err(Errno(libc::EIO));
        }
        self.bytes.resize(self.bytes.len().saturating_add(n), 0);
        Ok(())
    }

    /// Adds up to `n` bytes (fewer if there is less room) that `fill` writes; it returns how many it wrote.
    ///
    /// # Errors
    /// What `fill` returns.
    pub fn fill(&mut self, n: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize>) -> Result<usize> {
        let before = self.bytes.len();
        self.zeros(n.min(self.room()))?;
        let result = fill(self.bytes.get_mut(before..).unwrap_or_default());
        let written = result.unwrap_or(0);
        self.bytes.truncate(before.saturating_add(written));
        result
    }

    /// The headers' bytes, to be filled in at the end.
    pub fn headers(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.start).unwrap_or_default()
    }

    /// Headers and body.
    pub fn packet(&self) -> &[u8] {
        &self.bytes
    }
}

/// A device number as FUSE carries it: the kernel's `new_encode_dev`.
pub fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The device number that a guest gave to MKNOD.
pub fn decode_device(device: u32) -> libc::dev_t {
    let major = (device & 0xfff00) >> 8;
    let minor = (device & 0xff) | ((device >> 12) & 0xfff00);
    libc::makedev(major, minor)
}

/// Adds a `fuse_attr`.
///
/// # Errors
/// EIO if there is no room.
pub fn put_attr(body: &mut Body, stat: &libc::statx, flags: u32) -> Result<()> {
    for value in [
        stat.stx_ino,
        stat.stx_size,
        stat.stx_blocks,
        stat.stx_atime.tv_sec as u64,
        stat.stx_mtime.tv_sec as u64,
        stat.stx_ctime.tv_sec as u64,
    ] {
        body.u64(value)?;
    }
    for value in [
        stat.stx_atime.tv_nsec,
        stat.stx_mtime.tv_nsec,
        stat.stx_ctime.tv_nsec,
        u32::from(stat.stx_mode),
        stat.stx_nlink,
        stat.stx_uid,
        stat.stx_gid,
        encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        stat.stx_blksize,
        flags,
    ] {
        body.u32(value)?;
    }
    Ok(())
}

/// Adds a `fuse_statx`.
///
/// # Errors
/// EIO if there is no room.
pub fn put_statx(body: &mut Body, stat: &libc::statx) -> Result<()> {
    let known = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    body.u32(stat.stx_mask & known)?;
    body.u32(stat.stx_blksize)?;
    body.u64(stat.stx_attributes)?;
    body.u32(stat.stx_nlink)?;
    body.u32(stat.stx_uid)?;
    body.u32(stat.stx_gid)?;
    body.u32(u32::from(stat.stx_mode))?;
    body.u64(stat.stx_ino)?;
    body.u64(stat.stx_size)?;
    body.u64(stat.stx_blocks)?;
    body.u64(stat.stx_attributes_mask)?;
    for time in [&stat.stx_atime, &stat.stx_btime, &stat.stx_ctime, &stat.stx_mtime] {
        body.u64(time.tv_sec as u64)?;
        body.u32(time.tv_nsec)?;
        body.u32(0)?;
    }
    for value in [
        stat.stx_rdev_major,
        stat.stx_rdev_minor,
        stat.stx_dev_major,
        stat.stx_dev_minor,
    ] {
        body.u32(value)?;
    }
    body.zeros(14 * 8)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn name_of(bytes: &[u8]) -> Result<Vec<u8>> {
        Args::new(bytes).name().map(|n| n.to_bytes().to_vec())
    }

    #[test]
    fn names_are_one_component() {
        for bad in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"a/b\0",
            b"/\0",
            b"../x\0",
            b"no end",
            b"",
        ] {
            assert_eq!(name_of(bad), Err(Errno(libc::EINVAL)), "{bad:?}");
        }
        assert_eq!(
            name_of(&[vec![b'x'; 256], vec![0]].concat()),
            Err(Errno(libc::ENAMETOOLONG))
        );
        assert_eq!(name_of(&[vec![b'x'; 255], vec![0]].concat()).unwrap().len(), 255);
        for good in [&b"...\0"[..], b"..a\0", b"\n\xff \\\0", b" \0"] {
            assert_eq!(name_of(good).unwrap(), good[..good.len() - 1]);
        }
    }

    #[test]
    fn devices_travel_both_ways() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (259, 0xfffff), (0xfff, 1)] {
            let device = decode_device(encode_device(major, minor));
            assert_eq!((libc::major(device), libc::minor(device)), (major, minor));
        }
    }

    #[test]
    fn structures_have_the_kernels_lengths() {
        // SAFETY: statx is plain integers, for which zero is valid.
        let stat: libc::statx = unsafe { std::mem::zeroed() };
        let mut body = Body::new(0, 4096);
        put_attr(&mut body, &stat, 0).unwrap();
        assert_eq!(body.len(), 88);
        body.reset(4096);
        put_statx(&mut body, &stat).unwrap();
        assert_eq!(body.len(), 256);
    }

    #[test]
    fn a_body_stays_within_its_limit() {
        let mut body = Body::new(24, 100);
        body.reset(10);
        body.u64(1).unwrap();
        assert_eq!(body.u32(1), Err(Errno(libc::EIO)));
        assert_eq!(body.room(), 2);
        assert_eq!(body.fill(100, |b| Ok(b.len())), Ok(2));
        body.reset(usize::MAX);
        assert_eq!(body.room(), 76);
        assert_eq!(body.fill(8, |_| Err(Errno(5))), Err(Errno(5)));
        assert!(body.is_empty());
        assert_eq!(body.packet().len(), 24);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            n in any::<usize>(),
        ) {
            let mut args = Args::new(&bytes);
            let _ = InHeader::read(&mut args);
            let _ = args.offset();
            let _ = args.name();
            let _ = args.bytes(n);
            let _ = args.string();
            let _ = args.end();
        }

        #[test]
        fn a_name_that_is_taken_is_one_component(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(name) = name_of(&bytes) {
                prop_assert!(!name.is_empty() && name.len() <= NAME_MAX);
                prop_assert!(!name.contains(&b'/') && name != b"." && name != b"..");
            }
        }
    }
}
