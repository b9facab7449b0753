//! A container's cgroup.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::resources::Setting;
use crate::{fault::Fault, sys};

/// Bounds on what a container makes below its cgroup, so that removing it is bounded, too.
const MAX_DEPTH: &str = "64";
const MAX_DESCENDANTS: &str = "10000";

/// How long processes may take to die by SIGKILL.
const DEATH: Duration = Duration::from_secs(10);

/// A cgroup, and the right to remove it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup at `path` with `settings`. On failure nothing is left.
    ///
    /// # Errors
    ///
    /// It exists, or the kernel refuses a setting.
    pub fn create(path: PathBuf, settings: &[Setting]) -> Result<Self, Fault> {
        let failed = |error: io::Error| Fault::system("make the cgroup", error);
        fs::create_dir(&path).map_err(failed)?;
        let prepared = File::open(&path).map_err(failed).and_then(|directory| {
            let cgroup = Self {
                path: path.clone(),
                directory: directory.into(),
            };
            cgroup.write("cgroup.max.depth", MAX_DEPTH).map_err(failed)?;
            cgroup
                .write("cgroup.max.descendants", MAX_DESCENDANTS)
                .map_err(failed)?;
            for setting in settings {
                match cgroup.write(&setting.file, &setting.value) {
                    Err(error) if setting.optional && error.kind() == io::ErrorKind::NotFound => {}
                    result => result.map_err(|error| {
                        let what =
                            format!("{}: write {:?} to {}", setting.field, setting.value, setting.file);
                        Fault::system(what, error)
                    })?,
                }
            }
            Ok(cgroup)
        });
        if prepared.is_err() {
            let _ = fs::remove_dir(&path);
        }
        prepared
    }

    /// Removes it if nothing is in it: for a start that failed before there was a process.
    pub fn remove_empty(&self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            crate::log::error!("remove cgroup {}: {error}", self.path.display());
        }
    }

    /// For clone3.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// Kills every process in it.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// The pids of all processes in it and below, in the agent's pid namespace; at most `max`.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub fn processes(&self, max: usize) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let list = match fs::read_to_string(directory.join("cgroup.procs")) {
                // Removed meanwhile, or a threaded cgroup, whose processes are listed above it.
                Err(error)
                    if directory != self.path
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
                        ) =>
                {
                    continue;
                }
                result => result?,
            };
            // 0 stands for a process that this namespace does not see.
            pids.extend(
                list.lines()
                    .filter_map(|line| line.parse::<i32>().ok())
                    .filter(|pid| *pid > 0),
            );
            if pids.len() >= max {
                pids.truncate(max);
                break;
            }
            directories.extend(children(&directory));
        }
        Ok(pids)
    }

    /// How many processes the kernel has killed because the memory limit was reached.
    pub fn oom_kills(&self) -> u64 {
        // Without the memory controller there is no such file, and nothing to report.
        fs::read_to_string(self.path.join("memory.events")).map_or(0, |text| counter(&text, "oom_kill"))
    }

    /// Reports changes of `memory.events`, where the kernel has it.
    pub fn memory_events(&self) -> Option<Changes> {
        Changes::new(&self.path.join("memory.events")).ok()
    }

    /// Kills what is left in it, waits until that is dead and removes it, with all below it.
    ///
    /// # Errors
    ///
    /// A process does not die.
    pub async fn remove(&self) -> io::Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let mut events = Changes::new(&self.path.join("cgroup.events"))?;
        let empty = async {
            while counter(&events.read()?, "populated") != 0 {
                events.changed().await?;
            }
            io::Result::Ok(())
        };
        tokio::time::timeout(DEATH, empty).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "processes of the container do not die")
        })??;
        remove_tree(&self.path)
    }
}

/// The number after `key` in a flat keyed file.
fn counter(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0)
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Bounded by [`MAX_DEPTH`] and [`MAX_DESCENDANTS`].
fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in children(directory) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A file of the cgroup file system that tells of its changes.
#[derive(Debug)]
pub struct Changes(AsyncFd<File>);

impl Changes {
    fn new(path: &Path) -> io::Result<Self> {
        let mut changes = Self(sys::watch(File::open(path)?, Interest::PRIORITY)?);
        // A change is one since the last read.
        changes.read()?;
        Ok(changes)
    }

    fn read(&mut self) -> io::Result<String> {
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
