//! The containers of the sandbox and what can be done with them.
//!
//! The state is behind one lock that is never held across an await. A process is forked and registered in one go
//! under that lock, which the reaper takes, too: so no exit is ever seen of a process not yet known, and no signal
//! goes to a pid that has been given to somebody else.

mod create;
mod exec;
mod launching;
mod limits;
mod pause;
mod peers;
mod state;
mod volumes;

use std::{
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use husk_agent_protocol::{limits::MAX_PROCESSES, messages};
use tokio::sync::watch;

use self::state::{Container, Phase, State};
use crate::{
    dial::Dial,
    events::Events,
    fault::Fault,
    log,
    network::Network,
    process::{launch::Report, plan::TerminalSize, terminal},
    sys,
};

/// What the agent works with.
#[derive(Debug)]
pub struct Config {
    /// Where the host is.
    pub dial: Dial,
    /// Where the share is mounted.
    pub share: PathBuf,
    /// The directory of cgroup v2 in which containers' cgroups are made.
    pub cgroups: PathBuf,
    /// Whether this process is the init of a machine, which it may reset.
    pub machine: bool,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} does not exist")]
    NotFound(String),
    #[error("{0} exists already")]
    AlreadyExists(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    Fault(#[from] Fault),
    #[error("{what}: {error}")]
    System { what: &'static str, error: io::Error },
}

/// The sandbox.
#[derive(Debug)]
pub struct Sandbox {
    config: Config,
    network: Mutex<Network>,
    state: Mutex<State>,
    events: Events,
    is_set_up: watch::Sender<bool>,
}

impl Sandbox {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// The kernel lacks pidfds.
    pub fn new(config: Config, network: Network) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            config,
            network: Mutex::new(network),
            state: Mutex::default(),
            events: Events::default(),
            is_set_up: watch::Sender::new(false),
        }))
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Makes the network what `wanted` says.
    pub fn set_network(&self, wanted: messages::Network) -> Result<(), Fault> {
        let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        network.set(wanted)
    }

    pub fn events(&self) -> &Events {
        &self.events
    }

    /// From now on containers can be created. `false`: they could already.
    pub fn set_up(&self) -> bool {
        !self.is_set_up.send_replace(true)
    }

    pub fn is_set_up(&self) -> bool {
        *self.is_set_up.borrow()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the init process exec.
    pub async fn start(self: Arc<Self>, id: String) -> Result<(), Error> {
        let (channel, mut ended) = {
            let mut state = self.state();
            let container = state.container(&id)?;
            let init = &mut container.init;
            if !init.phase.can_start() || container.deleting {
                return Err(Error::FailedPrecondition(format!(
                    "container {id} is not waiting to be started"
                )));
            }
            let Some(channel) = init.channel.take() else {
                return Err(Error::FailedPrecondition(format!(
                    "container {id} is not waiting to be started"
                )));
            };
            init.phase = Phase::Starting;
            (channel, init.ended.subscribe())
        };
        channel.go();
        let failed = match channel.report().await {
            Report::Fault(fault) => Some(fault),
            Report::Terminal(_) | Report::Ready | Report::Closed => None,
        };
        if failed.is_some() {
            // It reported and exits.
            let _ = ended.wait_for(Option::is_some).await;
        }
        let mut state = self.state();
        let init = state.process(&id, "")?;
        match init.phase {
            Phase::Ended(status) => self.events.exit(&id, "", status),
            _ => init.phase = Phase::Running,
        }
        failed.map_or(Ok(()), |fault| Err(fault.into()))
    }

    /// The reaper's: the child `pid` has ended.
    pub fn reaped(&self, pid: i32, status: u32) {
        let mut state = self.state();
        // Not ours: an orphan that a container without a pid namespace has left to us.
        let Some((id, exec)) = state.owners.remove(&pid) else {
            return;
        };
        let Some(container) = state.containers.get_mut(&id) else {
            return;
        };
        report_oom(container, &id, &self.events);
        let is_init = exec.is_none();
        if is_init {
            // What is left of it cannot be resumed any more.
            pause::thaw(container, &id);
        }
        if is_init && !container.namespaces.pid.is_new() {
            // With one, the kernel has done this.
            if let Err(error) = container.cgroup.kill() {
                log::error!("container {id}: kill the rest: {error}");
            }
        }
        let process = match &exec {
            None => &mut container.init,
            Some(exec) => match container.execs.get_mut(exec) {
                Some(process) => process,
                None => return,
            },
        };
        let told_by_call = process.phase.is_told_by_call();
        process.phase = Phase::Ended(status);
        process.terminal = None;
        process.channel = None;
        process.ended.send_replace(Some(status));
        if !told_by_call {
            self.events.exit(&id, exec.as_deref().unwrap_or_default(), status);
            if let Some(exec) = &exec {
                container.execs.remove(exec);
            }
        }
    }

    fn report_oom(&self, id: &str) {
        if let Ok(container) = self.state().container(id) {
            report_oom(container, id, &self.events);
        }
    }

    /// Sends `signal` to a process, or to `all` of the container.
    pub fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        // SIGRTMAX.
        let signal = i32::try_from(signal).ok().filter(|signal| *signal <= 64);
        let signal = signal.ok_or_else(|| Error::InvalidArgument("no such signal".into()))?;
        let mut state = self.state();
        let failed = |error| Error::System {
            what: "send the signal",
            error,
        };
        if all {
            let container = state.container(id)?;
            if signal == libc::SIGKILL {
                return container.cgroup.kill().map_err(failed);
            }
            for pid in container.cgroup.processes(MAX_PROCESSES).map_err(failed)? {
                match sys::kill(pid, signal) {
                    // It ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    result => result.map_err(failed)?,
                }
            }
            return Ok(());
        }
        let process = state.process(id, exec)?;
        if process.phase.has_ended() {
            return Err(Error::NotFound(format!(
                "process {exec:?} of container {id}, which has ended,"
            )));
        }
        sys::kill(process.pid, signal).map_err(failed)
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: &str, exec: &str, size: TerminalSize) -> Result<(), Error> {
        let mut state = self.state();
        let process = state.process(id, exec)?;
        if process.phase.has_ended() {
            return Err(Error::NotFound(format!(
                "process {exec:?} of container {id}, which has ended,"
            )));
        }
        let Some(master) = &process.terminal else {
            return Err(Error::FailedPrecondition("the process has no terminal".into()));
        };
        terminal::resize(master.as_fd(), size).map_err(|error| Error::System {
            what: "resize the terminal",
            error,
        })
    }

    /// The pids of a container's processes, each with its exec id if it has one.
    pub fn processes(&self, id: &str) -> Result<Vec<(i32, String)>, Error> {
        let mut state = self.state();
        let container = state.container(id)?;
        let pids = container.cgroup.processes(MAX_PROCESSES);
        let mut pids = pids.map_err(|error| Error::System {
            what: "list processes",
            error,
        })?;
        pids.sort_unstable();
        let exec_of = |pid: i32| {
            let exec = container.execs.iter().find(|(_, process)| process.pid == pid);
            exec.map(|(exec, _)| exec.clone()).unwrap_or_default()
        };
        Ok(pids.into_iter().map(|pid| (pid, exec_of(pid))).collect())
    }

    /// Removes a container that has ended, or that was never started, and what is left of it.
    pub async fn delete(self: Arc<Self>, id: String) -> Result<(), Error> {
        let (cgroup, ended) = {
            let mut state = self.state();
            let container = state.container(&id)?;
            if container.deleting || !container.init.phase.can_delete() {
                return Err(Error::FailedPrecondition(format!("container {id} is running")));
            }
            container.deleting = true;
            let processes = container.execs.values().chain([&container.init]);
            let ended: Vec<_> = processes.map(|process| process.ended.subscribe()).collect();
            (Arc::clone(&container.cgroup), ended)
        };
        if let Err(error) = cgroup.remove().await {
            if let Ok(container) = self.state().container(&id) {
                container.deleting = false;
            }
            return Err(Error::System {
                what: "remove the cgroup",
                error,
            });
        }
        for mut ended in ended {
            // An exec that has been reaped is out of the table, and its sender gone.
            let _ = ended.wait_for(Option::is_some).await;
        }
        self.state().containers.remove(&id);
        Ok(())
    }
}

fn report_oom(container: &mut Container, id: &str, events: &Events) {
    let kills = container.cgroup.oom_kills();
    if kills > container.oom_kills {
        container.oom_kills = kills;
        events.oom(id);
    }
}
