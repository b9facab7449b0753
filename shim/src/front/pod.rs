//! The tasks of one server: a sandbox, its containers and execs as containerd knows them, and their events.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    api::Mount as AnnouncedMount,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskStart,
    },
    topics::{
        TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
    },
};
use husk_agent_protocol::limits::is_valid_id;
use protobuf::MessageField;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use ttrpc::Code;

use super::{
    bundle::Bundle,
    io::{self, Held, Names},
    order::{Announcement, Order},
    publish::{Publisher, timestamp},
    sizing::{Host, Size},
    start::write_atomically,
    status::{self, answer},
};
use crate::{
    engine::{
        CreateContainer, EngineError, Event, Exit, ProcessStatus, Programs, Sandbox, SandboxConfig,
        StartError,
    },
    host::rootfs::Mount,
};

/// How long a delete waits for the rest of a process's output.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a delete waits until the exit that it reports has been announced.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the end of the server waits for containerd to take the last events.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest signal number.
const MAX_SIGNAL: u32 = 64;

/// A container to create, in containerd's words.
#[derive(Debug)]
pub struct TaskConfig {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// Its streams.
    pub names: Names,
    /// What to mount on its root.
    pub rootfs: Vec<Mount>,
    /// The same, as it is announced.
    pub announced_rootfs: Vec<AnnouncedMount>,
}

/// A process as containerd sees it.
#[derive(Debug)]
pub struct View {
    /// The container's bundle.
    pub bundle: String,
    /// Its pid on the host; 0 for an exec that was not started.
    pub pid: u32,
    /// Its streams.
    pub names: Names,
    /// Where it is in its life.
    pub status: ProcessStatus,
}

/// All tasks of one server.
pub struct Pod {
    namespace: String,
    id: String,
    publisher: Publisher,
    events: mpsc::UnboundedSender<Event>,
    state: Mutex<State>,
    /// Counts the engine's events that were handled.
    handled: watch::Sender<u64>,
    /// Whether the server is to end.
    finished: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    sandbox: Slot,
    /// Ids whose creation is under way.
    creating: HashSet<String>,
    tasks: HashMap<String, Task>,
    order: Order,
    /// No container is taken any more.
    closing: bool,
}

#[derive(Default)]
enum Slot {
    #[default]
    Empty,
    /// Closed when the start is over.
    Starting(watch::Receiver<()>),
    Running(Arc<Sandbox>),
}

struct Task {
    pid: u32,
    bundle: String,
    names: Names,
    held: Held,
    execs: HashMap<String, Exec>,
}

struct Exec {
    names: Names,
    held: Held,
    started: bool,
}

impl Pod {
    /// A pod without containers. Its sandbox is started with the first one.
    pub fn new(namespace: String, id: String, publisher: Publisher) -> Arc<Self> {
        let (events, receiver) = mpsc::unbounded_channel();
        let pod = Arc::new(Self {
            namespace,
            id,
            publisher,
            events,
            state: Mutex::default(),
            handled: watch::Sender::new(0),
            finished: watch::Sender::new(false),
        });
        tokio::spawn(pod.clone().follow(receiver));
        pod
    }

    /// Returns when the server is to end.
    pub async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// Creates a container and, with the first one, the sandbox. Returns its pid.
    ///
    /// # Errors
    /// Then nothing of it is left, nor of the sandbox if it has no other.
    pub async fn create(&self, config: TaskConfig) -> ttrpc::Result<u32> {
        if !is_valid_id(&config.id) {
            return Err(answer(
                Code::INVALID_ARGUMENT,
                format!("container id {:?} is not valid", config.id),
            ));
        }
        {
            let mut state = self.lock();
            if state.closing {
                return Err(answer(Code::UNAVAILABLE, "the sandbox is being shut down"));
            }
            if state.tasks.contains_key(&config.id) || !state.creating.insert(config.id.clone()) {
                return Err(answer(
                    Code::ALREADY_EXISTS,
                    format!("container {} already exists", config.id),
                ));
            }
            state.order.creating(&config.id);
        }
        let id = config.id.clone();
        let result = self.create_reserved(config).await;
        if result.is_err() {
            let abandoned = {
                let mut state = self.lock();
                state.creating.remove(&id);
                state.order.forget(&id, None);
                state.is_empty().then(|| state.sandbox.take()).flatten()
            };
            if let Some(sandbox) = abandoned {
                sandbox.shutdown().await;
            }
        }
        result
    }

