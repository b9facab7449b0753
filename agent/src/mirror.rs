//! Mirrors: copies of volumes in the guest's memory, which the host keeps as the volumes are.
//!
//! Linux's virtio-fs has no notifications: whoever waits for a change by inotify(7) would wait forever for one that
//! is made on the host. In a mirror the agent makes the same changes in the same order, so that the kernel tells of them.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use husk_agent_protocol::{
    limits::{MAX_MIRROR_BYTES, MAX_MIRROR_ENTRIES, MAX_MIRROR_PATH, MAX_MIRRORED_FILE},
    messages::{MirrorChange, MirrorFile, mirror_change::Kind},
};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, renameat},
    mount::{MntFlags, umount2},
    sys::{
        stat::{FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat},
};

use crate::{fault::Fault, log, sys};

/// What a page is, in bytes: the least that a file takes.
const PAGE: usize = 4096;

/// A directory of a mirror's file system that containers do not see: for what is on its way in or out.
const STAGE: &CStr = c"stage";

/// What is on its way in, there.
const NEW: &CStr = c"new";

/// The mirrors, by the numbers of their volumes.
#[derive(Debug, Default)]
pub struct Mirrors(HashMap<u32, Mirror>);

impl Mirrors {
    /// Makes `changes` in the mirror of `volume`, which is made below `directory` if there is none.
    ///
    /// # Errors
    ///
    /// The first that failed; the others are made.
    pub fn update(&mut self, directory: &Path, volume: u32, changes: &[MirrorChange]) -> Result<(), Fault> {
        let mirror = match self.0.entry(volume) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let made = Mirror::new(directory.join(volume.to_string()));
                let made = made.map_err(|error| {
                    Fault::system(format_args!("make the mirror of volume {volume}"), error)
                })?;
                place.insert(made)
            }
        };
        let mut result = Ok(());
        for change in changes {
            if let Err(error) = mirror.apply(change) {
                let path = String::from_utf8_lossy(&change.path);
                let kind = change.kind;
                let what = format_args!("{kind:?} {path:?} in the mirror of volume {volume}");
                result = result.and(Err(Fault::system(what, error)));
            }
        }
        result
    }

    /// Forgets the mirror of `volume`.
    pub fn remove(&mut self, volume: u32) {
        self.0.remove(&volume);
    }

    /// What containers mount of the mirror of `volume`, if there is one.
    pub fn source(&self, volume: u32) -> Option<PathBuf> {
        self.0.get(&volume).map(Mirror::source)
    }
}

/// One mirror. Its file system goes with its last mount when it is dropped.
#[derive(Debug)]
struct Mirror {
    place: PathBuf,
    /// What containers see.
    tree: OwnedFd,
    /// See [`STAGE`].
    stage: OwnedFd,
}

impl Mirror {
    fn new(place: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&place)?;
        let made = Self::mount(&place);
        match made {
            Ok((tree, stage)) => Ok(Self { place, tree, stage }),
            Err(error) => {
                let _ = umount2(&place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
                let _ = fs::remove_dir(&place);
                Err(error)
            }
        }
    }

