//! One directory as its mirror has it, and what to change there when the directory changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::Duration,
};

use husk_agent_protocol::{
    limits::{MAX_MIRROR_BYTES, MAX_MIRROR_ENTRIES},
    messages::{MirrorChange, MirrorFile, mirror_change::Kind},
};
use nix::sys::{
    inotify::{AddWatchFlags, InotifyEvent, WatchDescriptor},
    stat::SFlag,
};
use sha2::{Digest, Sha256};

use super::{
    MAX_BYTES, MAX_ENTRIES, MAX_SANDBOX_BYTES, Refusal,
    read::{Found, Stat, join, look},
    watches::{News, Watches},
};
use crate::host::mount::open_path;

/// Most bytes of contents that a batch tells one by one.
const MAX_TOLD: usize = 2 * MAX_MIRROR_BYTES;

/// How often a batch is read anew with what has happened meanwhile, so that it ends while the directory keeps changing.
const MAX_ATTEMPTS: usize = 8;

/// How long an event can come after its change is seen in the directory: the kernel tells of a change as soon as it has
/// made it, unless another process gets the processor in between.
const EVENT_DELAY: Duration = Duration::from_millis(5);

/// What became of a tree: its number, and what to change in its mirror, or why it could not be followed.
pub type Told = (u32, Result<Vec<MirrorChange>, Refusal>);

/// The directories of a sandbox that are mirrored, by their numbers.
#[derive(Debug)]
pub struct Trees {
    watches: Watches,
    trees: HashMap<u32, Tree>,
}

impl Trees {
    /// None yet.
    ///
    /// # Errors
    /// When there can be no more inotify instances.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            watches: Watches::new()?,
            trees: HashMap::new(),
        })
    }

    /// A descriptor that is readable when [`Self::read`] has something to tell.
    ///
    /// # Errors
    /// When it cannot be duplicated.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.watches.descriptor()
    }

    /// Begins to watch `directory`. Tells what makes an empty mirror one of it.
    ///
    /// # Errors
    /// When it cannot be mirrored; then it is not watched.
    pub fn begin(&mut self, number: u32, directory: &Path) -> Result<Vec<MirrorChange>, Refusal> {
        let others: usize = self.trees.values().map(|tree| tree.state.bytes).sum();
        let begun = Tree::begin(number, directory, &mut self.watches).and_then(|(tree, changes)| {
            if tree.state.nodes.len() > MAX_ENTRIES {
                Err(Refusal::Entries)
            } else if tree.state.bytes > MAX_BYTES {
                Err(Refusal::Bytes)
            } else if others.saturating_add(tree.state.bytes) > MAX_SANDBOX_BYTES {
                Err(Refusal::Sandbox)
            } else {
                Ok((tree, changes))
            }
        });
        match begun {
            Ok((tree, changes)) => {
                self.trees.insert(number, tree);
                Ok(changes)
            }
            Err(refusal) => {
                self.watches.remove_all(number);
                Err(refusal)
            }
        }
    }

    /// Watches a directory no longer.
    pub fn end(&mut self, number: u32) {
        if self.trees.remove(&number).is_some() {
            self.watches.remove_all(number);
        }
    }

    /// Whether there is a tree.
    pub fn has(&self, number: u32) -> bool {
        self.trees.contains_key(&number)
    }

    /// Changes were not made as they were told: the next ones tell all anew.
    pub fn mistrust(&mut self, number: u32) {
        if let Some(tree) = self.trees.get_mut(&number) {
            tree.behind = true;
            tree.mistrusted = true;
        }
    }

    /// What has happened to each, and whether that was all.
    ///
    /// # Errors
    /// When the events cannot be read.
    pub fn read(&mut self) -> io::Result<(Vec<Told>, bool)> {
        let mut news = self.watches.read()?;
        let mut followed = self.follow(&news);
        for _ in 0..MAX_ATTEMPTS {
            if news.lost || !followed.iter().any(|(_, followed)| followed.early) {
                break;
            }
            let more = self.watches.wait(EVENT_DELAY)?;
            if more.events.is_empty() {
                break;
            }
            news.append(more);
            followed = self.follow(&news);
        }
        let mut told = Vec::new();
        for (number, followed) in followed {
            if let Some(tree) = self.trees.get_mut(&number) {
                let changes = tree.settle(followed, &mut self.watches);
                if !matches!(&changes, Ok(changes) if changes.is_empty()) {
                    told.push((number, changes));
                }
            }
        }
        Ok((told, news.drained))
    }

    /// What the trees become by what has happened.
    fn follow(&mut self, news: &News) -> Vec<(u32, Followed)> {
        let mut batches: BTreeMap<u32, Vec<&InotifyEvent>> = BTreeMap::new();
        for event in &news.events {
            for number in self.watches.users(event.wd) {
                batches.entry(*number).or_default().push(event);
            }
        }
        if news.lost {
            for number in self.trees.keys() {
                batches.entry(*number).or_default();
            }
        }
        let mut all = Vec::new();
        for (number, events) in batches {
            if let Some(tree) = self.trees.get(&number) {
                all.push((number, tree.follow(&events, news.lost, &mut self.watches)));
            }
        }
        all
    }
}

