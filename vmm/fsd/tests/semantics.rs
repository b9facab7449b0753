//! The share, mounted for real: this kernel's FUSE as the guest, husk-vmm's device, the husk-fsd binary locked up as
//! in production. What a program sees must be what it would see on the host's own file system.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::mount::Mount;
use common::posix::{self, as_user, errno};
use common::server::{check, mount_tmpfs, posix_path, without_forks};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink,
};
use std::path::Path;

const ALICE: u32 = 1000;
const BOB: u32 = 1001;
const STAFF: u32 = 50;

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

fn names(path: &Path) -> BTreeSet<String> {
    fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn contents_are_the_hosts_and_reach_the_host() {
    let m = Mount::new();
    let data: Vec<u8> = (0..5_000_003u32).map(|i| (i * 7 / 3) as u8).collect();
    fs::write(m.path("a"), &data).unwrap();
    assert!(
        fs::read(m.host("a")).unwrap() == data,
        "the host reads what was written"
    );
    fs::write(m.host("b"), &data).unwrap();
    assert!(
        fs::read(m.path("b")).unwrap() == data,
        "what the host wrote is read"
    );
    let file = File::open(m.path("b")).unwrap();
    let mut part = vec![0; 100_001];
    file.read_exact_at(&mut part, 4_099).unwrap();
    assert!(part == data[4_099..104_100]);
    assert_eq!(file.read_at(&mut part, data.len() as u64 - 3).unwrap(), 3);
    assert_eq!(file.read_at(&mut part, data.len() as u64 + 3).unwrap(), 0);
    // Opened anew, a change on the host is seen at once, even one that keeps the size. (Read without asking for the
    // file's attributes, which would freshen them.)
    let changed: Vec<u8> = data.iter().map(|b| !b).collect();
    fs::write(m.host("b"), &changed).unwrap();
    let mut found = vec![0; data.len()];
    File::open(m.path("b")).unwrap().read_exact(&mut found).unwrap();
    assert!(found == changed);
}

#[test]
fn direct_and_synchronous_io() {
    let m = Mount::new();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT | libc::O_SYNC)
        .open(m.path("f"))
        .unwrap();
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let page = Page([7; 4096]);
    file.write_all(&page.0).unwrap();
    assert_eq!(fs::read(m.host("f")).unwrap(), page.0);
    let mut back = Page([0; 4096]);
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut back.0).unwrap();
    assert_eq!(back.0, page.0);
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(m.path("")).unwrap().sync_all().unwrap();
    // SAFETY: no pointers are involved.
    check(unsafe { libc::syncfs(file.as_raw_fd()) }).unwrap();
}

#[test]
fn permissions_hold_for_other_users() {
    let m = Mount::new();
    fs::write(m.path("secret"), "x").unwrap();
    chmod(&m.path("secret"), 0o640);
    chown(m.path("secret"), Some(ALICE), Some(STAFF)).unwrap();
    as_user(ALICE, &[ALICE], || {
        assert_eq!(fs::read(m.path("secret")).unwrap(), b"x");
        fs::write(m.path("secret"), "y").unwrap();
    });
    as_user(BOB, &[BOB, STAFF], || {
        assert_eq!(fs::read(m.path("secret")).unwrap(), b"y");
        assert_eq!(errno(fs::write(m.path("secret"), "z")), libc::EACCES);
    });
    as_user(BOB, &[BOB], || {
        assert_eq!(errno(fs::read(m.path("secret"))), libc::EACCES);
        assert_eq!(
            errno(fs::set_permissions(
                m.path("secret"),
                Permissions::from_mode(0o777)
            )),
            libc::EPERM
        );
        assert_eq!(errno(chown(m.path("secret"), Some(BOB), None)), libc::EPERM);
        assert_eq!(errno(fs::write(m.path("new"), "")), libc::EACCES);
    });
    fs::create_dir(m.path("closed")).unwrap();
    fs::write(m.path("closed/f"), "x").unwrap();
    chmod(&m.path("closed"), 0o700);
    as_user(BOB, &[BOB], || {
        assert_eq!(errno(fs::read(m.path("closed/f"))), libc::EACCES);
        assert_eq!(errno(fs::read_dir(m.path("closed"))), libc::EACCES);
    });
    // A file may be made that its maker could not open a second time.
    chmod(&m.path(""), 0o777);
    as_user(BOB, &[BOB], || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(m.path("readonly"))
            .unwrap();
        file.write_all(b"once").unwrap();
        assert_eq!(
            errno(OpenOptions::new().write(true).open(m.path("readonly"))),
            libc::EACCES
        );
    });
}

#[test]
fn new_files_belong_to_their_makers() {
    let m = Mount::new();
    chmod(&m.path(""), 0o777);
    as_user(ALICE, &[STAFF], || {
        fs::write(m.path("file"), "").unwrap();
        fs::create_dir(m.path("dir")).unwrap();
        symlink("x", m.path("link")).unwrap();
        posix::mknod(&m.path("fifo"), libc::S_IFIFO | 0o666, 0).unwrap();
    });
    for name in ["file", "dir", "link", "fifo"] {
        assert_eq!(owner(&m.host(name)), (ALICE, STAFF), "{name}");
        assert_eq!(owner(&m.path(name)), (ALICE, STAFF), "{name}");
    }
    fs::write(m.path("root"), "").unwrap();
    assert_eq!(owner(&m.host("root")), (0, 0));
    // Ids that nobody on the host has.
    lchown(m.path("link"), Some(4_000_000_000), Some(3_999_999_999)).unwrap();
    assert_eq!(owner(&m.host("link")), (4_000_000_000, 3_999_999_999));
    as_user(3_000_000_000, &[3_000_000_001], || {
        fs::write(m.path("far"), "").unwrap()
    });
    assert_eq!(owner(&m.host("far")), (3_000_000_000, 3_000_000_001));
}

