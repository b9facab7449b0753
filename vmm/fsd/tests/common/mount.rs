//! The share, mounted by this kernel's FUSE: /dev/fuse on one side, the virtio-fs device on the other.

use super::driver::{AREA, Driver};
use super::server::{Server, check, posix_path};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// A mounted share. Dropping it unmounts, whatever happened.
pub struct Mount {
    path: PathBuf,
    bridge: Arc<Bridge>,
    threads: Vec<JoinHandle<()>>,
    pub server: Server,
}

struct Bridge {
    fuse: File,
    driver: Driver,
    ended: AtomicBool,
}

impl Mount {
    /// Starts a server on an empty share and mounts it, in a mount namespace of the calling thread.
    pub fn new() -> Self {
        Self::limited(None)
    }

    /// The same, of a server with a limit on open files.
    pub fn limited(files: Option<libc::rlim_t>) -> Self {
        let fuse = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap_or_else(|e| {
                panic!(
                    "/dev/fuse: {e}. These tests mount the share by this machine's kernel: load its module \
                 (modprobe fuse), and run them where the device can be opened (docker: --device /dev/fuse \
                 --cap-add SYS_ADMIN)."
                )
            });
        let mut server = Server::start_limited(files.map(|files| (libc::RLIMIT_NOFILE, files)));
        let driver = Driver::new(server.channel.take().unwrap());
        let path = server.mount_point();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            fuse.as_raw_fd()
        );
        let (at, options) = (posix_path(&path), posix_path(Path::new(&options)));
        // SAFETY: the strings are NUL-terminated and live through the call.
        check(unsafe {
            libc::mount(
                c"husk".as_ptr(),
                at.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        })
        .unwrap();
        let bridge = Arc::new(Bridge {
            fuse,
            driver,
            ended: AtomicBool::new(false),
        });
        let threads = [Bridge::requests as fn(&Bridge), Bridge::replies]
            .into_iter()
            .map(|run| {
                let bridge = bridge.clone();
                std::thread::spawn(move || run(&bridge))
            })
            .collect();
        Self {
            path,
            bridge,
            threads,
            server,
        }
    }

    /// A path in the mounted share.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The same file as the host sees it.
    pub fn host(&self, name: impl AsRef<Path>) -> PathBuf {
        self.server.share().join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = posix_path(&self.path);
        // SAFETY: the path is NUL-terminated and lives through the call.
        let unmounted = unsafe { libc::umount2(path.as_ptr(), 0) } == 0;
        if !unmounted {
            // A test that failed has left files open: the requests' thread would wait for ever.
            // SAFETY: as above.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::MNT_FORCE) };
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.bridge.driver.reset();
    }
}

impl Bridge {
    fn requests(&self) {
        loop {
            let slot = self.driver.take_slot();
            // SAFETY: the slot's area has AREA bytes, and is this thread's until it is sent.
            let n = unsafe { libc::read(self.fuse.as_raw_fd(), self.driver.bytes(slot, false).cast(), AREA) };
            let Ok(len) = usize::try_from(n) else {
                self.driver.free_slot(slot);
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::ENOENT) => continue,
                    // ENODEV: unmounted.
                    _ => break,
                }
            };
            // SAFETY: the kernel has written a header at least.
            let opcode = unsafe {
                self.driver
                    .bytes(slot, false)
                    .add(4)
                    .cast::<u32>()
                    .read_unaligned()
            };
            self.driver
                .send(slot, len, matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT));
        }
        self.ended.store(true, Ordering::SeqCst);
        self.driver.wake();
    }

    fn replies(&self) {
        let mut seen = [0; 2];
        while !self.ended.load(Ordering::SeqCst) {
            self.driver.wait();
            for (slot, len) in self.driver.replies(&mut seen) {
                if len > 0 {
                    // SAFETY: the device has written `len` bytes of the slot's area.
                    let n = unsafe {
                        libc::write(
                            self.fuse.as_raw_fd(),
                            self.driver.bytes(slot, true).cast(),
                            len as usize,
                        )
                    };
                    if n < 0 {
                        let error = io::Error::last_os_error();
                        // ENOENT: the caller was killed meanwhile. ENODEV, ENOTCONN: unmounted.
                        let gone = [libc::ENOENT, libc::ENODEV, libc::ENOTCONN];
                        if !error.raw_os_error().is_some_and(|e| gone.contains(&e)) {
                            eprintln!("the kernel refuses a reply: {error}");
                        }
                    }
                }
                self.driver.free_slot(slot);
            }
        }
    }
}
