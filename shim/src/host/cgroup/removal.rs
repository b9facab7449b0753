//! The removal of cgroups.

use std::{
    fs, io,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use super::{Trace, is_marked, systemd};

/// How long the last processes of a cgroup may take to be gone once they were killed.
const EMPTY: Duration = Duration::from_secs(2);

/// Between two attempts, as the kernel tells of an empty cgroup of version 1 to nobody.
const PAUSE: Duration = Duration::from_millis(5);

impl Trace {
    /// Removes the cgroup: ends what still is in it, and takes away its directories and those above it that husk made
    /// and nobody else uses. What others made is left alone. Idempotent; may block for a moment.
    ///
    /// # Errors
    /// For the first that cannot be removed; the rest is.
    pub fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        if let Some(unit) = &self.unit {
            if let Err(error) = systemd::stop(unit) {
                // It ends by itself with its last process.
                tracing::debug!(%error, unit, "systemd did not stop a unit");
            }
        }
        for dir in &self.dirs {
            let removed = remove_dir(dir);
            if let Err(error) = &removed {
                tracing::warn!(%error, dir = %dir.display(), "a cgroup cannot be removed");
            }
            result = result.and(removed);
        }
        result
    }
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    if is_marked(dir) {
        remove_tree(dir)?;
    }
    for above in dir.ancestors().skip(1) {
        // Those who use it keep it.
        if !is_marked(above) || fs::remove_dir(above).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes a cgroup of ours with all that others may have made beneath it.
fn remove_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    let end = Instant::now() + EMPTY;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() >= end => {
                return Err(error);
            }
            Err(_) => {}
        }
        kill_all(dir);
        sleep(PAUSE);
    }
}

fn kill_all(dir: &Path) {
    let own = std::process::id();
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|pid| pid.trim().parse::<u32>().ok()) {
        // 0: one that is not of our pid namespace.
        if pid == 0 || pid == own {
            continue;
        }
        tracing::warn!(pid, dir = %dir.display(), "a process that is left in a cgroup of husk's is killed");
        // SAFETY: no memory is involved.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
    }
}
