//! The host's side moves, replaces and mounts over what the guest's requests are walking: nothing outside of the share is
//! reached, told of or changed, each request ends in what is so, and the server keeps nothing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::client::{Args, Client, ROOT, Reply};
use common::server::{Server, bind, check, posix_path};
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

const SECRET: &[u8] = b"not the guest's";
const FOR: Duration = Duration::from_millis(1500);

/// Where the host keeps what it moves in and out, and what never is the guest's.
#[derive(Clone)]
struct Host {
    /// The directory that the share is in, by a mount that shows both: a move from one to the other stays on it.
    base: PathBuf,
    /// The share, by the mount that the server has.
    share: PathBuf,
}

impl Host {
    fn inside(&self, name: &str) -> PathBuf {
        self.base.join("share").join(name)
    }

    fn parked(&self, name: &str) -> PathBuf {
        self.base.join("parked").join(name)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        let (one, other) = (posix_path(one), posix_path(other));
        let at = libc::AT_FDCWD;
        // SAFETY: the paths are NUL-terminated and live through the call.
        check(unsafe { libc::renameat2(at, one.as_ptr(), at, other.as_ptr(), libc::RENAME_EXCHANGE) })?;
        Ok(())
    }

    /// Mounts the directory `bound`, beside the share, over the share's `name`.
    fn mount(&self, name: &str) {
        bind(&self.base.join("bound"), &self.share.join(name));
    }

    fn unmount(&self, name: &str) {
        let path = posix_path(&self.share.join(name));
        // SAFETY: the path is NUL-terminated and lives through the call.
        check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }).unwrap();
    }
}

/// A guest that remembers what it has to give back, and knows what it must never see.
struct Guest {
    c: Client,
    host: Host,
    lookups: HashMap<u64, u64>,
    /// Which file each number has stood for: it never stands for another.
    inodes: HashMap<u64, u64>,
    secrets: BTreeSet<u64>,
    descriptors: usize,
    is_limited: bool,
}

impl Guest {
    fn new() -> Self {
        Self::limited(None)
    }

    /// Before a server that may have no more descriptors.
    fn limited(descriptors: Option<libc::rlim_t>) -> Self {
        let limit = descriptors.map(|most| (libc::RLIMIT_NOFILE, most));
        let mut c = Client::before(Server::start_limited(limit));
        c.init();
        let base = PathBuf::from("/mnt/host");
        fs::create_dir(&base).unwrap();
        bind(c.server.outside(), &base);
        let host = Host {
            base,
            share: c.server.share(),
        };
        for name in ["parked", "secrets", "bound", "bound/inner"] {
            fs::create_dir(host.base.join(name)).unwrap();
        }
        for name in ["marker", "secrets/marker", "parked/marker"] {
            fs::write(host.base.join(name), SECRET).unwrap();
        }
        let secret = [
            "..",
            "",
            "marker",
            "parked",
            "parked/marker",
            "secrets",
            "secrets/marker",
        ];
        let secrets = secret.map(|name| c.server.outside().join(name).metadata().unwrap().ino());
        let is_limited = limit.is_some();
        let descriptors = self::descriptors(&c);
        Self {
            c,
            host,
            lookups: HashMap::new(),
            inodes: HashMap::new(),
            secrets: secrets.into(),
            descriptors,
            is_limited,
        }
    }

    fn is_allowed(&self, inode: u64, what: &str) {
        assert!(!self.secrets.contains(&inode), "{what}: outside of the share");
    }

    /// What the server answers, if that can be so.
    fn ask(&mut self, opcode: u32, node: u64, args: &Args) -> Option<Reply> {
        // EACCES: where the kernel has Landlock, a directory that was moved out is beyond the server's reach.
        let honest = match opcode {
            RENAME | LINK => &[
                libc::EXDEV,
                libc::EPERM,
                libc::EBUSY,
                libc::EINVAL,
                libc::ENOTEMPTY,
            ][..],
            UNLINK | RMDIR => &[libc::EBUSY, libc::EISDIR, libc::ENOTEMPTY],
            CREATE | OPEN => &[libc::ELOOP, libc::EISDIR],
            _ => &[],
        };
        let always = [
            libc::ENOENT,
            libc::ESTALE,
            libc::ENOTDIR,
            libc::EEXIST,
            libc::EACCES,
            // Files that have lost their names are held until the guest forgets them.
            if self.is_limited { libc::ENFILE } else { 0 },
        ];
        let reply = self.c.ask(opcode, node, args);
        if reply.error == 0 {
            return Some(reply);
        }
        assert!(
            honest.contains(&reply.error) || always.contains(&reply.error),
            "{opcode}: {}",
            io::Error::from_raw_os_error(reply.error)
        );
        None
    }

