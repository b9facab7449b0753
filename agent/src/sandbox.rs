//! The containers of the sandbox and what can be done with them.
//!
//! The state is behind one lock that is never held across an await. A process is forked and registered in one go
//! under that lock, which the reaper takes, too: so no exit is ever seen of a process not yet known, and no signal
//! goes to a pid that has been given to somebody else.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use husk_agent_protocol::{limits::MAX_PROCESSES, messages};
use oci_spec::runtime::{Process as ProcessSpec, Spec};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::JoinHandle,
};

use crate::{
    container::{cgroup::Cgroup, create, plan::ContainerPlan},
    dial::Dial,
    events::Events,
    fault::Fault,
    log,
    process::{
        launch::{self, Channel, Report},
        plan::{ProcessPlan, TerminalSize},
        terminal,
    },
    stdio::{self, AgentEnd, ProcessEnd, Streams},
    sys,
};

/// How long a CreateContainer waits for a Setup that was sent before it.
const SETUP: Duration = Duration::from_secs(30);

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

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
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
    fn can_start(self) -> bool {
        self == Self::Created
    }

    fn has_ended(self) -> bool {
        matches!(self, Self::Ended(_))
    }

    /// Whether somebody is told by the call in progress, so that no event is due.
    fn is_told_by_call(self) -> bool {
        matches!(self, Self::Preparing | Self::Starting)
    }

    fn can_be_joined(self) -> bool {
        matches!(self, Self::Created | Self::Running)
    }

    /// Whether the container can be deleted, by killing an init that has not started if need be.
    fn can_delete(self) -> bool {
        matches!(self, Self::Created | Self::Ended(_))
    }
}

#[derive(Debug)]
struct Process {
    pid: i32,
    phase: Phase,
    /// Of an init process until its start.
    channel: Option<Channel>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// The status once it has been reaped.
    ended: watch::Sender<Option<u32>>,
}

impl Process {
    fn new(pid: i32) -> Self {
        Self {
            pid,
            phase: Phase::Preparing,
            channel: None,
            terminal: None,
            ended: watch::Sender::new(None),
        }
    }
}

#[derive(Debug)]
struct Container {
    init: Process,
    /// Names the init process, and by it the container's namespaces.
    pidfd: Arc<OwnedFd>,
    execs: HashMap<String, Process>,
    cgroup: Arc<Cgroup>,
    has_pid_namespace: bool,
    /// OOM kills already reported.
    oom_kills: u64,
    oom_watch: Option<JoinHandle<()>>,
    deleting: bool,
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
    }
}

#[derive(Debug, Default)]
struct State {
    containers: HashMap<String, Container>,
    /// Which process of which container a pid is; `None`: the init process.
    owners: HashMap<i32, (String, Option<String>)>,
}

impl State {
    fn container(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    fn process(&mut self, id: &str, exec: &str) -> Result<&mut Process, Error> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(&mut container.init);
        }
        let process = container.execs.get_mut(exec);
        process.ok_or_else(|| Error::NotFound(format!("process {exec} of container {id}")))
    }
}

/// A child just forked, not yet ready.
struct Forked {
    pid: i32,
    channel: Channel,
    pipes: AgentEnd,
    ended: watch::Receiver<Option<u32>>,
}

/// The sandbox.
#[derive(Debug)]
pub struct Sandbox {
    config: Config,
    state: Mutex<State>,
    events: Events,
    is_set_up: watch::Sender<bool>,
    /// This process, to come back to its own pid namespace.
    own_pidfd: OwnedFd,
}

