//! The nodes that the guest knows: which number stands for which file.
//!
//! A number is given out once and never again, so a stale one can only be refused, never mean another file. A
//! node lives as long as the guest remembers it (LOOKUP and its kin count up, FORGET counts down) and pins its
//! file by an `O_PATH` descriptor; so a file's identity (device, inode, mount) cannot pass to another file
//! meanwhile, and an unlinked file stays reachable.

use crate::fuse::ROOT_ID;
use crate::sys::{Errno, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What makes two names the same node. The mount counts: the same file may be writable through one mount and not
/// through another, and a rename from one to the other is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Key {
    /// That of the file `stat` tells about.
    pub fn of(stat: &libc::statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    /// Whether both are on the same mount of the same file system.
    pub fn same_mount(&self, other: &Self) -> bool {
        self.mount == other.mount && self.device == other.device
    }
}

/// What of a file changes when its contents do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Stamp {
    /// That of the file `stat` tells about, if it can be told apart from a change now: kernels count these times
    /// in ticks of up to 10 ms, so a change in the same tick would leave no mark.
    pub fn settled(stat: &libc::statx, now: libc::timespec) -> Option<Self> {
        const SETTLED_NS: i64 = 100_000_000;
        let age = |t: &libc::statx_timestamp| {
            now.tv_sec
                .saturating_sub(t.tv_sec)
                .saturating_mul(1_000_000_000)
                .saturating_add(now.tv_nsec)
                .saturating_sub(i64::from(t.tv_nsec))
        };
        if age(&stat.stx_ctime) < SETTLED_NS || age(&stat.stx_mtime) < SETTLED_NS {
            return None;
        }
        Some(Self {
            size: stat.stx_size,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        })
    }
}

/// One file that the guest knows.
#[derive(Debug)]
pub struct Node {
    id: u64,
    file: OwnedFd,
    key: Key,
    kind: u32,
    /// The contents when the guest last opened the file: what it has cached since is good while they last.
    opened: Mutex<Option<Stamp>>,
}

impl Node {
    /// The number that the guest knows it by.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Names the file (`O_PATH`).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The file's identity.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// `S_IFMT` bits of its mode. A file's kind never changes.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// Remembers the contents at an open; whether they are those of the last one.
    pub fn note_open(&self, stamp: Option<Stamp>) -> bool {
        let mut opened = lock(&self.opened);
        let same = stamp.is_some() && *opened == stamp;
        *opened = stamp;
        same
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can be left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Debug)]
struct Tables {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    next: u64,
}

/// All nodes that the guest knows.
#[derive(Debug)]
pub struct Nodes {
    root: Arc<Node>,
    tables: Mutex<Tables>,
}

impl Nodes {
    /// The root directory alone.
    pub fn new(root: OwnedFd, stat: &libc::statx) -> Self {
        let root = Node {
            id: ROOT_ID,
            file: root,
            key: Key::of(stat),
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
            opened: Mutex::new(None),
        };
        Self {
            root: Arc::new(root),
            tables: Mutex::new(Tables {
                by_id: HashMap::new(),
                by_key: HashMap::new(),
                next: ROOT_ID + 1,
            }),
        }
    }

    /// The node of a number.
    ///
    /// # Errors
    /// ESTALE if the guest does not know it (any more).
    pub fn get(&self, id: u64) -> Result<Arc<Node>> {
        if id == ROOT_ID {
            return Ok(self.root.clone());
        }
        lock(&self.tables)
            .by_id
            .get(&id)
            .map(|known| known.node.clone())
            .ok_or(Errno(libc::ESTALE))
    }