    fn learn(&mut self, node: u64, inode: u64) -> u64 {
        *self.lookups.entry(node).or_default() += 1;
        self.is_of(node, inode, "an entry");
        node
    }

    fn is_of(&mut self, node: u64, inode: u64, what: &str) {
        self.is_allowed(inode, what);
        assert_eq!(*self.inodes.entry(node).or_insert(inode), inode, "{what}");
    }

    /// The node of a reply that begins with an entry.
    fn entry(&mut self, reply: &Reply) -> u64 {
        self.learn(reply.u64(0), reply.u64(40))
    }

    fn look_up(&mut self, parent: u64, name: &CStr) -> Option<u64> {
        let reply = self.ask(LOOKUP, parent, &Args::new().name(name))?;
        Some(self.entry(&reply))
    }

    /// Reads what was opened, writes something into it, and closes it.
    fn use_file(&mut self, node: u64, reply: Reply, handle: u64) {
        let mut file = fs::File::from(reply.file.unwrap());
        self.is_of(node, file.metadata().unwrap().ino(), "an open file");
        let mut contents = vec![];
        file.read_to_end(&mut contents).unwrap();
        assert_ne!(contents, SECRET);
        file.write_all_at(b"guest", 0).unwrap();
        self.close(RELEASE, node, handle);
    }

    fn close(&mut self, opcode: u32, node: u64, handle: u64) {
        let args = Args::new().u64(handle).bytes(&[0; 16]);
        assert_eq!(self.c.ask(opcode, node, &args).error, 0);
    }

    fn stat(&mut self, node: u64) {
        if let Some(reply) = self.ask(GETATTR, node, &Args::new().bytes(&[0; 16])) {
            self.is_of(node, reply.u64(16), "attributes");
        }
    }

    fn open(&mut self, node: u64) {
        let args = Args::new().u32(libc::O_RDWR as u32).u32(0);
        if let Some(reply) = self.ask(OPEN, node, &args) {
            let handle = reply.u64(0);
            self.use_file(node, reply, handle);
        }
    }

    fn create(&mut self, parent: u64, name: &CStr, flags: libc::c_int) {
        let flags = (libc::O_RDWR | flags) as u32;
        let args = Args::new().u32(flags).u32(0o666).u32(0).u32(0).name(name);
        if let Some(reply) = self.ask(CREATE, parent, &args) {
            let (node, handle) = (self.entry(&reply), reply.u64(128));
            self.use_file(node, reply, handle);
        }
    }

    /// Lists a directory: what it says of `..`, if it is one.
    fn list(&mut self, node: u64, opcode: u32) -> Option<u64> {
        let reply = self.ask(OPENDIR, node, &Args::new().u32(0).u32(0))?;
        let above = self.read_dir(node, reply.u64(0), opcode);
        self.close(RELEASEDIR, node, reply.u64(0));
        above
    }

