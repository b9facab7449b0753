//! What hostile code in a program that serves a guest would try, each as a function that tells whether it succeeded. All
//! of it is in the reach of the host's root.
//!
//! They undo what matters to the host, should they succeed, and change nothing of it that stays.

#![allow(clippy::undocumented_unsafe_blocks)] // All of these functions are system calls that are meant to be refused.

use std::ffi::{CStr, CString};
use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};

/// What of the host there is to attack.
#[derive(Debug)]
pub(super) struct Ground {
    /// A directory outside of the share. In it: the file `secret`, the directory `dir`, the listening socket `socket`.
    dir: CString,
    /// A process that is not the program's own.
    victim: i32,
    /// A TCP port on 127.0.0.1 that is listened on. A listening abstract socket is called `husk-attack-PORT`.
    port: u16,
}

impl Ground {
    /// `DIR,PID,PORT`.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.split(',');
        let mut next = || parts.next().unwrap_or_default().to_owned();
        Self {
            dir: CString::new(next()).unwrap_or_default(),
            victim: next().parse().unwrap_or(i32::MAX),
            port: next().parse().unwrap_or(1),
        }
    }

    fn path(&self, name: &str) -> CString {
        let dir = self.dir.to_string_lossy();
        CString::new(format!("{dir}/{name}")).unwrap_or_default()
    }

    fn secret(&self) -> CString {
        self.path("secret")
    }
}

/// An attack, by its name.
pub(super) type Attack = (&'static str, fn(&Ground) -> bool);

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

fn open(path: &CStr, flags: i32) -> Option<i32> {
    let fd = unsafe { libc::openat(libc::AT_FDCWD, path.as_ptr(), flags) };
    (fd >= 0).then_some(fd)
}

fn opened(path: &CStr, flags: i32) -> bool {
    open(path, flags).is_some_and(|fd| unsafe { libc::close(fd) } == 0)
}

fn socket(family: i32, kind: i32, protocol: i32) -> bool {
    opens!(SYS_socket, family, kind, protocol)
}

/// Whether any descriptor takes a request.
fn any_ioctl(request: u64, argument: usize) -> bool {
    (0..64).any(|fd| call!(SYS_ioctl, fd, request, argument))
}

/// Opens /dev/kvm where it is not open, as it is in a VMM: a request of it that is not the guest's business.
fn kvm(request: u64, argument: usize) -> bool {
    let _ = open(c"/dev/kvm", libc::O_RDWR);
    any_ioctl(request, argument)
}

fn connected(family: i32, address: *const u8, length: usize) -> bool {
    unsafe {
        let fd = libc::socket(family, libc::SOCK_STREAM, 0);
        fd >= 0 && libc::connect(fd, address.cast(), length as u32) == 0 && libc::close(fd) == 0
    }
}

fn unix_address(name: &[u8], is_abstract: bool) -> (libc::sockaddr_un, usize) {
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    let start = usize::from(is_abstract);
    for (to, from) in address.sun_path.iter_mut().skip(start).zip(name) {
        *to = *from as libc::c_char;
    }
    (address, 2 + start + name.len() + usize::from(!is_abstract))
}

fn loopback(port: u16) -> libc::sockaddr_in {
    let mut address: libc::sockaddr_in = unsafe { zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_port = port.to_be();
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    address
}

/// A page that can be executed.
fn executable(protection: i32) -> bool {
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(null_mut(), 4096, protection, flags, -1, 0);
        page != libc::MAP_FAILED && libc::munmap(page, 4096) == 0
    }
}

fn page() -> *mut libc::c_void {
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    }
}