/// What a tree becomes by a batch of events.
struct Followed {
    result: Result<(State, Vec<MirrorChange>), Refusal>,
    /// The directory is further than these events: with those that are on their way, more of the order is known.
    early: bool,
}

#[derive(Debug)]
struct Tree {
    number: u32,
    root: OwnedFd,
    state: State,
    /// The mirror is not what the directory is, and `state` is the mirror's.
    behind: bool,
    /// Nor is `state` known to be the mirror's.
    mistrusted: bool,
}

/// What the mirror has.
#[derive(Clone, Debug, Default)]
struct State {
    /// By their paths; the root's is empty.
    nodes: BTreeMap<Vec<u8>, Node>,
    /// The paths of watched directories.
    directories: HashMap<WatchDescriptor, Vec<u8>>,
    /// Of all contents.
    bytes: usize,
}

#[derive(Clone, Debug)]
struct Node {
    stat: Stat,
    /// Of the contents.
    sum: [u8; 32],
    length: usize,
    watch: Option<WatchDescriptor>,
    /// A file of which it has not been told that it was written and closed.
    is_new: bool,
}

/// How something came to its place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// It was there with the mirror.
    Root,
    Created,
    Moved,
}

/// An event, and those after it.
type Since<'a> = (&'a InotifyEvent, &'a [&'a InotifyEvent]);

/// What tells of a change in something that is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// Only what stat(2) tells.
    None,
    /// Nothing is known, all may have changed.
    Unknown,
    /// `IN_ATTRIB`.
    Attributes,
    /// `IN_MODIFY`: also where the time is too coarse to tell.
    Written,
    /// `IN_CLOSE_WRITE`.
    Closed,
}

impl Tree {
    fn begin(
        number: u32,
        directory: &Path,
        watches: &mut Watches,
    ) -> Result<(Self, Vec<MirrorChange>), Refusal> {
        let root = open_path(directory).map_err(|error| Refusal::Unreadable(Vec::new(), error))?;
        let mut tree = Self {
            number,
            root,
            state: State::default(),
            behind: false,
            mistrusted: false,
        };
        let mut batch = Batch::new(&tree, watches);
        if let Some(found) = batch.look(b"")? {
            batch.add(Vec::new(), found, How::Root)?;
        }
        let Batch { state, changes, .. } = batch;
        tree.state = state;
        Ok((tree, changes))
    }

    /// What to change in the mirror after `events`. If some were lost, everything is looked at.
    fn follow(&self, events: &[&InotifyEvent], lost: bool, watches: &mut Watches) -> Followed {
        if !lost && !self.behind {
            let mut batch = Batch::new(self, watches);
            let replayed = batch.replay(events).and_then(|structure| {
                let told = batch.changes.len();
                if structure {
                    batch.compare(false, false)?;
                }
                batch.early |= batch.changes.len() > told;
                Ok(())
            });
            if replayed.is_ok() {
                return batch.done();
            }
        }
        let mut batch = Batch::new(self, watches);
        match batch.compare(true, self.mistrusted) {
            Ok(()) => batch.done(),
            Err(refusal) => Followed {
                result: Err(refusal),
                early: false,
            },
        }
    }

    /// Takes over what [`Self::follow`] found, and tells what to change.
    fn settle(&mut self, followed: Followed, watches: &mut Watches) -> Result<Vec<MirrorChange>, Refusal> {
        match followed.result {
            Ok((state, changes)) => {
                self.state = state;
                watches.keep(self.number, &self.state.directories);
                (self.behind, self.mistrusted) = (false, false);
                Ok(changes)
            }
            Err(refusal) => {
                self.behind = true;
                Err(refusal)
            }
        }
    }
}