#[test]
fn modes_are_cut_by_the_umask_or_by_the_default_acl() {
    let m = Mount::new();
    // The test threads share this; no other test of this file depends on it.
    // SAFETY: no pointers are involved; the thread has its own umask since it has its own namespace.
    let before = unsafe { libc::umask(0o027) };
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o666)
        .open(m.path("f"))
        .unwrap();
    fs::DirBuilder::new().mode(0o777).create(m.path("d")).unwrap();
    assert_eq!((mode(&m.host("f")), mode(&m.host("d"))), (0o640, 0o750));
    // Version 2, then (tag, permissions, id) each: user::rwx, group::rwx, other::---.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions) in [(1u16, 7u16), (4, 7), (0x20, 0)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    posix::set_xattr(&m.path("d"), "system.posix_acl_default", &acl).unwrap();
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o666)
        .open(m.path("d/f"))
        .unwrap();
    assert_eq!(mode(&m.host("d/f")), 0o660);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
}

#[test]
fn acls_are_obeyed() {
    let m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    chmod(&m.path("f"), 0o600);
    // user::rw-, user:ALICE:r--, group::---, mask::r--, other::---
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, ALICE),
        (4, 0, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    posix::set_xattr(&m.path("f"), "system.posix_acl_access", &acl).unwrap();
    assert_eq!(
        posix::get_xattr(&m.host("f"), "system.posix_acl_access").unwrap(),
        acl
    );
    as_user(ALICE, &[ALICE], || {
        assert_eq!(fs::read(m.path("f")).unwrap(), b"x");
        assert_eq!(errno(fs::write(m.path("f"), "y")), libc::EACCES);
    });
    as_user(BOB, &[BOB], || {
        assert_eq!(errno(fs::read(m.path("f"))), libc::EACCES)
    });
}

#[test]
fn set_group_id_directories_pass_their_group_on() {
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    chown(m.path("d"), None, Some(STAFF)).unwrap();
    chmod(&m.path("d"), 0o2777);
    as_user(ALICE, &[ALICE], || {
        fs::write(m.path("d/file"), "").unwrap();
        fs::create_dir(m.path("d/dir")).unwrap();
        posix::mknod(&m.path("d/sock"), libc::S_IFSOCK | 0o666, 0).unwrap();
        // Not a member of the group: its set-group-id bit is not to be had.
        let options = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o2755)
            .open(m.path("d/sgid"));
        options.unwrap();
    });
    for name in ["d/file", "d/dir", "d/sock", "d/sgid"] {
        assert_eq!(owner(&m.host(name)), (ALICE, STAFF), "{name}");
    }
    assert_eq!(mode(&m.host("d/dir")) & 0o2000, 0o2000);
    assert_eq!(mode(&m.host("d/file")) & 0o2000, 0);
    assert_eq!(mode(&m.host("d/sgid")) & 0o2000, 0);
}

#[test]
fn set_id_bits_are_cleared_by_others_changes() {
    let m = Mount::new();
    let f = m.path("f");
    let prepare = || {
        fs::write(&f, "0123456789").unwrap();
        chown(&f, Some(ALICE), Some(STAFF)).unwrap();
        chmod(&f, 0o6777);
        posix::set_xattr(&f, "security.capability", &CAPABILITY).unwrap();
        assert_eq!(mode(&f), 0o6777);
    };
    let cleared = |what: &str| {
        assert_eq!(mode(&m.host("f")), 0o777, "{what}");
        assert_eq!(mode(&f), 0o777, "{what}");
        assert_eq!(
            errno(posix::get_xattr(&m.host("f"), "security.capability")),
            libc::ENODATA,
            "{what}"
        );
    };
    prepare();
    as_user(BOB, &[BOB], || {
        OpenOptions::new()
            .write(true)
            .open(&f)
            .unwrap()
            .write_all(b"x")
            .unwrap();
    });
    cleared("write");
    prepare();
    as_user(BOB, &[BOB], || {
        OpenOptions::new()
            .write(true)
            .open(&f)
            .unwrap()
            .set_len(3)
            .unwrap()
    });
    cleared("ftruncate");
    prepare();
    as_user(BOB, &[BOB], || {
        OpenOptions::new().write(true).truncate(true).open(&f).unwrap();
    });
    cleared("open with O_TRUNC");
    prepare();
    as_user(BOB, &[BOB], || {
        let file = OpenOptions::new().write(true).open(&f).unwrap();
        posix::fallocate(&file, 0, 0, 100).unwrap();
    });
    assert_eq!(mode(&m.host("f")), 0o777, "fallocate");
    prepare();
    chown(&f, Some(BOB), None).unwrap();
    cleared("chown");
    // The system's root keeps the bits when it truncates.
    prepare();
    OpenOptions::new()
        .write(true)
        .open(&f)
        .unwrap()
        .set_len(3)
        .unwrap();
    assert_eq!(mode(&m.host("f")), 0o6777);
}