fn victims_memory(g: &Ground, call: libc::c_long) -> bool {
    // Where a static program that was linked in the usual way begins; read from /proc would be another attack.
    let mut own = [0u8; 8];
    let mut remote = 0usize;
    unsafe {
        let maps = CString::new(format!("/proc/{}/maps", g.victim)).unwrap_or_default();
        if let Some(fd) = open(&maps, libc::O_RDONLY) {
            let mut text = [0u8; 16];
            let count = libc::read(fd, text.as_mut_ptr().cast(), text.len());
            libc::close(fd);
            if count > 0 {
                let text = String::from_utf8_lossy(&text).into_owned();
                let start = text.split('-').next().unwrap_or_default().to_owned();
                remote = usize::from_str_radix(&start, 16).unwrap_or(0);
            }
        }
        let local = libc::iovec {
            iov_base: own.as_mut_ptr().cast(),
            iov_len: own.len(),
        };
        let there = libc::iovec {
            iov_base: remote as *mut _,
            iov_len: own.len(),
        };
        // Nothing of it is changed: to write none is allowed to who may write.
        let count = u64::from(call == libc::SYS_process_vm_readv);
        libc::syscall(
            call,
            g.victim,
            &raw const local,
            count,
            &raw const there,
            count,
            0usize,
        ) >= 0
    }
}

fn changes_directory_to(g: &Ground, fd: i32) -> bool {
    call!(SYS_fchdir, fd) && opened(&g.secret(), libc::O_RDONLY)
}

