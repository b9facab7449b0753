//! Mounting: options as in fstab(5), trees cloned and attached in one step, and unmounting that cannot fail half-way.

use std::{
    ffi::CString,
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::DirBuilderExt,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
};

use super::idmap::{self, IdMap};

/// Options of a mount, sorted out: flags for the kernel, data for the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags of mount(2).
    pub flags: MsFlags,
    /// What is not a flag, in the given order.
    pub data: Vec<String>,
    /// Whose the files appear to be (`uidmap=`, `gidmap=`).
    pub id_map: Option<IdMap>,
}

impl Options {
    /// Sorts out options as containerd's mounts have them.
    ///
    /// # Errors
    /// With the option that cannot be applied.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            data: Vec::new(),
            id_map: None,
        };
        let (mut users, mut groups) = (Vec::new(), Vec::new());
        for option in options {
            let mapping = [("uidmap=", &mut users), ("gidmap=", &mut groups)]
                .into_iter()
                .find_map(|(name, ranges)| Some((option.strip_prefix(name)?, ranges)));
            if let Some((text, ranges)) = mapping {
                *ranges = idmap::parse(text).ok_or_else(|| option.clone())?;
                continue;
            }
            match option.as_str() {
                "" | "defaults" => {}
                "loop" | "user" | "users" | "_netdev" => return Err(option.clone()),
                name => match FLAGS.iter().find(|(known, ..)| *known == name) {
                    Some((_, true, flag)) => parsed.flags.insert(*flag),
                    Some((_, false, flag)) => parsed.flags.remove(*flag),
                    None => parsed.data.push(option.clone()),
                },
            }
        }
        match (users.is_empty(), groups.is_empty()) {
            (true, true) => {}
            (false, false) => {
                parsed.id_map = Some(IdMap {
                    users,
                    groups,
                    recursive: false,
                });
            }
            (true, false) => return Err("gidmap without uidmap".into()),
            (false, true) => return Err("uidmap without gidmap".into()),
        }
        Ok(parsed)
    }
}

/// Options that are flags: name, whether it sets or clears, flag.
const FLAGS: &[(&str, bool, MsFlags)] = &[
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("lazytime", true, MsFlags::MS_LAZYTIME),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("nolazytime", false, MsFlags::MS_LAZYTIME),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
];

/// Most bytes of data that mount(2) takes: a page with its final zero.
const MAX_DATA_LEN: usize = 4095;

/// Mounts `source` of file system `kind` on `target` (mount(2)). With a mapping of ids, that of an overlay is on its
/// lower layers (the upper one has the ids already), and only an overlay and a bind mount can have one.
///
/// # Errors
/// The kernel's; `E2BIG` when the data does not fit into a page; `Unsupported` for a mapping of another file system.
pub fn mount(kind: &str, source: &str, target: &Path, options: &Options) -> io::Result<()> {
    let Some(map) = &options.id_map else {
        return mount_plainly(kind, source, target, options);
    };
    let mut options = options.clone();
    options.id_map = None;
    if options.flags.contains(MsFlags::MS_BIND) {
        let how = Clone {
            recursive: options.flags.contains(MsFlags::MS_REC),
            read_only: options.flags.contains(MsFlags::MS_RDONLY),
            follow: false,
        };
        let from = open_path(Path::new(source))?;
        return clone_tree_with(from.as_fd(), target, how, |tree| map.apply(tree));
    }
    if kind != "overlay" {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("a mount of type {kind} cannot be mapped (uidmap)"),
        ));
    }
    // Overlay takes layers that are mounted somewhere: here, until it has them.
    let places = MappedLayers::new(target)?;
    for option in &mut options.data {
        if let Some(layers) = option.strip_prefix("lowerdir=") {
            let mut mapped = Vec::new();
            for layer in layers.split(':') {
                let place = places.add(mapped.len(), Path::new(layer), map)?;
                mapped.push(place.display().to_string());
            }
            *option = format!("lowerdir={}", mapped.join(":"));
        }
    }
    mount_plainly(kind, source, target, &options)
}

/// Mapped clones of layers, on directories beside the target. They go when dropped.
struct MappedLayers(PathBuf);