/// `struct vfs_cap_data` of version 2: CAP_NET_RAW, permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn sticky_directories_protect_others_files() {
    let m = Mount::new();
    fs::create_dir(m.path("tmp")).unwrap();
    chmod(&m.path("tmp"), 0o1777);
    as_user(ALICE, &[ALICE], || fs::write(m.path("tmp/a"), "").unwrap());
    as_user(BOB, &[BOB], || {
        assert_eq!(errno(fs::remove_file(m.path("tmp/a"))), libc::EPERM);
        assert_eq!(errno(fs::rename(m.path("tmp/a"), m.path("tmp/b"))), libc::EPERM);
        // O_CREAT on what is there, which the host's own sysctl must not meddle with.
        OpenOptions::new().read(true).open(m.path("tmp/a")).unwrap();
    });
    as_user(ALICE, &[ALICE], || fs::remove_file(m.path("tmp/a")).unwrap());
}

#[test]
fn hard_links_are_one_file() {
    let m = Mount::new();
    fs::write(m.path("a"), "x").unwrap();
    fs::hard_link(m.path("a"), m.path("b")).unwrap();
    let (a, b) = (
        fs::metadata(m.path("a")).unwrap(),
        fs::metadata(m.path("b")).unwrap(),
    );
    assert_eq!(
        (a.ino(), b.ino(), b.nlink()),
        (b.ino(), fs::metadata(m.host("a")).unwrap().ino(), 2)
    );
    fs::write(m.path("b"), "yy").unwrap();
    assert_eq!(fs::read(m.path("a")).unwrap(), b"yy");
    fs::remove_file(m.path("a")).unwrap();
    assert_eq!(fs::metadata(m.path("b")).unwrap().nlink(), 1);
    // Of a symbolic link itself, and of a special file.
    symlink("nowhere", m.path("l")).unwrap();
    fs::hard_link(m.path("l"), m.path("l2")).unwrap();
    assert_eq!(fs::read_link(m.path("l2")).unwrap(), Path::new("nowhere"));
    fs::create_dir(m.path("d")).unwrap();
    assert_eq!(errno(fs::hard_link(m.path("d"), m.path("d2"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(m.path("b"), m.path("l"))), libc::EEXIST);
}

#[test]
fn renames_with_flags() {
    let m = Mount::new();
    fs::write(m.path("a"), "a").unwrap();
    fs::write(m.path("b"), "b").unwrap();
    assert_eq!(
        errno(posix::rename(&m.path("a"), &m.path("b"), libc::RENAME_NOREPLACE)),
        libc::EEXIST
    );
    posix::rename(&m.path("a"), &m.path("b"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(
        (fs::read(m.path("a")).unwrap(), fs::read(m.path("b")).unwrap()),
        (b"b".to_vec(), b"a".to_vec())
    );
    posix::rename(&m.path("a"), &m.path("c"), libc::RENAME_WHITEOUT).unwrap();
    let whiteout = fs::symlink_metadata(m.path("a")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    fs::create_dir_all(m.path("d/sub")).unwrap();
    fs::rename(m.path("c"), m.path("d/sub/c")).unwrap();
    assert_eq!(fs::read(m.host("d/sub/c")).unwrap(), b"b");
    assert_eq!(errno(fs::rename(m.path("d"), m.path("d/sub/d"))), libc::EINVAL);
    assert_eq!(errno(fs::rename(m.path("b"), m.path("d"))), libc::EISDIR);
    fs::create_dir(m.path("e")).unwrap();
    assert_eq!(errno(fs::rename(m.path("e"), m.path("d"))), libc::ENOTEMPTY);
}

#[test]
fn a_file_replaced_while_open_goes_on_as_it_was() {
    let m = Mount::new();
    fs::write(m.path("a"), "old").unwrap();
    let mut old = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("a"))
        .unwrap();
    fs::write(m.path("b"), "new").unwrap();
    fs::rename(m.path("b"), m.path("a")).unwrap();
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old");
    assert_eq!(old.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read(m.path("a")).unwrap(), b"new");
    old.write_all(b"er").unwrap();
    assert_eq!(fs::read(m.host("a")).unwrap(), b"new");
}

#[test]
fn unlinked_files_live_until_closed() {
    let m = Mount::new();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(m.path("f"))
        .unwrap();
    fs::remove_file(m.path("f")).unwrap();
    assert!(
        names(&m.path("")).is_empty(),
        "no silly-renamed file is left behind"
    );
    file.write_all(b"still here").unwrap();
    file.set_len(5).unwrap();
    file.set_permissions(Permissions::from_mode(0o600)).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still");
    let metadata = file.metadata().unwrap();
    assert_eq!(
        (metadata.nlink(), metadata.len(), metadata.mode() & 0o777),
        (0, 5, 0o600)
    );
    // A directory that is no more, as a working directory might be.
    fs::create_dir(m.path("d")).unwrap();
    let directory = File::open(m.path("d")).unwrap();
    fs::remove_dir(m.path("d")).unwrap();
    assert_eq!(directory.metadata().unwrap().nlink(), 0);
}

#[test]
fn extended_attributes_of_all_kinds_of_files() {
    let m = Mount::new();
    let f = m.path("f");
    fs::write(&f, "").unwrap();
    fs::create_dir(m.path("d")).unwrap();
    let long = vec![b'v'; 3000];
    for path in [&f, &m.path("d")] {
        posix::set_xattr(path, "user.short", b"").unwrap();
        posix::set_xattr(path, "user.long", &long).unwrap();
        assert_eq!(posix::get_xattr(path, "user.short").unwrap(), b"");
        assert_eq!(posix::get_xattr(path, "user.long").unwrap(), long);
        let names = posix::list_xattrs(path).unwrap();
        assert!(names.contains(&"user.short".into()) && names.contains(&"user.long".into()));
        posix::remove_xattr(path, "user.long").unwrap();
        assert_eq!(errno(posix::get_xattr(path, "user.long")), libc::ENODATA);
        assert_eq!(errno(posix::remove_xattr(path, "user.long")), libc::ENODATA);
    }
    posix::set_xattr(&f, "security.capability", &CAPABILITY).unwrap();
    assert_eq!(
        posix::get_xattr(&m.host("f"), "security.capability").unwrap(),
        CAPABILITY
    );
    // Of a symbolic link itself: the host refuses user.* there as everywhere, and does not touch the target.
    symlink("f", m.path("l")).unwrap();
    assert_eq!(errno(posix::set_xattr(&m.path("l"), "user.x", b"x")), libc::EPERM);
    assert_eq!(posix::list_xattrs(&m.path("l")).unwrap(), Vec::<String>::new());
    posix::set_xattr(&m.path("l"), "security.capability", &CAPABILITY).unwrap();
    assert_eq!(
        posix::get_xattr(&m.host("l"), "security.capability").unwrap(),
        CAPABILITY
    );
    posix::mknod(&m.path("p"), libc::S_IFIFO | 0o600, 0).unwrap();
    assert_eq!(
        errno(posix::get_xattr(&m.path("p"), "security.capability")),
        libc::ENODATA
    );
}

#[test]
fn files_without_a_name() {
    let m = Mount::new();
    chmod(&m.path(""), 0o777);
    as_user(ALICE, &[STAFF], || {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o640)
            .custom_flags(libc::O_TMPFILE)
            .open(m.path(""))
            .unwrap();
        file.write_all(b"unnamed").unwrap();
        assert!(names(&m.path("")).is_empty());
        let from = posix_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
        let to = posix_path(&m.path("named"));
        // SAFETY: the paths are NUL-terminated and live through the call.
        check(unsafe {
            libc::linkat(
                libc::AT_FDCWD,
                from.as_ptr(),
                libc::AT_FDCWD,
                to.as_ptr(),
                libc::AT_SYMLINK_FOLLOW,
            )
        })
        .unwrap();
    });
    assert_eq!(fs::read(m.host("named")).unwrap(), b"unnamed");
    assert_eq!(
        (owner(&m.host("named")), mode(&m.host("named"))),
        ((ALICE, STAFF), 0o640)
    );
}

#[test]
fn special_files_are_the_guests_own() {
    let m = Mount::new();
    let device = libc::makedev(1, 5);
    posix::mknod(&m.path("zero"), libc::S_IFCHR | 0o666, device).unwrap();
    posix::mknod(&m.path("loop"), libc::S_IFBLK | 0o660, libc::makedev(7, 300)).unwrap();
    posix::mknod(&m.path("fifo"), libc::S_IFIFO | 0o644, 0).unwrap();
    posix::mknod(&m.path("sock"), libc::S_IFSOCK | 0o644, 0).unwrap();
    let zero = fs::symlink_metadata(m.path("zero")).unwrap();
    assert!(zero.file_type().is_char_device());
    assert_eq!(zero.rdev(), device);
    assert_eq!(
        fs::symlink_metadata(m.host("loop")).unwrap().rdev(),
        libc::makedev(7, 300)
    );
    assert!(
        fs::symlink_metadata(m.host("sock"))
            .unwrap()
            .file_type()
            .is_socket()
    );
    let mut bytes = [1; 4];
    File::open(m.path("zero"))
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    assert_eq!(bytes, [0; 4]);
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(m.path("fifo"), "through the pipe").unwrap());
        assert_eq!(fs::read_to_string(m.path("fifo")).unwrap(), "through the pipe");
    });
    let listener = std::os::unix::net::UnixListener::bind(m.path("listen")).unwrap();
    std::os::unix::net::UnixStream::connect(m.path("listen")).unwrap();
    drop(listener);
}

