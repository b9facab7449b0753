//! The FUSE wire (linux/fuse.h, version 7.38 and FUSE_STATX of 7.39): reading requests, building replies.
//!
//! All that is read here was written by the guest.

mod args;
mod body;

pub use args::Args;
pub use body::{Body, put_attr, put_statx};

use crate::sys::Result;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_travel_both_ways() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (259, 0xfffff), (0xfff, 1)] {
            let device = decode_device(encode_device(major, minor));
            assert_eq!((libc::major(device), libc::minor(device)), (major, minor));
        }
    }
}
