//! The tasks of one server: a sandbox, its containers and execs as containerd knows them, and their events.

mod control;
mod create;
mod follow;
mod life;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use ttrpc::Code;

pub use create::TaskConfig;

use super::{
    io::{Held, Names},
    logger::Loggers,
    order::Order,
    publish::Publisher,
    settings::Settings,
    status::{self, answer},
};
use crate::{
    engine::{EngineError, Event, Exit, ProcessStatus, Sandbox},
    host::child::Child,
};

/// How long a delete waits until the exit that it reports has been announced.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the end of the server waits for containerd to take the last events.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the end of the server waits for logging programs that have all of their input.
const LOGGERS_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest signal number.
const MAX_SIGNAL: u32 = 64;

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
    loggers: Loggers,
    state: Mutex<State>,
    /// Counts the engine's events that were handled.
    handled: watch::Sender<u64>,
    /// Whether the server is to end.
    finished: watch::Sender<bool>,
    /// Who plays the machine.
    #[cfg(test)]
    stage: Option<tests::Stage>,
}

#[derive(Default)]
struct State {
    sandbox: Slot,
    /// What the sandbox was started with.
    settings: Option<Arc<Settings>>,
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
    logger: Option<Child>,
    execs: HashMap<String, Exec>,
}

struct Exec {
    names: Names,
    held: Held,
    logger: Option<Child>,
    /// Its clients were done with its input before it was started.
    input_ended: bool,
    /// Once it was started.
    pid: Option<u32>,
}

impl Pod {
    /// A pod without containers. Its sandbox is started with the first one.
    pub fn new(namespace: String, id: String, publisher: Publisher) -> Arc<Self> {
        let (pod, events) = Self::assemble(namespace, id, publisher);
        let pod = Arc::new(pod);
        tokio::spawn(pod.clone().follow(events));
        pod
    }

    fn assemble(
        namespace: String,
        id: String,
        publisher: Publisher,
    ) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let pod = Self {
            namespace,
            id,
            publisher,
            events,
            loggers: Loggers::default(),
            state: Mutex::default(),
            handled: watch::Sender::new(0),
            finished: watch::Sender::new(false),
            #[cfg(test)]
            stage: None,
        };
        (pod, receiver)
    }

    /// Returns when the server is to end.
    pub async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = finished.wait_for(|finished| *finished).await;
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
        let names = match exec {
            None => &task.names,
            Some(name) => &task.execs.get(name).ok_or_else(|| not_found(id, exec))?.names,
        };
        Ok(View {
            bundle: task.bundle.clone(),
            pid,
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
        let added = exec.and_then(|exec| state.tasks.get_mut(id)?.execs.get_mut(exec));
        if let Some(added) = added.filter(|_| stdin) {
            added.input_ended = true;
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
                Ok(ProcessStatus::Created
                    | ProcessStatus::Running
                    | ProcessStatus::Pausing
                    | ProcessStatus::Paused)
            )
        };
        if runs(None) {
            processes.push((pid, None));
        }
        if let Some(task) = state.tasks.get(id) {
            let mut execs: Vec<_> = task
                .execs
                .iter()
                .filter(|(name, _)| runs(Some(name)))
                .filter_map(|(name, exec)| Some((exec.pid?, Some(name.clone()))))
                .collect();
            execs.sort_by(|(_, one), (_, other)| one.cmp(other));
            processes.extend(execs);
        }
        Ok(processes)
    }

    /// The pid of a container.
    pub fn pid_of(&self, id: &str) -> Option<u32> {
        self.lock().tasks.get(id).map(|task| task.pid)
    }

    /// Ends the server if it has no container. Returns when all is gone.
    pub async fn shutdown_if_empty(&self) {
        if self.lock().is_empty() {
            self.end().await;
        }
    }

    /// Ends the sandbox with all that is in it, and then the server. Returns when all is gone.
    pub async fn end(&self) {
        let (first, under_way) = {
            let mut state = self.lock();
            let first = !std::mem::replace(&mut state.closing, true);
            let under_way = match &state.sandbox {
                Slot::Starting(under_way) => Some(under_way.clone()),
                Slot::Empty | Slot::Running(_) => None,
            };
            (first, under_way)
        };
        if !first {
            return self.finished().await;
        }
        if let Some(mut under_way) = under_way {
            // Closed when the start is over, which has its own deadlines.
            let _ = under_way.changed().await;
        }
        let sandbox = self.lock().sandbox.get();
        if let Some(sandbox) = sandbox {
            sandbox.shutdown().await;
        }
        // The exits of what ran until now are on their way through `follow`; what was announced is flushed.
        let all_over = |state: &State| state.tasks.keys().all(|id| state.order.is_over(id, None));
        let mut handled = self.handled.subscribe();
        let _ = timeout(ANNOUNCE_TIMEOUT, handled.wait_for(|_| all_over(&self.lock()))).await;
        self.loggers.ended(LOGGERS_TIMEOUT).await;
        self.publisher.flush(FLUSH_TIMEOUT).await;
        self.finished.send_replace(true);
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

    /// The pid of a process on the host; 0 for one that has none (any more).
    fn pid(&self, id: &str, exec: Option<&str>) -> u32 {
        let Some(task) = self.tasks.get(id) else { return 0 };
        match exec {
            None => task.pid,
            Some(exec) => task.execs.get(exec).and_then(|exec| exec.pid).unwrap_or(0),
        }
    }

    /// The sandbox and the pid of a process that is there.
    fn find(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<(Arc<Sandbox>, u32)> {
        let task = self.tasks.get(id).ok_or_else(|| not_found(id, None))?;
        if exec.is_some_and(|name| !task.execs.contains_key(name)) {
            return Err(not_found(id, exec));
        }
        let sandbox = self.sandbox.get().ok_or_else(|| not_found(id, None))?;
        Ok((sandbox, self.pid(id, exec)))
    }

    /// The logging program of a process.
    fn logger(&self, id: &str, exec: Option<&str>) -> Option<Child> {
        let task = self.tasks.get(id)?;
        match exec {
            None => task.logger.clone(),
            Some(exec) => task.execs.get(exec)?.logger.clone(),
        }
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

#[cfg(test)]
#[path = "pod_test.rs"]
pub(in crate::front) mod tests;