#[test]
fn shared_mappings_reach_the_file() {
    let m = Mount::new();
    let len = 64 * 1024;
    // Appending must not carry pages that are written back to the end of the file.
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(m.path("f"))
        .unwrap();
    file.write_all(&vec![b'.'; len]).unwrap();
    // SAFETY: a new mapping of `len` bytes, unmapped below; the file is not shortened meanwhile.
    unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts_mut(map.cast::<u8>(), len);
        assert!(bytes.iter().all(|b| *b == b'.'));
        bytes[4095..4099].copy_from_slice(b"page");
        check(libc::msync(map, len, libc::MS_SYNC)).unwrap();
        assert_eq!(&fs::read(m.host("f")).unwrap()[4095..4099], b"page");
        assert_eq!(fs::metadata(m.host("f")).unwrap().len(), len as u64);
        bytes[0] = b'!';
        check(libc::munmap(map, len)).unwrap();
    }
    file.write_all(b"end").unwrap();
    drop(file);
    let host = fs::read(m.host("f")).unwrap();
    assert_eq!((host[0], &host[len..]), (b'!', &b"end"[..]));
}

#[test]
fn appends_go_to_the_hosts_end_of_the_file() {
    let m = Mount::new();
    fs::write(m.path("log"), "").unwrap();
    let mut guest = OpenOptions::new().append(true).open(m.path("log")).unwrap();
    let mut host = OpenOptions::new().append(true).open(m.host("log")).unwrap();
    for n in 0..10 {
        writeln!(guest, "guest {n}").unwrap();
        writeln!(host, "host {n}").unwrap();
    }
    let expected: String = (0..10).map(|n| format!("guest {n}\nhost {n}\n")).collect();
    assert_eq!(fs::read_to_string(m.host("log")).unwrap(), expected);
}

