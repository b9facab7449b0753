//! The files and directories that the guest has open.

use crate::node::Pinned;
use crate::sys::{Errno, Result};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An open regular file. The VMM has a duplicate of its descriptor, for READ and WRITE.
#[derive(Debug)]
pub struct OpenFile {
    file: OwnedFd,
    writable: bool,
    /// Its node keeps its descriptor while this is open: the file may have lost its name.
    _node: Pinned,
}

impl OpenFile {
    /// One just opened, of that node.
    pub fn new(file: OwnedFd, writable: bool, node: Pinned) -> Self {
        Self {
            file,
            writable,
            _node: node,
        }
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }
}

/// An open directory.
#[derive(Debug)]
pub struct OpenDir {
    directory: OwnedFd,
    /// Where the descriptor stands, if that is known: the cookie of the last entry read, as the file system gave it.
    position: Mutex<Option<u64>>,
}

impl OpenDir {
    /// One just opened.
    pub fn new(directory: OwnedFd) -> Self {
        Self {
            directory,
            position: Mutex::new(Some(0)),
        }
    }

    /// The directory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Reserves the descriptor's position for one reader.
    pub fn position(&self) -> MutexGuard<'_, Option<u64>> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a handle stands for.
#[derive(Clone, Debug)]
pub enum Handle {
    /// A regular file.
    File(Arc<OpenFile>),
    /// A directory.
    Directory(Arc<OpenDir>),
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Handle>,
    last: u64,
}

/// All open handles. Their numbers are given out once and never again.
#[derive(Debug, Default)]
pub struct Handles(Mutex<Table>);

impl Handles {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing under this lock can be left half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a handle and returns its number.
    ///
    /// # Errors
    /// ENFILE when all numbers have been given out.
    pub fn enter(&self, handle: Handle) -> Result<u64> {
        let mut table = self.lock();
        let number = table.last.checked_add(1).ok_or(Errno(libc::ENFILE))?;
        table.last = number;
        table.open.insert(number, handle);
        Ok(number)
    }

    /// The open file of a number.
    ///
    /// # Errors
    /// EBADF if there is none.
    pub fn file(&self, number: u64) -> Result<Arc<OpenFile>> {
        match self.lock().open.get(&number) {
            Some(Handle::File(file)) => Ok(file.clone()),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// The open directory of a number.
    ///
    /// # Errors
    /// EBADF if there is none.
    pub fn directory(&self, number: u64) -> Result<Arc<OpenDir>> {
        match self.lock().open.get(&number) {
            Some(Handle::Directory(directory)) => Ok(directory.clone()),
            _ => Err(Errno(libc::EBADF)),
        }
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// EBADF if there is none.
    pub fn release(&self, number: u64) -> Result<()> {
        let handle = self.lock().open.remove(&number);
        // Dropped outside of the lock: closing may take its time.
        handle.map(drop).ok_or(Errno(libc::EBADF))
    }

    /// Closes all.
    pub fn clear(&self) {
        let closed = std::mem::take(&mut self.lock().open);
        drop(closed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fuse::ROOT_ID;
    use crate::node::{Limits, Nodes};
    use crate::sys;

    #[test]
    fn a_handle_is_of_one_kind_and_ends_with_its_release() {
        let handles = Handles::default();
        let fd = || OwnedFd::from(std::fs::File::open("/").unwrap());
        let node = {
            let stat = sys::stat(fd().as_fd()).unwrap();
            let limits = Limits {
                nodes: 0,
                descriptors: 0,
            };
            Nodes::new(fd(), &stat, limits).get(ROOT_ID).unwrap()
        };
        let file = handles
            .enter(Handle::File(Arc::new(OpenFile::new(fd(), false, node.clone()))))
            .unwrap();
        let dir = handles
            .enter(Handle::Directory(Arc::new(OpenDir::new(fd()))))
            .unwrap();
        assert!(handles.file(file).is_ok() && handles.directory(dir).is_ok());
        assert_eq!(handles.file(dir).unwrap_err(), Errno(libc::EBADF));
        assert_eq!(handles.directory(file).unwrap_err(), Errno(libc::EBADF));
        handles.release(file).unwrap();
        assert_eq!(handles.release(file).unwrap_err(), Errno(libc::EBADF));
        handles.clear();
        assert_eq!(handles.directory(dir).unwrap_err(), Errno(libc::EBADF));
        assert!(
            handles
                .enter(Handle::File(Arc::new(OpenFile::new(fd(), false, node.clone()))))
                .unwrap()
                > dir
        );
    }
}
