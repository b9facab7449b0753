//! Starting processes and deleting what has ended.

use std::time::Duration;

use containerd_shim_protos::{events::task::TaskDelete, topics::TASK_DELETE_EVENT_TOPIC};
use protobuf::MessageField;
use tokio::time::timeout;
use ttrpc::Code;

use super::{ANNOUNCE_TIMEOUT, Pod, name};
use crate::{
    engine::{EngineError, Exit, ProcessStatus, Stdio},
    front::{
        publish::timestamp,
        status::{self, answer},
    },
};

/// How long a delete waits for the rest of a process's output.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

impl Pod {
    /// Starts a container's init process or an added exec. Returns its pid.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` unless it is created.
    pub async fn start(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<u32> {
        let sandbox = {
            let mut state = self.lock();
            let (sandbox, _) = state.find(id, exec)?;
            if exec.is_some() && state.order.is_over(id, None) {
                let text = format!("the init process of container {id} is not running");
                return Err(answer(Code::FAILED_PRECONDITION, text));
            }
            if !state.order.starting(id, exec) {
                let text = format!("{} was started before", name(id, exec));
                return Err(answer(Code::FAILED_PRECONDITION, text));
            }
            sandbox
        };
        let started = match exec {
            None => sandbox.start_container(id).await,
            Some(exec) => {
                let stdio = match self.open_exec(id, exec).await {
                    Ok(stdio) => stdio,
                    Err(error) => {
                        let mut state = self.lock();
                        let announcements = state.order.start_refused(id, Some(exec));
                        self.announce(&mut state, announcements);
                        return Err(error);
                    }
                };
                sandbox.start_exec(id, exec, stdio).await
            }
        };
        let mut state = self.lock();
        if let (Ok(()), Some(name)) = (&started, exec) {
            if let Some(added) = state.tasks.get_mut(id).and_then(|task| task.execs.get_mut(name)) {
                added.pid = sandbox.host_pid(id, exec).ok();
            }
        }
        let mut announcements = match &started {
            Ok(()) => state.order.started(id, exec),
            Err(EngineError::FailedPrecondition(_))
                if matches!(sandbox.status(id, exec), Ok(ProcessStatus::Created)) =>
            {
                state.order.start_refused(id, exec)
            }
            Err(_) => state.order.start_failed(id, exec),
        };
        if exec.is_none() {
            // A container whose command could not be executed has ended by that, and nobody else tells.
            if let (Err(_), Ok(ProcessStatus::Stopped { status, at })) = (&started, sandbox.status(id, None))
            {
                announcements.extend(state.order.exited(id, None, Exit { status, at }));
            }
        }
        self.announce(&mut state, announcements);
        let pid = state.pid(id, exec);
        started.map(|()| pid).map_err(|error| status::engine(&error))
    }

    /// Opens the streams of an exec that is about to start.
    async fn open_exec(&self, id: &str, exec: &str) -> ttrpc::Result<Stdio> {
        let names = {
            let state = self.lock();
            let added = state.tasks.get(id).and_then(|task| task.execs.get(exec));
            added.map(|added| added.names.clone()).unwrap_or_default()
        };
        let (stdio, mut held) = self.open(&names, exec).await?;
        let mut state = self.lock();
        if let Some(added) = state.tasks.get_mut(id).and_then(|task| task.execs.get_mut(exec)) {
            added.logger = held.logger();
            if added.input_ended {
                held.close_stdin();
            }
            added.held = held;
        }
        Ok(stdio)
    }

    /// Deletes a container that does not run, or an exec that does not. Returns its pid and how it ended.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` while it runs; `NOT_FOUND`.
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> ttrpc::Result<(u32, Exit)> {
        let (sandbox, pid, logger) = {
            let state = self.lock();
            let (sandbox, pid) = state.find(id, exec)?;
            (sandbox, pid, state.logger(id, exec))
        };
        if let Ok(ProcessStatus::Stopped { .. }) = sandbox.status(id, exec) {
            let written = async {
                sandbox.drained(id, exec).await;
                if let Some(logger) = logger {
                    logger.ended().await;
                }
            };
            if timeout(DRAIN_TIMEOUT, written).await.is_err() {
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
}
