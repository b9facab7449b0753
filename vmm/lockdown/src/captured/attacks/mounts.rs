//! Mounts and namespaces: to have others, or those of others.

use super::{Attack, Ground, last_error, open};
use std::ffi::{CStr, CString};
use std::mem::size_of_val;
use std::ptr::null;

fn mount(source: &CStr, target: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> bool {
    call!(
        SYS_mount,
        source.as_ptr(),
        target.as_ptr(),
        kind.map_or(null(), CStr::as_ptr),
        flags,
        null::<u8>()
    )
}

/// Has a mount namespace of its own, in which nothing reaches others: as who it is, or as another user's.
fn unshared() -> bool {
    let private = || mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE);
    (call!(SYS_unshare, libc::CLONE_NEWNS) && private()) || unshared_as_another_user()
}

/// Whose mounts are that one's slaves.
fn unshared_as_another_user() -> bool {
    call!(SYS_unshare, libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
}

fn unmounted(target: &CStr) -> bool {
    call!(SYS_umount2, target.as_ptr(), libc::MNT_DETACH)
}

/// Where something could be mounted: a program that has left the host has no directory but the root.
fn places(g: &Ground) -> impl Iterator<Item = CString> {
    [g.path("dir"), c"/".to_owned()].into_iter()
}

fn mounts(g: &Ground) -> bool {
    places(g).any(|place| mount(c"none", &place, Some(c"tmpfs"), 0) && unmounted(&place))
}

fn binds(g: &Ground) -> bool {
    places(g).any(|place| mount(&place, &place, None, libc::MS_BIND) && unmounted(&place))
}

/// By the newer system calls, which are checked elsewhere.
fn attaches(g: &Ground) -> bool {
    let attach = |place: &CStr| {
        let create = 6;
        let mount = unsafe {
            let context = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0);
            libc::syscall(libc::SYS_fsconfig, context, create, 0, 0, 0);
            libc::syscall(libc::SYS_fsmount, context, 0, 0)
        };
        let from_descriptor = 4;
        mount >= 0
            && call!(
                SYS_move_mount,
                mount,
                c"".as_ptr(),
                libc::AT_FDCWD,
                place.as_ptr(),
                from_descriptor
            )
            && unmounted(place)
    };
    unshared() && places(g).any(|place| attach(&place))
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("mount", mounts),
    ("mount-as-another-user", |g| {
        unshared_as_another_user() && mounts(g)
    }),
    ("mount-proc", |g| {
        unshared() && places(g).any(|place| mount(c"none", &place, Some(c"proc"), 0))
    }),
    ("bind-mount", binds),
    ("bind-mount-as-another-user", |g| {
        unshared_as_another_user() && binds(g)
    }),
    ("move-a-mount", |g| {
        unshared()
            && places(g).any(|place| {
                mount(c"none", &place, Some(c"tmpfs"), 0) && mount(&place, &g.dir, None, libc::MS_MOVE)
            })
    }),
    ("attach-a-mount", attaches),
    ("pivot-root", |g| {
        unshared()
            && places(g).any(|place| {
                mount(&place, &place, None, libc::MS_BIND)
                    && call!(SYS_chdir, place.as_ptr())
                    && call!(SYS_pivot_root, c".".as_ptr(), c".".as_ptr())
            })
    }),
    ("unmount-the-root", |_| unshared() && unmounted(c"/")),
    ("remount", |_| {
        let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_NOATIME;
        unshared() && mount(c"none", c"/", None, flags)
    }),
    ("new-mount-api", |_| opens!(SYS_fsopen, c"tmpfs".as_ptr(), 0)),
    ("open-tree", |_| {
        opens!(
            SYS_open_tree,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::OPEN_TREE_CLONE
        )
    }),
    ("mount-attributes", |_| {
        let attributes = [0u64; 4];
        call!(
            SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            0,
            attributes.as_ptr(),
            size_of_val(&attributes)
        )
    }),
    ("unshare-user", |_| call!(SYS_unshare, libc::CLONE_NEWUSER)),
    ("unshare-mount", |_| call!(SYS_unshare, libc::CLONE_NEWNS)),
    ("unshare-net", |_| call!(SYS_unshare, libc::CLONE_NEWNET)),
    ("unshare-pid", |_| call!(SYS_unshare, libc::CLONE_NEWPID)),
    ("setns-by-proc", |g| {
        let fd = open(&g.victim().file("ns/net"), libc::O_RDONLY);
        call!(SYS_setns, fd.unwrap_or(-1), 0)
    }),
    ("setns-by-pidfd", |g| unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, g.victim().pid, 0);
        libc::syscall(libc::SYS_setns, fd, libc::CLONE_NEWNS | libc::CLONE_NEWNET) == 0
    }),
    ("hostname", |_| {
        // Too long: an error other than that it is not allowed.
        !call!(SYS_sethostname, c"".as_ptr(), 1000) && last_error() == libc::EINVAL
    }),
];
