//! The nodes that the guest knows: which number stands for which file.
//!
//! A number is given out once and never again, so a stale one can only be refused, never mean another file. A
//! node lives as long as the guest remembers it (LOOKUP and its kin count up, FORGET counts down) and has a
//! [hold](crate::hold) on its file. While that is by a descriptor, the file's identity (device, inode, mount) cannot
//! pass to another file, and an unlinked file stays reachable.

use crate::fuse::ROOT_ID;
use crate::hold::{Found, Hold, Holders};
use crate::sys::{self, Errno, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::ffi::CStr;
use std::ops::Deref;
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
    key: Key,
    kind: u32,
    /// When it was made, as far as its file system tells: tells apart files that have had the same identity.
    born: (i64, u32),
    hold: Hold,
    /// The contents when the guest last opened the file: what it has cached since is good while they last.
    opened: Mutex<Option<Stamp>>,
}

impl Node {
    /// The number that the guest knows it by.
    pub fn id(&self) -> u64 {
        self.id
    }

    fn new(id: u64, file: Arc<OwnedFd>, stat: &libc::statx, place: Option<Found<'_>>) -> Self {
        Self {
            id,
            key: Key::of(stat),
            kind: sys::kind(stat),
            born: born(stat),
            hold: Hold::new(file, place),
            opened: Mutex::new(None),
        }
    }

    /// [`Hold::meet`] with what tells files of one identity apart.
    fn meet(
        &self,
        file: OwnedFd,
        stat: &libc::statx,
        place: Option<Found<'_>>,
    ) -> std::result::Result<(Arc<OwnedFd>, bool), OwnedFd> {
        if self.kind != sys::kind(stat) {
            return Err(file);
        }
        self.hold.meet(file, place, self.born == born(stat))
    }