impl Sandbox {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// The kernel lacks pidfds.
    pub fn new(config: Config) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            config,
            state: Mutex::default(),
            events: Events::default(),
            is_set_up: watch::Sender::new(false),
            own_pidfd: sys::pidfd_open(nix::unistd::getpid().as_raw())?,
        }))
    }

    pub fn config(&self) -> &Config {
        &self.config
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

    /// Makes a container whose init process waits for [`Sandbox::start`], and answers its pid.
    pub async fn create(
        self: Arc<Self>,
        id: String,
        spec: Vec<u8>,
        ports: messages::Stdio,
        volumes: HashMap<u32, u32>,
    ) -> Result<i32, Error> {
        let mut is_set_up = self.is_set_up.subscribe();
        if tokio::time::timeout(SETUP, is_set_up.wait_for(|done| *done))
            .await
            .is_err()
        {
            return Err(Error::FailedPrecondition(
                "the sandbox has not been set up".into(),
            ));
        }
        let spec: Spec = serde_json::from_slice(&spec).map_err(|error| Fault::spec("config.json", error))?;
        let plan = ContainerPlan::new(&spec, &self.config.share.join(&id), &volumes)?;
        drop(spec);
        let Forked {
            pid,
            channel,
            pipes,
            mut ended,
        } = self.fork_init(&id, &plan, &ports)?;
        let prepared = tokio::try_join!(ready(&channel), stdio::connect(&self.config.dial, &ports));
        let prepared = prepared.and_then(|(master, streams)| copy(master, pipes, streams));
        match prepared {
            Ok(terminal) => {
                let mut state = self.state();
                let init = state.process(&id, "")?;
                init.terminal = terminal;
                init.channel = Some(channel);
                match init.phase {
                    // Killed since it was ready: the end is an event like any other.
                    Phase::Ended(status) => self.events.exit(&id, "", status),
                    _ => init.phase = Phase::Created,
                }
                Ok(pid)
            }
            Err(fault) => {
                self.undo_create(&id).await;
                let _ = ended.wait_for(Option::is_some).await;
                self.state().containers.remove(&id);
                Err(fault.into())
            }
        }
    }

    fn fork_init(
        self: &Arc<Self>,
        id: &str,
        plan: &ContainerPlan,
        ports: &messages::Stdio,
    ) -> Result<Forked, Error> {
        let mut state = self.state();
        let Entry::Vacant(place) = state.containers.entry(id.to_owned()) else {
            return Err(Error::AlreadyExists(format!("container {id}")));
        };
        let (process_end, pipes) = process_stdio(&plan.process, ports)?;
        let cgroup = Cgroup::create(self.config.cgroups.join(id), &plan.settings)?;
        let forked = launch::fork(
            plan.namespaces.clone_flags(),
            cgroup.directory(),
            &descriptors(&process_end),
            |reporter| match create::run(id, plan, &process_end, reporter) {
                Err(fault) => fault,
                Ok(never) => match never {},
            },
        );
        let (pid, channel) = match forked {
            Ok(forked) => forked,
            Err(fault) => {
                cgroup.remove_empty();
                return Err(fault.into());
            }
        };
        let pidfd = match sys::pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // Its channel is dropped, so the child gives up and the reaper finds it unknown.
                let _ = cgroup.kill();
                cgroup.remove_empty();
                return Err(Error::System {
                    what: "open the new process",
                    error,
                });
            }
        };
        let cgroup = Arc::new(cgroup);
        let oom_watch = cgroup.memory_events().map(|mut changes| {
            let (sandbox, id) = (Arc::clone(self), id.to_owned());
            tokio::spawn(async move {
                while changes.changed().await.is_ok() {
                    sandbox.report_oom(&id);
                }
            })
        });
        let init = Process::new(pid);
        let ended = init.ended.subscribe();
        place.insert(Container {
            init,
            pidfd: Arc::new(pidfd),
            execs: HashMap::new(),
            cgroup,
            has_pid_namespace: plan.namespaces.pid,
            oom_kills: 0,
            oom_watch,
            deleting: false,
        });
        state.owners.insert(pid, (id.to_owned(), None));
        Ok(Forked {
            pid,
            channel,
            pipes,
            ended,
        })
    }

    async fn undo_create(&self, id: &str) {
        let cgroup = self.state().container(id).map(|container| {
            container.deleting = true;
            Arc::clone(&container.cgroup)
        });
        // Only this call can have removed it.
        let Ok(cgroup) = cgroup else { return };
        if let Err(error) = cgroup.remove().await {
            log::error!("container {id}: remove the cgroup: {error}");
        }
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
            Report::Ready(_) | Report::Closed => None,
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

    /// Starts a further process in a container, and answers its pid.
    pub async fn exec(
        self: Arc<Self>,
        id: String,
        exec: String,
        process: Vec<u8>,
        ports: messages::Stdio,
    ) -> Result<i32, Error> {
        let process: ProcessSpec =
            serde_json::from_slice(&process).map_err(|error| Fault::spec("process", error))?;
        let plan = ProcessPlan::new(&process, "process")?;
        drop(process);
        let Forked {
            pid,
            channel,
            pipes,
            mut ended,
        } = self.fork_exec(&id, &exec, &plan, &ports)?;
        let started = async {
            let (master, streams) =
                tokio::try_join!(ready(&channel), stdio::connect(&self.config.dial, &ports))?;
            let terminal = copy(master, pipes, streams)?;
            match channel.report().await {
                Report::Fault(fault) => Err(fault),
                Report::Ready(_) | Report::Closed => Ok(terminal),
            }
        };
        match started.await {
            Ok(terminal) => {
                let mut state = self.state();
                let process = state.process(&id, &exec)?;
                process.terminal = terminal;
                if let Phase::Ended(status) = process.phase {
                    state.container(&id)?.execs.remove(&exec);
                    self.events.exit(&id, &exec, status);
                } else {
                    process.phase = Phase::Running;
                }
                Ok(pid)
            }
            Err(fault) => {
                if let Ok(process) = self.state().process(&id, &exec) {
                    if !process.phase.has_ended() {
                        // Not reaped, so the pid is its own still.
                        let _ = sys::kill(process.pid, libc::SIGKILL);
                    }
                }
                let _ = ended.wait_for(Option::is_some).await;
                if let Ok(container) = self.state().container(&id) {
                    container.execs.remove(&exec);
                }
                Err(fault.into())
            }
        }
    }

    fn fork_exec(
        &self,
        id: &str,
        exec: &str,
        plan: &ProcessPlan,
        ports: &messages::Stdio,
    ) -> Result<Forked, Error> {
        let mut state = self.state();
        let container = state.container(id)?;
        if !container.init.phase.can_be_joined() || container.deleting {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            )));
        }
        if container.execs.contains_key(exec) {
            return Err(Error::AlreadyExists(format!("process {exec} of container {id}")));
        }
        let (process_end, pipes) = process_stdio(plan, ports)?;
        let init = &container.pidfd;
        let mut keep = descriptors(&process_end);
        keep.push(init.as_raw_fd());

        let enter = |pidfd: &OwnedFd| sys::set_pid_namespace_for_children(pidfd.as_fd());
        enter(init).map_err(|error| Error::System {
            what: "join the container's pid namespace",
            error,
        })?;
        let forked = launch::fork(
            0,
            container.cgroup.directory(),
            &keep,
            |reporter| match create::join(plan, init, &process_end, reporter) {
                Err(fault) => fault,
                Ok(never) => match never {},
            },
        );
        if let Err(error) = enter(&self.own_pidfd) {
            // Further children would be made in the container. Nothing can be trusted any more.
            crate::init::die(format_args!(
                "cannot return to the agent's pid namespace: {error}"
            ));
        }
        let (pid, channel) = forked?;
        let process = Process::new(pid);
        let ended = process.ended.subscribe();
        container.execs.insert(exec.to_owned(), process);
        state.owners.insert(pid, (id.to_owned(), Some(exec.to_owned())));
        Ok(Forked {
            pid,
            channel,
            pipes,
            ended,
        })
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
        if is_init && !container.has_pid_namespace {
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

fn process_stdio(plan: &ProcessPlan, ports: &messages::Stdio) -> Result<(ProcessEnd, AgentEnd), Error> {
    if plan.terminal.is_none() {
        return Ok(stdio::pipes(ports, plan.uid)?);
    }
    if ports.stderr_port != 0 {
        return Err(Error::InvalidArgument(
            "a terminal has no stderr of its own".into(),
        ));
    }
    Ok((ProcessEnd::Terminal, AgentEnd::default()))
}

fn descriptors(end: &ProcessEnd) -> Vec<RawFd> {
    match end {
        ProcessEnd::Terminal => Vec::new(),
        ProcessEnd::Files(files) => files.iter().map(AsRawFd::as_raw_fd).collect(),
    }
}

/// Waits until the forked child has prepared itself; answers its terminal's master.
async fn ready(channel: &Channel) -> Result<Option<OwnedFd>, Fault> {
    match channel.report().await {
        Report::Ready(master) => Ok(master),
        Report::Fault(fault) => Err(fault),
        Report::Closed => Err(Fault {
            kind: crate::fault::Kind::System,
            message: "the process was killed before its exec (out of memory?)".into(),
        }),
    }
}

/// Begins to copy between the process and the host.
fn copy(
    master: Option<OwnedFd>,
    pipes: AgentEnd,
    streams: Streams,
) -> Result<Option<Arc<AsyncFd<OwnedFd>>>, Fault> {
    let failed = |error| Fault::system("watch stdio", error);
    let Some(master) = master else {
        stdio::copy_pipes(pipes, streams).map_err(failed)?;
        return Ok(None);
    };
    let master = stdio::watch(master, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
    let master = Arc::new(master);
    stdio::copy_terminal(Arc::clone(&master), streams);
    Ok(Some(master))
}
