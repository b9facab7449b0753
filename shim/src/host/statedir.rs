//! A sandbox's directory under `/run/husk`, and the lock on it that tells whether its engine lives.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Where the sandboxes' directories are.
pub const RUN: &str = "/run/husk";

/// A directory that this process holds: as long as it lives and holds this, nobody else takes it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

/// What came of the wish for a directory.
#[derive(Debug)]
pub enum Claim {
    /// It is new and empty.
    New(StateDir),
    /// It is ours, but something of a sandbox whose engine died is in it.
    Stale(StateDir),
    /// A living engine has it.
    Taken,
}

impl StateDir {
    /// The directory of a sandbox.
    pub fn path_of(run: &Path, namespace: &str, id: &str) -> PathBuf {
        run.join(namespace).join(id)
    }

    /// Takes the directory of a sandbox, making it if needed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn claim(run: &Path, namespace: &str, id: &str) -> io::Result<Claim> {
        let path = Self::path_of(run, namespace, id);
        loop {
            DirBuilder::new().recursive(true).mode(0o711).create(run)?;
            match DirBuilder::new().mode(0o711).create(run.join(namespace)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // Somebody removed the namespace's directory just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            }
            let Ok(dir) = File::open(&path) else { continue };
            let lock = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EWOULDBLOCK)) => return Ok(Claim::Taken),
                Err((_, error)) => return Err(error.into()),
            };
            // It may have been removed, and even made anew, before the lock was ours.
            let ours = lock.metadata()?;
            match fs::symlink_metadata(&path) {
                Ok(named) if named.ino() == ours.ino() && named.dev() == ours.dev() => {}
                _ => continue,
            }
            let empty = fs::read_dir(&path)?.next().is_none();
            let dir = Self { path, _lock: lock };
            return Ok(if empty { Claim::New(dir) } else { Claim::Stale(dir) });
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes a directory that is empty, and the namespace's around it if that is empty too. Nothing there is fine.
///
/// # Errors
/// When it is not empty.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(namespace) = path.parent() {
        // Other sandboxes of the namespace keep it.
        let _ = fs::remove_dir(namespace);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_engine_at_a_time_has_a_directory() {
        let run = tempfile::tempdir().unwrap();
        let claim = |id| StateDir::claim(run.path(), "ns", id).unwrap();
        let Claim::New(first) = claim("a") else { panic!() };
        assert_eq!(fs::metadata(first.path()).unwrap().mode() & 0o777, 0o700);
        assert!(matches!(claim("a"), Claim::Taken));
        assert!(matches!(claim("b"), Claim::New(_)));
        fs::write(first.path().join("state.json"), "x").unwrap();
        drop(first);
        let Claim::Stale(second) = claim("a") else {
            panic!()
        };
        fs::remove_file(second.path().join("state.json")).unwrap();
        remove(second.path()).unwrap();
        remove(second.path()).unwrap();
        assert!(matches!(claim("a"), Claim::New(_)));
    }
}