    async fn create_reserved(&self, config: TaskConfig) -> ttrpc::Result<u32> {
        let directory = PathBuf::from(&config.bundle);
        let bundle = Bundle::read(&directory).map_err(|error| status::bundle(&error))?;
        let process = bundle
            .process(&directory)
            .map_err(|error| status::bundle(&error))?;
        if process.terminal != config.names.terminal {
            let text = "config.json and the request do not agree on whether the process has a terminal";
            return Err(answer(Code::INVALID_ARGUMENT, text));
        }
        let (stdio, held) = io::open(&config.names).map_err(|error| status::io(&error))?;
        let sandbox = self.sandbox(&bundle).await?;
        let request = CreateContainer {
            id: config.id.clone(),
            bundle: directory.clone(),
            spec: bundle.spec,
            rootfs: config.rootfs,
            stdio,
        };
        sandbox
            .create(request)
            .await
            .map_err(|error| status::engine(&error))?;
        let pid = sandbox.pid();
        // For `delete`, should this process be gone by then.
        if let Err(error) = write_atomically(&directory.join("init.pid"), pid.to_string().as_bytes()) {
            tracing::warn!(%error, "the bundle's init.pid is not written");
        }
        let event = TaskCreate {
            container_id: config.id.clone(),
            bundle: config.bundle.clone(),
            rootfs: config.announced_rootfs,
            io: MessageField::some(TaskIO {
                stdin: config.names.stdin.clone(),
                stdout: config.names.stdout.clone(),
                stderr: config.names.stderr.clone(),
                terminal: config.names.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        };
        let task = Task {
            pid,
            bundle: config.bundle,
            names: config.names,
            held,
            execs: HashMap::new(),
        };
        let mut state = self.lock();
        state.creating.remove(&config.id);
        state.tasks.insert(config.id.clone(), task);
        self.publisher.publish(TASK_CREATE_EVENT_TOPIC, &event);
        let announcements = state.order.created(&config.id);
        self.announce(&mut state, announcements);
        Ok(pid)
    }

    /// The sandbox, started if need be for the container in `bundle`.
    async fn sandbox(&self, bundle: &Bundle) -> ttrpc::Result<Arc<Sandbox>> {
        loop {
            let (over, mut under_way) = {
                let mut state = self.lock();
                match &state.sandbox {
                    Slot::Running(sandbox) => return Ok(sandbox.clone()),
                    Slot::Starting(under_way) => (None, under_way.clone()),
                    Slot::Empty => {
                        let (over, under_way) = watch::channel(());
                        state.sandbox = Slot::Starting(under_way.clone());
                        (Some(over), under_way)
                    }
                }
            };
            let Some(over) = over else {
                // It fails when the sender is dropped, which is what it waits for.
                let _ = under_way.changed().await;
                continue;
            };
            let started = self.start_sandbox(bundle).await;
            self.lock().sandbox = match &started {
                Ok(sandbox) => Slot::Running(sandbox.clone()),
                Err(_) => Slot::Empty,
            };
            drop(over);
            return started.map_err(|error| status::start(&error));
        }
    }

    async fn start_sandbox(&self, bundle: &Bundle) -> Result<Arc<Sandbox>, StartError> {
        let size = Size::for_container(&bundle.outline, Host::this());
        let config = SandboxConfig {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            programs: Programs::locate()?,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            hostname: bundle.outline.hostname.clone().unwrap_or_default(),
            kernel_params: String::new(),
        };
        let started = Sandbox::start(config, self.events.clone()).await;
        if let Err(StartError::Guest { console_tail, .. }) = &started {
            tracing::error!(console = console_tail, "the guest did not start");
        }
        started
    }

    /// Starts a container's init process or an added exec. Returns its pid.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` unless it is created.
    pub async fn start(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<u32> {
        let (sandbox, pid) = {
            let mut state = self.lock();
            let (sandbox, pid) = state.find(id, exec)?;
            if exec.is_some() && state.order.is_over(id, None) {
                let text = format!("the init process of container {id} is not running");
                return Err(answer(Code::FAILED_PRECONDITION, text));
            }
            if !state.order.starting(id, exec) {
                let text = format!("{} was started before", name(id, exec));
                return Err(answer(Code::FAILED_PRECONDITION, text));
            }
            (sandbox, pid)
        };
        let started = match exec {
            None => sandbox.start_container(id).await,
            Some(exec) => sandbox.start_exec(id, exec).await,
        };
        let mut state = self.lock();
        if let (Ok(()), Some(exec)) = (&started, exec) {
            if let Some(exec) = state.tasks.get_mut(id).and_then(|task| task.execs.get_mut(exec)) {
                exec.started = true;
            }
        }
        let announcements = match &started {
            Ok(()) => state.order.started(id, exec),
            Err(_) => state.order.start_failed(id, exec),
        };
        self.announce(&mut state, announcements);
        started.map(|()| pid).map_err(|error| status::engine(&error))
    }

    /// Adds an exec: `spec` is an OCI `process` object in JSON.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`, and what is wrong with the request.
    pub async fn exec(&self, id: &str, exec: &str, names: Names, spec: Vec<u8>) -> ttrpc::Result<()> {
        if !is_valid_id(exec) {
            return Err(answer(
                Code::INVALID_ARGUMENT,
                format!("exec id {exec:?} is not valid"),
            ));
        }
        let spec = with_terminal(spec, names.terminal)?;
        let sandbox = {
            let state = self.lock();
            let (sandbox, _) = state.find(id, None)?;
            if state
                .tasks
                .get(id)
                .is_some_and(|task| task.execs.contains_key(exec))
            {
                return Err(answer(
                    Code::ALREADY_EXISTS,
                    format!("exec {exec} already exists"),
                ));
            }
            sandbox
        };
        let (stdio, held) = io::open(&names).map_err(|error| status::io(&error))?;
        sandbox
            .add_exec(id, exec, spec, stdio)
            .await
            .map_err(|error| status::engine(&error))?;
        let mut state = self.lock();
        if let Some(task) = state.tasks.get_mut(id) {
            let added = Exec {
                names,
                held,
                started: false,
            };
            task.execs.insert(exec.to_owned(), added);
            state.order.added(id, exec);
            let event = TaskExecAdded {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                ..TaskExecAdded::default()
            };
            self.publisher.publish(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// A process as it is now. Never asks the guest.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn view(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<View> {
        let state = self.lock();
        let (sandbox, pid) = state.find(id, exec)?;
        let status = sandbox.status(id, exec).map_err(|error| status::engine(&error))?;
        let task = state.tasks.get(id).ok_or_else(|| not_found(id, None))?;
        let (names, started) = match exec {
            None => (&task.names, true),
            Some(name) => {
                let exec = task.execs.get(name).ok_or_else(|| not_found(id, exec))?;
                (&exec.names, exec.started)
            }
        };
        Ok(View {
            bundle: task.bundle.clone(),
            pid: if started { pid } else { 0 },
            names: names.clone(),
            status,
        })
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub async fn wait(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<Exit> {
        let (sandbox, _) = self.lock().find(id, exec)?;
        sandbox
            .wait(id, exec)
            .await
            .map_err(|error| status::engine(&error))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NOT_FOUND` when it has ended, `FAILED_PRECONDITION` for an exec that was not started.
    pub async fn kill(&self, id: &str, exec: Option<&str>, signal: u32, all: bool) -> ttrpc::Result<()> {
        if signal > MAX_SIGNAL {
            return Err(answer(
                Code::INVALID_ARGUMENT,
                format!("there is no signal {signal}"),
            ));
        }
        let (sandbox, _) = self.lock().find(id, exec)?;
        sandbox
            .signal(id, exec, signal, all)
            .await
            .map_err(|error| status::engine(&error))
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// `NOT_FOUND`; `FAILED_PRECONDITION` when the process has ended.
    pub async fn resize(&self, id: &str, exec: Option<&str>, columns: u16, rows: u16) -> ttrpc::Result<()> {
        let (sandbox, _) = self.lock().find(id, exec)?;
        sandbox
            .resize(id, exec, columns, rows)
            .await
            .map_err(|error| status::engine(&error))
    }

    /// Lets a process's input end when its clients are done with it.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn close_io(&self, id: &str, exec: Option<&str>, stdin: bool) -> ttrpc::Result<()> {
        let mut state = self.lock();
        state.find(id, exec)?;
        if let Some(held) = state.held(id, exec).filter(|_| stdin) {
            held.close_stdin();
        }
        Ok(())
    }

    /// The container's processes that run or are about to: pid on the host, and exec id. Answers at once: containerd
    /// asks all of them when it is started anew, and takes silence for death.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub fn processes(&self, id: &str) -> ttrpc::Result<Vec<(u32, Option<String>)>> {
        let state = self.lock();
        let (sandbox, pid) = state.find(id, None)?;
        let mut processes = Vec::new();
        let runs = |exec: Option<&str>| {
            matches!(
                sandbox.status(id, exec),
                Ok(ProcessStatus::Created | ProcessStatus::Running)
            )
        };
        if runs(None) {
            processes.push((pid, None));
        }
        if let Some(task) = state.tasks.get(id) {
            let mut execs: Vec<_> = task
                .execs
                .iter()
                .filter(|(name, exec)| exec.started && runs(Some(name)))
                .map(|(n, _)| n)
                .collect();
            execs.sort();
            processes.extend(execs.into_iter().map(|name| (pid, Some(name.clone()))));
        }
        Ok(processes)
    }

    /// The pid of a container.
    pub fn pid_of(&self, id: &str) -> Option<u32> {
        self.lock().tasks.get(id).map(|task| task.pid)
    }

    /// Deletes a container that does not run, or an exec that does not. Returns its pid and how it ended.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` while it runs; `NOT_FOUND`.
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<(u32, Exit)> {
        let (sandbox, pid) = self.lock().find(id, exec)?;
        if let Ok(ProcessStatus::Stopped { .. }) = sandbox.status(id, exec) {
            if timeout(DRAIN_TIMEOUT, sandbox.drained(id, exec)).await.is_err() {
                tracing::warn!("{}: the rest of its output is given up", name(id, exec));
            }
            self.announced(id, exec).await;
        }
        let deleted = match exec {
            None => sandbox.delete_container(id).await,
            Some(exec) => sandbox.delete_exec(id, exec).await,
        };
        let exit = deleted.map_err(|error| status::engine(&error))?;
        let mut state = self.lock();
        match exec {
            Some(name) => {
                if let Some(task) = state.tasks.get_mut(id) {
                    task.execs.remove(name);
                }
                let announcements = state.order.forget(id, exec);
                self.announce(&mut state, announcements);
            }
            None => {
                // One that was never started ends by being deleted.
                let announcements = state.order.exited(id, None, exit);
                self.announce(&mut state, announcements);
                state.order.forget(id, None);
                state.tasks.remove(id);
                let event = TaskDelete {
                    container_id: id.to_owned(),
                    pid,
                    exit_status: exit.status,
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..TaskDelete::default()
                };
                self.publisher.publish(TASK_DELETE_EVENT_TOPIC, &event);
            }
        }
        Ok((pid, exit))
    }

    /// Waits until the exit of a process that has stopped has been announced.
    async fn announced(&self, id: &str, exec: Option<&str>) {
        let mut handled = self.handled.subscribe();
        let announced = handled.wait_for(|_| self.lock().order.is_over(id, exec));
        if timeout(ANNOUNCE_TIMEOUT, announced).await.is_err() {
            tracing::warn!("{}: its exit was not announced in time", name(id, exec));
        }
    }

    /// Ends the server if it has no container. Returns when all is gone.
    pub async fn shutdown_if_empty(&self) {
        if self.lock().is_empty() {
            self.end().await;
        }
    }

    /// Ends the sandbox with all that is in it, and then the server. Returns when all is gone.
    pub async fn end(&self) {
        let sandbox = {
            let mut state = self.lock();
            let first = !state.closing;
            state.closing = true;
            first.then(|| state.sandbox.get())
        };
        let Some(sandbox) = sandbox else {
            return self.finished().await;
        };
        if let Some(sandbox) = sandbox {
            sandbox.shutdown().await;
        }
        // The exits of what ran until now are on their way through `follow`; what was announced is flushed.
        let all_over = |state: &State| state.tasks.keys().all(|id| state.order.is_over(id, None));
        let mut handled = self.handled.subscribe();
        let _ = timeout(ANNOUNCE_TIMEOUT, handled.wait_for(|_| all_over(&self.lock()))).await;
        self.publisher.flush(FLUSH_TIMEOUT).await;
        self.finished.send_replace(true);
    }

    /// Follows the engine's events.
    async fn follow(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Oom { container } => {
                    let event = TaskOOM {
                        container_id: container,
                        ..TaskOOM::default()
                    };
                    self.publisher.publish(TASK_OOM_EVENT_TOPIC, &event);
                }
                Event::Exited {
                    container,
                    exec,
                    status,
                    at,
                    ..
                } => self.exited(&container, exec.as_deref(), Exit { status, at }),
                Event::SandboxEnded { reason, console_tail } => {
                    tracing::info!(reason, "the sandbox has ended");
                    if !console_tail.is_empty() {
                        tracing::debug!(console = console_tail);
                    }
                }
            }
            self.handled.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    fn exited(&self, id: &str, exec: Option<&str>, exit: Exit) {
        let mut state = self.lock();
        let held = state.held(id, exec).map(std::mem::take);
        let sandbox = state.sandbox.get();
        let announcements = state.order.exited(id, exec, exit);
        self.announce(&mut state, announcements);
        drop(state);
        // Once the output is at its end nobody has to be kept from being told so.
        if let (Some(held), Some(sandbox)) = (held, sandbox) {
            let (id, exec) = (id.to_owned(), exec.map(str::to_owned));
            tokio::spawn(async move {
                sandbox.drained(&id, exec.as_deref()).await;
                drop(held);
            });
        }
    }

    /// Publishes what the order lets go. Under the lock, so that nothing comes between.
    fn announce(&self, state: &mut State, announcements: Vec<Announcement>) {
        for announcement in announcements {
            match announcement {
                Announcement::Started {
                    container,
                    exec: None,
                } => {
                    let pid = state.pid(&container);
                    let event = TaskStart {
                        container_id: container,
                        pid,
                        ..TaskStart::default()
                    };
                    self.publisher.publish(TASK_START_EVENT_TOPIC, &event);
                }
                Announcement::Started {
                    container,
                    exec: Some(exec_id),
                } => {
                    let pid = state.pid(&container);
                    let event = TaskExecStarted {
                        container_id: container,
                        exec_id,
                        pid,
                        ..TaskExecStarted::default()
                    };
                    self.publisher.publish(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
                }
                Announcement::Exited {
                    container,
                    exec,
                    exit,
                } => {
                    let event = TaskExit {
                        pid: state.pid(&container),
                        id: exec.unwrap_or_else(|| container.clone()),
                        container_id: container,
                        exit_status: exit.status,
                        exited_at: MessageField::some(timestamp(exit.at)),
                        ..TaskExit::default()
                    };
                    self.publisher.publish(TASK_EXIT_EVENT_TOPIC, &event);
                }
            }
        }
    }

    /// Never held across an await.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn get(&self) -> Option<Arc<Sandbox>> {
        match self {
            Self::Running(sandbox) => Some(sandbox.clone()),
            Self::Empty | Self::Starting(_) => None,
        }
    }

    /// Takes a sandbox that runs; a start that is under way is left alone.
    fn take(&mut self) -> Option<Arc<Sandbox>> {
        let sandbox = self.get();
        if sandbox.is_some() {
            *self = Self::Empty;
        }
        sandbox
    }
}

impl State {
    fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.creating.is_empty()
    }

    fn pid(&self, id: &str) -> u32 {
        self.tasks.get(id).map_or(0, |task| task.pid)
    }

    /// The sandbox and the pid of a process that is there.
    fn find(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<(Arc<Sandbox>, u32)> {
        let task = self.tasks.get(id).ok_or_else(|| not_found(id, None))?;
        if exec.is_some_and(|name| !task.execs.contains_key(name)) {
            return Err(not_found(id, exec));
        }
        let sandbox = self.sandbox.get().ok_or_else(|| not_found(id, None))?;
        Ok((sandbox, task.pid))
    }

    fn held(&mut self, id: &str, exec: Option<&str>) -> Option<&mut Held> {
        let task = self.tasks.get_mut(id)?;
        match exec {
            None => Some(&mut task.held),
            Some(exec) => task.execs.get_mut(exec).map(|exec| &mut exec.held),
        }
    }
}

fn name(id: &str, exec: Option<&str>) -> String {
    match exec {
        None => format!("container {id}"),
        Some(exec) => format!("exec {exec} of container {id}"),
    }
}

fn not_found(id: &str, exec: Option<&str>) -> ttrpc::Error {
    status::engine(&EngineError::NotFound(name(id, exec)))
}

/// A process object whose `terminal` is what the request says: clients set either or both.
fn with_terminal(spec: Vec<u8>, terminal: bool) -> ttrpc::Result<Vec<u8>> {
    let malformed = |why: &dyn std::fmt::Display| {
        answer(
            Code::INVALID_ARGUMENT,
            format!("the exec's process is not valid: {why}"),
        )
    };
    let mut process: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&spec).map_err(|error| malformed(&error))?;
    let said = match process.get("terminal") {
        None | Some(serde_json::Value::Null) => false,
        Some(serde_json::Value::Bool(said)) => *said,
        Some(_) => return Err(malformed(&"terminal is not a boolean")),
    };
    if said == terminal {
        return Ok(spec);
    }
    process.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&process).map_err(|error| malformed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_has_a_terminal_when_the_request_says_so() {
        let spec = br#"{"args":["sh"],"x":{"y":1.50}}"#.to_vec();
        assert_eq!(with_terminal(spec.clone(), false).unwrap(), spec);
        let with: serde_json::Value = serde_json::from_slice(&with_terminal(spec, true).unwrap()).unwrap();
        assert_eq!(
            with,
            serde_json::json!({ "args": ["sh"], "x": { "y": 1.5 }, "terminal": true })
        );
        for bad in ["", "[]", r#"{"terminal":1}"#] {
            with_terminal(bad.as_bytes().to_vec(), true).unwrap_err();
        }
    }
}