/// Changes in the making: from what the mirror has to what the directory is.
struct Batch<'a> {
    number: u32,
    root: &'a OwnedFd,
    watches: &'a mut Watches,
    state: State,
    changes: Vec<MirrorChange>,
    /// Bytes of contents in them.
    told: usize,
    /// What has been read since the events that are being told: they tell nothing new of it.
    fresh: HashSet<Vec<u8>>,
    /// Something was not found where the events leave it.
    early: bool,
}

impl<'a> Batch<'a> {
    fn new(tree: &'a Tree, watches: &'a mut Watches) -> Self {
        Self {
            number: tree.number,
            root: &tree.root,
            watches,
            state: tree.state.clone(),
            changes: Vec::new(),
            told: 0,
            fresh: HashSet::new(),
            early: false,
        }
    }

    fn done(self) -> Followed {
        Followed {
            result: Ok((self.state, self.changes)),
            early: self.early,
        }
    }

    fn look(&self, path: &[u8]) -> Result<Option<Found>, Refusal> {
        look(self.root.as_fd(), path)
    }

    /// Whether what the mirror has at `path` is still there.
    fn is_there(&self, path: &[u8]) -> Result<bool, Refusal> {
        let known = self.state.nodes.get(path).map(|node| node.stat.id);
        let found = self.look(path)?.map(|found| found.stat.id);
        Ok(known.is_some() && known == found)
    }

    fn change(&mut self, kind: Kind, path: &[u8], file: Option<MirrorFile>, to: &[u8]) {
        self.changes.push(MirrorChange {
            kind: kind.into(),
            path: path.to_vec(),
            file: file.into(),
            to: to.to_vec(),
            ..Default::default()
        });
    }

    /// Tells `events` one by one. `true`: the tree itself has changed, not only what is in it.
    fn replay(&mut self, events: &[&InotifyEvent]) -> Result<bool, Refusal> {
        let mut structure = false;
        let mut renamed = HashSet::new();
        for (index, event) in events.iter().enumerate() {
            let rest = events.get(index + 1..).unwrap_or_default();
            let Some(path) = self.path(event) else { continue };
            let is = |flag| event.mask.contains(flag);
            if is(AddWatchFlags::IN_MODIFY) {
                self.refresh(&path, Sign::Written, Some((event, rest)))?;
            } else if is(AddWatchFlags::IN_CLOSE_WRITE) {
                self.refresh(&path, Sign::Closed, Some((event, rest)))?;
            } else if is(AddWatchFlags::IN_ATTRIB) {
                self.refresh(&path, Sign::Attributes, None)?;
            } else if is(AddWatchFlags::IN_CREATE) {
                structure = true;
                self.arrive(path, How::Created, event, rest)?;
            } else if is(AddWatchFlags::IN_MOVED_FROM) {
                structure = true;
                let to = rest.iter().find(|other| {
                    other.cookie == event.cookie && other.mask.contains(AddWatchFlags::IN_MOVED_TO)
                });
                let to = to.and_then(|to| Some((to, self.path(to)?)));
                if !self.state.nodes.contains_key(&path) || self.is_there(&path)? {
                    continue;
                }
                if let Some((event, to)) = to {
                    renamed.insert(event.cookie);
                    self.rename(&path, &to);
                } else {
                    self.early = true;
                    self.change(Kind::TAKE_OUT, &path, None, b"");
                    self.forget(&path);
                }
            } else if is(AddWatchFlags::IN_MOVED_TO) {
                structure = true;
                if !renamed.contains(&event.cookie) {
                    self.arrive(path, How::Moved, event, rest)?;
                }
            } else if is(AddWatchFlags::IN_DELETE) {
                structure = true;
                if self.state.nodes.contains_key(&path) && !self.is_there(&path)? {
                    self.remove(&path);
                }
            }
        }
        Ok(structure)
    }

    fn path(&self, event: &InotifyEvent) -> Option<Vec<u8>> {
        let directory = self.state.directories.get(&event.wd)?;
        let name = event.name.as_ref();
        Some(name.map_or_else(|| directory.clone(), |name| join(directory, name.as_bytes())))
    }