    fn read_dir(&mut self, node: u64, handle: u64, opcode: u32) -> Option<u64> {
        let args = Args::new().u64(handle).u64(0).u32(65536).u32(0).u64(0).u64(0);
        let reply = self.ask(opcode, node, &args)?;
        let mut above = None;
        let mut rest = &reply.body[..];
        while !rest.is_empty() {
            let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            if opcode == READDIRPLUS {
                let found = word(rest, 0);
                if found != 0 {
                    self.learn(found, word(rest, 40));
                }
                rest = &rest[128..];
            }
            let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            let name = &rest[24..24 + len];
            self.is_allowed(word(rest, 0), &String::from_utf8_lossy(name));
            if name == b".." {
                above = Some(word(rest, 0));
            }
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
        above
    }

    /// All that a guest does with a name.
    fn turn(&mut self, parent: u64, name: &CStr) {
        let mut names = vec![];
        if let Some(node) = self.look_up(parent, name) {
            self.stat(node);
            self.open(node);
            self.list(node, READDIR);
            self.list(node, READDIRPLUS);
            for below in [c"marker", c"inner"] {
                self.look_up(node, below);
            }
            self.create(node, c"new", 0);
            let made = [
                (MKDIR, node, Args::new().u32(0o755).u32(0).name(c"newdir")),
                (LINK, parent, Args::new().u64(node).name(c"linked")),
                (LINK, node, Args::new().u64(node).name(c"linked")),
            ];
            for (opcode, parent, args) in made {
                if let Some(reply) = self.ask(opcode, parent, &args) {
                    self.entry(&reply);
                }
            }
            let to = |to: u64, new: &CStr| Args::new().u64(to).name(c"new").name(new);
            self.ask(RENAME, node, &to(ROOT, c"renamed"));
            self.ask(RENAME, node, &to(node, c"marker"));
            for gone in [c"new", c"linked", c"marker"] {
                names.push((node, gone));
            }
            self.ask(RMDIR, node, &Args::new().name(c"newdir"));
        }
        self.create(parent, name, libc::O_TRUNC);
        names.extend([(parent, c"linked"), (ROOT, c"renamed")]);
        for (parent, name) in names {
            self.ask(UNLINK, parent, &Args::new().name(name));
        }
    }

    /// Gives back all nodes.
    fn forget(&mut self) {
        let given = std::mem::take(&mut self.lookups);
        let args = Args::new().u32(given.len() as u32).u32(0);
        let args = given
            .iter()
            .fold(args, |args, (node, lookups)| args.u64(*node).u64(*lookups));
        self.c.tell(BATCH_FORGET, 0, &args);
    }

    /// Never gives back what it knows so far.
    fn keep(&mut self) {
        self.lookups.clear();
        self.descriptors = descriptors(&self.c);
    }

    /// Takes turns while the host makes `mischief`.
    fn while_the_host(&mut self, mut mischief: impl FnMut(&Host) + Send, turn: impl Fn(&mut Self)) {
        let end = AtomicBool::new(false);
        let host = self.host.clone();
        let (mut turns, moves) = (0, AtomicU64::new(0));
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    mischief(&host);
                    moves.fetch_add(1, Ordering::Relaxed);
                }
            });
            let start = Instant::now();
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let enough = |turns| turns >= 10 && moves.load(Ordering::Relaxed) >= 10;
                while !mover.is_finished() && (start.elapsed() < FOR || !enough(turns)) {
                    turn(self);
                    turns += 1;
                    self.forget();
                }
            }));
            end.store(true, Ordering::Relaxed);
            mover.join().unwrap();
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        eprintln!("{turns} turns of the guest, {moves:?} of the host");
        self.end();
    }

    /// Nothing outside has changed, and the server has given back all that it had.
    fn end(&mut self) {
        let base = &self.host.base;
        let listing = |name: &str| -> BTreeSet<_> {
            let entries = fs::read_dir(base.join(name)).unwrap();
            entries
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        assert_eq!(
            listing(""),
            ["bound", "marker", "parked", "secrets", "share"]
                .map(String::from)
                .into()
        );
        assert_eq!(listing("secrets"), ["marker"].map(String::from).into());
        for name in ["marker", "secrets/marker", "parked/marker"] {
            let path = base.join(name);
            assert_eq!(fs::read(&path).unwrap(), SECRET, "{name}");
            let stat = path.metadata().unwrap();
            assert!(self.secrets.contains(&stat.ino()) && stat.nlink() == 1, "{name}");
        }
        self.forget();
        let start = Instant::now();
        while descriptors(&self.c) != self.descriptors {
            assert!(
                start.elapsed().as_secs() < 10,
                "{} descriptors",
                descriptors(&self.c)
            );
        }
        let reply = self.c.ask(GETATTR, ROOT, &Args::new().bytes(&[0; 16]));
        assert_eq!(
            (reply.error, reply.u64(16)),
            (0, self.host.share.metadata().unwrap().ino())
        );
    }
}

fn descriptors(c: &Client) -> usize {
    fs::read_dir(format!("/proc/{}/fd", c.server.child.id()))
        .unwrap()
        .count()
}

#[test]
fn names_that_become_links_to_the_outside_lead_nowhere() {
    let mut guest = Guest::new();
    let kinds = ["file", "directory", "link", "link-to-directory"];
    let mut n = 0;
    guest.while_the_host(
        |host| {
            n += 1;
            let kind = kinds[n % kinds.len()];
            let (x, other) = (host.inside("x"), host.parked(kind));
            if host.exchange(&x, &other).is_ok() {
                return;
            }
            // The guest has taken one of them away.
            if other.symlink_metadata().is_err() {
                let _ = match kind {
                    "file" => fs::write(&other, "of the share"),
                    "directory" => fs::create_dir(&other),
                    "link" => symlink(host.base.join("marker"), &other),
                    _ => symlink("../secrets", &other),
                };
            }
            let _ = fs::rename(&other, &x);
        },
        |guest| {
            guest.turn(ROOT, c"x");
            guest.ask(UNLINK, ROOT, &Args::new().name(c"x"));
        },
    );
}

#[test]
fn directories_that_are_moved_out_are_no_way_out() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.host.inside("a/b/c")).unwrap();
    guest.while_the_host(
        |host| {
            for (inside, parked) in [("a/b", "b"), ("a/b/c", "c"), ("a", "a")] {
                let (inside, parked) = (host.inside(inside), host.parked(parked));
                fs::rename(&inside, &parked).unwrap();
                while let Err(error) = fs::rename(&parked, &inside) {
                    // The guest has made a file in its place.
                    assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
                    let _ = fs::remove_file(&inside);
                }
            }
        },
        |guest| {
            let mut node = ROOT;
            for name in [c"a", c"b"] {
                let Some(next) = guest.look_up(node, name) else {
                    return;
                };
                guest.list(node, READDIRPLUS);
                guest.list(next, READDIR);
                node = next;
            }
            guest.turn(node, c"c");
        },
    );
}