#[test]
fn truncation_under_open_files() {
    let m = Mount::new();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(m.path("f"))
        .unwrap();
    file.write_all(b"0123456789").unwrap();
    let other = OpenOptions::new().write(true).open(m.path("f")).unwrap();
    other.set_len(4).unwrap();
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "0123");
    other.set_len(6).unwrap();
    let mut bytes = vec![];
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"0123\0\0");
    // By name, and by opening.
    let path = posix_path(&m.path("f"));
    // SAFETY: the path is NUL-terminated and lives through the call.
    check(unsafe { libc::truncate(path.as_ptr(), 1) }).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1);
    File::create(m.path("f")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(errno(File::create(m.path(""))), libc::EISDIR);
    assert_eq!(errno(other.set_len(u64::MAX >> 1)), libc::EFBIG);
}

#[test]
fn holes_are_seen_and_punched() {
    let m = Mount::new();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(m.path("f"))
        .unwrap();
    let mib = 1 << 20;
    file.write_all_at(b"start", 0).unwrap();
    file.write_all_at(b"end", 8 * mib).unwrap();
    let hole = posix::seek(&file, 0, libc::SEEK_HOLE).unwrap();
    assert!((5..8 * mib as i64).contains(&hole));
    let data = posix::seek(&file, hole, libc::SEEK_DATA).unwrap();
    assert!(data > hole && data <= 8 * mib as i64);
    assert_eq!(
        errno(posix::seek(&file, 9 * mib as i64, libc::SEEK_DATA)),
        libc::ENXIO
    );
    assert!(fs::metadata(m.path("f")).unwrap().blocks() * 512 < mib);
    posix::fallocate(&file, 0, 0, mib as i64).unwrap();
    let before = fs::metadata(m.host("f")).unwrap().blocks();
    assert!(before * 512 >= mib);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    posix::fallocate(&file, mode, 0, mib as i64).unwrap();
    assert!(fs::metadata(m.host("f")).unwrap().blocks() < before);
    let mut bytes = [1; 5];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 5]);
    assert_eq!(file.metadata().unwrap().len(), 8 * mib + 3);
}

#[test]
fn copies_within_the_share() {
    let m = Mount::new();
    let data: Vec<u8> = (0..300_000u32).map(|i| (i / 11) as u8).collect();
    fs::write(m.path("a"), &data).unwrap();
    let (from, to) = (
        File::open(m.path("a")).unwrap(),
        File::create(m.path("b")).unwrap(),
    );
    let (mut from_at, mut to_at) = (10i64, 20i64);
    // SAFETY: both offsets live through the call.
    let n = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_at,
            to.as_raw_fd(),
            &raw mut to_at,
            200_000,
            0,
        )
    };
    assert_eq!((n, from_at, to_at), (200_000, 200_010, 200_020));
    let copy = fs::read(m.path("b")).unwrap();
    assert!(copy[..20] == [0; 20] && copy[20..] == data[10..200_010]);
}

#[test]
fn large_directories_are_read_whole_and_from_any_place() {
    let m = Mount::new();
    let count = 5000;
    fs::create_dir(m.path("d")).unwrap();
    let expected: BTreeSet<String> = (0..count).map(|n| format!("entry-{n:05}")).collect();
    for name in &expected {
        File::create(m.host("d").join(name)).unwrap();
    }
    assert_eq!(names(&m.path("d")), expected);
    // A second time, with everything known.
    assert_eq!(names(&m.path("d")), expected);
    let path = posix_path(&m.path("d"));
    // SAFETY: `path` is NUL-terminated; the stream is checked before use and closed once; entries are used before the
    // next call.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        assert!(!stream.is_null());
        let next = || {
            let entry = libc::readdir(stream);
            (!entry.is_null()).then(|| {
                std::ffi::CStr::from_ptr((*entry).d_name.as_ptr())
                    .to_str()
                    .unwrap()
                    .to_owned()
            })
        };
        let mut all = vec![];
        let mut places = vec![];
        loop {
            let place = libc::telldir(stream);
            let Some(name) = next() else { break };
            places.push(place);
            all.push(name);
        }
        assert_eq!(all.len(), count + 2);
        assert_eq!(all.iter().cloned().collect::<BTreeSet<_>>().len(), count + 2);
        for at in [0, 1, 2, 77, 2500, 4999, 5001, 3, 1234] {
            libc::seekdir(stream, places[at]);
            assert_eq!(next().as_ref(), Some(&all[at]), "entry {at}");
            assert_eq!(next().as_ref(), all.get(at + 1), "entry {}", at + 1);
        }
        // What is removed meanwhile neither repeats nor hides others.
        libc::seekdir(stream, places[2000]);
        for name in &all[1000..2000] {
            let _ = fs::remove_file(m.path("d").join(name));
        }
        let rest: Vec<_> = std::iter::from_fn(next).collect();
        assert_eq!(rest, all[2000..]);
        libc::closedir(stream);
    }
    fs::remove_dir_all(m.path("d")).unwrap();
    assert!(!m.host("d").exists());
}

