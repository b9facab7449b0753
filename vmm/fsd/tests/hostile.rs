//! The husk-fsd binary before a guest, or a VMM, that means harm: nothing outside of the share is touched, and the
//! server answers and lives on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::client::{Args, Client, ROOT, request};
use common::server::{Server, mount_tmpfs};
use husk_vmm_protocol::fs::{MAX_REQUEST_LEN, RequestHeader};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::cell::RefCell;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const TMPFILE: u32 = 51;

/// The arguments before the name, of each request that has a name.
fn named() -> Vec<(u32, Args)> {
    let args = Args::new;
    vec![
        (LOOKUP, args()),
        (MKNOD, args().u32(libc::S_IFREG | 0o644).u32(0).u32(0).u32(0)),
        (MKDIR, args().u32(0o755).u32(0)),
        (UNLINK, args()),
        (RMDIR, args()),
        (LINK, args().u64(ROOT)),
        (CREATE, args().u32(libc::O_RDWR as u32).u32(0o644).u32(0).u32(0)),
        (RENAME, args().u64(ROOT).name(c"there")),
        (RENAME2, args().u64(ROOT).u32(0).u32(0).name(c"there")),
    ]
}

fn eventually(mut holds: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed().as_secs() < 10, "it does not come about");
    }
}

#[test]
fn names_that_could_lead_elsewhere_are_refused() {
    let mut c = Client::new();
    c.init();
    let outside = c.server.outside().join("outside");
    fs::write(&outside, "untouched").unwrap();
    fs::write(c.server.share().join("there"), "").unwrap();
    let long = [vec![b'x'; 256], vec![0]].concat();
    for (opcode, args) in named() {
        for name in [
            &b"..\0"[..],
            b".\0",
            b"\0",
            b"../outside\0",
            b"/etc/passwd\0",
            b"there/../../outside\0",
        ] {
            assert_eq!(
                c.error(opcode, ROOT, &args.clone().bytes(name)),
                libc::EINVAL,
                "{opcode} {name:?}"
            );
        }
        assert_eq!(
            c.error(opcode, ROOT, &args.clone().bytes(b"no end")),
            libc::EINVAL,
            "{opcode}"
        );
        assert_eq!(
            c.error(opcode, ROOT, &args.clone().bytes(b"two\0more\0")),
            libc::EINVAL,
            "{opcode}"
        );
        assert_eq!(
            c.error(opcode, ROOT, &args.clone().bytes(&long)),
            libc::ENAMETOOLONG,
            "{opcode}"
        );
    }
    // The link's own name, and the new name of a rename.
    assert_eq!(
        c.error(SYMLINK, ROOT, &Args::new().name(c"../l").name(c"t")),
        libc::EINVAL
    );
    assert_eq!(
        c.error(RENAME, ROOT, &Args::new().u64(ROOT).name(c"..").name(c"x")),
        libc::EINVAL
    );
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    assert_eq!(fs::read_dir(c.server.share()).unwrap().count(), 1);
}

#[test]
fn links_are_never_followed_by_the_server() {
    let mut c = Client::new();
    c.init();
    fs::write(c.server.outside().join("secret"), "s").unwrap();
    symlink(c.server.outside(), c.server.share().join("out")).unwrap();
    symlink("../secret", c.server.share().join("secret")).unwrap();
    symlink("/proc/self/root/etc", c.server.share().join("magic")).unwrap();
    for name in [c"out", c"secret", c"magic"] {
        let link = c.look_up(ROOT, name).u64(0);
        assert_eq!(c.error(OPEN, link, &Args::new().u32(0).u32(0)), libc::ELOOP);
        assert_eq!(c.error(OPENDIR, link, &Args::new().u32(0).u32(0)), libc::ENOTDIR);
        assert_eq!(c.error(LOOKUP, link, &Args::new().name(c"secret")), libc::ENOTDIR);
        // chmod, truncate.
        for valid in [1, 8] {
            let args = Args::new().u32(valid).u32(0).bytes(&[0; 80]);
            assert_ne!(c.error(SETATTR, link, &args), 0);
        }
        let create = Args::new()
            .u32(libc::O_RDWR as u32)
            .u32(0o644)
            .u32(0)
            .u32(0)
            .name(name);
        assert_eq!(c.error(CREATE, ROOT, &create), libc::ELOOP);
    }
    assert_eq!(fs::read(c.server.outside().join("secret")).unwrap(), b"s");
}

