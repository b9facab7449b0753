//! One sandbox: a machine and the containers in it.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use husk_agent_protocol::limits::is_valid_id;
use tokio::{
    sync::{OnceCell, mpsc::UnboundedSender, watch},
    time::timeout,
};

use super::{
    EngineError, Event, Exit, ProcessInfo, ProcessStatus, SandboxConfig, StartError, Stdio,
    cgroups::Cgroups,
    error::last_words,
    hooks::Lives,
    localhost::Localhost,
    lock,
    network::Network,
    places::Places,
    record::Record,
    spec,
    standins::{OBEY, StandIns},
    start,
    streams::Streams,
    table::Table,
    undo::Undo,
    volumes::Volumes,
};
use crate::{
    config::Config,
    guest::{
        agent::{Agent, GuestInfo},
        vm::Machine,
    },
    host::hooks::Phase,
};

/// How long the ends of execs are awaited after the end of the init process that they die with.
pub(super) const EXEC_GRACE: Duration = Duration::from_secs(2);

/// How long the list of processes may take before it is answered from what is known without asking. An engine that
/// was restarted asks for it, and gives up on the container after five seconds.
const LIST: Duration = Duration::from_secs(2);

/// How long a machine that fails a call may take to be seen to have ended.
const EXPLANATION: Duration = Duration::from_secs(3);

/// How a machine ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub reason: String,
    pub console_tail: String,
}

impl Ended {
    fn to_error(&self) -> EngineError {
        let Self { reason, console_tail } = self;
        EngineError::SandboxEnded(format!("{reason}{}", last_words(console_tail)))
    }
}

/// One sandbox: a machine and the containers in it. Its calls are to be run to their end, not dropped half-way.
/// Dropped itself, it ends and leaves nothing, though not in order.
#[derive(Debug)]
pub struct Sandbox {
    pub(super) parts: Parts,
    down: OnceCell<()>,
}

/// What a started sandbox consists of.
#[derive(Debug)]
pub(super) struct Parts {
    pub dir: PathBuf,
    pub machine: Arc<Machine>,
    pub agent: Arc<Agent>,
    pub network: Network,
    pub localhost: Localhost,
    pub table: Arc<Mutex<Table>>,
    pub record: Arc<Mutex<Record>>,
    pub standins: Arc<StandIns>,
    pub cgroups: Cgroups,
    pub lives: Lives,
    pub volumes: Arc<Volumes>,
    pub undo: Mutex<Undo>,
    pub ended: watch::Receiver<Option<Ended>>,
    /// Set when the end is wanted.
    pub stopping: Arc<OnceCell<()>>,
    pub operator: Arc<Config>,
    pub places: Places,
}

impl Sandbox {
    pub(super) fn assemble(parts: Parts) -> Self {
        Self {
            parts,
            down: OnceCell::new(),
        }
    }