#[test]
fn names_of_all_bytes() {
    let m = Mount::new();
    let long = vec![b'n'; 255];
    let odd: [&[u8]; 9] = [
        b"...",
        b"..a",
        b" ",
        b"a\nb",
        b"\x01\x7f\xff\xfe",
        b"back\\slash",
        b"*?[",
        b"\xe2\x82\xac",
        &long,
    ];
    for name in odd {
        let name = OsStr::from_bytes(name);
        fs::write(m.path(name), "x").unwrap();
        assert_eq!(fs::read(m.host(name)).unwrap(), b"x");
    }
    let found: BTreeSet<_> = fs::read_dir(m.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(
        found,
        odd.iter().map(|n| OsStr::from_bytes(n).to_owned()).collect()
    );
    assert_eq!(errno(fs::write(m.path("n".repeat(256)), "")), libc::ENAMETOOLONG);
    assert_eq!(errno(File::open(m.path("missing"))), libc::ENOENT);
    assert_eq!(errno(File::open(m.path(" /x"))), libc::ENOTDIR);
}

#[test]
fn symbolic_links_are_followed_by_the_guest_alone() {
    let m = Mount::new();
    fs::write(m.server.outside().join("outside"), "the host's").unwrap();
    // Through the host's side this would lead out of the share.
    symlink("../outside", m.path("up")).unwrap();
    assert_eq!(fs::read(m.host("up")).unwrap(), b"the host's");
    assert_eq!(errno(File::open(m.path("up"))), libc::ENOENT);
    // An absolute one means the guest's root, here this test's.
    symlink("/mnt/share/f", m.path("absolute")).unwrap();
    fs::write(m.path("f"), "inside").unwrap();
    assert_eq!(fs::read(m.path("absolute")).unwrap(), b"inside");
    let target = "t".repeat(4000);
    symlink(&target, m.path("long")).unwrap();
    assert_eq!(fs::read_link(m.path("long")).unwrap(), Path::new(&target));
    symlink("loop-b", m.path("loop-a")).unwrap();
    symlink("loop-a", m.path("loop-b")).unwrap();
    assert_eq!(errno(File::open(m.path("loop-a"))), libc::ELOOP);
    let times = fs::symlink_metadata(m.path("long")).unwrap();
    assert_eq!((times.len(), times.mode() & 0o777), (4000, 0o777));
    let error = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(m.path("absolute"));
    assert_eq!(errno(error), libc::ELOOP);
}

#[test]
fn a_link_put_in_a_directorys_place_leads_nowhere() {
    let m = Mount::new();
    fs::create_dir(m.path("d")).unwrap();
    fs::write(m.path("d/f"), "inside").unwrap();
    let inside = File::open(m.path("d")).unwrap();
    fs::write(m.server.outside().join("f"), "outside").unwrap();
    fs::rename(m.host("d"), m.host("moved")).unwrap();
    symlink(m.server.outside(), m.host("d")).unwrap();
    // SAFETY: the path is NUL-terminated and lives through the call; the descriptor is closed with the process.
    let fd = check(unsafe { libc::openat(inside.as_raw_fd(), c"f".as_ptr(), libc::O_RDONLY) }).unwrap();
    let mut bytes = [0u8; 7];
    // SAFETY: `bytes` has room for the length given; the descriptor is this test's.
    let n = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
    // SAFETY: the descriptor is this test's and not used again.
    unsafe { libc::close(fd) };
    assert_eq!(&bytes[..n as usize], b"inside");
}

#[test]
fn locks_hold_between_processes() {
    let m = Mount::new();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(m.path("f"))
        .unwrap();
    // SAFETY: flock is plain integers, for which zero is valid; it lives through the call.
    let fcntl_lock = |fd: i32| unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as libc::c_short;
        libc::fcntl(fd, libc::F_SETLK, &raw const lock)
    };
    assert_eq!(fcntl_lock(file.as_raw_fd()), 0);
    let other = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path("f"))
        .unwrap();
    let _alone = without_forks();
    // SAFETY: no pointers are involved.
    assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
    // SAFETY: the child makes system calls alone, then ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = fcntl_lock(other.as_raw_fd()) < 0
            // SAFETY: as above.
            && unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0;
        // SAFETY: as above.
        unsafe { libc::_exit(if refused { 7 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 7);
    drop(file);
    // SAFETY: no pointers are involved.
    let taken = unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    assert_eq!(taken, 0);
    // SAFETY: forks a child that only locks and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let taken = fcntl_lock(other.as_raw_fd()) == 0;
        // SAFETY: as above.
        unsafe { libc::_exit(if taken { 7 } else { 1 }) };
    }
    // SAFETY: `status` lives through the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

#[test]
fn times_and_file_system_facts() {
    let m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    let file = OpenOptions::new().write(true).open(m.path("f")).unwrap();
    let at = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_times(fs::FileTimes::new().set_modified(at).set_accessed(at))
        .unwrap();
    for path in [m.path("f"), m.host("f")] {
        let metadata = fs::metadata(path).unwrap();
        assert_eq!(
            (metadata.mtime(), metadata.mtime_nsec()),
            (1_000_000_000, 123_456_789)
        );
        assert_eq!(
            (metadata.atime(), metadata.atime_nsec()),
            (1_000_000_000, 123_456_789)
        );
    }
    let now = [
        libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_NOW,
        },
        libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        },
    ];
    // SAFETY: two times, as the call wants, live through it.
    check(unsafe { libc::futimens(file.as_raw_fd(), now.as_ptr()) }).unwrap();
    let metadata = fs::metadata(m.host("f")).unwrap();
    assert!(metadata.atime() > 1_600_000_000 && metadata.mtime() == 1_000_000_000);
    assert!(
        fs::metadata(m.path("f")).unwrap().created().is_ok(),
        "the time of birth is told"
    );
    // Before 1970.
    symlink("f", m.path("l")).unwrap();
    let old = [libc::timespec {
        tv_sec: -5,
        tv_nsec: 1,
    }; 2];
    let path = posix_path(&m.path("l"));
    // SAFETY: the path is NUL-terminated, two times; both live through the call.
    check(unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            path.as_ptr(),
            old.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
        )
    })
    .unwrap();
    assert_eq!(fs::symlink_metadata(m.host("l")).unwrap().mtime(), -5);
    assert_eq!(fs::metadata(m.host("f")).unwrap().mtime(), 1_000_000_000);
    // SAFETY: statfs is plain integers, for which zero is valid; the path and it live through the calls.
    unsafe {
        let (mut ours, mut hosts): (libc::statfs, libc::statfs) = (std::mem::zeroed(), std::mem::zeroed());
        check(libc::statfs(posix_path(&m.path("")).as_ptr(), &raw mut ours)).unwrap();
        check(libc::statfs(posix_path(&m.host("")).as_ptr(), &raw mut hosts)).unwrap();
        assert_eq!(
            (ours.f_blocks, ours.f_bsize, ours.f_namelen),
            (hosts.f_blocks, hosts.f_bsize, hosts.f_namelen)
        );
    }
}