#[test]
fn special_files_are_never_opened_on_the_host() {
    let mut c = Client::new();
    c.init();
    for (name, mode) in [
        (c"fifo", libc::S_IFIFO),
        (c"char", libc::S_IFCHR),
        (c"block", libc::S_IFBLK),
        (c"sock", libc::S_IFSOCK),
    ] {
        let args = Args::new().u32(mode | 0o666).u32(0x105).u32(0).u32(0).name(name);
        let node = c.ask(MKNOD, ROOT, &args).u64(0);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_NONBLOCK] {
            assert_eq!(
                c.error(OPEN, node, &Args::new().u32(flags as u32).u32(0)),
                libc::ENXIO,
                "{name:?}"
            );
        }
        assert_eq!(c.error(OPENDIR, node, &Args::new().u32(0).u32(0)), libc::ENOTDIR);
        let truncate = Args::new().u32(8).u32(0).bytes(&[0; 80]);
        assert_eq!(c.error(SETATTR, node, &truncate), libc::ENXIO);
        let create = Args::new()
            .u32(libc::O_RDWR as u32)
            .u32(0o644)
            .u32(0)
            .u32(0)
            .name(name);
        assert_eq!(c.error(CREATE, ROOT, &create), libc::ENXIO);
    }
    // A directory in the guise of a file by MKNOD, or no kind at all.
    for mode in [libc::S_IFDIR, libc::S_IFLNK, 0] {
        let args = Args::new().u32(mode | 0o666).u32(0).u32(0).u32(0).name(c"x");
        assert_eq!(c.error(MKNOD, ROOT, &args), libc::EINVAL);
    }
    assert_eq!(c.error(OPEN, ROOT, &Args::new().u32(0).u32(0)), libc::EISDIR);
}

#[test]
fn numbers_out_of_use_mean_nothing() {
    let mut c = Client::new();
    c.init();
    fs::write(c.server.share().join("f"), "").unwrap();
    let node = c.look_up(ROOT, c"f").u64(0);
    let opened = c.ask(OPEN, node, &Args::new().u32(0).u32(0));
    assert!(opened.file.is_some());
    let handle = opened.u64(0);
    c.tell(FORGET, node, &Args::new().u64(u64::MAX));
    // Another thread may carry it out later than what is asked next.
    eventually(|| c.ask(GETATTR, node, &Args::new().bytes(&[0; 16])).error != 0);
    assert_eq!(c.error(OPEN, node, &Args::new().u32(0).u32(0)), libc::ESTALE);
    assert_ne!(c.look_up(ROOT, c"f").u64(0), node);
    for stale in [0, node, node + 100, u64::MAX] {
        for (opcode, args) in named() {
            assert_eq!(
                c.error(opcode, stale, &args.name(c"name")),
                libc::ESTALE,
                "{opcode} {stale}"
            );
        }
        assert_eq!(c.error(OPENDIR, stale, &Args::new().u32(0).u32(0)), libc::ESTALE);
    }
    let renamed = Args::new().u64(node).name(c"f").name(c"g");
    assert_eq!(c.error(RENAME, ROOT, &renamed), libc::ESTALE);
    // Handles: of the other kind, released, never given out.
    let read = |handle| Args::new().u64(handle).u64(0).u32(4096).u32(0).u64(0).u64(0);
    assert_eq!(c.error(READDIR, ROOT, &read(handle)), libc::EBADF);
    assert_eq!(
        c.ask(RELEASE, node, &Args::new().u64(handle).bytes(&[0; 16]))
            .error,
        0
    );
    assert_eq!(
        c.error(RELEASE, node, &Args::new().u64(handle).bytes(&[0; 16])),
        libc::EBADF
    );
    for handle in [0, handle, u64::MAX] {
        assert_eq!(c.error(READDIRPLUS, ROOT, &read(handle)), libc::EBADF);
    }
    // Contents never pass through the server.
    assert_eq!(c.error(READ, node, &read(handle)), libc::ENOSYS);
    assert_eq!(c.error(WRITE, node, &read(handle)), libc::ENOSYS);
    // A session's end is the end of all.
    let node = c.look_up(ROOT, c"f").u64(0);
    assert_eq!(c.ask(DESTROY, 0, &Args::new()).error, 0);
    assert_eq!(c.error(GETATTR, node, &Args::new().bytes(&[0; 16])), libc::ESTALE);
}