    /// Starts a sandbox. The guest boots on its own: what is asked of it meanwhile is answered when it can
    /// ([`Sandbox::ready`] waits for that).
    ///
    /// # Errors
    /// When it cannot be started; then nothing of it is left.
    pub async fn start(
        config: SandboxConfig,
        events: UnboundedSender<Event>,
    ) -> Result<Arc<Self>, StartError> {
        start::start(config, events, Places::default()).await
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.parts.table)
    }

    /// The VMM's pid on the host.
    pub fn pid(&self) -> u32 {
        self.parts.machine.vmm().pid()
    }

    /// A process's pid on the host: its stand-in's. It keeps it when it has ended.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn host_pid(&self, container: &str, exec: Option<&str>) -> Result<u32, EngineError> {
        self.table().host_pid(container, exec)
    }

    /// Waits until the guest is up.
    ///
    /// # Errors
    /// `SandboxEnded` when it does not come up.
    pub async fn ready(&self) -> Result<GuestInfo, EngineError> {
        let mut hello = self.parts.agent.hello();
        let answer = hello
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|hello| hello.clone());
        let message = match answer {
            Some(Ok(info)) => return Ok(info),
            Some(Err(message)) => message,
            None => "no answer".into(),
        };
        // With that the sandbox ends, if its end is not the cause.
        let ended = self.end_within(EXPLANATION * 2).await;
        Err(ended.unwrap_or_else(|| EngineError::Agent {
            call: "Setup",
            message,
            console_tail: self.parts.machine.console_tail(),
        }))
    }

    /// Waits for the sandbox's end; tells why it ended. [`Sandbox::shutdown`] still has to be called then.
    pub async fn ended(&self) -> String {
        let mut ended = self.parts.ended.clone();
        let ended = ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|ended| ended.clone());
        ended.map_or_else(|| "its watcher is gone".into(), |ended| ended.reason)
    }

    /// The last part of what the guest wrote on its console, as text that is safe to show.
    pub fn console(&self) -> String {
        self.parts.machine.console().tail(crate::guest::console::KEPT)
    }

    /// The better error, if the machine's end is behind one of the agent's or of the host's; else the same, with what
    /// the guest said last where the agent is not to be relied on.
    pub(super) async fn explain(&self, mut error: EngineError) -> EngineError {
        let lost = match &error {
            EngineError::Agent { .. } => self.parts.agent.is_lost(),
            EngineError::Deadline { .. } => true,
            EngineError::Host { source, .. } => source.kind() == std::io::ErrorKind::BrokenPipe,
            _ => false,
        };
        let patience = if lost { EXPLANATION } else { Duration::ZERO };
        if let Some(ended) = self.end_within(patience).await {
            return ended;
        }
        if let EngineError::Agent { console_tail, .. } | EngineError::Deadline { console_tail, .. } =
            &mut error
        {
            *console_tail = self.parts.machine.console_tail();
        }
        error
    }

    async fn end_within(&self, patience: Duration) -> Option<EngineError> {
        let mut ended = self.parts.ended.clone();
        let ended = timeout(patience, ended.wait_for(Option::is_some)).await;
        ended.ok()?.ok()?.as_ref().map(Ended::to_error)
    }

    /// Lets the init process exec, and runs the poststart hooks: when one fails the container is killed.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is created; the failure of the command otherwise, and the container
    /// is then stopped with the error's exit code.
    pub async fn start_container(&self, id: &str) -> Result<(), EngineError> {
        self.table().begin_start(id)?;
        let in_hooks = self.time_of_start(id);
        let result = async {
            // An engine may have wired the sandbox's network since its container was made.
            self.parts.network.catch_up().await?;
            self.parts.localhost.look(id).await;
            self.parts.agent.start_container(id, in_hooks).await
        }
        .await;
        self.table()
            .finish_start(id, None, result.as_ref().map(|()| None));
        if let Err(error) = result {
            if matches!(error, EngineError::Deadline { .. }) {
                // It hangs in a hook, or worse, and must not run later.
                self.kill_and_wait(id).await;
            }
            return Err(self.explain(error).await);
        }
        match self.run_hooks(id, Phase::Poststart).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.kill_and_wait(id).await;
                Err(error)
            }
        }
    }

    /// Adds an exec, not started: an OCI `process` object in JSON.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, `InvalidSpec`; `FailedPrecondition` when the container does not run.
    pub async fn add_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        terminal: bool,
    ) -> Result<(), EngineError> {
        check_id("exec", exec)?;
        spec::check_exec(&process_json, terminal, &self.parts.operator.security)?;
        self.table().add_exec(container, exec, process_json, terminal)
    }

    /// Starts an added exec, with streams that are as it was said of its terminal.
    ///
    /// # Errors
    /// `FailedPrecondition` when the container does not run; the failure of the command otherwise, and the exec is
    /// then stopped with the error's exit code.
    pub async fn start_exec(&self, container: &str, exec: &str, stdio: Stdio) -> Result<(), EngineError> {
        let json = self.table().begin_exec(container, exec)?;
        let result = async {
            let streams = Streams::open(&self.parts.machine, stdio);
            let (streams, standin) = tokio::join!(streams, self.exec_stand_in(container, exec));
            let (streams, ports) = streams?;
            self.table().set_streams(container, exec, streams);
            let pid = self
                .parts
                .agent
                .exec_process(container, exec, json, ports)
                .await?;
            if let Some(standin) = standin {
                self.attend(standin, container, Some(exec));
            }
            Ok(pid)
        }
        .await;
        self.table()
            .finish_start(container, Some(exec), result.as_ref().map(|pid| Some(*pid)));
        match result {
            Ok(_) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when the process has ended or is unknown, `FailedPrecondition` when an exec was not started.
    pub async fn signal(
        &self,
        container: &str,
        exec: Option<&str>,
        signal: u32,
        all: bool,
    ) -> Result<(), EngineError> {
        self.table().check_signal(container, exec)?;
        let kills = exec.is_none() && signal == libc::SIGKILL.unsigned_abs();
        let sent = self.parts.agent.signal(container, exec, signal, all).await;
        // A guest must not be able to keep its container from being killed, whatever it answers.
        if kills {
            self.insist(container);
        }
        match sent {
            Ok(()) => Ok(()),
            Err(EngineError::Deadline { .. }) if kills => {
                tracing::error!(
                    container,
                    "the guest does not answer when it is to kill: the machine is killed"
                );
                self.parts.machine.kill();
                Ok(())
            }
            // Its end is under way, or it will be ended with the machine.
            Err(error) if kills && !matches!(error, EngineError::NotFound(_)) => {
                tracing::error!(container, %error, "the guest was to kill and did not");
                Ok(())
            }
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Ends the machine if the guest does not end a container that was killed.
    fn insist(&self, container: &str) {
        let Ok(mut exit) = self.table().watch(container, None) else {
            return;
        };
        let machine = Arc::clone(&self.parts.machine);
        let container = container.to_owned();
        tokio::spawn(async move {
            if timeout(OBEY, exit.wait_for(Option::is_some)).await.is_err() {
                tracing::error!(
                    container,
                    "the guest does not end it, though it was killed: the machine is killed"
                );
                machine.kill();
            }
        });
    }

    /// Sets the size of a process's terminal; nothing is done when it has none.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended.
    pub async fn resize(
        &self,
        container: &str,
        exec: Option<&str>,
        columns: u16,
        rows: u16,
    ) -> Result<(), EngineError> {
        let (terminal, status) = {
            let table = self.table();
            let process = table.process(container, exec)?;
            (process.terminal, process.state().status())
        };
        if let ProcessStatus::Stopped { .. } = status {
            let name = super::table::name(container, exec);
            return Err(EngineError::FailedPrecondition(format!("{name} has ended")));
        }
        // An exec that is not started has no pty yet.
        if !terminal || (exec.is_some() && status == ProcessStatus::Created) {
            return Ok(());
        }
        match self.parts.agent.resize(container, exec, columns, rows).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Ends the process's stdin: what was sent before still arrives. Idempotent.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn close_stdin(&self, container: &str, exec: Option<&str>) -> Result<(), EngineError> {
        self.table().close_input(container, exec)
    }

    /// Where a process is in its life. Never asks the guest.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn status(&self, container: &str, exec: Option<&str>) -> Result<ProcessStatus, EngineError> {
        self.table().status(container, exec)
    }

    /// Whether the process has a terminal.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn terminal(&self, container: &str, exec: Option<&str>) -> Result<bool, EngineError> {
        Ok(self.table().process(container, exec)?.terminal)
    }

    /// Waits for a process's end; valid before its start.
    ///
    /// # Errors
    /// `NotFound`, also when it is deleted meanwhile without having run.
    pub async fn wait(&self, container: &str, exec: Option<&str>) -> Result<Exit, EngineError> {
        let mut exit = self.table().watch(container, exec)?;
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.ok_or_else(|| EngineError::NotFound(super::table::name(container, exec)))
    }

    /// The container's processes. When the guest is too busy to answer soon, those that the engine started.
    ///
    /// # Errors
    /// `NotFound`, and whatever befalls a call of the agent.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, EngineError> {
        let known = self.table().known_processes(container)?;
        if known.is_empty() {
            return Ok(known);
        }
        match timeout(LIST, self.parts.agent.processes(container)).await {
            Ok(Ok(processes)) => Ok(processes),
            Ok(Err(EngineError::NotFound(_))) => Ok(Vec::new()),
            Ok(Err(error)) => Err(self.explain(error).await),
            Err(_) => Ok(known),
        }
    }

    /// Waits until all output of a process has been copied and its streams are closed. Returns at once for an
    /// unknown process. Has no deadline of its own.
    pub async fn drained(&self, container: &str, exec: Option<&str>) {
        let open = {
            let table = self.table();
            let process = table.process(container, exec).ok();
            process
                .and_then(|process| process.streams.as_ref())
                .map(Streams::open_outputs)
        };
        if let Some(mut open) = open {
            let _ = open.wait_for(|open| *open == 0).await;
        }
    }

    /// Removes an exec.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub async fn delete_exec(&self, container: &str, exec: &str) -> Result<Exit, EngineError> {
        self.table().delete_exec(container, exec)
    }

    /// The containers, in no order.
    pub fn containers(&self) -> Vec<String> {
        self.table().ids()
    }

    /// Ends the machine, in order if it still answers, and removes everything. Idempotent.
    pub async fn shutdown(&self) {
        self.down.get_or_init(|| self.take_down()).await;
    }

    async fn take_down(&self) {
        let parts = &self.parts;
        let _ = parts.stopping.set(());
        let running = parts.ended.borrow().is_none();
        if running && start::has_answered(&parts.agent) {
            let orderly = async {
                // The answer may never come; the end does.
                let ended = self.ended();
                tokio::pin!(ended);
                tokio::select! {
                    _ = &mut ended => return,
                    () = parts.agent.shutdown() => {}
                }
                ended.await;
            };
            if timeout(parts.operator.timeouts.shutdown, orderly).await.is_err() {
                tracing::warn!("the guest did not end in order and is killed");
            }
        }
        parts.machine.kill();
        self.ended().await;
        parts.localhost.stop().await;
        parts.network.stop().await;
        let mut undos = self.table().take_undos();
        undos.push(std::mem::take(&mut *lock(&parts.undo)));
        let undone = tokio::task::spawn_blocking(move || {
            for mut undo in undos {
                undo.run();
            }
        });
        if let Err(error) = undone.await {
            tracing::error!(%error, "removing the sandbox failed");
        }
        self.run_all_poststop().await;
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.parts.machine.kill();
        for mut undo in self.table().take_undos() {
            undo.run();
        }
    }
}

/// Checks an id of a container or exec.
pub(super) fn check_id(what: &str, id: &str) -> Result<(), EngineError> {
    if is_valid_id(id) {
        return Ok(());
    }
    Err(EngineError::InvalidArgument(format!(
        "the {what} id {id:?} is not valid: letters, digits and _.+- are allowed, at most 128, no - . or + first"
    )))
}