impl MappedLayers {
    fn new(target: &Path) -> io::Result<Self> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".layers");
        let places = target.with_file_name(name);
        DirBuilder::new().mode(0o700).create(&places)?;
        Ok(Self(places))
    }

    fn add(&self, number: usize, layer: &Path, map: &IdMap) -> io::Result<PathBuf> {
        let place = self.0.join(number.to_string());
        fs::create_dir(&place)?;
        let how = Clone {
            recursive: false,
            read_only: true,
            follow: false,
        };
        clone_tree_with(open_path(layer)?.as_fd(), &place, how, |tree| map.apply(tree))?;
        Ok(place)
    }
}

impl Drop for MappedLayers {
    fn drop(&mut self) {
        // Directories with nothing in them but what is still mounted, which rmdir refuses.
        let removed = unmount_below(&self.0).and_then(|()| {
            for entry in fs::read_dir(&self.0)? {
                fs::remove_dir(entry?.path())?;
            }
            fs::remove_dir(&self.0)
        });
        if let Err(error) = removed {
            tracing::warn!(%error, path = %self.0.display(), "mapped layers are left behind");
        }
    }
}

fn mount_plainly(kind: &str, source: &str, target: &Path, options: &Options) -> io::Result<()> {
    let bind = options.flags.contains(MsFlags::MS_BIND);
    let (data, _held) = shortened(&options.data)?;
    let data = (!data.is_empty()).then_some(data.as_str());
    let kind = (!bind && !kind.is_empty()).then_some(kind);
    nix::mount::mount(Some(source), target, kind, options.flags, data)?;
    // A bind mount takes its other flags only when it is mounted again.
    let kept = options.flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if bind && !kept.is_empty() {
        let flags = kept | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        if let Err(error) = nix::mount::mount(None::<&str>, target, None::<&str>, flags, None::<&str>) {
            unmount(target)?;
            return Err(error.into());
        }
    }
    Ok(())
}