    /// Something came to `path`, and may be elsewhere by now, as `rest` tells.
    fn arrive(
        &mut self,
        path: Vec<u8>,
        how: How,
        event: &InotifyEvent,
        rest: &[&InotifyEvent],
    ) -> Result<(), Refusal> {
        let found = self.find(&path, Some((event, rest)))?;
        let Some(found) = found else {
            // What comes and goes that fast is not told of.
            self.early |= !self.is_removed(event, rest);
            return Ok(());
        };
        match self.state.nodes.get(&path) {
            Some(node) if node.stat.id == found.stat.id => Ok(()),
            Some(_) => self.add(path, found, How::Moved),
            None => self.add(path, found, how),
        }
    }

    /// What is at `path`, or was there before it was moved.
    fn find(&self, path: &[u8], since: Option<Since<'_>>) -> Result<Option<Found>, Refusal> {
        let found = self.look(path)?;
        match since {
            Some((event, rest)) if found.is_none() => self
                .destination(event, rest)
                .map_or(Ok(None), |path| self.look(&path)),
            _ => Ok(found),
        }
    }

    /// Whether what `event` tells of was removed later, at its first place.
    fn is_removed(&self, event: &InotifyEvent, rest: &[&InotifyEvent]) -> bool {
        rest.iter().any(|other| {
            other.mask.contains(AddWatchFlags::IN_DELETE)
                && (other.wd, &other.name) == (event.wd, &event.name)
        })
    }

    /// Where what `event` tells of was moved later, if it was.
    fn destination(&self, event: &InotifyEvent, rest: &[&InotifyEvent]) -> Option<Vec<u8>> {
        let mut at = event;
        let mut rest = rest.iter();
        loop {
            let from = rest.find(|other| {
                other.mask.contains(AddWatchFlags::IN_MOVED_FROM)
                    && (other.wd, &other.name) == (at.wd, &at.name)
            });
            let to = from.and_then(|from| {
                rest.find(|other| {
                    other.mask.contains(AddWatchFlags::IN_MOVED_TO) && other.cookie == from.cookie
                })
            });
            match to {
                Some(to) => at = to,
                None if std::ptr::eq(at, event) => return None,
                None => return self.path(at),
            }
        }
    }

    /// Adds what was found for `path`, with all in it, in place of what the mirror has there.
    fn add(&mut self, path: Vec<u8>, found: Found, how: How) -> Result<(), Refusal> {
        self.forget(&path);
        let mut made = Vec::new();
        let mut waiting = self.add_one(path, &found, how, &mut made)?;
        drop(found);
        while let Some(path) = waiting.pop() {
            // It is watched since before its name was read: if it has gone, we shall be told.
            if let Some(found) = self.look(&path)? {
                waiting.extend(self.add_one(path, &found, How::Created, &mut made)?);
            }
        }
        // With what was made in it, a directory's time has changed.
        while let Some(path) = made.pop() {
            if let Some(file) = self
                .state
                .nodes
                .get(&path)
                .map(|node| file(&node.stat, Vec::new()))
            {
                self.change(Kind::ATTRIBUTES, &path, Some(file), b"");
            }
        }
        Ok(())
    }

    /// Adds one file; tells what is in it, last one first, if it is a directory.
    fn add_one(
        &mut self,
        path: Vec<u8>,
        found: &Found,
        how: How,
        made: &mut Vec<Vec<u8>>,
    ) -> Result<Vec<Vec<u8>>, Refusal> {
        let stat = found.stat;
        let mut node = Node {
            stat,
            sum: [0; 32],
            length: 0,
            watch: None,
            is_new: stat.kind() == SFlag::S_IFREG && how != How::Moved,
        };
        let mut content = Vec::new();
        let mut names = Vec::new();
        match stat.kind() {
            SFlag::S_IFDIR => {
                // First the watch, then the names.
                let watch = self.watches.add(self.number, &path, found)?;
                node.watch = Some(watch);
                self.state.directories.insert(watch, path.clone());
                names = found.names(&path)?;
                names.reverse();
                made.push(path.clone());
            }
            SFlag::S_IFREG | SFlag::S_IFLNK => content = found.content(&path)?,
            SFlag::S_IFIFO => return Err(Refusal::Kind(path, "a FIFO")),
            SFlag::S_IFSOCK => return Err(Refusal::Kind(path, "a socket")),
            _ => return Err(Refusal::Kind(path, "a device")),
        }
        node.length = content.len();
        node.sum = sum(&content);
        self.tell(content.len())?;
        self.state.bytes = self.state.bytes.saturating_add(content.len());
        self.state.nodes.insert(path.clone(), node);
        self.check_size()?;
        self.fresh.insert(path.clone());
        let kind = match how {
            How::Root => None,
            How::Created => Some(Kind::CREATE),
            How::Moved => Some(Kind::PLACE),
        };
        if let Some(kind) = kind {
            self.change(kind, &path, Some(file(&stat, content)), b"");
        }
        Ok(names.into_iter().map(|name| join(&path, &name)).collect())
    }

