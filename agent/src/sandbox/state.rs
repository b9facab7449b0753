//! What is known of each container and process.

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc};

use tokio::{io::unix::AsyncFd, sync::watch, task::JoinHandle};

use super::{
    Error,
    peers::{Peer, Peers},
};
use crate::{
    container::{cgroup::Cgroup, namespaces::Namespaces, resources::Standing, user::Mappings},
    device_filter::DeviceFilter,
    mirror::Mirrors,
    process::{launch::Channel, plan::Shared},
};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Forked, and becoming what it shall be. Its end is told in the answer of the call, not by an event.
    Preparing,
    /// Waits for the start.
    Created,
    /// Told to exec. Its end is told once the exec is known to have succeeded or failed.
    Starting,
    Running,
    Ended(u32),
}

impl Phase {
    pub(super) fn can_start(self) -> bool {
        self == Self::Created
    }

    pub(super) fn has_ended(self) -> bool {
        matches!(self, Self::Ended(_))
    }

    /// Whether somebody is told by the call in progress, so that no event is due.
    pub(super) fn is_told_by_call(self) -> bool {
        matches!(self, Self::Preparing | Self::Starting)
    }

    pub(super) fn can_be_joined(self) -> bool {
        matches!(self, Self::Created | Self::Running)
    }

    /// Whether limits can be changed.
    pub(super) fn can_be_limited(self) -> bool {
        matches!(self, Self::Created | Self::Starting | Self::Running)
    }

    /// Whether the container can be deleted, by killing an init that has not started if need be.
    pub(super) fn can_delete(self) -> bool {
        matches!(self, Self::Created | Self::Ended(_))
    }
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) phase: Phase,
    /// Of an init process until its start.
    pub(super) channel: Option<Channel>,
    pub(super) terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// The status once it has been reaped.
    pub(super) ended: watch::Sender<Option<u32>>,
}

impl Process {
    pub(super) fn new(pid: i32) -> Self {
        Self {
            pid,
            phase: Phase::Preparing,
            channel: None,
            terminal: None,
            ended: watch::Sender::new(None),
        }
    }
}

/// Whether a container stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freezer {
    Thawed,
    Freezing,
    Frozen,
}

#[derive(Debug)]
pub(super) struct Container {
    pub(super) init: Process,
    /// Names the init process, and by it the container's namespaces.
    pub(super) pidfd: Arc<OwnedFd>,
    pub(super) execs: HashMap<String, Process>,
    pub(super) cgroup: Arc<Cgroup>,
    /// Mounts over its volumes.
    pub(super) _peers: Vec<Arc<Peer>>,
    pub(super) namespaces: Namespaces,
    /// Of its user namespace, unless that is the sandbox's.
    pub(super) mappings: Option<Mappings>,
    /// What processes that join it have of its init.
    pub(super) shared: Shared,
    /// OOM kills already reported.
    pub(super) oom_kills: u64,
    pub(super) oom_watch: Option<JoinHandle<()>>,
    pub(super) deleting: bool,
    pub(super) freezer: Freezer,
    /// How many execs are on their way to their command. Frozen there, they would be started by a resume that nobody
    /// connects with them.
    pub(super) preparing: watch::Sender<usize>,
    pub(super) standing: Standing,
    /// The filter of devices that is attached to the cgroup.
    pub(super) filter: Option<DeviceFilter>,
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) containers: HashMap<String, Container>,
    /// Which process of which container a pid is; `None`: the init process.
    pub(super) owners: HashMap<i32, (String, Option<String>)>,
    /// Volumes through which containers see each other's mounts.
    pub(super) peers: Peers,
    /// Volumes that are in the guest's own memory.
    pub(super) mirrors: Mirrors,
}

impl State {
    pub(super) fn container(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    pub(super) fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process, Error> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(&mut container.init);
        }
        let process = container.execs.get_mut(exec);
        process.ok_or_else(|| Error::NotFound(format!("process {exec} of container {id}")))
    }
}