/// The data as one string. Where overlay's layers make it longer than a page, each is named by a descriptor, which
/// has to be held until the mount is made.
fn shortened(data: &[String]) -> io::Result<(String, Vec<OwnedFd>)> {
    let joined = data.join(",");
    if joined.len() <= MAX_DATA_LEN {
        return Ok((joined, Vec::new()));
    }
    let mut held = Vec::new();
    let mut shorter = Vec::with_capacity(data.len());
    for option in data {
        match option.strip_prefix("lowerdir=") {
            Some(layers) => {
                let mut names = Vec::new();
                for layer in layers.split(':') {
                    let fd = open_path(Path::new(layer))?;
                    names.push(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                    held.push(fd);
                }
                shorter.push(format!("lowerdir={}", names.join(":")));
            }
            None => shorter.push(option.clone()),
        }
    }
    let joined = shorter.join(",");
    if joined.len() <= MAX_DATA_LEN {
        Ok((joined, held))
    } else {
        Err(io::Error::from_raw_os_error(libc::E2BIG))
    }
}

/// Opens a path as a place only.
///
/// # Errors
/// The kernel's.
pub fn open_path(path: &Path) -> io::Result<OwnedFd> {
    use nix::{fcntl::OFlag, sys::stat::Mode};
    Ok(nix::fcntl::open(
        path,
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

/// Opens the directory `path` beneath `root`, as if `root` were `/`: no symbolic link leads out.
///
/// # Errors
/// The kernel's.
pub fn open_in_root(root: &Path, path: &str) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
    /// A `..` is not resolved while anything on the host is mounted or renamed, and the caller is to try again.
    const ATTEMPTS: usize = 1000;
    let dir = open_path(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut opened = Err(Errno::EAGAIN);
    for _ in 0..ATTEMPTS {
        opened = openat2(&dir, path.trim_start_matches('/'), how);
        if !matches!(opened, Err(Errno::EAGAIN)) {
            break;
        }
    }
    Ok(opened?)
}

/// How a tree is cloned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clone {
    /// With the mounts below.
    pub recursive: bool,
    /// The topmost mount becomes read-only.
    pub read_only: bool,
    /// Mounts and unmounts that happen at the source later are seen in the clone (never the other way).
    pub follow: bool,
}

/// Clones the tree at `source` onto `target`. Nothing that is mounted or unmounted in the clone reaches the source.
///
/// # Errors
/// The kernel's; then nothing is mounted.
pub fn clone_tree(source: BorrowedFd<'_>, target: &Path, how: Clone) -> io::Result<()> {
    clone_tree_with(source, target, how, |_| Ok(()))
}

/// As [`clone_tree`]; `change` may do more to the clone before it is mounted.
///
/// # Errors
/// The kernel's, and those of `change`; then nothing is mounted.
pub fn clone_tree_with(
    source: BorrowedFd<'_>,
    target: &Path,
    how: Clone,
    change: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let recursive = if how.recursive {
        libc::AT_RECURSIVE as u32
    } else {
        0
    };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32 | recursive;
    // SAFETY: the path is an empty C string; the descriptor is open for the length of the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags) };
    if tree < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
    let propagation = if how.follow {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    set_attributes(tree.as_fd(), libc::AT_RECURSIVE as u32, 0, propagation)?;
    if how.read_only {
        set_attributes(tree.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, 0)?;
    }
    change(tree.as_fd())?;
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings; the descriptor is open for the length of the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if moved == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes a mount and all below it read-only.
///
/// # Errors
/// The kernel's.
pub fn set_read_only_below(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, libc::AT_RECURSIVE as u32, libc::MOUNT_ATTR_RDONLY, 0)
}

fn set_attributes(mount: BorrowedFd<'_>, flags: u32, set: u64, propagation: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the structure outlives the call and its size is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as u32 | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Unmounts what is on `path`; at once where it is not in use, otherwise as soon as nobody uses it. Nothing mounted
/// there is fine.
///
/// # Errors
/// When the kernel refuses.
pub fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => match umount2(path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        },
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Unmounts all that is mounted on `path` and beneath it, topmost last.
///
/// # Errors
/// The first failure; the rest is still unmounted.
pub fn unmount_below(path: &Path) -> io::Result<()> {
    let table = fs::read("/proc/self/mountinfo")?;
    let mut result = Ok(());
    // Later lines are mounted on or beneath earlier ones.
    for point in mount_points(&table)
        .into_iter()
        .rev()
        .filter(|point| point.starts_with(path))
    {
        result = result.and(unmount(&point));
    }
    result
}

/// Where something is mounted below `path`, but not on it; parents first.
///
/// # Errors
/// When the table of mounts cannot be read.
pub fn mounts_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut points = mount_points(&fs::read("/proc/self/mountinfo")?);
    points.retain(|point| point.starts_with(path) && point != path);
    points.sort();
    points.dedup();
    Ok(points)
}

/// Mount points in the order of `/proc/self/mountinfo` (its fifth field, blanks and the like as `\ooo`).
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
        .collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|digits| first == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match octal {
            Some(digits) => {
                let value = digits
                    .iter()
                    .fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                bytes.push(value as u8);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let parsed = Options::parse(&strings(&["ro", "rbind", "lowerdir=/a:/b", "index=off", "rw"])).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(parsed.data, strings(&["lowerdir=/a:/b", "index=off"]));
        assert_eq!(Options::parse(&strings(&["ro", "loop"])), Err("loop".into()));
        let mapped = Options::parse(&strings(&["uidmap=0:100000:65536,70000:5:1", "gidmap=0:7:9"])).unwrap();
        let map = mapped.id_map.unwrap();
        assert_eq!((map.users.len(), map.groups.len()), (2, 1));
        assert_eq!(map.groups[0].outside, 7);
        for wrong in ["uidmap=0:1:1", "uidmap=0:1", "gidmap=0:1:1", "uidmap=a:1:1"] {
            assert!(Options::parse(&strings(&[wrong])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mount_points_are_unescaped() {
        let table = b"22 1 0:21 / /proc rw - proc proc rw\n\
                      30 22 0:26 / /a\\040b\\134c\\04 rw,nosuid shared:2 - tmpfs t rw\n";
        assert_eq!(
            mount_points(table),
            [PathBuf::from("/proc"), PathBuf::from("/a b\\c\\04")]
        );
    }

    #[test]
    fn a_cloned_tree_is_whole_and_goes_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&target).unwrap();
        let tmpfs = Options {
            flags: MsFlags::empty(),
            data: vec!["size=1m".into()],
            id_map: None,
        };
        mount("tmpfs", "one", &source, &tmpfs).unwrap();
        fs::create_dir(source.join("below")).unwrap();
        mount("tmpfs", "two", &source.join("below"), &tmpfs).unwrap();
        fs::write(source.join("below/file"), "x").unwrap();
        let how = Clone {
            recursive: true,
            read_only: true,
            follow: true,
        };
        clone_tree(open_path(&source).unwrap().as_fd(), &target, how).unwrap();
        assert_eq!(fs::read(target.join("below/file")).unwrap(), b"x");
        assert_eq!(mounts_below(&target).unwrap(), [target.join("below")]);
        let refused = fs::write(target.join("new"), "x").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
        unmount_below(&target).unwrap();
        assert!(!target.join("below").exists());
        assert!(source.join("below/file").exists());
        unmount_below(&source).unwrap();
        unmount(&source).unwrap();
        assert!(!source.join("below").exists());
    }

    #[test]
    fn an_overlay_of_mapped_layers_leaves_no_other_mount() {
        use std::os::unix::fs::{MetadataExt, chown};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // Overlay cannot have its upper directory on an overlay, as a test machine's /tmp may be.
        let tmpfs = Options::parse(&[]).unwrap();
        mount("tmpfs", "test", dir.path(), &tmpfs).unwrap();
        for name in ["one", "two", "upper", "work", "merged"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("one/file"), "").unwrap();
        fs::write(path("two/other"), "").unwrap();
        chown(path("two/other"), Some(3), Some(4)).unwrap();
        for name in ["upper", "merged"] {
            chown(path(name), Some(100_000), Some(200_000)).unwrap();
        }
        let text = |name: &str| path(name).display().to_string();
        let options = Options::parse(&[
            format!("lowerdir={}:{}", text("one"), text("two")),
            format!("upperdir={}", text("upper")),
            format!("workdir={}", text("work")),
            "uidmap=0:100000:65536".into(),
            "gidmap=0:200000:65536".into(),
        ])
        .unwrap();
        mount("overlay", "overlay", &path("merged"), &options).unwrap();
        let owner = |name: &str| {
            fs::metadata(path(name))
                .map(|found| (found.uid(), found.gid()))
                .unwrap()
        };
        assert_eq!(owner("merged/file"), (100_000, 200_000));
        assert_eq!(owner("merged/other"), (100_003, 200_004));
        // What is copied up has the ids for good.
        fs::write(path("merged/other"), "changed").unwrap();
        assert_eq!(owner("upper/other"), (100_003, 200_004));
        assert_eq!(owner("two/other"), (3, 4));
        assert!(!path("merged.layers").exists());
        let table = fs::read("/proc/self/mountinfo").unwrap();
        let left = mount_points(&table)
            .into_iter()
            .filter(|point| point.starts_with(dir.path()));
        assert_eq!(left.collect::<Vec<_>>(), [dir.path().to_owned(), path("merged")]);
        unmount(&path("merged")).unwrap();
        let refused = mount(
            "tmpfs",
            "x",
            &path("merged"),
            &Options {
                data: Vec::new(),
                ..options
            },
        );
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Unsupported);
        unmount(dir.path()).unwrap();
    }

    #[test]
    fn links_that_lead_up_are_followed_while_others_rename() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("../../../a/../a/b", dir.path().join("a/link")).unwrap();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "").unwrap();
        let renaming = std::thread::spawn(move || {
            while let Err(std::sync::mpsc::TryRecvError::Empty) = stopped.try_recv() {
                fs::rename(&from, &to).unwrap();
                fs::rename(&to, &from).unwrap();
            }
        });
        for _ in 0..20_000 {
            open_in_root(dir.path(), "/a/link").unwrap();
        }
        drop(stop);
        renaming.join().unwrap();
    }

    #[test]
    fn an_overlay_of_very_many_layers_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let name = "x".repeat(120);
        let layers: Vec<String> = (0..60)
            .map(|number| {
                let layer = dir.path().join(format!("{name}{number}"));
                fs::create_dir(&layer).unwrap();
                fs::write(layer.join(format!("file{number}")), "").unwrap();
                layer.to_str().unwrap().to_owned()
            })
            .collect();
        let merged = dir.path().join("merged");
        fs::create_dir(&merged).unwrap();
        let options = Options {
            flags: MsFlags::empty(),
            data: vec![format!("lowerdir={}", layers.join(":"))],
            id_map: None,
        };
        mount("overlay", "overlay", &merged, &options).unwrap();
        assert_eq!(fs::read_dir(&merged).unwrap().count(), 60);
        unmount(&merged).unwrap();
    }
}
