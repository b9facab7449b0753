//! FUSE requests to husk-fsd, on a share of its own.

use crate::input::Input;
use husk_fsd::fuse::{Body, op};
use husk_fsd::node::Limits;
use husk_fsd::passthrough::Passthrough;
use husk_fsd::{credentials, serve};
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, RequestHeader};
use std::cell::RefCell;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

/// Most requests of one input.
const MAX_REQUESTS: usize = 64;

/// All that there are, but INIT, DESTROY and SYNCFS (which waits for a disk), which come less often.
const OPERATIONS: [u32; 35] = [
    op::LOOKUP,
    op::LOOKUP,
    op::FORGET,
    op::BATCH_FORGET,
    op::GETATTR,
    op::STATX,
    op::SETATTR,
    op::READLINK,
    op::SYMLINK,
    op::MKNOD,
    op::MKDIR,
    op::UNLINK,
    op::RMDIR,
    op::RENAME,
    op::RENAME2,
    op::LINK,
    op::OPEN,
    op::CREATE,
    op::CREATE,
    op::TMPFILE,
    op::RELEASE,
    op::RELEASEDIR,
    op::FLUSH,
    op::FSYNC,
    op::FALLOCATE,
    op::LSEEK,
    op::COPY_FILE_RANGE,
    op::OPENDIR,
    op::READDIR,
    op::READDIRPLUS,
    op::SETXATTR,
    op::GETXATTR,
    op::LISTXATTR,
    op::REMOVEXATTR,
    op::STATFS,
];

const NAMES: [&str; 14] = [
    "a",
    "b",
    "c",
    "dir",
    "file",
    "link",
    "absolute",
    "",
    ".",
    "..",
    "a/b",
    "dir/..",
    "../outside",
    "/",
];

const XATTRS: [&str; 8] = [
    "user.a",
    "user.b",
    "security.capability",
    "system.posix_acl_access",
    "system.posix_acl_default",
    "trusted.overlay.opaque",
    "user.",
    "",
];

/// A directory with the share in it and what must not be reached from there, on a file system of its own that takes
/// little.
struct Place {
    root: PathBuf,
    proc_fds: OwnedFd,
}

thread_local! {
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

fn check(result: libc::c_int, what: &str) {
    assert!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
}

fn path_descriptor(path: &Path) -> OwnedFd {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path);
    opened.expect("the directory is there").into()
}

impl Place {
    /// Needs root: it mounts, in a mount namespace of the calling thread.
    fn make() -> Self {
        let root = PathBuf::from("/mnt");
        // SAFETY: all strings have their NUL and live through the calls; only this thread's namespace is changed.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS), "a mount namespace needs root");
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let none = std::ptr::null();
            check(
                libc::mount(c"none".as_ptr(), c"/".as_ptr(), none, private, none.cast()),
                "private mounts",
            );
            check(
                libc::mount(
                    c"fuzz".as_ptr(),
                    c"/mnt".as_ptr(),
                    c"tmpfs".as_ptr(),
                    libc::MS_NODEV | libc::MS_NOSUID | libc::MS_NOEXEC,
                    c"size=4m,nr_inodes=1000,mode=755".as_ptr().cast(),
                ),
                "a tmpfs",
            );
        }
        fs::create_dir(root.join("outside")).expect("an empty tmpfs");
        fs::write(root.join("outside/secret"), "secret").expect("an empty tmpfs");
        let proc_fds = path_descriptor(Path::new("/proc/self/fd"));
        credentials::enter(proc_fds.as_fd()).expect("it has no reason to fail");
        Self { root, proc_fds }
    }

    /// A share as new.
    fn share(&self) -> Passthrough {
        let share = self.root.join("share");
        let _ = fs::remove_dir_all(&share);
        fs::create_dir(&share).expect("there is room");
        fs::create_dir(share.join("dir")).expect("there is room");
        fs::write(share.join("file"), "some text").expect("there is room");
        symlink("../outside", share.join("link")).expect("there is room");
        symlink("/", share.join("absolute")).expect("there is room");
        let proc_fds = self.proc_fds.try_clone().expect("descriptors");
        // So few that descriptors are let go and nodes refused within one input.
        let limits = Limits {
            nodes: 16,
            descriptors: 2,
        };
        Passthrough::new(path_descriptor(&share), proc_fds, limits).expect("a directory")
    }

    /// All that can be told of what lies outside.
    fn outside(&self) -> Vec<(u64, u32, u32, u64, i64, i64, u64)> {
        let paths = ["outside", "outside/secret"].map(|path| self.root.join(path));
        let stat = |path: &PathBuf| {
            let stat = fs::symlink_metadata(path).expect("it was there");
            (
                stat.ino(),
                stat.mode(),
                stat.uid(),
                stat.size(),
                stat.ctime(),
                stat.ctime_nsec(),
                stat.nlink(),
            )
        };
        paths.iter().map(stat).collect()
    }
}