#[test]
fn identities_that_name_nobody_make_no_files() {
    let mut c = Client::new();
    c.init();
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        let mut fuse = request(MKDIR, ROOT, 5, &Args::new().u32(0o755).u32(0).name(c"d"));
        fuse[24..28].copy_from_slice(&uid.to_le_bytes());
        fuse[28..32].copy_from_slice(&gid.to_le_bytes());
        c.send_request(4096, &fuse);
        assert_eq!(c.receive().unwrap().error, libc::EOVERFLOW);
    }
    assert_eq!(fs::read_dir(c.server.share()).unwrap().count(), 0);
}

#[test]
fn lengths_are_believed_only_as_far_as_they_go() {
    let mut c = Client::new();
    c.init();
    let f = c.server.share().join("f");
    fs::write(&f, "").unwrap();
    let node = c.look_up(ROOT, c"f").u64(0);
    let value = vec![b'v'; 4000];
    let set = |size: u32, value: &[u8]| {
        Args::new()
            .u32(size)
            .u32(0)
            .u32(0)
            .u32(0)
            .name(c"user.x")
            .bytes(value)
    };
    assert_eq!(c.error(SETXATTR, node, &set(u32::MAX, &value)), libc::EINVAL);
    assert_eq!(c.error(SETXATTR, node, &set(4001, &value)), libc::EINVAL);
    assert_eq!(c.error(SETXATTR, node, &set(3999, &value)), libc::EINVAL);
    assert_eq!(c.ask(SETXATTR, node, &set(4000, &value)).error, 0);
    let get = |size: u32| Args::new().u32(size).u32(0).name(c"user.x");
    assert_eq!(c.ask(GETXATTR, node, &get(u32::MAX)).body, value);
    assert_eq!(c.error(GETXATTR, node, &get(3999)), libc::ERANGE);
    assert_eq!(c.ask(GETXATTR, node, &get(0)).u32(0), 4000);
    assert_eq!(
        c.ask(LISTXATTR, node, &Args::new().u32(u32::MAX).u32(0)).body,
        b"user.x\0"
    );
    // Less room than it takes, and none.
    for capacity in [0, 15, 16, 17, 4000] {
        assert_eq!(
            c.ask_with_room(capacity, GETXATTR, node, &get(65536)).error,
            libc::EIO
        );
        assert_eq!(
            c.ask_with_room(capacity.min(100), LOOKUP, ROOT, &Args::new().name(c"f"))
                .error,
            libc::EIO
        );
    }
    for n in 0..500 {
        fs::write(c.server.share().join(format!("file-{n:03}")), "").unwrap();
    }
    let dir = c.ask(OPENDIR, ROOT, &Args::new().u32(0).u32(0)).u64(0);
    let read = |offset: u64, size: u32| Args::new().u64(dir).u64(offset).u32(size).u32(0).u64(0).u64(0);
    for opcode in [READDIR, READDIRPLUS] {
        assert!(!c.ask(opcode, ROOT, &read(0, u32::MAX)).body.is_empty());
        assert_eq!(c.error(opcode, ROOT, &read(0, 0)), libc::EINVAL);
        assert_eq!(c.error(opcode, ROOT, &read(0, 20)), libc::EINVAL);
        for offset in [1, 12345, u64::MAX, 1 << 63, (1 << 63) - 1] {
            c.ask(opcode, ROOT, &read(offset, 4096));
        }
    }
    // Counts of forgotten nodes that are not there.
    c.tell(
        BATCH_FORGET,
        0,
        &Args::new().u32(u32::MAX).u32(0).u64(node).u64(1),
    );
    c.tell(BATCH_FORGET, 0, &Args::new().u32(1));
    c.tell(INTERRUPT, 0, &Args::new());
    c.tell(FORGET, ROOT, &Args::new().u64(u64::MAX));
    // A header that says more, or less, than there is.
    for len in [0u32, 39, 40, 55, 57, u32::MAX] {
        let mut fuse = request(GETATTR, ROOT, 9, &Args::new().bytes(&[0; 16]));
        fuse[..4].copy_from_slice(&len.to_le_bytes());
        c.send_request(4096, &fuse);
        assert_eq!(c.receive().unwrap().error, libc::EINVAL, "{len}");
    }
    c.send_request(4096, &[]);
    assert_eq!(c.receive().unwrap().error, libc::EINVAL);
    c.send_request(4096, &vec![0; MAX_REQUEST_LEN + 1]);
    assert_eq!(c.receive().unwrap().error, libc::EINVAL);
    assert_eq!(c.ask(GETATTR, ROOT, &Args::new().bytes(&[0; 16])).error, 0);
}

