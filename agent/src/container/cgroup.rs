//! A container's cgroup.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    changes::{Changes, counter},
    resources::Setting,
};
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
            cgroup.set(settings)?;
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

    /// Where a further process goes: here, or, where the container has handed controllers on to cgroups below, so that
    /// none may be here any more (as systemd does), where its init process `init` is.
    ///
    /// # Errors
    ///
    /// No descriptor is to be had.
    pub fn for_exec(&self, init: i32) -> io::Result<OwnedFd> {
        let handed_on = fs::read_to_string(self.path.join("cgroup.subtree_control")).unwrap_or_default();
        if !handed_on.trim().is_empty() {
            let told = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap_or_default();
            if let Some(below) = told
                .lines()
                .find_map(|line| below(&self.path, line.strip_prefix("0::/")?))
            {
                let flags = libc::O_RDONLY | libc::O_DIRECTORY;
                let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
                // It can move meanwhile; then the kernel says why the process cannot be here.
                if let Ok(found) = sys::openat2(self.directory(), &below, flags, 0, resolve) {
                    return Ok(found);
                }
            }
        }
        self.directory.try_clone()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes to one of its files.
    ///
    /// # Errors
    ///
    /// The file is not there, or the kernel refuses the value.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        // Never to be created, which would hide that it is not there.
        fs::OpenOptions::new()
            .write(true)
            .open(self.path.join(file))?
            .write_all(value.as_bytes())
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

    /// How many processes in it and below the kernel has killed for lack of memory, be it the container's or the
    /// machine's.
    pub fn oom_kills(&self) -> u64 {
        self.memory_event("oom_kill")
    }

    /// Whether a process in it could not go on for lack of memory, or was killed for it.
    pub fn was_out_of_memory(&self) -> bool {
        self.memory_event("oom") > 0 || self.oom_kills() > 0
    }

    fn memory_event(&self, name: &str) -> u64 {
        // Without the memory controller there is no such file, and nothing to report.
        fs::read_to_string(self.path.join("memory.events")).map_or(0, |text| counter(&text, name))
    }

    /// Waits until a process in it cannot go on for lack of memory; for ever without a limit.
    pub async fn out_of_memory(&self) {
        let Some(mut events) = self.memory_events() else {
            return std::future::pending().await;
        };
        // It can have happened before the watch began.
        while !self.was_out_of_memory() {
            if events.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Bytes of memory in use.
    pub fn memory(&self) -> Option<u64> {
        let text = fs::read_to_string(self.path.join("memory.current")).ok()?;
        text.trim().parse().ok()
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

/// What of a cgroup's path, from the root of the hierarchy, is below the cgroup whose directory is `directory`.
fn below(directory: &Path, path: &str) -> Option<CString> {
    let all = Path::new(path);
    // The longest that fits: a container can be called as the directory is that it is in.
    let own = all
        .ancestors()
        .find(|it| !it.as_os_str().is_empty() && directory.ends_with(it))?;
    let below = all.strip_prefix(own).ok()?;
    CString::new(below.as_os_str().as_bytes())
        .ok()
        .filter(|below| !below.is_empty())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_below_is_found_whatever_the_container_is_called() {
        let below = |directory: &str, path| {
            below(Path::new(directory), path).map(|found| found.into_string().unwrap())
        };
        assert_eq!(
            below("/sys/fs/cgroup/husk/c", "husk/c/init.scope").as_deref(),
            Some("init.scope")
        );
        assert_eq!(
            below("/sys/fs/cgroup/husk/husk", "husk/husk/a/b").as_deref(),
            Some("a/b")
        );
        assert_eq!(below("/sys/fs/cgroup/husk/c", "husk/c"), None);
        assert_eq!(below("/sys/fs/cgroup/husk/c", "husk/d/init"), None);
        assert_eq!(below("/sys/fs/cgroup/husk/c", ""), None);
    }
}