#[test]
fn programs_run_from_the_share() {
    let m = Mount::new();
    let _alone = without_forks();
    fs::copy(std::env::current_exe().unwrap(), m.path("program")).unwrap();
    for _ in 0..2 {
        let output = std::process::Command::new(m.path("program"))
            .arg("--list")
            .output()
            .unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("programs_run_from_the_share"));
    }
    fs::write(m.path("script"), "#!/bin/sh\necho \"$0\"\n").unwrap();
    chmod(&m.path("script"), 0o755);
    let output = std::process::Command::new(m.path("script")).output().unwrap();
    assert_eq!(output.stdout, b"/mnt/share/script\n");
}

#[test]
fn mounts_made_later_on_the_host_show_up() {
    let m = Mount::new();
    fs::create_dir(m.host("c1")).unwrap();
    mount_tmpfs(&m.host("c1"));
    fs::write(m.host("c1/f"), "on the tmpfs").unwrap();
    assert_eq!(fs::read(m.path("c1/f")).unwrap(), b"on the tmpfs");
    fs::write(m.path("c1/g"), "back").unwrap();
    assert_eq!(fs::read(m.host("c1/g")).unwrap(), b"back");
    // As between any two file systems.
    assert_eq!(errno(fs::rename(m.path("c1/g"), m.path("g"))), libc::EXDEV);
    assert_eq!(errno(fs::hard_link(m.path("c1/g"), m.path("g"))), libc::EXDEV);
    let at = posix_path(&m.host("c1"));
    // SAFETY: the path is NUL-terminated and lives through the call.
    check(unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) }).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(names(&m.path("c1")).is_empty());
}

/// What engines give a container as its root: here with lower and upper layer on different file systems, where an
/// overlay gives a file another identity when it is first written to.
#[test]
fn overlays_beneath_the_share() {
    let m = Mount::new();
    let lower = m.server.outside().join("lower");
    fs::create_dir_all(lower.join("dir")).unwrap();
    fs::write(lower.join("dir/old"), "old").unwrap();
    fs::write(lower.join("gone"), "x").unwrap();
    for name in ["upper", "work"] {
        fs::create_dir(Path::new("/mnt").join(name)).unwrap();
    }
    fs::create_dir(m.host("rootfs")).unwrap();
    let options = format!(
        "lowerdir={},upperdir=/mnt/upper,workdir=/mnt/work",
        lower.display()
    );
    let (at, options) = (posix_path(&m.host("rootfs")), posix_path(Path::new(&options)));
    // SAFETY: the strings are NUL-terminated and live through the call.
    check(unsafe {
        libc::mount(
            c"overlay".as_ptr(),
            at.as_ptr(),
            c"overlay".as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    })
    .unwrap();
    let root = m.path("rootfs");
    let reader = File::open(root.join("dir/old")).unwrap();
    let mut writer = OpenOptions::new()
        .append(true)
        .open(root.join("dir/old"))
        .unwrap();
    writer.write_all(b" and new").unwrap();
    let mut text = vec![0; 11];
    reader.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(text, b"old and new");
    assert_eq!(fs::read(lower.join("dir/old")).unwrap(), b"old");
    chmod(&root.join("dir/old"), 0o4711);
    fs::hard_link(root.join("dir/old"), root.join("dir/link")).unwrap();
    assert_eq!(mode(&root.join("dir/link")), 0o4711);
    fs::remove_file(root.join("gone")).unwrap();
    fs::rename(root.join("dir/link"), root.join("moved")).unwrap();
    assert_eq!(names(&root), ["dir".to_owned(), "moved".to_owned()].into());
    fs::create_dir(root.join("made")).unwrap();
    posix::set_xattr(&root.join("moved"), "user.x", b"x").unwrap();
    assert_eq!(posix::get_xattr(&m.host("rootfs/moved"), "user.x").unwrap(), b"x");
    let mut unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(root.join("made"))
        .unwrap();
    unnamed.write_all(b"unnamed").unwrap();
    chown(root.join("moved"), Some(ALICE), Some(STAFF)).unwrap();
    assert_eq!(owner(&m.host("rootfs/moved")), (ALICE, STAFF));
    fs::remove_dir_all(root.join("dir")).unwrap();
    assert_eq!(
        names(&m.host("rootfs")),
        ["made".to_owned(), "moved".to_owned()].into()
    );
}

#[test]
fn many_threads_at_once() {
    let m = Mount::new();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let m = &m;
            scope.spawn(move || {
                let dir = m.path(format!("t{thread}"));
                fs::create_dir(&dir).unwrap();
                for n in 0..100 {
                    let path = dir.join(format!("f{n}"));
                    fs::write(&path, format!("{thread} {n}").repeat(n)).unwrap();
                    fs::rename(&path, dir.join(format!("g{n}"))).unwrap();
                    let text = fs::read_to_string(dir.join(format!("g{n}"))).unwrap();
                    assert_eq!(text, format!("{thread} {n}").repeat(n));
                    if n % 3 == 0 {
                        fs::remove_file(dir.join(format!("g{n}"))).unwrap();
                    }
                }
                assert_eq!(names(&dir).len(), 66);
            });
        }
    });
}

