//! Looking at a directory's files while somebody else may change them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

use husk_agent_protocol::limits::{MAX_MIRROR_ENTRIES, MAX_MIRROR_PATH, MAX_MIRRORED_FILE};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2, readlinkat},
    sys::stat::{Mode, SFlag},
};

use super::Refusal;

/// What stat(2) tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// Which file it is.
    pub id: Id,
    /// With the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub mtime: Time,
    pub ctime: Time,
}

/// Seconds and nanoseconds since the epoch.
pub(super) type Time = (i64, u32);

/// Which file something is. Inodes are used again; with the time of its birth, where the file system knows that, a file is
/// not taken for the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id {
    device: (u32, u32),
    inode: u64,
    birth: Time,
}

impl Stat {
    fn of(place: BorrowedFd<'_>) -> io::Result<Self> {
        let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is an empty C string and the buffer is of the kernel's size.
        let result = unsafe {
            libc::statx(
                place.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_BASIC_STATS | libc::STATX_BTIME,
                found.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed and then filled by the kernel; every bit pattern is a valid statx.
        let found = unsafe { found.assume_init() };
        let time = |time: libc::statx_timestamp| (time.tv_sec, time.tv_nsec);
        Ok(Self {
            id: Id {
                device: (found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
                birth: time(found.stx_btime),
            },
            mode: found.stx_mode.into(),
            uid: found.stx_uid,
            gid: found.stx_gid,
            size: found.stx_size,
            mtime: time(found.stx_mtime),
            ctime: time(found.stx_ctime),
        })
    }

    pub fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.mode) & SFlag::S_IFMT
    }

    pub fn is_directory(&self) -> bool {
        self.kind() == SFlag::S_IFDIR
    }

    /// Whether owner and mode are the same.
    pub fn same_access(&self, other: &Self) -> bool {
        (self.mode, self.uid, self.gid) == (other.mode, other.uid, other.gid)
    }

    /// Whether nothing tells of a change of the contents.
    pub fn unchanged(&self, other: &Self) -> bool {
        (self.size, self.mtime, self.ctime) == (other.size, other.mtime, other.ctime)
    }
}

/// A file that was found, held as a place only.
pub(super) struct Found {
    place: OwnedFd,
    pub stat: Stat,
}

/// Looks at `path` below `root`; empty: `root` itself. No link is followed, no mount entered. `None`: nothing is there.
pub(super) fn look(root: BorrowedFd<'_>, path: &[u8]) -> Result<Option<Found>, Refusal> {
    if path.len() > MAX_MIRROR_PATH {
        return Err(Refusal::Path(path.to_vec()));
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    let name: &[u8] = if path.is_empty() { b"." } else { path };
    let place = match openat2(root, name, how) {
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
        Err(Errno::EXDEV) => return Err(Refusal::Kind(path.to_vec(), "a mount point")),
        place => place.map_err(|error| Refusal::unreadable(path, error))?,
    };
    let stat = Stat::of(place.as_fd()).map_err(|error| Refusal::Unreadable(path.to_vec(), error))?;
    Ok(Some(Found { place, stat }))
}

impl Found {
    /// A path that leads to it, whatever its name is now.
    pub fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.place.as_raw_fd())
    }

    /// What is in the file, or where the link points.
    pub fn content(&self, path: &[u8]) -> Result<Vec<u8>, Refusal> {
        let unreadable = |error: Errno| Refusal::unreadable(path, error);
        let kind = self.stat.kind();
        if kind == SFlag::S_IFLNK {
            let target = readlinkat(self.place.as_fd(), "").map_err(unreadable)?;
            return Ok(target.into_vec());
        }
        // What is opened here is known to be a regular file, and no other.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = File::from(open(self.path().as_str(), flags, Mode::empty()).map_err(unreadable)?);
        let mut content = Vec::new();
        let most = MAX_MIRRORED_FILE as u64 + 1;
        file.take(most)
            .read_to_end(&mut content)
            .map_err(|error| Refusal::Unreadable(path.to_vec(), error))?;
        if content.len() > MAX_MIRRORED_FILE {
            return Err(Refusal::File(path.to_vec()));
        }
        Ok(content)
    }

    /// The names in the directory, sorted.
    pub fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let unreadable = |error: io::Error| Refusal::Unreadable(path.to_vec(), error);
        let entries = match fs::read_dir(self.path()) {
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(unreadable)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            if names.len() > MAX_MIRROR_ENTRIES {
                return Err(Refusal::Entries);
            }
            names.push(entry.map_err(unreadable)?.file_name().into_vec());
        }
        names.sort();
        Ok(names)
    }
}

/// The path of `name` in the directory at `path`.
pub(super) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        return name.to_vec();
    }
    [path, b"/", name].concat()
}

/// A path for people.
pub(super) fn shown(path: &[u8]) -> String {
    if path.is_empty() {
        return ".".into();
    }
    OsStr::from_bytes(path).to_string_lossy().into_owned()
}