    /// Its hold on the file.
    pub fn hold(&self) -> &Hold {
        &self.hold
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

fn born(stat: &libc::statx) -> (i64, u32) {
    (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
}

/// A node whose descriptor stays as long as this lives.
#[derive(Clone, Debug)]
pub struct Pinned {
    node: Arc<Node>,
    file: Arc<OwnedFd>,
}

impl Pinned {
    fn new(id: u64, file: OwnedFd, stat: &libc::statx, place: Option<Found<'_>>) -> Self {
        let file = Arc::new(file);
        let node = Arc::new(Node::new(id, file.clone(), stat, place));
        Self { node, file }
    }

    fn entry<'a>(&'a self, name: &'a CStr) -> Found<'a> {
        Found {
            directory: &self.node,
            name,
        }
    }

    /// Names the file (`O_PATH`).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Deref for Pinned {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

/// How much the guest may make the server keep.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nodes. One takes some 400 bytes besides its name.
    pub nodes: usize,
    /// Descriptors that nodes keep although they could do without.
    pub descriptors: usize,
}

impl Limits {
    /// Those of a process that may have as many descriptors as this one.
    pub fn of_process() -> Self {
        const NODES: usize = 4 << 20;
        const DESCRIPTORS: usize = 16 << 10;
        Self {
            nodes: NODES,
            // The rest is for directories and for open files.
            descriptors: sys::max_descriptors()
                .checked_div(4)
                .unwrap_or_default()
                .min(DESCRIPTORS),
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
    root: Pinned,
    tables: Mutex<Tables>,
    holders: Holders,
    limit: usize,
}

impl Nodes {
    /// The root directory alone.
    pub fn new(root: OwnedFd, stat: &libc::statx, limits: Limits) -> Self {
        Self {
            root: Pinned::new(ROOT_ID, root, stat, None),
            tables: Mutex::new(Tables {
                by_id: HashMap::new(),
                by_key: HashMap::new(),
                next: ROOT_ID + 1,
            }),
            holders: Holders::new(limits.descriptors),
            limit: limits.nodes,
        }
    }

    /// The node of a number.
    ///
    /// # Errors
    /// ESTALE if the guest does not know it (any more), or if its file is not to be found any more; those of
    /// openat2(2).
    pub fn get(&self, id: u64) -> Result<Pinned> {
        if id == ROOT_ID {
            return Ok(self.root.clone());
        }
        let node = lock(&self.tables)
            .by_id
            .get(&id)
            .map(|known| known.node.clone())
            .ok_or(Errno(libc::ESTALE))?;
        if let Some(file) = node.hold.held() {
            return Ok(Pinned { node, file });
        }
        let (file, anew) = node.hold.regain(&node.key, node.kind)?;
        if anew {
            self.holders.enter(&node);
        }
        Ok(Pinned { node, file })
    }

    /// The node of a file that was found as the entry `name` of a directory, or that has no name; a new one if the guest
    /// does not know it. Counts one lookup.
    ///
    /// # Errors
    /// ENFILE when there are as many as there may be.
    pub fn look_up(
        &self,
        file: OwnedFd,
        stat: &libc::statx,
        place: Option<(&Pinned, &CStr)>,
    ) -> Result<Pinned> {
        let key = Key::of(stat);
        // A bind mount of the share within itself has another mount id, so only the root itself is met here.
        if key == self.root.key {
            return Ok(self.root.clone());
        }
        let place = place
            .filter(|_| sys::kind(stat) != libc::S_IFDIR)
            .map(|(directory, name)| directory.entry(name));
        let (pinned, anew) = self.meet_or_make(key, file, stat, place)?;
        if anew && place.is_some() {
            self.holders.enter(&pinned.node);
        }
        Ok(pinned)
    }

    /// The flag tells whether the node holds a descriptor that it did not hold before.
    fn meet_or_make(
        &self,
        key: Key,
        mut file: OwnedFd,
        stat: &libc::statx,
        place: Option<Found<'_>>,
    ) -> Result<(Pinned, bool)> {
        let mut guard = lock(&self.tables);
        let tables = &mut *guard;
        if let Some(known) = tables.by_key.get(&key).and_then(|id| tables.by_id.get_mut(id)) {
            match known.node.meet(file, stat, place) {
                Ok((file, anew)) => {
                    known.lookups = known.lookups.saturating_add(1);
                    let node = known.node.clone();
                    return Ok((Pinned { node, file }, anew));
                }
                Err(other) => file = other,
            }
        }
        let id = tables.next;
        if tables.by_id.len() >= self.limit {
            return Err(Errno(libc::ENFILE));
        }
        tables.next = id.checked_add(1).ok_or(Errno(libc::ENFILE))?;
        let pinned = Pinned::new(id, file, stat, place);
        tables.by_key.insert(key, id);
        tables.by_id.insert(
            id,
            Known {
                node: pinned.node.clone(),
                lookups: 1,
            },
        );
        Ok((pinned, true))
    }

    /// Whether nodes have let go of descriptors.
    pub fn have_released(&self) -> bool {
        self.holders.have_released()
    }

    /// Something happens to the file's names: `place` is its newest if it is told. A node that the guest has of it holds
    /// it from now on, as it might not be found again.
    pub fn hold_on(&self, file: OwnedFd, stat: &libc::statx, place: Option<(&Pinned, &CStr)>) {
        if sys::kind(stat) == libc::S_IFDIR {
            return;
        }
        let Some(node) = self.known(&Key::of(stat)) else {
            return;
        };
        let place = place.map(|(directory, name)| directory.entry(name));
        if let Ok((_, true)) = node.meet(file, stat, place) {
            self.holders.enter(&node);
        }
    }

    fn known(&self, key: &Key) -> Option<Arc<Node>> {
        let tables = lock(&self.tables);
        let known = tables.by_key.get(key).and_then(|id| tables.by_id.get(id))?;
        Some(known.node.clone())
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
        let key = known.node.key();
        // Another file may have come to this identity.
        if tables.by_key.get(key) == Some(&id) {
            tables.by_key.remove(key);
        }
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
        self.holders.clear();
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

    fn nodes_up_to(dir: &tempfile::TempDir, nodes: usize, descriptors: usize) -> Nodes {
        let root: OwnedFd = std::fs::File::open(dir.path()).unwrap().into();
        let stat = sys::stat(root.as_fd()).unwrap();
        Nodes::new(root, &stat, Limits { nodes, descriptors })
    }

    fn nodes(dir: &tempfile::TempDir) -> Nodes {
        nodes_up_to(dir, 1000, 1000)
    }

    fn try_enter(nodes: &Nodes, name: &CStr) -> Result<Pinned> {
        let root = nodes.get(ROOT_ID).unwrap();
        let fd = sys::open_entry(root.fd(), name).unwrap();
        let stat = sys::stat(fd.as_fd()).unwrap();
        nodes.look_up(fd, &stat, Some((&root, name)))
    }

    fn enter(nodes: &Nodes, name: &CStr) -> Pinned {
        try_enter(nodes, name).unwrap()
    }

    /// As many as make all that are not pinned let go.
    fn crowd(dir: &tempfile::TempDir, nodes: &Nodes) {
        for n in 0..20 {
            let name = format!("crowd{n}");
            std::fs::write(dir.path().join(&name), "").unwrap();
            enter(nodes, &std::ffi::CString::new(name).unwrap());
        }
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
    fn there_are_no_more_nodes_than_may_be() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let nodes = nodes_up_to(&dir, 2, 0);
        let a = enter(&nodes, c"a").id();
        enter(&nodes, c"b");
        assert_eq!(try_enter(&nodes, c"c").unwrap_err(), Errno(libc::ENFILE));
        assert_eq!(enter(&nodes, c"a").id(), a);
        nodes.forget(a, 2);
        enter(&nodes, c"c");
    }

    #[test]
    fn descriptors_that_are_let_go_are_had_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["file", "pinned", "moved", "gone", "replaced"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::os::unix::fs::symlink("to", path("link")).unwrap();
        std::fs::create_dir(path("directory")).unwrap();
        let nodes = nodes_up_to(&dir, 1000, 4);
        let names = [c"file", c"moved", c"gone", c"replaced", c"link", c"directory"];
        let ids = names.map(|name| enter(&nodes, name).id());
        let held = |id| lock(&nodes.tables).by_id[&id].node.hold.held().is_some();
        let pinned = enter(&nodes, c"pinned");
        crowd(&dir, &nodes);
        assert!(nodes.have_released());
        assert_eq!(ids.map(held), [false, false, false, false, false, true]);
        assert!(held(pinned.id()));

        let inode = |id| Ok(sys::stat(nodes.get(id)?.fd())?.stx_ino);
        use std::os::unix::fs::MetadataExt;
        let [file, moved, gone, replaced, link, _] = ids;
        for (id, name) in [(file, "file"), (link, "link")] {
            let on_host = std::fs::symlink_metadata(path(name)).unwrap().ino();
            assert_eq!(inode(id), Ok(on_host));
        }
        std::fs::rename(path("moved"), path("elsewhere")).unwrap();
        std::fs::remove_file(path("gone")).unwrap();
        std::fs::write(path("other"), "").unwrap();
        std::fs::rename(path("other"), path("replaced")).unwrap();
        for id in [moved, gone, replaced] {
            assert_eq!(inode(id), Err(Errno(libc::ESTALE)));
        }
        assert_eq!(enter(&nodes, c"elsewhere").id(), moved);
        assert!(inode(moved).is_ok());
        assert_ne!(enter(&nodes, c"replaced").id(), replaced);
        nodes.forget(replaced, 1);
        assert!(inode(enter(&nodes, c"replaced").id()).is_ok());

        // One that lost its name while it was held is not let go any more.
        std::fs::remove_file(path("pinned")).unwrap();
        let id = pinned.id();
        drop(pinned);
        crowd(&dir, &nodes);
        assert!(held(id) && inode(id).is_ok());
    }

    /// A file system gives an inode's number to the next file when the one before is gone.
    #[test]
    fn an_identity_that_came_to_another_file_is_another_node() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "").unwrap();
        let nodes = nodes_up_to(&dir, 1000, 0);
        let a = enter(&nodes, c"a");
        let (id, root) = (a.id(), nodes.get(ROOT_ID).unwrap());
        let mut stat = sys::stat(a.fd()).unwrap();
        drop(a);
        crowd(&dir, &nodes);
        let met = |stat: &libc::statx, name| {
            let fd = sys::open_entry(root.fd(), c"a").unwrap();
            nodes.look_up(fd, stat, Some((&root, name))).unwrap().id()
        };
        stat.stx_btime.tv_sec += 1;
        assert_eq!(met(&stat, c"a"), id, "a copied-up file of an overlay");
        crowd(&dir, &nodes);
        let other = met(&stat, c"b");
        assert_ne!(other, id);
        nodes.forget(id, 2);
        assert_eq!(met(&stat, c"b"), other);
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
