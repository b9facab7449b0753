//! Removing a sandbox without its engine: by its record and by what is mounted in its directory.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use husk_agent_protocol::limits::is_valid_id;
use tokio::time::sleep;

use super::{CleanupError, hooks::Poststop, places::Places, record::Record, status};
use crate::host::{
    mount::unmount_below,
    ringlog,
    share::remove_mount_points,
    statedir::{self, Claim, StateDir},
};

/// How long a killed process may take to be gone.
const KILL: Duration = Duration::from_secs(3);

/// Removes what a sandbox left behind, knowing no more than its record. Idempotent; nothing there is fine.
///
/// # Errors
/// For what could not be removed; the rest is.
pub async fn cleanup(namespace: &str, id: &str) -> Result<(), CleanupError> {
    cleanup_of_dead(Places::default(), namespace, id).await
}

/// Keeps engines away meanwhile: the next sandbox of that id may be on its way, and what is removed must not be its. One
/// that an engine has stays as it is.
pub(super) async fn cleanup_of_dead(places: Places, namespace: &str, id: &str) -> Result<(), CleanupError> {
    check(namespace, id)?;
    let path = StateDir::path_of(&places.run, namespace, id);
    if !path.exists() {
        return Ok(());
    }
    // One that was killed may take a moment to be gone.
    let end = Instant::now() + KILL;
    let lock = loop {
        let claim = StateDir::claim(&places.run, namespace, id).map_err(|source| CleanupError::Host {
            what: format!("cannot lock {}", path.display()),
            source,
        })?;
        match claim {
            Claim::New(lock) | Claim::Stale(lock) => break lock,
            Claim::Taken if Instant::now() < end => sleep(Duration::from_millis(50)).await,
            Claim::Taken => {
                tracing::info!(path = %path.display(), "an engine has the sandbox: nothing is removed");
                return Ok(());
            }
        }
    };
    let result = cleanup_in(places, namespace, id).await;
    drop(lock);
    result
}

fn check(namespace: &str, id: &str) -> Result<(), CleanupError> {
    for name in [namespace, id] {
        if !is_valid_id(name) {
            return Err(CleanupError::InvalidArgument(format!(
                "{name:?} is not a valid id"
            )));
        }
    }
    Ok(())
}

pub(super) async fn cleanup_in(places: Places, namespace: &str, id: &str) -> Result<(), CleanupError> {
    check(namespace, id)?;
    let path = StateDir::path_of(&places.run, namespace, id);
    let dir = path.clone();
    let removed = tokio::task::spawn_blocking(move || {
        let poststop = remove_leftovers(&dir)?;
        statedir::remove(&dir)?;
        Ok(poststop)
    })
    .await;
    let poststop = removed
        .map_err(io::Error::other)
        .and_then(|result| result)
        .map_err(|source| CleanupError::Host {
            what: format!("cannot remove what is left of the sandbox in {}", path.display()),
            source,
        })?;
    for poststop in poststop {
        poststop.run().await;
    }
    Ok(())
}

/// Removes all that a sandbox left in and outside of its directory, but not the directory. Gives the hooks that are
/// still to be run.
pub(super) fn remove_leftovers(dir: &Path) -> io::Result<Vec<Poststop>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    // A record that cannot be read is as good as none: its sandbox's programs end with their engine.
    let record = Record::load(dir).unwrap_or_else(|error| {
        tracing::warn!(%error, dir = %dir.display(), "the record cannot be read");
        None
    });
    let record = record.unwrap_or_default();
    let mut result = Ok(());
    let programs = [record.vmm, record.fsd].into_iter().flatten();
    for process in programs.chain(record.standins) {
        match process.kill(KILL) {
            Ok(true) => {}
            Ok(false) => {
                let text = format!("process {} does not end", process.pid);
                result = result.and(Err(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    if let Some(network) = &record.network {
        result = result.and(network.clear());
    }
    for cgroup in &record.cgroups {
        result = result.and(cgroup.remove());
    }
    result = result.and(unmount_below(dir));
    for mount in record.mounts.iter().rev() {
        result = result.and(unmount_below(mount));
    }
    result
        .and_then(|()| remove_mount_points(&dir.join("share")))
        .and_then(|()| ringlog::remove(&dir.join(status::LOG)))
        .and_then(|()| ringlog::remove(&dir.join(status::CONSOLE)))
        .and_then(|()| status::remove(dir))
        .and_then(|()| Record::remove(dir))
        .map(|()| record.poststop)
}