#[test]
fn other_mounts_are_told_to_be_so() {
    let mut c = Client::new();
    assert_eq!(c.init().error, 0);
    fs::create_dir_all(c.server.share().join("same")).unwrap();
    fs::create_dir_all(c.server.share().join("other")).unwrap();
    mount_tmpfs(&c.server.share().join("other"));
    fs::create_dir(c.server.share().join("other/inner")).unwrap();
    // fuse_attr.flags, after 40 bytes of fuse_entry_out.
    let flags = |reply: &common::client::Reply| reply.u32(40 + 84);
    assert_eq!(flags(&c.look_up(ROOT, c"same")), 0);
    let other = c.look_up(ROOT, c"other");
    assert_eq!(flags(&other), 1);
    assert_eq!(flags(&c.look_up(other.u64(0), c"inner")), 0);
    let dir = c.ask(OPENDIR, ROOT, &Args::new().u32(0).u32(0)).u64(0);
    let read = Args::new().u64(dir).u64(0).u32(65536).u32(0).u64(0).u64(0);
    let entries = c.ask(READDIRPLUS, ROOT, &read).body;
    let mut found = 0;
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[128 + 16..128 + 20].try_into().unwrap()) as usize;
        let name = &rest[128 + 24..128 + 24 + len];
        let flags = u32::from_le_bytes(rest[124..128].try_into().unwrap());
        assert_eq!(flags, u32::from(name == b"other"), "{name:?}");
        found += 1;
        rest = &rest[(128 + 24 + len).next_multiple_of(8)..];
    }
    assert_eq!(found, 4);
}

#[test]
fn the_guest_keeps_its_cache_while_the_file_is_as_it_was() {
    const KEEP_CACHE: u32 = 2;
    let mut c = Client::new();
    c.init();
    let f = c.server.share().join("f");
    fs::write(&f, "one").unwrap();
    let touch = |at| {
        let file = fs::File::options().write(true).open(&f).unwrap();
        file.set_modified(at).unwrap();
    };
    // Young however long this test takes.
    touch(SystemTime::now() + Duration::from_secs(3600));
    let node = c.look_up(ROOT, c"f").u64(0);
    let mut open = || c.ask(OPEN, node, &Args::new().u32(0).u32(0)).u32(8) & KEEP_CACHE != 0;
    assert!(!open());
    // Just written: another change could leave no mark.
    assert!(!open());
    let settle = || std::thread::sleep(Duration::from_millis(150));
    touch(SystemTime::now());
    settle();
    assert!(!open());
    assert!(open());
    fs::write(&f, "two").unwrap();
    settle();
    assert!(!open());
    assert!(open());
}