    fn mount(place: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
        // Room for what a mirror may hold, and for one file more on its way in.
        let size = MAX_MIRROR_BYTES + MAX_MIRROR_ENTRIES * PAGE + MAX_MIRRORED_FILE;
        let inodes = MAX_MIRROR_ENTRIES + 64;
        let system = sys::FileSystem::open(c"tmpfs")?;
        for (key, value) in [
            (c"source", "mirror".to_owned()),
            (c"mode", "0700".to_owned()),
            (c"size", size.to_string()),
            (c"nr_inodes", inodes.to_string()),
        ] {
            system.set(key, Some(&CString::new(value)?))?;
        }
        let mount = system.mount(0)?;
        let directory = |name: &CStr| {
            mkdirat(&mount, name, Mode::S_IRWXU)?;
            open_directory(mount.as_fd(), name)
        };
        let (tree, stage) = (directory(c"tree")?, directory(STAGE)?);
        let at = open(
            place,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        sys::attach_tree(mount.as_fd(), at.as_fd())?;
        Ok((tree, stage))
    }

    fn source(&self) -> PathBuf {
        self.place.join("tree")
    }

    fn apply(&self, change: &MirrorChange) -> io::Result<()> {
        let kind = change.kind.enum_value().map_err(|_| Errno::EINVAL)?;
        let file = || change.file.as_ref().ok_or_else(|| io::Error::from(Errno::EINVAL));
        if change.path.is_empty() {
            return match kind {
                Kind::ATTRIBUTES => {
                    set_access(self.tree.as_fd(), file()?)?;
                    set_time(self.tree.as_fd(), file()?, false)
                }
                _ => Err(Errno::EINVAL.into()),
            };
        }
        let (directory, name) = self.find(&change.path)?;
        let (directory, name) = (directory.as_fd(), name.as_c_str());
        match kind {
            Kind::CREATE => match self.create(directory, name, file()?) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    self.take_out(directory, name)?;
                    self.create(directory, name, file()?)
                }
                made => made,
            },
            Kind::PLACE => self.place(directory, name, file()?),
            Kind::WRITE => match write(directory, name, file()?) {
                // The host knows better what is there.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::ELOOP | libc::EISDIR)
                    ) =>
                {
                    self.place(directory, name, file()?)
                }
                written => written,
            },
            Kind::ATTRIBUTES => set_attributes(directory, name, file()?),
            Kind::RENAME => {
                let (to, new) = self.find(&change.to)?;
                self.rename((directory, name), (to.as_fd(), &new))
            }
            Kind::TAKE_OUT => self.take_out(directory, name),
            Kind::REMOVE => self.remove(directory, name),
        }
    }

    /// The directory that `path` is in, and its name there. Symbolic links are not followed.
    fn find(&self, path: &[u8]) -> io::Result<(OwnedFd, CString)> {
        if path.len() > MAX_MIRROR_PATH {
            return Err(Errno::ENAMETOOLONG.into());
        }
        let mut names = path.split(|byte| *byte == b'/');
        if names.any(|name| matches!(name, b"" | b"." | b"..")) {
            return Err(Errno::EINVAL.into());
        }
        let mut parts = path.rsplitn(2, |byte| *byte == b'/');
        let name = parts.next().unwrap_or_default();
        let parent = CString::new(parts.next().unwrap_or(b"."))?;
        let resolve = libc::RESOLVE_BENEATH
            | libc::RESOLVE_NO_SYMLINKS
            | libc::RESOLVE_NO_MAGICLINKS
            | libc::RESOLVE_NO_XDEV;
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let parent = sys::openat2(self.tree.as_fd(), &parent, flags, 0, resolve)?;
        Ok((parent, CString::new(name)?))
    }

    /// Makes a file that is not there. But for a directory, it is made out of sight and linked: it is seen complete.
    fn create(&self, directory: BorrowedFd<'_>, name: &CStr, file: &MirrorFile) -> io::Result<()> {
        if kind(file.mode) == SFlag::S_IFDIR {
            return make(directory, name, file);
        }
        self.clear(NEW)?;
        make(self.stage.as_fd(), NEW, file)?;
        let linked = linkat(&self.stage, NEW, directory, name, AtFlags::empty());
        self.clear(NEW)?;
        Ok(linked?)
    }

    /// Makes a file out of sight, and moves it in.
    fn place(&self, directory: BorrowedFd<'_>, name: &CStr, file: &MirrorFile) -> io::Result<()> {
        self.clear(NEW)?;
        make(self.stage.as_fd(), NEW, file)?;
        self.rename((self.stage.as_fd(), NEW), (directory, name))
    }

    fn rename(&self, from: (BorrowedFd<'_>, &CStr), to: (BorrowedFd<'_>, &CStr)) -> io::Result<()> {
        match renameat(from.0, from.1, to.0, to.1) {
            // What is in the way is of another type, or full.
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EISDIR | Errno::ENOTDIR) => {
                self.take_out(to.0, to.1)?;
                Ok(renameat(from.0, from.1, to.0, to.1)?)
            }
            renamed => Ok(renamed?),
        }
    }

    fn take_out(&self, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        const OLD: &CStr = c"old";
        self.clear(OLD)?;
        match renameat(directory, name, &self.stage, OLD) {
            Err(Errno::ENOENT) => Ok(()),
            moved => {
                moved?;
                self.clear(OLD)
            }
        }
    }

    fn remove(&self, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let removed = match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => unlinkat(directory, name, UnlinkatFlags::RemoveDir),
            removed => removed,
        };
        match removed {
            Err(Errno::ENOENT) => Ok(()),
            // A container that may mount can write to it, too.
            Err(Errno::ENOTEMPTY) => self.take_out(directory, name),
            removed => Ok(removed?),
        }
    }

    /// Removes what the stage has under `name`.
    fn clear(&self, name: &CStr) -> io::Result<()> {
        match unlinkat(&self.stage, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => {
                let name = String::from_utf8_lossy(name.to_bytes()).into_owned();
                let stage = String::from_utf8_lossy(STAGE.to_bytes()).into_owned();
                // It follows no links, whoever exchanges them.
                fs::remove_dir_all(self.place.join(stage).join(name))
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let unmounted = umount2(&self.place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let removed = unmounted
            .map_err(io::Error::from)
            .and_then(|()| fs::remove_dir(&self.place));
        if let Err(error) = removed {
            log::error!("remove {}: {error}", self.place.display());
        }
    }
}

fn open_directory(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?)
}

fn kind(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT
}

/// Makes a file that is not there.
fn make(directory: BorrowedFd<'_>, name: &CStr, file: &MirrorFile) -> io::Result<()> {
    let mode = Mode::from_bits_truncate(file.mode & 0o777);
    match kind(file.mode) {
        SFlag::S_IFDIR => {
            mkdirat(directory, name, mode)?;
            let made = open_directory(directory, name)?;
            // Its time is told when all is in it.
            set_access(made.as_fd(), file)
        }
        SFlag::S_IFREG => {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mut made = File::from(openat(directory, name, flags, mode)?);
            // First whose it is, then what is in it.
            set_access(made.as_fd(), file)?;
            made.write_all(content(file)?)?;
            set_time(made.as_fd(), file, true)
        }
        SFlag::S_IFLNK => {
            symlinkat(content(file)?, directory, name)?;
            set_attributes(directory, name, file)
        }
        _ => Err(Errno::EINVAL.into()),
    }
}

fn content(file: &MirrorFile) -> io::Result<&[u8]> {
    if file.content.len() > MAX_MIRRORED_FILE {
        return Err(Errno::EFBIG.into());
    }
    Ok(&file.content)
}

/// Changes the contents of a file that is there. Who reads it meanwhile never finds it empty.
fn write(directory: BorrowedFd<'_>, name: &CStr, file: &MirrorFile) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let mut there = File::from(openat(directory, name, flags, Mode::empty())?);
    let stat = fstat(&there)?;
    if kind(stat.st_mode) != SFlag::S_IFREG {
        return Err(Errno::EISDIR.into());
    }
    set_access(there.as_fd(), file)?;
    let content = content(file)?;
    there.write_all(content)?;
    if usize::try_from(stat.st_size).is_ok_and(|size| size > content.len()) {
        there.set_len(content.len() as u64)?;
    }
    set_time(there.as_fd(), file, true)
}

/// Owner, mode and time of what is there, if it is of the same type.
fn set_attributes(directory: BorrowedFd<'_>, name: &CStr, file: &MirrorFile) -> io::Result<()> {
    let stat = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    match kind(stat.st_mode) {
        found if found != kind(file.mode) => Err(Errno::EINVAL.into()),
        SFlag::S_IFLNK => {
            let (user, group) = (Uid::from_raw(file.uid), Gid::from_raw(file.gid));
            if (stat.st_uid, stat.st_gid) != (file.uid, file.gid) {
                fchownat(
                    directory,
                    name,
                    Some(user),
                    Some(group),
                    AtFlags::AT_SYMLINK_NOFOLLOW,
                )?;
            }
            if differs(&stat, file) {
                let time = time(file)?;
                utimensat(directory, name, &time, &time, UtimensatFlags::NoFollowSymlink)?;
            }
            Ok(())
        }
        _ => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let there = openat(directory, name, flags, Mode::empty())?;
            set_access(there.as_fd(), file)?;
            set_time(there.as_fd(), file, false)
        }
    }
}

