//! Descriptors: what leads on from those that a program has.

use super::{Attack, FDS, Ground, kept, open, opened, opened_at};
use std::ffi::CString;

fn any_ioctl(fds: &[i32], request: u64, argument: usize) -> bool {
    fds.iter().any(|fd| call!(SYS_ioctl, *fd, request, argument))
}

/// A directory of the host's. Nothing is said of what the share has.
fn directory(g: &Ground) -> Vec<i32> {
    kept(open(&g.path("dir"), libc::O_PATH | libc::O_DIRECTORY))
}

/// A server of files keeps one of /proc/self/fd.
fn own_descriptors() -> Vec<i32> {
    kept(open(c"/proc/self/fd", libc::O_PATH | libc::O_DIRECTORY))
}

/// The terminal's end for programs, as the one that this process is controlled by.
fn terminal() -> Vec<i32> {
    let own = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY).and_then(|master| unsafe {
        libc::setsid();
        let unlocked = 0i32;
        libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlocked);
        let end = libc::ioctl(master, libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY);
        libc::ioctl(end, libc::TIOCSCTTY, 0);
        (end >= 0).then_some(end)
    });
    kept(own)
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("reopen-to-write", |g| {
        let fds = kept(open(&g.secret(), libc::O_RDONLY));
        fds.into_iter().any(|fd| {
            let path = CString::new(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            opened(&path, libc::O_RDWR)
        })
    }),
    ("reopen-by-a-kept-directory", |_| {
        // What 0 stands for is the host's /dev/null.
        let mut fds = own_descriptors().into_iter();
        fds.any(|fd| opened_at(fd, c"0", libc::O_RDWR))
    }),
    ("leave-by-a-descriptor", |g| {
        let mut fds = directory(g).into_iter();
        fds.any(|fd| opened_at(fd, &g.secret_by_dots(), libc::O_RDONLY))
    }),
    ("own-memory-by-a-descriptor", |_| {
        let mut fds = own_descriptors().into_iter();
        fds.any(|fd| opened_at(fd, c"../mem", libc::O_RDWR))
    }),
    ("own-program-by-a-descriptor", |_| {
        let mut fds = own_descriptors().into_iter();
        fds.any(|fd| opened_at(fd, c"../exe", libc::O_RDONLY))
    }),
    ("own-root-by-a-descriptor", |g| {
        let path = format!("../root{}", g.secret().to_string_lossy());
        let path = CString::new(path).unwrap_or_default();
        let mut fds = own_descriptors().into_iter();
        fds.any(|fd| opened_at(fd, &path, libc::O_RDONLY))
    }),
    ("victims-root-by-a-descriptor", |g| {
        let path = format!("../../{}/root{}", g.victim().pid, g.secret().to_string_lossy());
        let path = CString::new(path).unwrap_or_default();
        let mut fds = own_descriptors().into_iter();
        fds.any(|fd| opened_at(fd, &path, libc::O_RDONLY))
    }),
    ("fchdir", |g| {
        let mut fds = directory(g).into_iter();
        fds.any(|fd| call!(SYS_fchdir, fd) && opened(c"../secret", libc::O_RDONLY))
    }),
    ("terminals", |_| {
        let mut number = 0u32;
        let fds = kept(open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY));
        any_ioctl(&fds, libc::TIOCGPTN, (&raw mut number) as usize)
    }),
    ("push-into-a-terminal", |_| {
        any_ioctl(&terminal(), libc::TIOCSTI, c"x".as_ptr() as usize)
    }),
    ("descriptor-flags", |_| {
        // Of any: all have them.
        any_ioctl(&FDS.collect::<Vec<_>>(), libc::FIONCLEX, 0)
    }),
    ("owner-of-a-descriptor", |g| {
        FDS.into_iter()
            .any(|fd| call!(SYS_fcntl, fd, libc::F_SETOWN, g.victim().pid))
    }),
    ("lease", |g| {
        let mut fds = kept(open(&g.secret(), libc::O_RDONLY)).into_iter();
        fds.any(|fd| call!(SYS_fcntl, fd, libc::F_SETLEASE, libc::F_RDLCK))
    }),
    ("pipe", |_| {
        let mut pair = [0i32; 2];
        call!(SYS_pipe2, pair.as_mut_ptr(), 0)
    }),
    ("duplicate-a-descriptor", |_| call!(SYS_dup3, 0, 95, 0)),
    ("close-a-range", |_| call!(SYS_close_range, 90, 95, 0)),
];