/// All of them.
pub(super) static ATTACKS: &[Attack] = &[
    // Files of the host.
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
    ("open-by-dots", |g| {
        let dots = CString::new(format!(
            "../../../../../../../../..{}",
            g.secret().to_string_lossy()
        ));
        opened(&dots.unwrap_or_default(), libc::O_RDONLY)
    }),
    ("open-by-proc-root", |g| {
        let path = CString::new(format!("/proc/{}/root{}", g.victim, g.secret().to_string_lossy()));
        opened(&path.unwrap_or_default(), libc::O_RDONLY)
    }),
    ("open-by-own-proc-root", |g| {
        let path = CString::new(format!("/proc/self/root{}", g.secret().to_string_lossy()));
        opened(&path.unwrap_or_default(), libc::O_RDONLY)
    }),
    ("open-by-proc-cwd", |g| {
        let path = CString::new(format!(
            "/proc/{}/cwd/../../../../../../../..{}",
            g.victim,
            g.secret().to_string_lossy()
        ));
        opened(&path.unwrap_or_default(), libc::O_RDONLY)
    }),
    ("open-by-a-link", |g| {
        // Made where the program may make one, if anywhere.
        let link = g.path("link-to-secret");
        let made =
            |path: &CStr| unsafe { libc::symlinkat(g.secret().as_ptr(), libc::AT_FDCWD, path.as_ptr()) } == 0;
        let found = (made(&link) && opened(&link, libc::O_RDONLY))
            || (made(c"/husk-attack-link") && opened(c"/husk-attack-link", libc::O_RDONLY));
        unsafe {
            libc::unlinkat(libc::AT_FDCWD, link.as_ptr(), 0);
            libc::unlinkat(libc::AT_FDCWD, c"/husk-attack-link".as_ptr(), 0);
        }
        found
    }),
    ("reopen-descriptors", |_| {
        (0..64).any(|fd| {
            let path = CString::new(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            opened(&path, libc::O_RDWR)
        })
    }),
    ("leave-by-a-descriptor", |g| {
        (0..64).any(|fd| {
            let up = format!("../../../../../../../..{}", g.secret().to_string_lossy());
            let up = CString::new(up).unwrap_or_default();
            opens!(SYS_openat, fd, up.as_ptr(), libc::O_RDONLY)
        }) || opened(&g.secret(), libc::O_PATH)
    }),
    ("own-memory-by-proc", |_| opened(c"/proc/self/mem", libc::O_RDWR)),
    ("own-memory-by-a-descriptor", |_| {
        // A server of files keeps a descriptor of /proc/self/fd.
        let _ = open(c"/proc/self/fd", libc::O_PATH | libc::O_DIRECTORY);
        (0..64).any(|fd| opens!(SYS_openat, fd, c"../mem".as_ptr(), libc::O_RDWR))
    }),
    ("own-program-by-a-descriptor", |_| {
        let _ = open(c"/proc/self/fd", libc::O_PATH | libc::O_DIRECTORY);
        (0..64).any(|fd| opens!(SYS_openat, fd, c"../exe".as_ptr(), libc::O_RDONLY))
    }),
    ("own-maps", |_| opened(c"/proc/self/maps", libc::O_RDONLY)),
    ("own-environment", |_| {
        opened(c"/proc/self/environ", libc::O_RDONLY)
    }),
    ("victims-memory-by-proc", |g| {
        opened(
            &CString::new(format!("/proc/{}/mem", g.victim)).unwrap_or_default(),
            libc::O_RDWR,
        )
    }),
    ("victims-descriptors", |g| {
        let path = CString::new(format!("/proc/{}/fd/0", g.victim)).unwrap_or_default();
        opened(&path, libc::O_RDONLY | libc::O_NONBLOCK)
    }),
    ("hosts-kernel-log", |_| opened(c"/dev/kmsg", libc::O_RDONLY)),
    ("hosts-memory", |_| opened(c"/dev/mem", libc::O_RDONLY)),
    ("another-kvm", |_| opened(c"/dev/kvm", libc::O_RDWR)),
    ("another-tap", |_| opened(c"/dev/net/tun", libc::O_RDWR)),
    ("sysrq", |_| opened(c"/proc/sysrq-trigger", libc::O_WRONLY)),
    ("core-pattern", |_| {
        opened(c"/proc/sys/kernel/core_pattern", libc::O_WRONLY)
    }),
    ("cgroups", |_| {
        opened(c"/sys/fs/cgroup/cgroup.procs", libc::O_WRONLY)
    }),
    ("a-device-that-it-made", |g| {
        // A new node for /dev/kmsg's like, where it may make one.
        [g.path("node"), c"/husk-attack-node".to_owned()]
            .iter()
            .any(|node| unsafe {
                let made = libc::mknodat(
                    libc::AT_FDCWD,
                    node.as_ptr(),
                    libc::S_IFCHR | 0o600,
                    libc::makedev(1, 5),
                );
                let found = made == 0 && opened(node, libc::O_RDONLY);
                libc::unlinkat(libc::AT_FDCWD, node.as_ptr(), 0);
                found
            })
    }),
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
    ("mkdir", |g| {
        call!(SYS_mkdirat, libc::AT_FDCWD, g.path("dir/made").as_ptr(), 0o700)
            && unsafe { libc::rmdir(g.path("dir/made").as_ptr()) } == 0
    }),
    ("symlink", |g| {
        call!(
            SYS_symlinkat,
            c"x".as_ptr(),
            libc::AT_FDCWD,
            g.path("dir/link").as_ptr()
        ) && unsafe { libc::unlink(g.path("dir/link").as_ptr()) } == 0
    }),
    ("link", |g| {
        call!(
            SYS_linkat,
            libc::AT_FDCWD,
            g.secret().as_ptr(),
            libc::AT_FDCWD,
            g.path("hard").as_ptr(),
            0
        ) && unsafe { libc::unlink(g.path("hard").as_ptr()) } == 0
    }),
    ("link-into-the-share", |g| {
        let made = [c"/husk-attack-hard".to_owned(), g.path("hard")]
            .into_iter()
            .find(|to| {
                call!(
                    SYS_linkat,
                    libc::AT_FDCWD,
                    g.secret().as_ptr(),
                    libc::AT_FDCWD,
                    to.as_ptr(),
                    0
                )
            });
        made.is_some_and(|to| unsafe { libc::unlink(to.as_ptr()) } == 0)
    }),
    ("rename", |g| {
        let (from, to) = (g.secret(), g.path("renamed"));
        call!(
            SYS_renameat2,
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            0
        ) && unsafe { libc::rename(to.as_ptr(), from.as_ptr()) } == 0
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
    ("fchdir", |g| {
        let fd = open(&g.dir, libc::O_PATH).unwrap_or(-1);
        changes_directory_to(g, fd) || (0..64).any(|fd| changes_directory_to(g, fd))
    }),
    ("chroot", |_| call!(SYS_chroot, c".".as_ptr())),
    ("inotify", |_| opens!(SYS_inotify_init1, 0)),
    ("fanotify", |_| opens!(SYS_fanotify_init, 0, 0)),
    ("swap", |g| {
        // Refused for what the file is, not for who asks.
        !call!(SYS_swapon, g.secret().as_ptr(), 0) && unsafe { *libc::__errno_location() } == libc::EINVAL
    }),
    ("quota", |_| {
        call!(SYS_quotactl, 0x80_0001u32 << 8, null::<u8>(), 0, null_mut::<u8>())
    }),
    // Mounts.
    ("mount", |g| {
        let dir = g.path("dir");
        call!(
            SYS_mount,
            c"none".as_ptr(),
            dir.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            null::<u8>()
        ) && unsafe { libc::umount2(dir.as_ptr(), libc::MNT_DETACH) } == 0
    }),
    ("bind-mount", |g| {
        let dir = g.path("dir");
        call!(
            SYS_mount,
            dir.as_ptr(),
            dir.as_ptr(),
            null::<u8>(),
            libc::MS_BIND,
            null::<u8>()
        ) && unsafe { libc::umount2(dir.as_ptr(), libc::MNT_DETACH) } == 0
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
    // Namespaces.
    ("unshare-user", |_| call!(SYS_unshare, libc::CLONE_NEWUSER)),
    ("unshare-mount", |_| call!(SYS_unshare, libc::CLONE_NEWNS)),
    ("unshare-net", |_| call!(SYS_unshare, libc::CLONE_NEWNET)),
    ("unshare-pid", |_| call!(SYS_unshare, libc::CLONE_NEWPID)),
    ("setns-by-proc", |g| {
        let path = CString::new(format!("/proc/{}/ns/net", g.victim)).unwrap_or_default();
        call!(SYS_setns, open(&path, libc::O_RDONLY).unwrap_or(-1), 0)
    }),
    ("setns-by-pidfd", |g| unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, g.victim, 0);
        libc::syscall(libc::SYS_setns, fd, libc::CLONE_NEWNS | libc::CLONE_NEWNET) == 0
    }),
    ("hostname", |_| {
        // Too long: an error other than that it is not allowed.
        !call!(SYS_sethostname, c"".as_ptr(), 1000) && unsafe { *libc::__errno_location() } == libc::EINVAL
    }),
    // Sockets.
    ("socket-unix", |_| socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
    ("socket-inet", |_| socket(libc::AF_INET, libc::SOCK_STREAM, 0)),
    ("socket-inet6", |_| socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)),
    ("socket-raw", |_| {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    ("socket-packet", |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("socket-netlink", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
    }),
    ("socket-audit", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_KOBJECT_UEVENT)
    }),
    ("socketpair", |_| {
        let mut pair = [0i32; 2];
        call!(
            SYS_socketpair,
            libc::AF_UNIX,
            libc::SOCK_STREAM,
            0,
            pair.as_mut_ptr()
        )
    }),
    ("connect-tcp", |g| {
        let address = loopback(g.port);
        connected(libc::AF_INET, (&raw const address).cast(), size_of_val(&address))
    }),
    ("connect-by-a-path", |g| {
        let (address, length) = unix_address(g.path("socket").as_bytes(), false);
        connected(libc::AF_UNIX, (&raw const address).cast(), length)
    }),
    ("connect-abstract", |g| {
        let (address, length) = unix_address(format!("husk-attack-{}", g.port).as_bytes(), true);
        connected(libc::AF_UNIX, (&raw const address).cast(), length)
    }),
    ("connect-with-what-is-open", |g| {
        // Its own channels, turned to somebody else.
        let (address, length) = unix_address(g.path("packets").as_bytes(), false);
        unsafe {
            let own = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0);
            let attack = |fd| libc::connect(fd, (&raw const address).cast(), length as u32) == 0;
            attack(own) || (3..64).any(attack)
        }
    }),
    ("bind", |_| unsafe {
        let address = loopback(0);
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) == 0
    }),
    // Processes.
    ("fork", |_| unsafe {
        match libc::syscall(libc::SYS_fork) {
            0 => libc::_exit(0),
            pid => pid > 0 && libc::waitpid(pid as i32, null_mut(), 0) > 0,
        }
    }),
    ("clone", |_| unsafe {
        match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
            0 => libc::_exit(0),
            pid => pid > 0 && libc::waitpid(pid as i32, null_mut(), 0) > 0,
        }
    }),
    ("clone3", |_| unsafe {
        let mut arguments: libc::clone_args = zeroed();
        arguments.exit_signal = libc::SIGCHLD as u64;
        match libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) {
            0 => libc::_exit(0),
            pid => pid > 0 && libc::waitpid(pid as i32, null_mut(), 0) > 0,
        }
    }),
    ("execve", |_| unsafe {
        // Replaces the process by one that ends well.
        let argv = [c"true".as_ptr(), null()];
        libc::syscall(
            libc::SYS_execve,
            c"/bin/true".as_ptr(),
            argv.as_ptr(),
            null::<u8>(),
        ) == 0
    }),
    ("execve-itself", |_| unsafe {
        let argv = [c"husk".as_ptr(), c"--version".as_ptr(), null()];
        libc::syscall(
            libc::SYS_execve,
            c"/proc/self/exe".as_ptr(),
            argv.as_ptr(),
            null::<u8>(),
        ) == 0
    }),
    ("execveat", |_| unsafe {
        let argv = [c"true".as_ptr(), null()];
        libc::syscall(
            libc::SYS_execveat,
            libc::AT_FDCWD,
            c"/bin/true".as_ptr(),
            argv.as_ptr(),
            null::<u8>(),
            0,
        ) == 0
    }),
    ("kill", |g| call!(SYS_kill, g.victim, libc::SIGCONT)),
    ("kill-all", |_| call!(SYS_kill, -1, 0)),
    ("kill-the-parent", |_| unsafe {
        let parent = libc::getppid();
        // 0 is nobody: a parent in another pid namespace.
        parent > 0 && libc::syscall(libc::SYS_kill, parent, 0) == 0
    }),
    ("tgkill", |g| call!(SYS_tgkill, g.victim, g.victim, libc::SIGCONT)),
    ("queue-a-signal", |g| {
        let mut info: libc::siginfo_t = unsafe { zeroed() };
        info.si_code = -1;
        call!(SYS_rt_sigqueueinfo, g.victim, libc::SIGCONT, &raw const info)
    }),
    ("pidfd", |g| opens!(SYS_pidfd_open, g.victim, 0)),
    ("pidfd-signal", |g| unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, g.victim, 0);
        libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGCONT, null::<u8>(), 0) == 0
    }),
    ("pidfd-descriptor", |g| unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, g.victim, 0);
        libc::syscall(libc::SYS_pidfd_getfd, fd, 0, 0) >= 0
    }),
    ("ptrace", |g| unsafe {
        let seized = libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, g.victim, 0, 0) == 0;
        seized && {
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_DETACH, g.victim, 0, 0);
            true
        }
    }),
    ("victims-memory-read", |g| {
        victims_memory(g, libc::SYS_process_vm_readv)
    }),
    ("victims-memory-written", |g| {
        victims_memory(g, libc::SYS_process_vm_writev)
    }),
    ("victims-limits", |g| {
        let mut limit = [0u64; 2];
        call!(
            SYS_prlimit64,
            g.victim,
            libc::RLIMIT_NOFILE,
            null::<u8>(),
            limit.as_mut_ptr()
        )
    }),
    ("victims-priority", |g| {
        call!(SYS_setpriority, libc::PRIO_PROCESS, g.victim, 0)
    }),
    ("victims-processors", |g| {
        let mut set = [0u64; 16];
        call!(
            SYS_sched_getaffinity,
            g.victim,
            size_of_val(&set),
            set.as_mut_ptr()
        )
    }),
    ("victims-scheduler", |g| call!(SYS_sched_getscheduler, g.victim)),
    ("victims-group", |g| call!(SYS_getpgid, g.victim)),
    ("victims-pages", |g| {
        call!(
            SYS_move_pages,
            g.victim,
            0,
            null::<u8>(),
            null::<u8>(),
            null::<u8>(),
            0
        )
    }),
    ("compare-with-victim", |g| {
        call!(SYS_kcmp, g.victim, g.victim, 0, 0, 0)
    }),
    ("robust-list", |g| {
        let (mut head, mut length) = (0usize, 0usize);
        call!(SYS_get_robust_list, g.victim, &raw mut head, &raw mut length)
    }),
    // Rights.
    ("setuid", |_| call!(SYS_setresuid, 0, 0, 0)),
    ("setgid", |_| call!(SYS_setresgid, 0, 0, 0)),
    ("setgroups", |_| call!(SYS_setgroups, 0, null::<u8>())),
    ("more-files", |_| {
        let limit = [1u64 << 21, 1 << 21];
        call!(
            SYS_prlimit64,
            0,
            libc::RLIMIT_NOFILE,
            limit.as_ptr(),
            null::<u8>()
        ) || call!(SYS_setrlimit, libc::RLIMIT_CORE, limit.as_ptr())
    }),
    ("dumpable", |_| {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
    }),
    ("keep-capabilities", |_| {
        call!(SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)
    }),
    ("ambient-capabilities", |_| {
        call!(
            SYS_prctl,
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0
        )
    }),
    ("outlive-the-parent", |_| {
        call!(SYS_prctl, libc::PR_SET_PDEATHSIG, 0, 0, 0, 0)
    }),
    ("another-filter", |_| {
        call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    }),
    ("read-the-time-stamp", |_| {
        call!(SYS_prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE, 0, 0, 0)
    }),
    ("other-handlers", |_| {
        let mut old = [0u64; 8];
        call!(SYS_rt_sigaction, libc::SIGUSR1, null::<u8>(), old.as_mut_ptr(), 8)
    }),
    ("personality", |_| call!(SYS_personality, 0xffff_ffffu32)),
    ("session", |_| unsafe {
        // A leader of a group cannot: as its child.
        libc::syscall(libc::SYS_setsid) >= 0
    }),
    ("io-ports", |_| call!(SYS_ioperm, 0x80, 1, 1)),
    ("segments", |_| {
        let mut table = [0u8; 16];
        call!(SYS_modify_ldt, 0, table.as_mut_ptr(), table.len())
    }),
    // Memory that can be executed.
    ("map-executable", |_| {
        executable(libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("map-all", |_| {
        executable(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }),
    ("make-executable", |_| unsafe {
        libc::mprotect(page(), 4096, libc::PROT_READ | libc::PROT_EXEC) == 0
    }),
    ("make-executable-by-key", |_| {
        call!(
            SYS_pkey_mprotect,
            page(),
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            -1
        )
    }),
    ("map-a-file", |_| unsafe {
        let fd = open(c"/proc/self/exe", libc::O_RDONLY).unwrap_or(6);
        let map = |protection| libc::mmap(null_mut(), 4096, protection, libc::MAP_PRIVATE, fd, 0);
        map(libc::PROT_READ | libc::PROT_EXEC) != libc::MAP_FAILED
    }),
    ("memory-file", |_| opens!(SYS_memfd_create, c"x".as_ptr(), 0)),
    ("shared-memory", |_| unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600);
        id >= 0 && libc::shmctl(id, libc::IPC_RMID, null_mut()) == 0
    }),
    ("messages", |_| unsafe {
        let id = libc::msgget(libc::IPC_PRIVATE, libc::IPC_CREAT | 0o600);
        id >= 0 && libc::msgctl(id, libc::IPC_RMID, null_mut()) == 0
    }),
    ("locked-memory", |_| {
        call!(SYS_mlockall, libc::MCL_CURRENT | libc::MCL_ONFAULT)
    }),
    // The kernel.
    ("bpf", |_| {
        let attributes: [u32; 18] = {
            let mut map = [0; 18];
            // An array of one value of four bytes.
            (map[0], map[1], map[2], map[3]) = (2, 4, 4, 1);
            map
        };
        opens!(SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes))
    }),
    ("perf", |_| {
        let mut attributes = [0u32; 32];
        // Software, of this length, the processor's clock.
        (attributes[0], attributes[1]) = (1, 128);
        opens!(SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0)
    }),
    ("userfaultfd", |_| opens!(SYS_userfaultfd, 0)),
    ("io-uring", |_| {
        let mut parameters = [0u32; 30];
        opens!(SYS_io_uring_setup, 1, parameters.as_mut_ptr())
    }),
    ("keys", |_| {
        call!(
            SYS_add_key,
            c"user".as_ptr(),
            c"husk".as_ptr(),
            c"x".as_ptr(),
            1,
            -2
        )
    }),
    ("keyring", |_| call!(SYS_keyctl, 0, -3, 1)),
    ("kernel-messages", |_| call!(SYS_syslog, 10, null_mut::<u8>(), 0)),
    ("module", |_| {
        // Nothing to load: an error other than that it is not allowed.
        !call!(SYS_init_module, null::<u8>(), 0, c"".as_ptr())
            && unsafe { *libc::__errno_location() } == libc::ENOEXEC
    }),
    ("kexec", |_| call!(SYS_kexec_load, 0, 0, null::<u8>(), 0)),
    ("reboot", |_| {
        call!(SYS_reboot, 0xfee1_deadu32, 672_274_793, 0, null::<u8>())
    }),
    ("set-the-clock", |_| {
        // An impossible time: an error other than that it is not allowed.
        let time = [0i64, -1];
        !call!(SYS_clock_settime, libc::CLOCK_REALTIME, time.as_ptr())
            && unsafe { *libc::__errno_location() } == libc::EINVAL
    }),
    ("accounting", |_| call!(SYS_acct, null::<u8>())),
    ("timers", |_| {
        let mut timer = 0i32;
        call!(
            SYS_timer_create,
            libc::CLOCK_MONOTONIC,
            null::<u8>(),
            &raw mut timer
        )
    }),
    ("listen-to-signals", |_| {
        let mask = 0u64;
        opens!(SYS_signalfd4, -1, &raw const mask, 8, 0)
    }),
    ("filter-with-a-listener", |_| {
        // Allow all; a second filter could tell another process of each call.
        let program = [libc::sock_filter {
            code: 6,
            jt: 0,
            jf: 0,
            k: 0x7fff_0000,
        }];
        let program = libc::sock_fprog {
            len: 1,
            filter: program.as_ptr().cast_mut(),
        };
        opens!(SYS_seccomp, 1, 8, &raw const program)
    }),
    ("landlock", |_| {
        call!(SYS_landlock_create_ruleset, null::<u8>(), 0, 1)
    }),
    // Requests of descriptors.
    ("terminals", |_| {
        let mut number = 0u32;
        let terminal = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY).unwrap_or(0);
        any_ioctl(libc::TIOCSTI, c"x".as_ptr() as usize)
            || call!(SYS_ioctl, terminal, libc::TIOCGPTN, &raw mut number)
    }),
    ("descriptor-flags", |_| any_ioctl(libc::FIONCLEX, 0)),
    ("owner-of-a-descriptor", |g| {
        (0..16).any(|fd| call!(SYS_fcntl, fd, libc::F_SETOWN, g.victim))
    }),
    ("another-vm", |_| kvm(0xae01, 0)),
    ("kvm-version", |_| kvm(0xae00, 0)),
];
