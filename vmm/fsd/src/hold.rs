//! How a node keeps hold of its file: by an `O_PATH` descriptor while few are held, else by the directory and the name
//! under which it was last found, to be opened anew when the guest asks for it.
//!
//! A descriptor pins an inode and a directory entry in the host's memory, so their number must not be the guest's to
//! choose. (Handles of open_by_handle_at(2) would pin nothing either, but the right to use them, CAP_DAC_READ_SEARCH,
//! reaches every file of the file system that the share is on.)
//!
//! Directories always keep theirs: names need something to start from. So does a file that the guest has open, and one
//! that is no longer where it was last found.

use crate::node::{Key, Node, lock};
use crate::sys::{self, Errno, Result};
use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

const STALE: Errno = Errno(libc::ESTALE);

/// Where a file was found: a directory and a name in it.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The directory.
    pub directory: &'a Arc<Node>,
    /// One component.
    pub name: &'a CStr,
}

/// The same, remembered.
#[derive(Clone, Debug)]
struct Place {
    directory: Arc<Node>,
    name: CString,
}

impl Place {
    fn of(found: Found<'_>) -> Self {
        Self {
            directory: found.directory.clone(),
            name: found.name.to_owned(),
        }
    }

    fn found(&self) -> Found<'_> {
        Found {
            directory: &self.directory,
            name: &self.name,
        }
    }

    fn is(&self, found: Found<'_>) -> bool {
        self.directory.id() == found.directory.id() && self.name.as_c_str() == found.name
    }

    /// Opens what is there, if it is still the file with that identity.
    ///
    /// # Errors
    /// ESTALE if it is not, upon which the guest's kernel looks the name up again.
    fn open(&self, key: &Key, kind: u32) -> Result<OwnedFd> {
        let directory = self.directory.hold().held().ok_or(STALE)?;
        let file = sys::open_entry(directory.as_fd(), &self.name).map_err(|error| match error.0 {
            libc::ENOENT | libc::ENOTDIR => STALE,
            _ => error,
        })?;
        let stat = sys::stat(file.as_fd())?;
        if Key::of(&stat) == *key && sys::kind(&stat) == kind {
            Ok(file)
        } else {
            Err(STALE)
        }
    }
}

#[derive(Debug)]
struct State {
    file: Option<Arc<OwnedFd>>,
    place: Option<Place>,
    /// Whether the guest has asked for it since it was last looked at for release.
    used: bool,
}

/// The hold of one node on its file.
#[derive(Debug)]
pub struct Hold(Mutex<State>);

impl Hold {
    /// By `file`; it can be let go where there is a place.
    pub fn new(file: Arc<OwnedFd>, place: Option<Found<'_>>) -> Self {
        Self(Mutex::new(State {
            file: Some(file),
            place: place.map(Place::of),
            used: false,
        }))
    }

    /// The descriptor, if it is held.
    pub fn held(&self) -> Option<Arc<OwnedFd>> {
        let mut state = lock(&self.0);
        state.used = true;
        state.file.clone()
    }

    /// Opens the file anew. The flag tells whether this call did so, not another thread's.
    ///
    /// # Errors
    /// ESTALE if it is not where it was last found; those of openat2(2).
    pub fn regain(&self, key: &Key, kind: u32) -> Result<(Arc<OwnedFd>, bool)> {
        let place = {
            let state = lock(&self.0);
            match (&state.file, &state.place) {
                (Some(file), _) => return Ok((file.clone(), false)),
                (None, Some(place)) => place.clone(),
                (None, None) => return Err(STALE),
            }
        };
        Ok(self.take(Arc::new(place.open(key, kind)?)))
    }

    fn take(&self, file: Arc<OwnedFd>) -> (Arc<OwnedFd>, bool) {
        let mut state = lock(&self.0);
        match &state.file {
            Some(held) => (held.clone(), false),
            None => {
                state.file = Some(file.clone());
                (file, true)
            }
        }
    }

    /// A file of the same identity was found, at `place` if it has a name. While a descriptor is held it can only be the
    /// same file; after that the file system may have given the identity to another, so the place or the time of birth
    /// (`same_birth`) must be the same too. (Not the latter alone: an overlay's files change it when they are first
    /// written.)
    ///
    /// Gives the descriptor, and whether it is the new one.
    ///
    /// # Errors
    /// With the file, if it is another one.
    pub fn meet(
        &self,
        file: OwnedFd,
        place: Option<Found<'_>>,
        same_birth: bool,
    ) -> std::result::Result<(Arc<OwnedFd>, bool), OwnedFd> {
        let before;
        {
            let mut state = lock(&self.0);
            let moved = place.filter(|found| !state.place.as_ref().is_some_and(|place| place.is(*found)));
            let same_place = place.is_some() && moved.is_none();
            if state.file.is_none() && !same_place && !same_birth {
                return Err(file);
            }
            before = moved.and_then(|found| state.place.replace(Place::of(found)));
        }
        // With the lock gone: it may be the last to know its directory.
        drop(before);
        Ok(self.take(Arc::new(file)))
    }

    /// Lets go of the descriptor if the file would be found again, nobody uses it now, and the guest has not asked for it
    /// since the last attempt.
    fn release(&self, key: &Key, kind: u32) -> bool {
        let (file, place) = {
            let mut state = lock(&self.0);
            if std::mem::take(&mut state.used) {
                return false;
            }
            (state.file.clone(), state.place.clone())
        };
        let (Some(file), Some(place)) = (file, place) else {
            return false;
        };
        let found = place.open(key, kind);
        let mut state = lock(&self.0);
        if let Err(error) = found {
            // Renamed or unlinked, by the host or under another of its names. Any other error says nothing of the file:
            // there may be no descriptor left to look with.
            if error == STALE && state.place.as_ref().is_some_and(|now| now.is(place.found())) {
                state.place = None;
            }
            return false;
        }
        // One is the hold's own, one is here.
        if Arc::strong_count(&file) > 2 {
            return false;
        }
        let released = state.file.take();
        // Closed with the lock gone.
        drop(state);
        drop((file, released));
        true
    }
}

/// Releases tried when a descriptor is added. Two would do on average; a long row of files that the guest has open must
/// not make one request slow.
const ATTEMPTS: usize = 16;

/// The nodes that hold a descriptor which can be released, in about the order in which they were last asked for.
#[derive(Debug)]
pub struct Holders {
    queue: Mutex<VecDeque<Weak<Node>>>,
    limit: usize,
    released: AtomicBool,
}

impl Holders {
    /// None yet, and as far as can be no more than `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            queue: Mutex::default(),
            limit,
            released: AtomicBool::new(false),
        }
    }

    /// Enters one that has just got its descriptor, and releases others'.
    pub fn enter(&self, node: &Arc<Node>) {
        lock(&self.queue).push_back(Arc::downgrade(node));
        for _ in 0..ATTEMPTS {
            let oldest = {
                let mut queue = lock(&self.queue);
                if queue.len() <= self.limit {
                    return;
                }
                queue.pop_front()
            };
            let Some(oldest) = oldest.as_ref().and_then(Weak::upgrade) else {
                continue;
            };
            if oldest.hold().release(oldest.key(), oldest.kind()) {
                self.released.store(true, Ordering::Relaxed);
            } else {
                lock(&self.queue).push_back(Arc::downgrade(&oldest));
            }
        }
    }

    /// Whether any descriptor has ever been released.
    pub fn have_released(&self) -> bool {
        self.released.load(Ordering::Relaxed)
    }

    /// Forgets all.
    pub fn clear(&self) {
        lock(&self.queue).clear();
    }
}