    fn tell(&mut self, length: usize) -> Result<(), Refusal> {
        self.told = self.told.saturating_add(length);
        if self.told > MAX_TOLD {
            return Err(Refusal::Burst);
        }
        Ok(())
    }

    fn check_size(&self) -> Result<(), Refusal> {
        if self.state.nodes.len() > MAX_MIRROR_ENTRIES {
            return Err(Refusal::Entries);
        }
        if self.state.bytes > MAX_MIRROR_BYTES {
            return Err(Refusal::Bytes);
        }
        Ok(())
    }

    /// Looks again at what the mirror has at `path`, after a `sign` that it may have changed. It may be elsewhere by now, as
    /// the events `since` then tell.
    fn refresh(&mut self, path: &[u8], sign: Sign, since: Option<Since<'_>>) -> Result<(), Refusal> {
        let Some(old) = self.state.nodes.get(path).cloned() else {
            return Ok(());
        };
        // Who waits for a new file waits for its end.
        let completed = sign == Sign::Closed && old.is_new;
        if self.fresh.contains(path) && !completed {
            return Ok(());
        }
        let Some(found) = self.find(path, since)? else {
            self.early = true;
            return Ok(());
        };
        let stat = found.stat;
        if stat.id != old.stat.id || stat.kind() != old.stat.kind() {
            return Ok(());
        }
        let mut new = Node { stat, ..old };
        if stat.kind() == SFlag::S_IFREG {
            let written = matches!(sign, Sign::Written | Sign::Closed);
            if !written && sign != Sign::Unknown && stat.unchanged(&old.stat) {
                return Ok(());
            }
            let content = found.content(path)?;
            new.length = content.len();
            new.sum = sum(&content);
            self.fresh.insert(path.to_vec());
            if completed || new.sum != old.sum || (written && stat.mtime != old.stat.mtime) {
                new.is_new = false;
                self.tell(content.len())?;
                self.state.bytes = self
                    .state
                    .bytes
                    .saturating_add(new.length)
                    .saturating_sub(old.length);
                self.state.nodes.insert(path.to_vec(), new);
                self.change(Kind::WRITE, path, Some(file(&stat, content)), b"");
                return self.check_size();
            }
        }
        // A link never changes. Where inodes have no time of birth, this is another one.
        if stat.kind() == SFlag::S_IFLNK
            && !stat.unchanged(&old.stat)
            && sum(&found.content(path)?) != old.sum
        {
            return self.add(path.to_vec(), found, How::Moved);
        }
        // That of a directory goes its own way with what is made in it.
        let timed = !stat.is_directory() || sign == Sign::Attributes;
        if !stat.same_access(&old.stat) || (timed && stat.mtime != old.stat.mtime) {
            self.change(Kind::ATTRIBUTES, path, Some(file(&stat, Vec::new())), b"");
        }
        self.state.nodes.insert(path.to_vec(), new);
        Ok(())
    }

    /// The paths that the mirror has at and below `path`, parents first.
    fn below(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let first = self.state.nodes.contains_key(path).then(|| path.to_vec());
        let start = join(path, b"");
        let rest = self.state.nodes.range(start.clone()..);
        let rest = rest.take_while(|(key, _)| key.starts_with(&start));
        first
            .into_iter()
            .chain(rest.map(|(key, _)| key.clone()))
            .collect()
    }

    /// The mirror will have nothing at `path`.
    fn forget(&mut self, path: &[u8]) {
        for path in self.below(path) {
            if let Some(node) = self.state.nodes.remove(&path) {
                self.state.bytes = self.state.bytes.saturating_sub(node.length);
                // It may be watched at another path by now, if it was moved and its new name was met first.
                let watch = node
                    .watch
                    .filter(|watch| self.state.directories.get(watch) == Some(&path));
                if let Some(watch) = watch {
                    self.state.directories.remove(&watch);
                }
            }
            self.fresh.remove(&path);
        }
    }