    /// The node of a file, a new one if the guest does not know it; counts one lookup.
    ///
    /// # Errors
    /// ENFILE when all numbers have been given out.
    pub fn look_up(&self, file: OwnedFd, stat: &libc::statx) -> Result<Arc<Node>> {
        let key = Key::of(stat);
        // A bind mount of the share within itself has another mount id, so only the root itself is met here.
        if key == self.root.key {
            return Ok(self.root.clone());
        }
        let mut guard = lock(&self.tables);
        let tables = &mut *guard;
        if let Some(known) = tables.by_key.get(&key).and_then(|id| tables.by_id.get_mut(id)) {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(known.node.clone());
        }
        let id = tables.next;
        tables.next = id.checked_add(1).ok_or(Errno(libc::ENFILE))?;
        let node = Arc::new(Node {
            id,
            file,
            key,
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
            opened: Mutex::new(None),
        });
        tables.by_key.insert(key, id);
        tables.by_id.insert(
            id,
            Known {
                node: node.clone(),
                lookups: 1,
            },
        );
        Ok(node)
    }

    /// Counts `n` lookups down; at none the guest knows the node no more.
    pub fn forget(&self, id: u64, n: u64) {
        let mut tables = lock(&self.tables);
        let Slot::Occupied(mut slot) = tables.by_id.entry(id) else {
            return;
        };
        let known = slot.get_mut();
        known.lookups = known.lookups.saturating_sub(n);
        if known.lookups > 0 {
            return;
        }
        let known = slot.remove();
        tables.by_key.remove(known.node.key());
        // Closing the last descriptor of an unlinked file frees its blocks, which takes its time.
        drop(tables);
        drop(known);
    }

    /// Forgets all but the root. Numbers are not given out again.
    pub fn clear(&self) {
        let mut tables = lock(&self.tables);
        tables.by_key.clear();
        let forgotten = std::mem::take(&mut tables.by_id);
        drop(tables);
        drop(forgotten);
    }

    /// Number of nodes besides the root.
    pub fn len(&self) -> usize {
        lock(&self.tables).by_id.len()
    }

    /// Whether the root is the only one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys;

    fn nodes(dir: &tempfile::TempDir) -> Nodes {
        let root: OwnedFd = std::fs::File::open(dir.path()).unwrap().into();
        let stat = sys::stat(root.as_fd()).unwrap();
        Nodes::new(root, &stat)
    }

    fn enter(nodes: &Nodes, name: &std::ffi::CStr) -> Arc<Node> {
        let fd = sys::open_entry(nodes.get(ROOT_ID).unwrap().fd(), name).unwrap();
        let stat = sys::stat(fd.as_fd()).unwrap();
        nodes.look_up(fd, &stat).unwrap()
    }

    #[test]
    fn a_node_lives_until_all_lookups_are_forgotten_and_its_number_never_returns() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "").unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let nodes = nodes(&dir);
        let id = enter(&nodes, c"a").id();
        assert_eq!(enter(&nodes, c"b").id(), id);
        nodes.forget(id, 1);
        assert!(nodes.get(id).is_ok());
        nodes.forget(id, u64::MAX);
        assert_eq!(nodes.get(id).unwrap_err(), Errno(libc::ESTALE));
        nodes.forget(id, 1);
        assert!(enter(&nodes, c"a").id() > id);
        nodes.clear();
        assert!(nodes.is_empty());
        nodes.forget(ROOT_ID, 100);
        assert!(nodes.get(ROOT_ID).is_ok());
    }

    #[test]
    fn only_a_settled_stamp_says_that_contents_are_the_same() {
        // SAFETY: statx is plain integers, for which zero is valid.
        let mut stat: libc::statx = unsafe { std::mem::zeroed() };
        stat.stx_mtime.tv_sec = 100;
        stat.stx_ctime.tv_sec = 100;
        let at = |tv_sec, tv_nsec| libc::timespec { tv_sec, tv_nsec };
        assert_eq!(Stamp::settled(&stat, at(100, 99_000_000)), None);
        assert_eq!(Stamp::settled(&stat, at(99, 0)), None);
        let stamp = Stamp::settled(&stat, at(100, 100_000_000));
        assert!(stamp.is_some());
        let dir = tempfile::tempdir().unwrap();
        let node = nodes(&dir).get(ROOT_ID).unwrap();
        assert!(!node.note_open(stamp));
        assert!(node.note_open(stamp));
        assert!(!node.note_open(None));
        assert!(!node.note_open(None));
    }
}
