//! A husk-fsd that serves a directory of its own, started as husk starts it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// Keeps this program's other tests from forking. Until it executes another program, a child has all descriptors of all
/// tests: a file stays open for writing, or locked, after its test has closed it.
pub fn without_forks() -> MutexGuard<'static, ()> {
    static FORK: Mutex<()> = Mutex::new(());
    FORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server and its share, in a mount namespace of the calling thread.
pub struct Server {
    pub child: Child,
    /// The VMM's end of the channel.
    pub channel: Option<OwnedFd>,
    directory: TempDir,
}

impl Server {
    /// Gives the calling thread a mount namespace of its own and starts a server in it.
    pub fn start() -> Self {
        Self::start_limited(None)
    }

    /// The same, with a limit on a resource: the soft one is half of the hard one.
    pub fn start_limited(limit: Option<(libc::__rlimit_resource_t, libc::rlim_t)>) -> Self {
        // SAFETY: geteuid cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        assert!(
            root,
            "these tests need root: they mount file systems and change owners"
        );
        // SAFETY: no pointers are involved; only this thread is concerned.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).unwrap();
        mount_flags(Path::new("/"), libc::MS_REC | libc::MS_PRIVATE);
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let share = directory.path().join("share");
        std::fs::create_dir(&share).unwrap();
        // Where all users can reach it, whatever the modes above the target directory.
        mount_tmpfs(Path::new("/mnt"));
        std::fs::create_dir("/mnt/share").unwrap();
        bind(&share, &share);
        mount_flags(&share, libc::MS_SHARED);
        let share_fd = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&share)
            .unwrap();
        let (ours, theirs) = packet_pair();
        let child = spawn(share_fd, theirs, limit);
        Self {
            child,
            channel: Some(ours),
            directory,
        }
    }

    /// The share, as the host sees it.
    pub fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// A directory outside of the share.
    pub fn outside(&self) -> &Path {
        self.directory.path()
    }

    /// Where the share may be mounted.
    pub fn mount_point(&self) -> PathBuf {
        PathBuf::from("/mnt/share")
    }

    /// Waits for the server's end; its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.channel = None;
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.channel = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Lest the temporary directory be busy. Mounts above it go with the namespace anyway.
        let share = posix_path(&self.share());
        // SAFETY: the path is NUL-terminated and lives through the call.
        unsafe { libc::umount2(share.as_ptr(), libc::MNT_DETACH) };
    }
}

fn spawn(share: File, channel: OwnedFd, limit: Option<(libc::__rlimit_resource_t, libc::rlim_t)>) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk-fsd"));
    // One heap is for the server itself to see to.
    command.env_remove("MALLOC_ARENA_MAX");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(move || {
            let share = check(libc::fcntl(share.as_raw_fd(), libc::F_DUPFD, 10))?;
            let channel = check(libc::fcntl(channel.as_raw_fd(), libc::F_DUPFD, 10))?;
            check(libc::dup2(share, husk_vmm_protocol::fds::fsd::SHARE))?;
            check(libc::dup2(channel, husk_vmm_protocol::fds::fsd::CHANNEL))?;
            if let Some((resource, most)) = limit {
                let limit = libc::rlimit {
                    rlim_cur: most / 2,
                    rlim_max: most,
                };
                check(libc::setrlimit(resource, &raw const limit))?;
            }
            Ok(())
        });
    }
    let _alone = without_forks();
    command.spawn().unwrap()
}

/// Both ends of a packet socket.
pub fn packet_pair() -> (OwnedFd, OwnedFd) {
    let mut fds: [RawFd; 2] = [-1; 2];
    // SAFETY: `fds` has room for two descriptors, which are nobody else's.
    unsafe {
        check(libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        ))
        .unwrap();
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// The result of a system call.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A path for a system call.
pub fn posix_path(path: &Path) -> std::ffi::CString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Mounts a directory somewhere else too.
pub fn bind(from: &Path, to: &Path) {
    let (from, to) = (posix_path(from), posix_path(to));
    // SAFETY: the paths are NUL-terminated and live through the call.
    check(unsafe {
        libc::mount(
            from.as_ptr(),
            to.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND,
            std::ptr::null(),
        )
    })
    .unwrap();
}

/// Mounts an empty tmpfs.
pub fn mount_tmpfs(at: &Path) {
    let at = posix_path(at);
    // SAFETY: the strings are NUL-terminated and live through the call.
    check(unsafe {
        libc::mount(
            c"tmpfs".as_ptr(),
            at.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        )
    })
    .unwrap();
}

fn mount_flags(at: &Path, flags: libc::c_ulong) {
    let at = posix_path(at);
    // SAFETY: the strings are NUL-terminated and live through the call.
    check(unsafe {
        libc::mount(
            c"none".as_ptr(),
            at.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    })
    .unwrap();
}