    fn remove(&mut self, path: &[u8]) {
        for path in self.below(path).iter().rev() {
            self.change(Kind::REMOVE, path, None, b"");
        }
        self.forget(path);
    }

    fn rename(&mut self, from: &[u8], to: &[u8]) {
        self.forget(to);
        for path in self.below(from) {
            let Some(node) = self.state.nodes.remove(&path) else {
                continue;
            };
            let new = [to, path.get(from.len()..).unwrap_or_default()].concat();
            if let Some(watch) = node.watch {
                self.state.directories.insert(watch, new.clone());
            }
            if self.fresh.remove(&path) {
                self.fresh.insert(new.clone());
            }
            self.state.nodes.insert(new, node);
        }
        self.change(Kind::RENAME, from, None, to);
    }

    /// Compares the whole directory with what the mirror has. `all`: contents, too, and everything is watched anew.
    /// `mistrusted`: the mirror may have something else.
    fn compare(&mut self, all: bool, mistrusted: bool) -> Result<(), Refusal> {
        let mut there: HashSet<Vec<u8>> = HashSet::new();
        let mut waiting = vec![Vec::new()];
        while let Some(path) = waiting.pop() {
            let Some(found) = self.look(&path)? else { continue };
            let Some(node) = self.state.nodes.get(&path).cloned() else {
                self.add(path, found, How::Created)?;
                continue;
            };
            there.insert(path.clone());
            if node.stat.id != found.stat.id || node.stat.kind() != found.stat.kind() {
                if path.is_empty() {
                    continue;
                }
                self.add(path, found, How::Moved)?;
                continue;
            }
            if found.stat.is_directory() {
                if all {
                    let watch = self.watches.add(self.number, &path, &found)?;
                    self.state.directories.insert(watch, path.clone());
                    if let Some(node) = self.state.nodes.get_mut(&path) {
                        node.watch = Some(watch);
                    }
                }
                let mut names = found.names(&path)?;
                names.reverse();
                waiting.extend(names.into_iter().map(|name| join(&path, &name)));
            }
            if mistrusted {
                self.repeat(&path, &found)?;
            } else {
                self.refresh(&path, if all { Sign::Unknown } else { Sign::None }, None)?;
            }
        }
        let gone: Vec<Vec<u8>> = self
            .state
            .nodes
            .keys()
            .filter(|path| !there.contains(*path) && !self.fresh.contains(*path))
            .cloned()
            .collect();
        for path in gone.iter().rev() {
            self.remove(path);
        }
        if all {
            self.drop_old_watches();
        }
        Ok(())
    }

    /// Tells all of what the mirror should have already.
    fn repeat(&mut self, path: &[u8], found: &Found) -> Result<(), Refusal> {
        let kind = match found.stat.kind() {
            SFlag::S_IFDIR => Kind::ATTRIBUTES,
            SFlag::S_IFREG => Kind::WRITE,
            _ => Kind::PLACE,
        };
        let content = match kind {
            Kind::ATTRIBUTES => Vec::new(),
            _ => found.content(path)?,
        };
        self.tell(content.len())?;
        if let Some(node) = self.state.nodes.get_mut(path) {
            let old = std::mem::replace(&mut node.length, content.len());
            self.state.bytes = self.state.bytes.saturating_add(content.len()).saturating_sub(old);
            node.sum = sum(&content);
            node.stat = found.stat;
        }
        self.change(kind, path, Some(file(&found.stat, content)), b"");
        self.check_size()
    }

    /// Forgets watches that were replaced.
    fn drop_old_watches(&mut self) {
        let nodes = &self.state.nodes;
        let is_used = |watch: &WatchDescriptor, path: &Vec<u8>| {
            nodes.get(path).is_some_and(|node| node.watch == Some(*watch))
        };
        self.state.directories.retain(|watch, path| is_used(watch, path));
    }
}

fn sum(content: &[u8]) -> [u8; 32] {
    Sha256::digest(content).into()
}

fn file(stat: &Stat, content: Vec<u8>) -> MirrorFile {
    MirrorFile {
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        mtime_seconds: stat.mtime.0,
        mtime_nanoseconds: stat.mtime.1,
        content,
        ..Default::default()
    }
}
