//! What hostile code in a program that serves a guest would try, each as a function that tells whether it succeeded. All
//! of it is in the reach of the host's root.
//!
//! They undo what matters to the host, should they succeed, and change nothing of it that stays. What they do to their own
//! process stays: it is forked for each of them, unless none is expected to succeed.
//!
//! Where an attack needs something that is open already, it opens that itself if it can: without a lock-down it shows what
//! it is named for and nothing else. If it cannot, it tries all descriptors that there are.

#![allow(clippy::undocumented_unsafe_blocks)] // All of these functions are system calls that are meant to be refused.

/// A system call that did what it was asked.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        unsafe { libc::syscall(libc::$number $(, $argument)*) >= 0 }
    };
}

/// The same, for a descriptor, which is closed again.
macro_rules! opens {
    ($number:ident $(, $argument:expr)*) => {
        unsafe {
            let fd = libc::syscall(libc::$number $(, $argument)*);
            fd >= 0 && libc::close(fd as i32) == 0
        }
    };
}

pub(super) mod deadly;
mod descriptors;
mod devices;
mod escapes;
mod files;
mod kernel;
mod kvm;
mod memory;
mod mounts;
mod names;
mod processes;
mod rights;
mod sockets;
mod victims;

use std::ffi::{CStr, CString};
use std::ops::Range;

/// An attack, by its name.
pub(super) type Attack = (&'static str, fn(&Ground) -> bool);

/// All of them, by what they are after.
static ATTACKS: &[&[Attack]] = &[
    files::ALL,
    names::ALL,
    devices::ALL,
    descriptors::ALL,
    mounts::ALL,
    escapes::ALL,
    sockets::ALL,
    processes::ALL,
    victims::ALL,
    rights::ALL,
    memory::ALL,
    kernel::ALL,
    kvm::ALL,
];

/// All of them.
pub(super) fn all() -> impl Iterator<Item = &'static Attack> {
    ATTACKS.iter().copied().flatten()
}

/// Numbers of descriptors that a program may have.
const FDS: Range<i32> = 0..96;

/// A process that is not the program's own.
#[derive(Debug)]
struct Victim {
    pid: i32,
    /// Where it has memory of its own that never changes.
    memory: usize,
}

impl Victim {
    /// `PID:ADDRESS`, the latter in hexadecimal.
    fn parse(text: &str) -> Self {
        let (pid, memory) = text.split_once(':').unwrap_or_default();
        Self {
            pid: pid.parse().unwrap_or(i32::MAX),
            memory: usize::from_str_radix(memory, 16).unwrap_or(0),
        }
    }

    /// A file of it in /proc.
    fn file(&self, name: &str) -> CString {
        CString::new(format!("/proc/{}/{name}", self.pid)).unwrap_or_default()
    }
}

/// What of the host there is to attack.
#[derive(Debug)]
pub(super) struct Ground {
    /// A directory outside of the share. In it: the files `secret` and `empty`, the directory `dir`, the listening sockets
    /// `socket` and `packets`.
    dir: CString,
    /// A TCP port on 127.0.0.1 that is listened on. A listening abstract socket is called `husk-attack-PORT`.
    port: u16,
    /// Somebody's process, the shim and the VMM of another sandbox.
    victims: [Victim; 3],
    /// The program's parent, 0 if that is in another pid namespace.
    parent: i32,
}

impl Ground {
    /// `DIR,PORT,VICTIM,VICTIM,VICTIM`.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.split(',');
        let mut next = || parts.next().unwrap_or_default();
        Self {
            dir: CString::new(next()).unwrap_or_default(),
            port: next().parse().unwrap_or(1),
            victims: [(); 3].map(|()| Victim::parse(next())),
            parent: unsafe { libc::getppid() },
        }
    }

    fn path(&self, name: &str) -> CString {
        let dir = self.dir.to_string_lossy();
        CString::new(format!("{dir}/{name}")).unwrap_or_default()
    }

    fn secret(&self) -> CString {
        self.path("secret")
    }

    /// The way to the secret from a root directory, however far down one is.
    fn secret_by_dots(&self) -> CString {
        let secret = self.secret();
        CString::new(format!("../../../../../../../..{}", secret.to_string_lossy())).unwrap_or_default()
    }

    fn victim(&self) -> &Victim {
        let [victim, ..] = &self.victims;
        victim
    }
}

fn open(path: &CStr, flags: i32) -> Option<i32> {
    open_at(libc::AT_FDCWD, path, flags)
}

fn open_at(dir: i32, path: &CStr, flags: i32) -> Option<i32> {
    let fd = unsafe { libc::openat(dir, path.as_ptr(), flags, 0o600) };
    (fd >= 0).then_some(fd)
}

fn opened(path: &CStr, flags: i32) -> bool {
    opened_at(libc::AT_FDCWD, path, flags)
}

fn opened_at(dir: i32, path: &CStr, flags: i32) -> bool {
    open_at(dir, path, flags).is_some_and(|fd| unsafe { libc::close(fd) } == 0)
}

/// The descriptor that an attack has made for itself, or else all that there are.
fn kept(made: Option<i32>) -> Vec<i32> {
    made.map_or_else(|| FDS.collect(), |fd| vec![fd])
}

/// A descriptor that a system call has made.
fn made(result: libc::c_long) -> Option<i32> {
    i32::try_from(result).ok().filter(|fd| *fd >= 0)
}

fn last_error() -> i32 {
    unsafe { *libc::__errno_location() }
}

/// To a descriptor of one's own.
fn written(fd: i32, bytes: &[u8]) -> bool {
    unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) == bytes.len() as libc::c_long }
}
