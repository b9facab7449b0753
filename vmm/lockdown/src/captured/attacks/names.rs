//! Names: made and changed on the host, and in the share to get out of it. A file server may make them in the root
//! directory that it sees.

use super::{Attack, Ground, kept, open, opened, opened_at};
use std::ffi::{CStr, CString};

const LINK: &CStr = c"/husk-attack-link";
const DIRECTORY: &CStr = c"/husk-attack-dir";
const NODE: &CStr = c"/husk-attack-node";
const HARD_LINK: &CStr = c"/husk-attack-hard";

/// Makes `link` lead to `target` for as long as `attack` takes.
fn with_link(target: &CStr, link: &CStr, attack: impl FnOnce() -> bool) -> bool {
    let linked = call!(SYS_symlinkat, target.as_ptr(), libc::AT_FDCWD, link.as_ptr());
    let found = linked && attack();
    remove(link, 0);
    found
}

fn remove(path: &CStr, flags: i32) -> bool {
    unsafe { libc::unlinkat(libc::AT_FDCWD, path.as_ptr(), flags) == 0 }
}

fn make_directory(path: &CStr) -> bool {
    call!(SYS_mkdirat, libc::AT_FDCWD, path.as_ptr(), 0o700)
}

fn rename(from: &CStr, to: &CStr, flags: u32) -> bool {
    call!(
        SYS_renameat2,
        libc::AT_FDCWD,
        from.as_ptr(),
        libc::AT_FDCWD,
        to.as_ptr(),
        flags
    )
}

fn hard_link(from: &CStr, to: &CStr, flags: i32) -> bool {
    call!(
        SYS_linkat,
        libc::AT_FDCWD,
        from.as_ptr(),
        libc::AT_FDCWD,
        to.as_ptr(),
        flags
    ) && remove(to, 0)
}

/// A name that was a directory when it was looked at, and is a link to the host when it is opened.
fn exchanged(g: &Ground) -> bool {
    let inside = |name: &str| CString::new(format!("/husk-attack-dir/{name}")).unwrap_or_default();
    let found = make_directory(DIRECTORY)
        && with_link(&g.dir, LINK, || {
            opened(DIRECTORY, libc::O_DIRECTORY | libc::O_NOFOLLOW)
                && rename(DIRECTORY, LINK, libc::RENAME_EXCHANGE)
                && {
                    let found = opened(&inside("secret"), libc::O_RDONLY);
                    rename(DIRECTORY, LINK, libc::RENAME_EXCHANGE) && found
                }
        });
    remove(DIRECTORY, libc::AT_REMOVEDIR);
    found
}

/// A directory that one stands in, and that is moved up: its `..` leads further up than it did.
fn moved_up(g: &Ground) -> bool {
    let deep = c"/husk-attack-dir/deep";
    let found = make_directory(DIRECTORY)
        && make_directory(deep)
        && open(deep, libc::O_PATH).is_some_and(|fd| {
            rename(deep, c"/husk-attack-deep", 0)
                && remove(DIRECTORY, libc::AT_REMOVEDIR)
                && opened_at(fd, &g.secret_by_dots(), libc::O_RDONLY)
        });
    remove(c"/husk-attack-deep", libc::AT_REMOVEDIR);
    remove(deep, libc::AT_REMOVEDIR);
    remove(DIRECTORY, libc::AT_REMOVEDIR);
    found
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("mkdir", |g| {
        make_directory(&g.path("dir/made")) && remove(&g.path("dir/made"), libc::AT_REMOVEDIR)
    }),
    ("symlink", |g| with_link(c"x", &g.path("dir/link"), || true)),
    ("link", |g| hard_link(&g.secret(), &g.path("hard"), 0)),
    ("rename", |g| {
        let (from, to) = (g.secret(), g.path("renamed"));
        rename(&from, &to, 0) && rename(&to, &from, 0)
    }),
    ("open-by-a-link", |g| {
        with_link(&g.secret(), LINK, || opened(LINK, libc::O_RDONLY))
    }),
    ("open-by-a-link-of-dots", |g| {
        with_link(&g.secret_by_dots(), LINK, || opened(LINK, libc::O_RDONLY))
    }),
    ("open-by-a-link-to-proc", |g| {
        let target = CString::new(format!("/proc/self/root{}", g.secret().to_string_lossy()));
        with_link(&target.unwrap_or_default(), LINK, || opened(LINK, libc::O_RDONLY))
    }),
    ("open-by-a-chain-of-links", |g| {
        with_link(&g.dir, LINK, || {
            let second = c"/husk-attack-second";
            with_link(c"husk-attack-link/secret", second, || {
                opened(second, libc::O_RDONLY)
            })
        })
    }),
    ("make-by-a-link", |g| {
        with_link(&g.path("made"), LINK, || {
            opened(LINK, libc::O_WRONLY | libc::O_CREAT) && remove(&g.path("made"), 0)
        })
    }),
    ("open-what-was-exchanged", exchanged),
    ("open-from-what-was-moved-up", moved_up),
    ("link-into-the-share", |g| hard_link(&g.secret(), HARD_LINK, 0)),
    ("link-by-a-link", |g| {
        with_link(&g.secret(), LINK, || {
            hard_link(LINK, HARD_LINK, libc::AT_SYMLINK_FOLLOW)
        })
    }),
    ("link-by-a-descriptor", |g| {
        let fds = kept(open(&g.secret(), libc::O_PATH));
        fds.into_iter().any(|fd| {
            call!(
                SYS_linkat,
                fd,
                c"".as_ptr(),
                libc::AT_FDCWD,
                HARD_LINK.as_ptr(),
                libc::AT_EMPTY_PATH
            ) && remove(HARD_LINK, 0)
        })
    }),
    ("rename-into-the-share", |g| {
        let (secret, taken) = (g.secret(), c"/husk-attack-taken");
        rename(&secret, taken, 0) && rename(taken, &secret, 0)
    }),
    ("a-device-that-it-made", |_| {
        let made = call!(
            SYS_mknodat,
            libc::AT_FDCWD,
            NODE.as_ptr(),
            libc::S_IFCHR | 0o600,
            // /dev/zero
            libc::makedev(1, 5)
        );
        let found = made && opened(NODE, libc::O_RDONLY);
        remove(NODE, 0);
        found
    }),
];