/// What the guest knows.
struct Guest {
    nodes: Vec<u64>,
    handles: Vec<u64>,
    unique: u64,
}

impl Guest {
    fn node(&self, input: &mut Input<'_>) -> u64 {
        match input.u8() {
            0xff => input.number(),
            choice => self.nodes[usize::from(choice) % self.nodes.len()],
        }
    }

    fn handle(&self, input: &mut Input<'_>) -> u64 {
        match input.u8() {
            0xff => input.number(),
            // The latest ones first.
            choice => self.handles[self.handles.len() - 1 - usize::from(choice) % self.handles.len()],
        }
    }

    fn request(&mut self, input: &mut Input<'_>) -> (u32, Vec<u8>) {
        let opcode = match input.u8() {
            0xff => input.u32(),
            0xfe => op::INIT,
            0xfd => op::DESTROY,
            0xfc => op::SYNCFS,
            choice => OPERATIONS[usize::from(choice) % OPERATIONS.len()],
        };
        let how = input.u8();
        let node = self.node(input);
        let mut arguments = vec![];
        if how & 0xf == 0xf {
            arguments.extend(input.text(200));
        } else {
            self.arguments(opcode, input, &mut arguments);
        }
        if how & 0xf0 == 0xf0 {
            arguments.truncate(usize::from(input.u8()));
        }
        self.unique += 1;
        let user = input.one_of(&[0, 0, 0, 1000, 65_534, u32::MAX]);
        let length = if how & 0xf0 == 0xe0 {
            input.number() as u32
        } else {
            40 + arguments.len() as u32
        };
        let mut request = vec![];
        request.extend(length.to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(user.to_le_bytes());
        request.extend(user.to_le_bytes());
        request.extend([0; 8]);
        request.append(&mut arguments);
        (opcode, request)
    }

    fn arguments(&self, opcode: u32, input: &mut Input<'_>, to: &mut Vec<u8>) {
        let mode =
            |input: &mut Input<'_>, kinds: &[u32]| input.one_of(kinds) | u32::from(input.u16() & 0o7777);
        match opcode {
            op::LOOKUP | op::UNLINK | op::RMDIR => name(input, to),
            op::FORGET => to.extend(input.number().to_le_bytes()),
            op::BATCH_FORGET => {
                let count = input.number() as u32;
                to.extend(count.to_le_bytes());
                to.extend([0; 4]);
                for _ in 0..count.min(4) {
                    to.extend(self.node(input).to_le_bytes());
                    to.extend(input.number().to_le_bytes());
                }
            }
            op::SETATTR => {
                to.extend(u32::from(input.u16()).to_le_bytes());
                to.extend([0; 4]);
                to.extend(self.handle(input).to_le_bytes());
                to.extend(input.number().to_le_bytes());
                to.extend([0; 8]);
                for _ in 0..3 {
                    to.extend(input.number().to_le_bytes());
                }
                for _ in 0..3 {
                    to.extend((input.number() as u32).to_le_bytes());
                }
                to.extend(mode(input, &[0, 0o100_000, u32::MAX]).to_le_bytes());
                to.extend([0; 4]);
                to.extend((input.number() as u32).to_le_bytes());
                to.extend((input.number() as u32).to_le_bytes());
                to.extend([0; 4]);
            }
            op::SYMLINK => {
                name(input, to);
                to.extend(
                    input
                        .one_of(&["..", "/etc", "a", "../outside/secret", ""])
                        .bytes(),
                );
                to.push(0);
            }
            op::MKNOD => {
                to.extend(
                    mode(
                        input,
                        &[libc::S_IFREG, libc::S_IFIFO, libc::S_IFCHR, libc::S_IFSOCK, 0],
                    )
                    .to_le_bytes(),
                );
                to.extend((input.number() as u32).to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                to.extend([0; 4]);
                name(input, to);
            }
            op::MKDIR => {
                to.extend(mode(input, &[0, libc::S_IFDIR]).to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                name(input, to);
            }
            op::RENAME | op::RENAME2 => {
                to.extend(self.node(input).to_le_bytes());
                if opcode == op::RENAME2 {
                    to.extend(u32::from(input.u8()).to_le_bytes());
                    to.extend([0; 4]);
                }
                name(input, to);
                name(input, to);
            }
            op::LINK => {
                to.extend(self.node(input).to_le_bytes());
                name(input, to);
            }
            op::OPEN | op::OPENDIR => {
                to.extend(flags(input).to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
            }
            op::CREATE | op::TMPFILE => {
                to.extend(flags(input).to_le_bytes());
                to.extend(mode(input, &[libc::S_IFREG, 0, libc::S_IFDIR]).to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                to.extend(u32::from(input.u8() & 1).to_le_bytes());
                name(input, to);
            }
            op::RELEASE | op::RELEASEDIR | op::FLUSH | op::FSYNC => {
                to.extend(self.handle(input).to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                to.extend([0; 12]);
            }
            op::FALLOCATE => {
                to.extend(self.handle(input).to_le_bytes());
                to.extend(input.number().to_le_bytes());
                to.extend(input.number().to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                to.extend([0; 4]);
            }
            op::LSEEK => {
                to.extend(self.handle(input).to_le_bytes());
                to.extend(input.number().to_le_bytes());
                to.extend(u32::from(input.u8() % 8).to_le_bytes());
                to.extend([0; 4]);
            }
            op::COPY_FILE_RANGE => {
                to.extend(self.handle(input).to_le_bytes());
                to.extend(input.number().to_le_bytes());
                to.extend(self.node(input).to_le_bytes());
                to.extend(self.handle(input).to_le_bytes());
                for _ in 0..3 {
                    to.extend(input.number().to_le_bytes());
                }
            }
            op::READDIR | op::READDIRPLUS => {
                to.extend(self.handle(input).to_le_bytes());
                to.extend(input.number().to_le_bytes());
                let size = match input.u8() {
                    0xff => input.number() as u32,
                    size => u32::from(size) * 16,
                };
                to.extend(size.to_le_bytes());
                to.extend([0; 12]);
            }
            op::SETXATTR => {
                let value = input.text(100);
                let size = if input.u8() == 0 {
                    input.number() as u32
                } else {
                    value.len() as u32
                };
                to.extend(size.to_le_bytes());
                to.extend(u32::from(input.u8()).to_le_bytes());
                if input.u8() & 1 == 0 {
                    to.extend(u32::from(input.u8()).to_le_bytes());
                    to.extend([0; 4]);
                }
                to.extend(input.one_of(&XATTRS).bytes());
                to.push(0);
                to.extend(value);
            }
            op::GETXATTR | op::LISTXATTR => {
                to.extend((input.number() as u32).to_le_bytes());
                to.extend([0; 4]);
                if opcode == op::GETXATTR {
                    to.extend(input.one_of(&XATTRS).bytes());
                    to.push(0);
                }
            }
            op::REMOVEXATTR => {
                to.extend(input.one_of(&XATTRS).bytes());
                to.push(0);
            }
            op::INIT => {
                to.extend(input.one_of(&[7u32, 7, 6, 8]).to_le_bytes());
                to.extend(input.one_of(&[41u32, 38, 36, 35, 0]).to_le_bytes());
                to.extend([0, 0, 2, 0]);
                to.extend(input.one_of(&[u32::MAX, 0, 1 << 30]).to_le_bytes());
                to.extend([0xff; 4]);
                to.extend([0; 44]);
            }
            _ => to.extend(input.text(100)),
        }
    }
}

fn name(input: &mut Input<'_>, to: &mut Vec<u8>) {
    match input.u8() {
        0xff => to.extend(input.text(300)),
        0xfe => to.extend([b'x'; 255]),
        0xfd => to.extend([b'x'; 256]),
        choice => to.extend(NAMES[usize::from(choice) % NAMES.len()].bytes()),
    }
    to.push(0);
}

fn flags(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        0xff => input.u32(),
        choice => {
            u32::from(choice & 3)
                | [0, libc::O_TRUNC, libc::O_EXCL | libc::O_CREAT, libc::O_APPEND]
                    [usize::from(choice >> 2 & 3)] as u32
        }
    }
}

/// FUSE requests, one after the other.
pub fn fuse(bytes: &[u8]) {
    PLACE.with_borrow_mut(|place| {
        let place = place.get_or_insert_with(Place::make);
        let share = place.share();
        let outside = place.outside();
        play(&share, &mut Input::new(bytes));
        drop(share);
        assert_eq!(
            place.outside(),
            outside,
            "something was done outside of the share"
        );
        let entries = fs::read_dir(place.root.join("outside")).expect("it was there");
        assert_eq!(entries.count(), 1, "something was made outside of the share");
    });
}

fn play(share: &Passthrough, input: &mut Input<'_>) {
    let mut guest = Guest {
        nodes: vec![1],
        handles: vec![0],
        unique: 0,
    };
    let mut body = Body::new(serve::REPLY_START, HEADER_LEN + MAX_REPLY_LEN);
    for _ in 0..MAX_REQUESTS {
        if input.is_empty() {
            return;
        }
        let (opcode, request) = guest.request(input);
        let capacity = match input.u8() {
            small @ 0..=7 => u32::from(small) * 16,
            8 => input.number() as u32,
            _ => MAX_REPLY_LEN as u32,
        };
        let header = RequestHeader { tag: 7, capacity };
        let answered = serve::answer(share, header, &request, &mut body);
        assert_eq!(
            answered.is_none(),
            Passthrough::is_silent(opcode) && request.len() as u32 == u32_at(&request, 0),
            "an answer where there is none, or none where there is one"
        );
        if answered.is_none() {
            continue;
        }
        let Some(reply) = body.packet().get(HEADER_LEN..) else {
            panic!("a reply without a header");
        };
        assert_eq!(
            u32_at(reply, 0) as usize,
            reply.len(),
            "the length that a reply tells"
        );
        assert!(
            reply.len() <= (capacity as usize).clamp(16, MAX_REPLY_LEN),
            "the guest has no room for {} bytes",
            reply.len()
        );
        let error = (u32_at(reply, 4) as i32).wrapping_neg();
        assert!((0..512).contains(&error), "error {error}");
        if error == 0 {
            learn(&mut guest, opcode, reply);
        }
    }
}

fn learn(guest: &mut Guest, opcode: u32, reply: &[u8]) {
    match opcode {
        op::LOOKUP | op::SYMLINK | op::MKNOD | op::MKDIR | op::LINK => guest.nodes.push(u64_at(reply, 16)),
        op::CREATE | op::TMPFILE => {
            guest.nodes.push(u64_at(reply, 16));
            guest.handles.push(u64_at(reply, 16 + 128));
        }
        op::OPEN | op::OPENDIR => guest.handles.push(u64_at(reply, 16)),
        _ => {}
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |bytes| {
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    })
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
