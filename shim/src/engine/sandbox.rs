//! One sandbox: a machine and the containers in it.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use super::{
    CleanupError, CreateContainer, EngineError, Event, Exit, ProcessInfo, ProcessStatus, SandboxConfig,
    StartError, Stdio,
};

/// One sandbox: a machine and the containers in it.
#[derive(Debug)]
pub struct Sandbox {}

fn unwritten<T>() -> Result<T, EngineError> {
    Err(EngineError::FailedPrecondition("being written".into()))
}

impl Sandbox {
    /// Starts a sandbox.
    ///
    /// # Errors
    /// When it cannot be started; then nothing of it is left.
    pub async fn start(
        _config: SandboxConfig,
        _events: UnboundedSender<Event>,
    ) -> Result<Arc<Self>, StartError> {
        Err(StartError::InvalidArgument("being written".into()))
    }

    /// The VMM's pid on the host. It stands for every task.
    pub fn pid(&self) -> u32 {
        0
    }

    /// Makes a container and its init process, stopped before its exec.
    ///
    /// # Errors
    /// When it cannot be made; then nothing of it is left.
    pub async fn create(&self, _request: CreateContainer) -> Result<(), EngineError> {
        unwritten()
    }

    /// Lets the init process exec.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is created.
    pub async fn start_container(&self, _id: &str) -> Result<(), EngineError> {
        unwritten()
    }

    /// Adds an exec, not started: an OCI `process` object in JSON.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, `InvalidSpec`.
    pub async fn add_exec(
        &self,
        _container: &str,
        _exec: &str,
        _process_json: Vec<u8>,
        _stdio: Stdio,
    ) -> Result<(), EngineError> {
        unwritten()
    }

    /// Starts an added exec.
    ///
    /// # Errors
    /// `FailedPrecondition` when the container does not run; the failure of the command otherwise, and the exec is
    /// then stopped with the error's exit code.
    pub async fn start_exec(&self, _container: &str, _exec: &str) -> Result<(), EngineError> {
        unwritten()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when the process has ended or is unknown, `FailedPrecondition` when an exec was not started.
    pub async fn signal(
        &self,
        _container: &str,
        _exec: Option<&str>,
        _signal: u32,
        _all: bool,
    ) -> Result<(), EngineError> {
        unwritten()
    }

    /// Sets the size of a process's terminal; nothing is done when it has none.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended.
    pub async fn resize(
        &self,
        _container: &str,
        _exec: Option<&str>,
        _columns: u16,
        _rows: u16,
    ) -> Result<(), EngineError> {
        unwritten()
    }

    /// Ends the process's stdin: what was sent before still arrives. Idempotent.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn close_stdin(&self, _container: &str, _exec: Option<&str>) -> Result<(), EngineError> {
        unwritten()
    }

    /// Where a process is in its life. Never asks the guest.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn status(&self, _container: &str, _exec: Option<&str>) -> Result<ProcessStatus, EngineError> {
        unwritten()
    }

    /// Whether the process has a terminal.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn terminal(&self, _container: &str, _exec: Option<&str>) -> Result<bool, EngineError> {
        unwritten()
    }

    /// Waits for a process's end; valid before its start.
    ///
    /// # Errors
    /// `NotFound`, also when it is deleted meanwhile without having run.
    pub async fn wait(&self, _container: &str, _exec: Option<&str>) -> Result<Exit, EngineError> {
        unwritten()
    }

    /// The container's processes.
    ///
    /// # Errors
    /// `NotFound`, and whatever befalls a call of the agent.
    pub async fn processes(&self, _container: &str) -> Result<Vec<ProcessInfo>, EngineError> {
        unwritten()
    }

    /// Waits until all output of a process has been copied and its streams are closed. Returns at once for an
    /// unknown process. Has no deadline of its own.
    pub async fn drained(&self, _container: &str, _exec: Option<&str>) {}

    /// Removes a container and its execs. One that was never started is ended first.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub async fn delete_container(&self, _id: &str) -> Result<Exit, EngineError> {
        unwritten()
    }

    /// Removes an exec.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub async fn delete_exec(&self, _container: &str, _exec: &str) -> Result<Exit, EngineError> {
        unwritten()
    }

    /// The containers, in no order.
    pub fn containers(&self) -> Vec<String> {
        Vec::new()
    }

    /// Ends the machine, in order if it still answers, and removes everything. Idempotent.
    pub async fn shutdown(&self) {}
}

/// Removes what a sandbox left behind, knowing no more than its record. Idempotent; nothing there is fine.
///
/// # Errors
/// For what could not be removed; the rest is.
pub async fn cleanup(_namespace: &str, _id: &str) -> Result<(), CleanupError> {
    Ok(())
}
