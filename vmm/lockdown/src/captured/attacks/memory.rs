//! Memory: code of one's own, and what others could see.

use super::{Attack, kept, made, open, written};
use std::ptr::{null, null_mut};

/// `mov eax, 42; ret`
const CODE: [u8; 6] = [0xb8, 42, 0, 0, 0, 0xc3];

/// Whether [`CODE`] runs at `page`.
///
/// # Safety
/// It is there, and may be executed.
unsafe fn run(page: *mut libc::c_void) -> bool {
    let code: extern "C" fn() -> i32 = unsafe { std::mem::transmute(page) };
    code() == 42
}

/// Whether any of the descriptors can be mapped.
fn mapped(mut fds: impl Iterator<Item = i32>, protection: i32) -> bool {
    fds.any(|fd| unsafe {
        let page = libc::mmap(null_mut(), 4096, protection, libc::MAP_PRIVATE, fd, 0);
        page != libc::MAP_FAILED && libc::munmap(page, 4096) == 0
    })
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

/// All of them.
pub(super) const ALL: &[Attack] = &[
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
    ("map-a-file", |_| {
        let fds = kept(open(c"/proc/self/exe", libc::O_RDONLY)).into_iter();
        mapped(fds, libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("map-a-descriptor", |g| {
        // To read alone: of a descriptor that shows more memory than a program was given.
        let fds = kept(open(&g.secret(), libc::O_RDONLY)).into_iter();
        mapped(fds, libc::PROT_READ)
    }),
    ("run-what-it-wrote", |_| unsafe {
        let page = page();
        page != libc::MAP_FAILED && {
            page.cast::<[u8; 6]>().write(CODE);
            libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) == 0 && run(page)
        }
    }),
    ("run-a-memory-file", |_| unsafe {
        let file = made(libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0));
        file.is_some_and(|fd| {
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            written(fd, &CODE) && {
                let page = libc::mmap(null_mut(), 4096, protection, libc::MAP_PRIVATE, fd, 0);
                page != libc::MAP_FAILED && run(page)
            }
        })
    }),
    ("secret-memory", |_| opens!(SYS_memfd_secret, 0)),
    ("memory-policy", |_| call!(SYS_set_mempolicy, 0, null::<u8>(), 0)),
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
];
