//! What is watched by the one inotify(7) instance of a sandbox. A directory has one watch, however many trees it is in.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};

use super::{Refusal, read::Found};

/// Most events that are read at once.
const MAX_EVENTS: usize = 4096;

/// What is told of each directory.
fn wanted() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_ONLYDIR
        | AddWatchFlags::from_bits_retain(libc::IN_EXCL_UNLINK)
}

/// What was read.
#[derive(Debug, Default)]
pub(super) struct News {
    /// In the order in which it happened.
    pub events: Vec<InotifyEvent>,
    /// Not all that happened is there.
    pub lost: bool,
    /// There is no more to read now.
    pub drained: bool,
}

impl News {
    /// Adds what happened after it.
    pub fn append(&mut self, later: Self) {
        self.events.extend(later.events);
        self.lost |= later.lost || self.events.len() >= MAX_EVENTS;
        self.drained = later.drained;
    }
}

#[derive(Debug)]
pub(super) struct Watches {
    inotify: Inotify,
    /// The trees that have the directory.
    users: HashMap<WatchDescriptor, Vec<u32>>,
}

impl Watches {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?,
            users: HashMap::new(),
        })
    }

    /// A descriptor that is readable when there are news.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.inotify.as_fd().try_clone_to_owned()
    }

    /// Watches a directory at `path` of a tree.
    pub fn add(&mut self, tree: u32, path: &[u8], directory: &Found) -> Result<WatchDescriptor, Refusal> {
        let watch = self.inotify.add_watch(directory.path().as_str(), wanted());
        let watch = watch.map_err(|error| Refusal::Watch(path.to_vec(), error.into()))?;
        let users = self.users.entry(watch).or_default();
        if !users.contains(&tree) {
            users.push(tree);
        }
        Ok(watch)
    }

    /// A tree has a directory no more.
    pub fn remove(&mut self, tree: u32, watch: WatchDescriptor) {
        let Some(users) = self.users.get_mut(&watch) else {
            return;
        };
        users.retain(|user| *user != tree);
        if users.is_empty() {
            self.users.remove(&watch);
            // A directory that is gone took its watch along.
            let _ = self.inotify.rm_watch(watch);
        }
    }

    /// A tree is no more.
    pub fn remove_all(&mut self, tree: u32) {
        self.keep::<()>(tree, &HashMap::new());
    }

    /// A tree has no directories but `kept`.
    pub fn keep<T>(&mut self, tree: u32, kept: &HashMap<WatchDescriptor, T>) {
        let others = self.users.keys().filter(|watch| !kept.contains_key(*watch));
        let others: Vec<WatchDescriptor> = others.copied().collect();
        for watch in others {
            self.remove(tree, watch);
        }
    }

    /// The trees that have a directory.
    pub fn users(&self, watch: WatchDescriptor) -> &[u32] {
        self.users.get(&watch).map(Vec::as_slice).unwrap_or_default()
    }

    /// What has happened.
    pub fn read(&mut self) -> io::Result<News> {
        let mut news = News::default();
        loop {
            match self.inotify.read_events() {
                Err(Errno::EAGAIN) => {
                    news.drained = true;
                    return Ok(news);
                }
                Err(Errno::EINTR) => {}
                events => news.events.extend(events?),
            }
            news.lost |= news
                .events
                .iter()
                .any(|event| event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW));
            if news.events.len() >= MAX_EVENTS {
                news.lost = true;
                return Ok(news);
            }
        }
    }

    /// What happens within `patience`, if nothing has happened yet.
    pub fn wait(&mut self, patience: Duration) -> io::Result<News> {
        let mut ready = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, patience) {
            Ok(_) | Err(Errno::EINTR) => self.read(),
            Err(error) => Err(error.into()),
        }
    }
}
