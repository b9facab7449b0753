//! Processes: to make them and to become another program. An attack that succeeds in the latter goes on as that program,
//! which ends well.

use super::{Attack, FDS, kept, made, open, written};
use std::mem::{size_of_val, zeroed};
use std::ptr::{null, null_mut};

/// A program whose one deed is `exit(0)`: the header of an ELF file, that of its one segment, and the code.
const PROGRAM: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\
    \x02\0\x3e\0\x01\0\0\0\x78\0\x40\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\
    \x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x40\0\0\0\0\0\
    \x81\0\0\0\0\0\0\0\x81\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\
    \x31\xff\xb8\x3c\0\0\0\x0f\x05";

/// Becomes the program of a descriptor. Does not return if it succeeds.
fn executed(fd: i32, argv: &[*const libc::c_char]) -> bool {
    call!(
        SYS_execveat,
        fd,
        c"".as_ptr(),
        argv.as_ptr(),
        null::<u8>(),
        libc::AT_EMPTY_PATH
    )
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
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
    ("vfork", |_| unsafe {
        // As vfork(2), but for the memory, which the child would spoil.
        match libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) {
            0 => libc::_exit(0),
            pid => pid > 0 && libc::waitpid(pid as i32, null_mut(), 0) > 0,
        }
    }),
    ("clone-into-namespaces", |_| unsafe {
        let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::SIGCHLD;
        match libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) {
            0 => libc::_exit(0),
            pid => pid > 0 && libc::waitpid(pid as i32, null_mut(), 0) > 0,
        }
    }),
    ("execveat-itself", |_| {
        let fds = kept(open(c"/proc/self/exe", libc::O_PATH));
        let argv = [c"husk".as_ptr(), c"--version".as_ptr(), null()];
        fds.into_iter().any(|fd| executed(fd, &argv))
    }),
    ("execveat-of-memory", |_| {
        let argv = [c"x".as_ptr(), null()];
        match made(unsafe { libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0) }) {
            Some(fd) => written(fd, PROGRAM) && executed(fd, &argv),
            None => FDS.into_iter().any(|fd| executed(fd, &argv)),
        }
    }),
    ("execute-what-it-wrote", |_| {
        // In the root directory that it sees; only who may write there gets to it.
        let path = c"/husk-attack-program";
        let wrote = open(path, libc::O_WRONLY | libc::O_CREAT).is_some_and(|fd| {
            let wrote = written(fd, PROGRAM);
            call!(SYS_fchmodat, libc::AT_FDCWD, path.as_ptr(), 0o700) && call!(SYS_close, fd) && wrote
        });
        let fd = open(path, libc::O_PATH);
        let _ = call!(SYS_unlinkat, libc::AT_FDCWD, path.as_ptr(), 0);
        wrote && fd.is_some_and(|fd| executed(fd, &[c"x".as_ptr(), null()]))
    }),
];
