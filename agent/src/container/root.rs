//! Paths in a container's root, resolved so that none leads out of it, whatever links the image holds.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
};

use crate::sys;

/// Most dangling links that one path may go through.
const MAX_LINKS: usize = 40;

/// What is to be at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
}

/// A root directory.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// The root that `directory` (an `O_PATH` descriptor will do) is.
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// The directory itself.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Opens `path` within the root: absolute links and `..` stay inside, `/proc/PID/fd` and its like are refused.
    ///
    /// # Errors
    ///
    /// As open(2).
    pub fn open(&self, path: &Path, flags: i32) -> io::Result<OwnedFd> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        sys::openat2(
            self.directory(),
            &path,
            flags,
            0,
            libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS,
        )
    }

    /// A descriptor (`O_PATH`) of what is at `path`; what is missing is made, directories with mode 0755. The
    /// answer tells, too, whether it was there already.
    ///
    /// # Errors
    ///
    /// Something of another kind is there.
    pub fn ensure(&self, path: &Path, kind: Kind) -> io::Result<(OwnedFd, bool)> {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            match self.open(&path, libc::O_PATH) {
                Ok(found) => {
                    let is_directory =
                        SFlag::from_bits_truncate(fstat(&found)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
                    return match (kind, is_directory) {
                        // What mount(2) says of either; Docker knows it and tells its user what it means.
                        (Kind::Directory, false) | (Kind::File, true) => Err(Errno::ENOTDIR.into()),
                        _ => Ok((found, true)),
                    };
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
            match self.make(&path, kind)? {
                Made::It(made) => return Ok((made, false)),
                Made::Link(target) => path = target,
            }
        }
        Err(Errno::ELOOP.into())
    }

    /// Makes the missing part of `path`, unless a dangling link is met: then the answer is the path with that link
    /// replaced by its target.
    fn make(&self, path: &Path, kind: Kind) -> io::Result<Made> {
        let names: Vec<&OsStr> = path
            .components()
            .filter_map(|component| match component {
                Component::Normal(name) => Some(name),
                Component::ParentDir => Some(OsStr::new("..")),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
            })
            .collect();
        let mut done = PathBuf::from("/");
        let mut parent = self.open(&done, libc::O_PATH | libc::O_DIRECTORY)?;
        for (index, name) in names.iter().enumerate() {
            let last = index.saturating_add(1) == names.len();
            let next = done.join(name);
            let opened = match self.open(&next, libc::O_PATH) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    let made = match (last, kind) {
                        (true, Kind::File) => openat(
                            &parent,
                            *name,
                            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                            Mode::from_bits_truncate(0o644),
                        )
                        .map(drop),
                        _ => mkdirat(&parent, *name, Mode::from_bits_truncate(0o755)),
                    };
                    match made {
                        Ok(()) => self.open(&next, libc::O_PATH)?,
                        Err(Errno::EEXIST) => match self.open(&next, libc::O_PATH) {
                            // It cannot be opened and yet is there: a link to nothing.
                            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                                let target = readlinkat(&parent, *name)?;
                                let rest = names.get(index.saturating_add(1)..).unwrap_or_default();
                                // join() starts anew at an absolute target, as the kernel would, in the root.
                                return Ok(Made::Link(
                                    done.join(target).join(rest.iter().collect::<PathBuf>()),
                                ));
                            }
                            // Another sandbox that shares the volume has made it just now.
                            result => result?,
                        },
                        Err(error) => return Err(error.into()),
                    }
                }
                result => result?,
            };
            parent = opened;
            done = next;
        }
        Ok(Made::It(parent))
    }
}

enum Made {
    It(OwnedFd),
    Link(PathBuf),
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root(directory: &Path) -> Root {
        Root::new(fs::File::open(directory).unwrap().into())
    }

    #[test]
    fn missing_parts_are_made_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let root = root(directory.path());
        assert!(!root.ensure(Path::new("/a/b/c"), Kind::Directory).unwrap().1);
        assert!(root.ensure(Path::new("a/b/c"), Kind::Directory).unwrap().1);
        assert!(!root.ensure(Path::new("/a/file"), Kind::File).unwrap().1);
        assert!(directory.path().join("a/b/c").is_dir());
        assert!(directory.path().join("a/file").is_file());
        assert!(root.ensure(Path::new("/a/file"), Kind::Directory).is_err());
        assert!(root.ensure(Path::new("/a/b"), Kind::File).is_err());
    }

    #[test]
    fn two_that_make_the_same_both_find_it() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..300 {
            for kind in [Kind::Directory, Kind::File] {
                let path = PathBuf::from(format!("/{kind:?}/{round}/a/b"));
                std::thread::scope(|scope| {
                    let make = || root(directory.path()).ensure(&path, kind).unwrap();
                    let other = scope.spawn(make);
                    make();
                    other.join().unwrap();
                });
            }
        }
    }

    #[test]
    fn links_do_not_lead_out() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("root");
        fs::create_dir(&inside).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        symlink("/outside", inside.join("absolute")).unwrap();
        let root = root(&inside);
        root.ensure(Path::new("/relative/made"), Kind::Directory).unwrap();
        root.ensure(Path::new("/absolute/file"), Kind::File).unwrap();
        root.ensure(Path::new("/../../up"), Kind::Directory).unwrap();
        assert_eq!(fs::read_dir(directory.path().join("outside")).unwrap().count(), 0);
        assert!(inside.join("outside/made").is_dir());
        assert!(inside.join("outside/file").is_file());
        assert!(inside.join("up").is_dir());
    }

    #[test]
    fn a_dangling_link_is_followed_within_the_root() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        symlink(
            "../run/systemd/stub.conf",
            directory.path().join("etc/resolv.conf"),
        )
        .unwrap();
        symlink("loop", directory.path().join("loop")).unwrap();
        let root = root(directory.path());
        root.ensure(Path::new("/etc/resolv.conf"), Kind::File).unwrap();
        assert!(directory.path().join("run/systemd/stub.conf").is_file());
        assert!(root.ensure(Path::new("/loop"), Kind::File).is_err());
    }
}
