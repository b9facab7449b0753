//! The engine: owns one sandbox and knows nothing of containerd.

mod cgroups;
mod cleanup;
mod container;
mod control;
mod error;
mod hooks;
mod localhost;
mod mirrors;
mod network;
mod places;
mod process;
mod programs;
mod record;
mod sandbox;
mod spec;
mod standins;
mod start;
mod status;
mod streams;
mod table;
mod undo;
mod volumes;

#[cfg(test)]
mod mirrors_test;
#[cfg(test)]
mod network_test;
#[cfg(test)]
mod player_test;
#[cfg(test)]
mod sandbox_test;
#[cfg(test)]
mod standins_test;
#[cfg(test)]
mod stuck_test;

#[cfg(test)]
pub(crate) use player_test::{Character, Player};

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

pub use cgroups::CgroupConfig;
pub use cleanup::cleanup;
pub use error::{CleanupError, EngineError, LocateError, StartError, last_words};
pub use programs::Programs;
pub use sandbox::Sandbox;
pub use status::{ContainerStatus, Role, Seen, Status, sandboxes};

use crate::{
    config::Config,
    host::{ringlog::RingLog, rootfs::Mount},
};

/// A sandbox to start.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Whose ids these are: containerd's namespace, or `husk-run`. The same alphabet as an id.
    pub namespace: String,
    /// Unique in the namespace; see [`husk_agent_protocol::limits::is_valid_id`].
    pub id: String,
    /// What to run.
    pub programs: Programs,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The guest's hostname; empty: the id, cut to what a hostname may have.
    pub hostname: String,
    /// Added to the guest kernel's command line. From the operator only.
    pub kernel_params: String,
    /// The operator's configuration: deadlines, and what is kept of logs.
    pub operator: Arc<Config>,
    /// Where its processes are on the host.
    pub cgroup: CgroupConfig,
    /// The network namespace that its first container is to join; `None`: one of its own.
    pub network: Option<PathBuf>,
    /// The log of the process that runs the engine, which is kept in the sandbox's directory while it is there.
    pub log: RingLog,
}

/// A container to create.
#[derive(Debug)]
pub struct CreateContainer {
    /// Unique in the sandbox; see [`husk_agent_protocol::limits::is_valid_id`].
    pub id: String,
    /// The OCI bundle.
    pub bundle: PathBuf,
    /// config.json as it was read.
    pub spec: Vec<u8>,
    /// Mounts to make on the bundle's `rootfs`; empty: what `root.path` names is there already.
    pub rootfs: Vec<Mount>,
    /// The init process's streams.
    pub stdio: Stdio,
}

/// The streams of a process, on the host: FIFO, pipe, tty, socket or file. The engine copies between them and the
/// guest, and closes an output as soon as the process has exited and all it wrote has been copied.
#[derive(Debug, Default)]
pub struct Stdio {
    /// The process has a pty: stdin and stdout are its two directions, stderr is not used.
    pub terminal: bool,
    /// Read from; `None`: /dev/null.
    pub stdin: Option<OwnedFd>,
    /// Written to; `None`: /dev/null.
    pub stdout: Option<OwnedFd>,
    /// Written to; `None`: /dev/null.
    pub stderr: Option<OwnedFd>,
}

/// What happens in a sandbox, in order. For each container OOM comes before the exit it caused, and the init
/// process's exit after those of its execs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The kernel killed a process of the container for want of memory.
    Oom {
        /// The container.
        container: String,
    },
    /// A started process ended.
    Exited {
        /// The container.
        container: String,
        /// The exec; `None`: the init process.
        exec: Option<String>,
        /// As a shell reports it: the exit code, or 128 + the signal's number.
        status: u32,
        /// When, by the host's clock.
        at: SystemTime,
        /// Its pid on the host.
        pid: u32,
    },
    /// The machine is gone, by itself or by [`Sandbox::shutdown`]. The last event.
    SandboxEnded {
        /// Why.
        reason: String,
        /// The last lines of the guest's console.
        console_tail: String,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// As a shell reports it: the exit code, or 128 + the signal's number.
    pub status: u32,
    /// When, by the host's clock.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessStatus {
    /// Made (or, an exec, added), not started.
    Created,
    /// Started.
    Running,
    /// Its container is being paused.
    Pausing,
    /// Its container is paused.
    Paused,
    /// Ended.
    Stopped {
        /// See [`Exit::status`].
        status: u32,
        /// See [`Exit::at`].
        at: SystemTime,
    },
}

/// A process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its pid in the guest.
    pub pid: i32,
    /// The exec that it is the first process of.
    pub exec: Option<String>,
}

/// Starts a sandbox whose machine is played, with its directory under `run`: for tests of what stands before the engine.
#[cfg(test)]
pub(crate) async fn start_played(
    config: SandboxConfig,
    events: tokio::sync::mpsc::UnboundedSender<Event>,
    player: &Player,
    run: PathBuf,
) -> Result<Arc<Sandbox>, StartError> {
    // Opening the kernel, a FIFO here, must not wait.
    let _held = player.hold();
    let places = places::Places {
        run,
        kvm: "/dev/null".into(),
        cgroups: Some(Default::default()),
        fault: None,
        player: Some(player.clone()),
    };
    start::start(config, events, places).await
}

/// Locks what no panic can leave half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
