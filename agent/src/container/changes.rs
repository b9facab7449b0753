//! Files of the cgroup file system that tell of their changes.

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// A file of the cgroup file system that tells of its changes.
#[derive(Debug)]
pub struct Changes(AsyncFd<File>);

impl Changes {
    /// Of the file at `path`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn new(path: &Path) -> io::Result<Self> {
        let mut changes = Self(sys::watch(File::open(path)?, Interest::PRIORITY)?);
        // A change is one since the last read.
        changes.read()?;
        Ok(changes)
    }

    /// What is in the file.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub fn read(&mut self) -> io::Result<String> {
        let mut text = String::new();
        let file = self.0.get_mut();
        file.rewind()?;
        file.take(4096).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Waits for the next change.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        self.read().map(drop)
    }
}

/// The number after `key` in a flat keyed file; 0 if it is not there.
pub fn counter(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_whole_name() {
        let text = "low 0\noom 7\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(counter(text, "oom_kill"), 3);
        assert_eq!(counter(text, "oom"), 7);
        assert_eq!(counter(text, "populated"), 0);
        assert_eq!(counter("oom_kill x\n", "oom_kill"), 0);
    }
}