/// Owner and mode. What is right is not set: that would be an event, too.
fn set_access(there: BorrowedFd<'_>, file: &MirrorFile) -> io::Result<()> {
    let stat = fstat(there)?;
    let mut mode = stat.st_mode & 0o7777;
    if (stat.st_uid, stat.st_gid) != (file.uid, file.gid) {
        fchown(
            there,
            Some(Uid::from_raw(file.uid)),
            Some(Gid::from_raw(file.gid)),
        )?;
        // It takes marks away.
        mode = fstat(there)?.st_mode & 0o7777;
    }
    if mode != file.mode & 0o7777 {
        fchmod(there, Mode::from_bits_truncate(file.mode & 0o7777))?;
    }
    Ok(())
}

/// The time of the last change. For the kernel that is a change of the attributes if both times are set, and one of the
/// contents if it is this one alone: so it is after those were `written`.
fn set_time(there: BorrowedFd<'_>, file: &MirrorFile, written: bool) -> io::Result<()> {
    if differs(&fstat(there)?, file) {
        let time = time(file)?;
        futimens(there, if written { &TimeSpec::UTIME_OMIT } else { &time }, &time)?;
    }
    Ok(())
}

fn differs(stat: &FileStat, file: &MirrorFile) -> bool {
    (stat.st_mtime, stat.st_mtime_nsec) != (file.mtime_seconds, i64::from(file.mtime_nanoseconds))
}

fn time(file: &MirrorFile) -> io::Result<TimeSpec> {
    // Above that there are words, as UTIME_NOW.
    if file.mtime_nanoseconds >= 1_000_000_000 {
        return Err(Errno::EINVAL.into());
    }
    Ok(TimeSpec::new(file.mtime_seconds, file.mtime_nanoseconds.into()))
}
