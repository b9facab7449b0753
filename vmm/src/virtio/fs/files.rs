//! The files that the guest has open: which handle of the server's stands for which descriptor.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Descriptors left to the rest of the VMM.
const RESERVED: u64 = 256;

/// Readies the process for the guest's files: as many descriptors as it may have (each file that the guest opens
/// takes one), and no signal for a write beyond the largest size that RLIMIT_FSIZE allows, which would end the VMM
/// instead of being the guest's error. Gives how many files the guest may have open.
pub fn ready_process() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives through the calls; a signal that is ignored has no handler. Where one of them fails, the
    // guest has to make do with fewer files.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    usize::try_from(limit.rlim_cur.saturating_sub(RESERVED)).unwrap_or(usize::MAX)
}

/// Why a file cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// As many are open as the VMM's limit on descriptors allows.
    #[error("the guest has {0} files open, as many as the VMM's RLIMIT_NOFILE allows")]
    Full(usize),
    /// The server passed something else: reading from it could block the device for ever.
    #[error("the server passed something that is not a regular file")]
    NotRegular,
    /// The server uses a handle twice.
    #[error("the server gave out handle {0} twice")]
    Twice(u64),
}

/// Open files by handle.
#[derive(Debug)]
pub struct Files {
    open: HashMap<u64, OwnedFd>,
    limit: usize,
}

impl Files {
    /// None, with room for `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            open: HashMap::new(),
            limit,
        }
    }

    /// Enters an opened file.
    ///
    /// # Errors
    /// See [`FileError`]; the file is closed then.
    pub fn enter(&mut self, handle: u64, file: OwnedFd) -> Result<(), FileError> {
        if self.open.len() >= self.limit {
            return Err(FileError::Full(self.open.len()));
        }
        if !is_regular(file.as_fd()) {
            return Err(FileError::NotRegular);
        }
        if self.open.contains_key(&handle) {
            return Err(FileError::Twice(handle));
        }
        self.open.insert(handle, file);
        Ok(())
    }

    /// The file of a handle.
    pub fn get(&self, handle: u64) -> Option<BorrowedFd<'_>> {
        self.open.get(&handle).map(OwnedFd::as_fd)
    }

    /// Closes the file of a handle, if there is one.
    pub fn release(&mut self, handle: u64) {
        self.open.remove(&handle);
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.open.clear();
    }

    /// Number of open files.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

fn is_regular(file: BorrowedFd<'_>) -> bool {
    // SAFETY: stat is plain integers, for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` has room for what is written and lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_fstat, file.as_raw_fd(), &raw mut stat) };
    if result < 0 {
        let error = io::Error::last_os_error();
        crate::warning!("fs: a file cannot be looked at: {error}");
        return false;
    }
    stat.st_mode & libc::S_IFMT == libc::S_IFREG
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn only_regular_files_are_taken_and_each_handle_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let open = |path: &std::path::Path| OwnedFd::from(File::open(path).unwrap());
        let mut files = Files::new(ready_process());
        files.enter(1, open(&path)).unwrap();
        assert!(matches!(files.enter(1, open(&path)), Err(FileError::Twice(1))));
        assert!(matches!(
            files.enter(2, open(dir.path())),
            Err(FileError::NotRegular)
        ));
        assert!(matches!(
            files.enter(2, open(std::path::Path::new("/dev/null"))),
            Err(FileError::NotRegular)
        ));
        files.limit = 1;
        assert!(matches!(files.enter(2, open(&path)), Err(FileError::Full(1))));
        assert!(files.get(1).is_some());
        files.release(1);
        assert!(files.get(1).is_none());
        files.enter(2, open(&path)).unwrap();
        files.clear();
        assert!(files.is_empty());
    }
}