#[test]
fn when_descriptors_run_out_the_server_says_so_and_recovers() {
    let mut c = Client::before(Server::start_limited(Some((libc::RLIMIT_NOFILE, 64))));
    c.init();
    fs::write(c.server.share().join("file"), "").unwrap();
    let file = c.look_up(ROOT, c"file").u64(0);
    let mut nodes = vec![];
    let mut refused = 0;
    for n in 0..200 {
        let name = format!("d{n}");
        fs::create_dir(c.server.share().join(&name)).unwrap();
        let name = std::ffi::CString::new(name).unwrap();
        let reply = c.ask(LOOKUP, ROOT, &Args::new().name(&name));
        match reply.error {
            0 => nodes.push(reply.u64(0)),
            libc::ENFILE => refused += 1,
            e => panic!("error {e}"),
        }
    }
    assert!(nodes.len() > 30 && refused > 100, "{} {refused}", nodes.len());
    assert_eq!(c.error(OPEN, file, &Args::new().u32(0).u32(0)), libc::ENFILE);
    let create = Args::new()
        .u32(libc::O_RDWR as u32)
        .u32(0o644)
        .u32(0)
        .u32(0)
        .name(c"new");
    assert_eq!(c.error(CREATE, ROOT, &create), libc::ENFILE);
    for node in nodes {
        c.tell(FORGET, node, &Args::new().u64(1));
    }
    eventually(|| c.ask(LOOKUP, ROOT, &Args::new().name(c"d199")).error == 0);
    assert_eq!(c.ask(CREATE, ROOT, &create).error, 0);
}

#[test]
fn the_server_has_given_up_what_it_does_not_need() {
    let mut c = Client::new();
    c.init();
    let pid = c.server.child.id();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .unwrap()
                .trim()
                .to_owned()
        };
        // CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID SETGID SETUID MKNOD SETFCAP
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0x880000df, "{set}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Groups:"), "");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(
        mounts.contains(" nosuid,nodev,noexec") || mounts.contains(",nosuid,nodev,noexec"),
        "{mounts}"
    );
    let mut kinds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|e| fs::read_link(e.unwrap().path()).unwrap().display().to_string())
        .collect();
    kinds.sort();
    // 0 and 1, log, channel, root, /proc/self/fd.
    assert_eq!(kinds.len(), 6, "{kinds:?}");
}

#[test]
fn the_server_ends_with_its_channel() {
    let mut server = Server::start();
    assert_eq!(server.wait(), Some(0));
    let mut c = Client::new();
    c.init();
    for name in [c"a", c"b"] {
        // Answers that nobody reads.
        c.send_request(4096, &request(LOOKUP, ROOT, 1, &Args::new().name(name)));
    }
    let mut server = c.close();
    assert_eq!(server.wait(), Some(0));
}

#[test]
fn without_its_descriptors_it_says_what_is_wrong() {
    use std::process::{Command, Stdio};
    let binary = env!("CARGO_BIN_EXE_husk-fsd");
    let run = |argument: &[&str]| {
        Command::new(binary)
            .args(argument)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("descriptor 3 is not"),
        "{output:?}"
    );
    assert!(run(&["--version"]).stdout.starts_with(b"husk-fsd "));
    assert!(run(&["--help"]).status.success());
    assert_eq!(run(&["--share=/"]).status.code(), Some(2));
}

