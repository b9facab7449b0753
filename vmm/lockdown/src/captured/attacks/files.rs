//! Files of the host, by their names.

use super::{Attack, last_error, open, opened};
use std::ffi::CString;
use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("open", |g| opens!(SYS_open, g.secret().as_ptr(), libc::O_RDONLY)),
    ("open-to-write", |g| opened(&g.secret(), libc::O_WRONLY)),
    ("openat", |g| opened(&g.secret(), libc::O_RDONLY)),
    ("openat2", |g| {
        let how: libc::open_how = unsafe { zeroed() };
        opens!(
            SYS_openat2,
            libc::AT_FDCWD,
            g.secret().as_ptr(),
            &raw const how,
            size_of::<libc::open_how>()
        )
    }),
    ("open-path", |g| opened(&g.secret(), libc::O_PATH)),
    ("creat", |g| opens!(SYS_creat, g.path("made").as_ptr(), 0o600)),
    ("open-by-dots", |g| opened(&g.secret_by_dots(), libc::O_RDONLY)),
    ("open-by-proc-root", |g| {
        let path = format!("root{}", g.secret().to_string_lossy());
        opened(&g.victim().file(&path), libc::O_RDONLY)
    }),
    ("open-by-own-proc-root", |g| {
        let path = CString::new(format!("/proc/self/root{}", g.secret().to_string_lossy()));
        opened(&path.unwrap_or_default(), libc::O_RDONLY)
    }),
    ("open-by-proc-cwd", |g| {
        let path = format!("cwd/{}", g.secret_by_dots().to_string_lossy());
        opened(&g.victim().file(&path), libc::O_RDONLY)
    }),
    ("stat", |g| {
        let mut stat: libc::statx = unsafe { zeroed() };
        call!(
            SYS_statx,
            libc::AT_FDCWD,
            g.secret().as_ptr(),
            0,
            libc::STATX_BASIC_STATS,
            &raw mut stat
        )
    }),
    ("access", |g| {
        call!(SYS_faccessat, libc::AT_FDCWD, g.secret().as_ptr(), libc::F_OK)
    }),
    ("list", |g| opened(&g.dir, libc::O_RDONLY | libc::O_DIRECTORY)),
    ("handles", |g| {
        // open_by_handle_at(2) knows no directory that it would have to stay in.
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            handle: [u8; 128],
        }
        let mut handle = Handle {
            bytes: 128,
            kind: 0,
            handle: [0; 128],
        };
        let mut mount = 0;
        let named = call!(
            SYS_name_to_handle_at,
            libc::AT_FDCWD,
            g.secret().as_ptr(),
            &raw mut handle,
            &raw mut mount,
            0
        );
        let root = open(&g.dir, libc::O_RDONLY).unwrap_or(libc::AT_FDCWD);
        named && opens!(SYS_open_by_handle_at, root, &raw const handle, libc::O_RDONLY)
    }),
    ("chmod", |g| {
        call!(SYS_fchmodat, libc::AT_FDCWD, g.secret().as_ptr(), 0o600)
    }),
    ("chown", |g| {
        call!(SYS_fchownat, libc::AT_FDCWD, g.secret().as_ptr(), 0, 0, 0)
    }),
    ("truncate", |g| call!(SYS_truncate, g.path("empty").as_ptr(), 0)),
    ("touch", |g| {
        call!(
            SYS_utimensat,
            libc::AT_FDCWD,
            g.secret().as_ptr(),
            null::<u8>(),
            0
        )
    }),
    ("xattr", |g| {
        call!(
            SYS_setxattr,
            g.secret().as_ptr(),
            c"trusted.husk".as_ptr(),
            c"x".as_ptr(),
            1,
            0
        )
    }),
    ("statfs", |g| {
        let mut stat: libc::statfs = unsafe { zeroed() };
        call!(SYS_statfs, g.dir.as_ptr(), &raw mut stat)
    }),
    ("chdir", |g| call!(SYS_chdir, g.dir.as_ptr())),
    ("inotify", |_| opens!(SYS_inotify_init1, 0)),
    ("fanotify", |_| opens!(SYS_fanotify_init, 0, 0)),
    ("swap", |g| {
        // Refused for what the file is, not for who asks.
        !call!(SYS_swapon, g.secret().as_ptr(), 0) && last_error() == libc::EINVAL
    }),
    ("quota", |_| {
        call!(SYS_quotactl, 0x80_0001u32 << 8, null::<u8>(), 0, null_mut::<u8>())
    }),
];
