//! Landlock: no file, no port and no other process for whoever is in this process, as far as the running kernel can deny
//! them (linux/landlock.h). What is open already stays usable.

use crate::check;
use std::io;
use std::os::fd::RawFd;

/// `struct landlock_ruleset_attr` up to ABI 6.
#[repr(C)]
struct Attributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

const CREATE_RULESET_VERSION: u32 = 1;

/// How many rights to files each ABI from 1 on knows.
const FILE_RIGHTS: [u32; 6] = [13, 14, 15, 15, 16, 16];

/// Binding and connecting TCP ports, since ABI 4.
const NET_RIGHTS: u64 = 0b11;

/// Abstract sockets and signals of others, since ABI 6.
const SCOPES: u64 = 0b11;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: RawFd,
}

const RULE_PATH_BENEATH: u32 = 1;
const EXECUTE: u64 = 1 << 0;

/// What of files is denied.
#[derive(Clone, Copy, Debug)]
pub enum Files {
    /// All rights.
    All,
    /// All rights but below this directory, and to execute one anywhere; and no mount can be made or moved.
    Outside {
        /// The directory.
        root: RawFd,
    },
}

/// Denies the calling thread, and those that it will start, `files`, ports and other processes. Gives the ABI, 0 if the
/// kernel has no Landlock.
///
/// # Errors
/// When the kernel has it and refuses.
pub fn deny(files: Files) -> io::Result<u32> {
    // SAFETY: with this flag there are no attributes.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Attributes>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    let Ok(abi @ 1..) = u32::try_from(abi) else {
        return match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(0),
            e => Err(e),
        };
    };
    let known = usize::try_from(abi).unwrap_or(usize::MAX).min(FILE_RIGHTS.len());
    let rights = FILE_RIGHTS.get(known.saturating_sub(1)).copied().unwrap_or(0);
    let all = 1u64.checked_shl(rights).unwrap_or(0).saturating_sub(1);
    // Without the right to refer, which ABI 1 does not know, all moves between directories are denied.
    if matches!(files, Files::Outside { .. }) && abi < 2 {
        return Ok(0);
    }
    let attributes = Attributes {
        handled_access_fs: all,
        handled_access_net: if abi >= 4 { NET_RIGHTS } else { 0 },
        scoped: if abi >= 6 { SCOPES } else { 0 },
    };
    // An older kernel knows fewer fields, and takes more if they are zero.
    // SAFETY: the attributes live through the call and have the length that is told.
    let ruleset = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attributes,
            size_of::<Attributes>(),
            0u32,
        )
    };
    let Ok(ruleset @ 0..) = i32::try_from(ruleset) else {
        return Err(io::Error::last_os_error());
    };
    let restricted = restrict(ruleset, files, all);
    // SAFETY: the ruleset's descriptor was just made and is not used after this.
    unsafe { libc::close(ruleset) };
    restricted.map(|()| abi)
}

fn restrict(ruleset: RawFd, files: Files, all: u64) -> io::Result<()> {
    if let Files::Outside { root } = files {
        let beneath = PathBeneath {
            allowed_access: all & !EXECUTE,
            parent_fd: root,
        };
        // SAFETY: the rule lives through the call and is of the kind that is told.
        check(unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset,
                RULE_PATH_BENEATH,
                &raw const beneath,
                0u32,
            )
        })?;
    }
    // SAFETY: no pointers are involved.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0u32) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_thread_that_is_denied_all_has_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            // SAFETY: the option takes plain numbers.
            assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
            let abi = deny(Files::All).unwrap();
            if abi == 0 {
                eprintln!("not run: this kernel has no Landlock");
                return;
            }
            let denied = |result: io::Result<()>, what: &str| {
                let error = result.expect_err(what);
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}: {error}");
            };
            denied(std::fs::read("/etc/passwd").map(drop), "reading");
            denied(std::fs::read_dir("/").map(drop), "listing");
            denied(std::fs::write("/tmp/husk-landlock", "x"), "making");
            if abi >= 4 {
                denied(TcpStream::connect(address).map(drop), "connecting");
            }
        })
        .join()
        .unwrap();
    }
}