/// Requests with something of the right form in them, so that they get further than their first field.
fn hostile_request() -> impl Strategy<Value = (u32, u64, Vec<u8>)> {
    let name = prop_oneof![
        Just(b"..\0".to_vec()),
        Just(b"a\0".to_vec()),
        Just(b"b\0".to_vec()),
        Just(b"../outside\0".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..300),
    ];
    let word = prop_oneof![
        Just(0u32),
        1u32..16,
        Just(libc::S_IFREG | 0o644),
        Just(libc::S_IFCHR | 0o666),
        any::<u32>(),
        Just(u32::MAX),
    ];
    let words = proptest::collection::vec(word, 0..24);
    let opcode = prop_oneof![10 => 0u32..56, 1 => any::<u32>()];
    let node = prop_oneof![4 => Just(ROOT), 6 => 2u64..40, 1 => any::<u64>()];
    (opcode, node, words, proptest::collection::vec(name, 0..3)).prop_map(|(opcode, node, words, names)| {
        let mut body: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        body.extend(names.concat());
        // What is allocated beyond a file's end, RLIMIT_FSIZE does not bound. (What punches holes allocates nothing.)
        match body.get_mut(24) {
            Some(mode) if opcode == FALLOCATE && *mode & libc::FALLOC_FL_PUNCH_HOLE as u8 == 0 => {
                *mode &= !(libc::FALLOC_FL_KEEP_SIZE as u8);
            }
            _ => {}
        }
        (opcode, node, body)
    })
}

#[test]
fn any_request_is_answered_and_nothing_outside_changes() {
    // Or a FALLOCATE could take all of the host's disk.
    let mut c = Client::before(Server::start_limited(Some((libc::RLIMIT_FSIZE, 128 << 20))));
    c.init();
    let outside = c.server.outside().to_owned();
    fs::write(outside.join("outside"), "untouched").unwrap();
    fs::write(c.server.share().join("a"), "").unwrap();
    symlink("../outside", c.server.share().join("b")).unwrap();
    let c = RefCell::new(c);
    let mut runner = TestRunner::new(Config {
        cases: 4000,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(
            &(hostile_request(), any::<u32>(), any::<bool>()),
            |((opcode, node, body), capacity, whole)| {
                // Without INIT and DESTROY nodes pile up, for the others to meet.
                prop_assume!(![26, 38].contains(&opcode) || capacity % 100 == 0);
                let mut fuse = request(opcode, node, 77, &Args(body));
                if !whole {
                    fuse.truncate(fuse.len() * 2 / 3);
                }
                let capacity = if capacity % 2 == 0 { 65536 } else { capacity };
                let mut c = c.borrow_mut();
                let tag = c.send_request(capacity, &fuse);
                let silent = [FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) && whole;
                if !silent {
                    let reply = c.receive().expect("the server is gone");
                    prop_assert_eq!(reply.tag, tag);
                    prop_assert!(reply.file.is_none() || [OPEN, CREATE, TMPFILE].contains(&opcode));
                    prop_assert!(reply.body.len() + 16 <= (capacity as usize).max(16));
                }
                prop_assert_eq!(fs::read(outside.join("outside")).unwrap(), b"untouched");
                prop_assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
                Ok(())
            },
        )
        .unwrap();
    assert_eq!(
        c.borrow_mut()
            .ask(GETATTR, ROOT, &Args::new().bytes(&[0; 16]))
            .error,
        0
    );
}

#[test]
fn a_broken_packet_ends_the_server_and_nothing_else() {
    let mut c = Client::new();
    c.init();
    c.send(&RequestHeader { tag: 1, capacity: 0 }.encode()[..5]);
    assert!(c.receive().is_none());
    let mut server = c.close();
    assert_eq!(server.wait(), Some(1));
}

#[test]
fn descriptors_sent_along_are_not_taken() {
    let mut c = Client::new();
    c.init();
    let pid = c.server.child.id();
    let count = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = count();
    let file = fs::File::open("/").unwrap();
    for _ in 0..20 {
        c.send_with_file(
            &request(GETATTR, ROOT, 1, &Args::new().bytes(&[0; 16])),
            file.as_raw_fd(),
        );
        assert_eq!(c.receive().unwrap().error, 0);
    }
    assert_eq!(count(), before);
}