#[test]
fn when_the_server_dies_requests_fail_rather_than_hang() {
    let mut m = Mount::new();
    fs::write(m.path("f"), "x").unwrap();
    m.server.child.kill().unwrap();
    m.server.child.wait().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(errno(fs::read(m.path("f"))), libc::ENOTCONN);
    assert_eq!(errno(fs::write(m.path("g"), "x")), libc::ENOTCONN);
}

/// The guest may know more files than the server keeps descriptors of.
#[test]
fn more_files_than_descriptors() {
    const FILES: usize = 1000;
    let m = Mount::limited(Some(256));
    let name = |n: usize| format!("{}/{n}", n % 10);
    for n in 0..10 {
        fs::create_dir(m.host(n.to_string())).unwrap();
    }
    for n in 0..FILES {
        fs::write(m.host(name(n)), n.to_string()).unwrap();
    }
    let walk = || {
        for n in 20..FILES {
            assert_eq!(
                fs::metadata(m.path(name(n))).unwrap().len(),
                n.to_string().len() as u64
            );
        }
    };
    symlink("elsewhere", m.path("link")).unwrap();
    posix::mknod(&m.path("fifo"), libc::S_IFIFO | 0o600, 0).unwrap();
    fs::hard_link(m.path(name(1)), m.path("second")).unwrap();
    let mut open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(m.path(name(2)))
        .unwrap();
    let mut unlinked = File::create_new(m.path("unlinked")).unwrap();
    fs::remove_file(m.path("unlinked")).unwrap();
    let named_only = |name: &str| {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        options.open(m.path(name)).unwrap()
    };
    let paths = ["link", "fifo", "second", "3/3"].map(named_only);
    let before = paths.each_ref().map(|file| file.metadata().unwrap().ino());
    walk();

    assert_eq!(
        paths.each_ref().map(|file| file.metadata().unwrap().ino()),
        before
    );
    assert_eq!(fs::read_link(m.path("link")).unwrap(), Path::new("elsewhere"));
    unlinked.write_all(b"still here").unwrap();
    assert_eq!(unlinked.metadata().unwrap().len(), 10);
    for n in 0..FILES {
        assert_eq!(fs::read_to_string(m.path(name(n))).unwrap(), n.to_string());
    }

    // What the guest itself does to names.
    let (moved, removed) = (named_only("4/4"), named_only("5/5"));
    walk();
    fs::rename(m.path(name(4)), m.path("moved")).unwrap();
    fs::remove_file(m.path(name(5))).unwrap();
    fs::remove_file(m.path(name(1))).unwrap();
    fs::rename(m.path(name(6)), m.path(name(7))).unwrap();
    walk();
    assert_eq!(
        moved.metadata().unwrap().ino(),
        fs::metadata(m.host("moved")).unwrap().ino()
    );
    assert_eq!(removed.metadata().unwrap().nlink(), 0);
    assert_eq!(paths[2].metadata().unwrap().nlink(), 1);
    assert_eq!(fs::read_to_string(m.path(name(7))).unwrap(), "6");
    chmod(&m.path("moved"), 0o741);
    posix::set_xattr(&m.path("second"), "user.a", b"b").unwrap();
    walk();
    assert_eq!(mode(&m.host("moved")), 0o741);
    assert_eq!(posix::get_xattr(&m.path("second"), "user.a").unwrap(), b"b");

    // What the host does to them.
    fs::rename(m.host(name(8)), m.host("by-host")).unwrap();
    fs::remove_file(m.host(name(9))).unwrap();
    fs::write(m.host(name(9)), "another").unwrap();
    fs::rename(m.host(name(2)), m.host("open")).unwrap();
    assert_eq!(fs::read_to_string(m.path("by-host")).unwrap(), "8");
    assert_eq!(fs::read_to_string(m.path(name(9))).unwrap(), "another");
    walk();
    open.write_all(b"two").unwrap();
    assert_eq!(open.metadata().unwrap().len(), 3);
    assert_eq!(fs::read_to_string(m.path("open")).unwrap(), "two");
}