#[test]
fn mounts_that_come_and_go_show_no_more_than_what_is_mounted() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.host.inside("d/m/inner")).unwrap();
    guest.while_the_host(
        |host| {
            host.mount("d/m");
            std::thread::yield_now();
            host.unmount("d/m");
        },
        |guest| {
            let Some(d) = guest.look_up(ROOT, c"d") else {
                return;
            };
            guest.list(d, READDIRPLUS);
            guest.turn(d, c"m");
        },
    );
}

/// Names below a directory stay right when its own place changes all the time.
#[test]
fn a_file_that_keeps_its_name_is_always_found() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.host.inside("d/sub")).unwrap();
    fs::write(guest.host.inside("d/sub/file"), "").unwrap();
    let d = guest.look_up(ROOT, c"d").unwrap();
    let sub = guest.look_up(d, c"sub").unwrap();
    guest.keep();
    let inode = guest.host.inside("d/sub/file").metadata().unwrap().ino();
    guest.while_the_host(
        |host| {
            let (here, there) = (host.inside("d/sub"), host.inside("elsewhere"));
            fs::rename(&here, &there).unwrap();
            fs::rename(&there, &here).unwrap();
        },
        |guest| {
            let reply = guest.c.look_up(sub, c"file");
            assert_eq!(reply.u64(40), inode);
            guest.entry(&reply);
        },
    );
}

/// Of most of these the server has let go, to open them again by the names that they had.
#[test]
fn a_number_never_stands_for_another_file() {
    const FILES: usize = 60;
    let mut guest = Guest::limited(Some(128));
    let name = |n: usize| format!("f{:02}", n % FILES);
    for n in 0..FILES {
        fs::write(guest.host.inside(&name(n)), "").unwrap();
    }
    let mut n = 0;
    guest.while_the_host(
        |host| {
            n += 1;
            let [one, other] = [n, n * 7].map(|n| host.inside(&name(n)));
            let parked = host.parked("file");
            match n % 3 {
                0 if one != other => host.exchange(&one, &other).unwrap(),
                1 => {
                    fs::rename(&one, &parked).unwrap();
                    fs::rename(&parked, &one).unwrap();
                }
                _ => {
                    fs::write(&parked, "").unwrap();
                    fs::rename(&parked, &one).unwrap();
                }
            }
        },
        |guest| {
            let nodes: Vec<_> = (0..FILES)
                .filter_map(|n| guest.look_up(ROOT, &CString::new(name(n)).unwrap()))
                .collect();
            for node in nodes {
                guest.stat(node);
                guest.open(node);
            }
        },
    );
}

#[test]
fn above_a_directory_is_what_the_share_has_there() {
    let mut guest = Guest::new();
    let host = guest.host.clone();
    for name in ["d", "d/m", "moved"] {
        fs::create_dir(host.inside(name)).unwrap();
    }
    host.mount("d/m");
    let inode = |path: PathBuf| path.metadata().unwrap().ino();
    let (share, d) = (inode(host.inside("")), inode(host.inside("d")));
    let d_node = guest.look_up(ROOT, c"d").unwrap();
    let m_node = guest.look_up(d_node, c"m").unwrap();
    let inner_node = guest.look_up(m_node, c"inner").unwrap();
    let moved_node = guest.look_up(ROOT, c"moved").unwrap();
    let open = |guest: &mut Guest, node| {
        let reply = guest.ask(OPENDIR, node, &Args::new().u32(0).u32(0));
        reply.unwrap().u64(0)
    };
    let moved = open(&mut guest, moved_node);
    fs::rename(host.inside("moved"), host.parked("moved")).unwrap();
    for opcode in [READDIR, READDIRPLUS] {
        for (node, above) in [
            (ROOT, share),
            (d_node, share),
            (m_node, d),
            (inner_node, inode(host.base.join("bound"))),
        ] {
            assert_eq!(guest.list(node, opcode), Some(above));
        }
        // As good as a root.
        let own = inode(host.parked("moved"));
        assert_eq!(guest.read_dir(moved_node, moved, opcode), Some(own));
        // A handle of one directory with the number of another.
        for (node, of) in [(d_node, ROOT), (ROOT, m_node)] {
            let handle = open(&mut guest, of);
            let above = guest.read_dir(node, handle, opcode);
            assert_eq!(above, Some(if of == ROOT { share } else { d }));
            guest.close(RELEASEDIR, of, handle);
        }
    }
    guest.close(RELEASEDIR, moved_node, moved);
    host.unmount("d/m");
    guest.end();
}
