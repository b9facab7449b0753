//! The server's socket: its name, and whether somebody answers there.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use sha2::{Digest, Sha256};

/// Where shims' sockets are when containerd names no other place: its own default.
pub const DEFAULT_DIRECTORY: &str = "/run/containerd/s";

/// Longest path of a socket, in bytes, that all of containerd's platforms take.
const MAX_PATH_LEN: usize = 104;

/// The path of the socket of a sandbox: unique for containerd's own socket, its namespace and the sandbox.
///
/// # Errors
/// When `directory` is too long for the path of a socket.
pub fn path(directory: &Path, grpc_address: &str, namespace: &str, sandbox: &str) -> io::Result<PathBuf> {
    let mut hash = Sha256::new();
    for part in ["husk", grpc_address, namespace, sandbox] {
        hash.update(part.as_bytes());
        // A separator that none of them holds.
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(name);
    if path.as_os_str().len() > MAX_PATH_LEN {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} is longer than a socket's path may be ({MAX_PATH_LEN} bytes)",
                path.display()
            ),
        ));
    }
    Ok(path)
}

/// What became of [`claim`].
#[derive(Debug)]
pub enum Claim {
    /// Nobody served there; this is the socket to serve.
    Ours(UnixListener),
    /// A server lives there.
    Served,
}

/// Makes the socket at `path`, in place of one that nobody serves any more.
///
/// # Errors
/// When the host refuses.
pub fn claim(path: &Path) -> io::Result<Claim> {
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(directory)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path)? {
                return Ok(Claim::Served);
            }
            remove(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    fs::set_permissions(path, Permissions::from_mode(0o600)).inspect_err(|_| {
        let _ = remove(path);
    })?;
    Ok(Claim::Ours(listener))
}

/// Whether a server has the socket at `path` open. Never waits.
///
/// # Errors
/// When that cannot be told.
pub fn is_served(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        // EAGAIN: its queue is full, but it is there.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes the socket. It is fine if it is not there.
///
/// # Errors
/// When the host refuses.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_help::eventually;

    #[test]
    fn paths_differ_for_whatever_makes_sandboxes_different() {
        let directory = Path::new(DEFAULT_DIRECTORY);
        let name = |address, namespace, sandbox| path(directory, address, namespace, sandbox).unwrap();
        let all = [
            name("a", "n", "s"),
            name("b", "n", "s"),
            name("a", "m", "s"),
            name("a", "n", "t"),
            name("an", "", "s"),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(one.as_os_str().len() <= MAX_PATH_LEN);
            assert!(!all[..index].contains(one), "{one:?}");
        }
        assert_eq!(name("a", "n", "s"), all[0]);
        path(Path::new(&format!("/{}", "d".repeat(60))), "a", "n", "s").unwrap_err();
    }

    #[test]
    fn a_socket_is_claimed_once_while_it_is_served_and_again_when_its_server_died() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        assert!(!is_served(&path).unwrap());
        let Claim::Ours(listener) = claim(&path).unwrap() else {
            panic!("not ours")
        };
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(claim(&path).unwrap(), Claim::Served));
        drop(listener);
        assert!(path.exists());
        // A child that another test forks may have a copy of the listener.
        eventually(|| {
            if is_served(&path).unwrap() {
                return Err("it is still served".into());
            }
            Ok(())
        });
        assert!(matches!(claim(&path).unwrap(), Claim::Ours(_)));
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
