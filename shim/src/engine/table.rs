//! The containers of a sandbox and their processes: what is so, and what becomes of it when something happens.
//!
//! Nothing here waits, and nothing asks the guest. Events leave in the order in which things became so.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use tokio::sync::{Notify, mpsc::UnboundedSender, watch};

use super::{
    EngineError, Event, Exit, ProcessInfo, ProcessStatus,
    process::{Process, State},
    status::{ContainerStatus, seconds},
    streams::Streams,
    undo::Undo,
};
use crate::guest::agent::GuestEvent;

/// Exit status of a process that was killed.
pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// See the module.
#[derive(Debug)]
pub struct Table {
    containers: BTreeMap<String, Container>,
    events: UnboundedSender<Event>,
    /// Why the machine is gone, once it is.
    ended: Option<String>,
    /// Told when what [`Table::describe`] says may have changed.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Container {
    phase: Phase,
    init: Process,
    created: SystemTime,
    execs: BTreeMap<String, Exec>,
    /// The init process's end, held back until those of its execs are told.
    held: Option<Exit>,
    freeze: Freeze,
    undo: Undo,
}

/// Whether a container's processes stand still. Means nothing once the init process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeze {
    Thawed,
    /// A pause is under way.
    Freezing,
    Frozen,
    /// A resume is under way.
    Thawing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Creating,
    Ready,
    Deleting,
}

#[derive(Debug)]
struct Exec {
    process: Process,
    /// What it is started with.
    plan: Option<Vec<u8>>,
}

/// What is to be done after something happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing.
    Nothing,
    /// An init process ended while execs of its live: [`Table::release`] it after a while.
    Held(String),
}

impl Table {
    /// An empty table.
    pub fn new(events: UnboundedSender<Event>) -> Self {
        Self {
            containers: BTreeMap::new(),
            events,
            ended: None,
            changed: Arc::new(Notify::new()),
        }
    }

    /// Told when what [`Table::describe`] says may have changed.
    pub fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    /// The containers that can be seen, for people.
    pub fn describe(&self) -> Vec<ContainerStatus> {
        self.containers
            .iter()
            .filter(|(_, container)| container.phase != Phase::Creating)
            .map(|(id, container)| ContainerStatus {
                id: id.clone(),
                pid: container.init.host_pid,
                status: match self.status(id, None) {
                    Ok(ProcessStatus::Created) => "created",
                    Ok(ProcessStatus::Running) => "running",
                    Ok(ProcessStatus::Pausing) => "pausing",
                    Ok(ProcessStatus::Paused) => "paused",
                    Ok(ProcessStatus::Stopped { .. }) | Err(_) => "stopped",
                }
                .to_owned(),
                created: seconds(container.created),
                execs: container
                    .execs
                    .values()
                    .filter(|exec| exec.process.state() == State::Running)
                    .count(),
            })
            .collect()
    }

    /// The containers that can be seen.
    pub fn ids(&self) -> Vec<String> {
        self.containers
            .iter()
            .filter(|(_, c)| c.phase != Phase::Creating)
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// # Errors
    /// `SandboxEnded`.
    pub fn check_alive(&self) -> Result<(), EngineError> {
        match &self.ended {
            Some(reason) => Err(EngineError::SandboxEnded(reason.clone())),
            None => Ok(()),
        }
    }

    /// Takes an id for a container that is being made.
    ///
    /// # Errors
    /// `AlreadyExists`, `SandboxEnded`.
    pub fn reserve(&mut self, id: &str, terminal: bool) -> Result<(), EngineError> {
        self.check_alive()?;
        if self.containers.contains_key(id) {
            return Err(EngineError::AlreadyExists(format!("container {id}")));
        }
        let container = Container {
            phase: Phase::Creating,
            init: Process::new(terminal, None),
            created: SystemTime::now(),
            execs: BTreeMap::new(),
            held: None,
            freeze: Freeze::Thawed,
            undo: Undo::default(),
        };
        self.containers.insert(id.to_owned(), container);
        Ok(())
    }

    /// Shows a container that was made.
    ///
    /// # Errors
    /// `SandboxEnded`; then the container is gone and its undo has to be run by the caller.
    pub fn commit(
        &mut self,
        id: &str,
        pid: i32,
        streams: Streams,
        undo: &mut Undo,
    ) -> Result<(), EngineError> {
        if let Err(error) = self.check_alive() {
            self.containers.remove(id);
            return Err(error);
        }
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id, None))?;
        let ended = match container.init.state() {
            State::Stopped(exit) => Some(exit),
            _ => None,
        };
        if ended.is_some() {
            streams.process_ended();
        }
        container.init.streams = Some(streams);
        container.init.guest_pid = pid;
        container.undo = std::mem::take(undo);
        container.phase = Phase::Ready;
        self.changed.notify_one();
        if let Some(exit) = ended {
            self.send_exit(id, None, exit);
        }
        Ok(())
    }

    /// Gives back the id of a container that was not made.
    pub fn abandon(&mut self, id: &str) {
        if self
            .containers
            .get(id)
            .is_some_and(|container| container.phase == Phase::Creating)
        {
            self.containers.remove(id);
        }
    }

    fn container(&self, id: &str) -> Result<&Container, EngineError> {
        self.containers
            .get(id)
            .filter(|c| c.phase != Phase::Creating)
            .ok_or_else(|| not_found(id, None))
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container, EngineError> {
        self.containers
            .get_mut(id)
            .filter(|c| c.phase != Phase::Creating)
            .ok_or_else(|| not_found(id, None))
    }

    /// A process.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, id: &str, exec: Option<&str>) -> Result<&Process, EngineError> {
        let container = self.container(id)?;
        match exec {
            None => Ok(&container.init),
            Some(exec) => {
                let exec_of = container
                    .execs
                    .get(exec)
                    .ok_or_else(|| not_found(id, Some(exec)))?;
                Ok(&exec_of.process)
            }
        }
    }

    fn process_mut(&mut self, id: &str, exec: Option<&str>) -> Result<&mut Process, EngineError> {
        let container = self.container_mut(id)?;
        match exec {
            None => Ok(&mut container.init),
            Some(exec) => match container.execs.get_mut(exec) {
                Some(exec) => Ok(&mut exec.process),
                None => Err(not_found(id, Some(exec))),
            },
        }
    }

    /// A process's pid on the host; 0 when it has none.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn host_pid(&self, id: &str, exec: Option<&str>) -> Result<u32, EngineError> {
        Ok(self.process(id, exec)?.host_pid)
    }

    /// Gives a process its pid on the host, also while its container is being made.
    pub fn set_host_pid(&mut self, id: &str, exec: Option<&str>, pid: u32) {
        if let Some(process) = self.any_process(id, exec) {
            process.host_pid = pid;
        }
    }

    /// Marks that a process was killed on the host: it ends with `status`.
    pub fn set_killed(&mut self, id: &str, exec: Option<&str>, status: u32) {
        if let Some(process) = self.any_process(id, exec) {
            process.killed = Some(status);
        }
    }

    fn any_process(&mut self, id: &str, exec: Option<&str>) -> Option<&mut Process> {
        let container = self.containers.get_mut(id)?;
        match exec {
            None => Some(&mut container.init),
            Some(exec) => Some(&mut container.execs.get_mut(exec)?.process),
        }
    }

    /// Where a process is in its life. What runs in a container that is paused is paused.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn status(&self, id: &str, exec: Option<&str>) -> Result<ProcessStatus, EngineError> {
        let status = self.process(id, exec)?.state().status();
        let freeze = self.container(id)?.freeze;
        Ok(match (status, freeze) {
            (ProcessStatus::Running, Freeze::Freezing) => ProcessStatus::Pausing,
            (ProcessStatus::Running, Freeze::Frozen | Freeze::Thawing) => ProcessStatus::Paused,
            (status, _) => status,
        })
    }

    /// Marks that a container is being paused.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it runs.
    pub fn begin_pause(&mut self, id: &str) -> Result<(), EngineError> {
        self.check_alive()?;
        let container = self.container_mut(id)?;
        container.check_running(id)?;
        container.freeze = Freeze::Freezing;
        Ok(())
    }

    /// Marks that a container is being resumed.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is paused.
    pub fn begin_resume(&mut self, id: &str) -> Result<(), EngineError> {
        self.check_alive()?;
        let container = self.container_mut(id)?;
        if container.is_live() && container.freeze == Freeze::Frozen {
            container.freeze = Freeze::Thawing;
            return Ok(());
        }
        Err(EngineError::FailedPrecondition(format!(
            "{} is not paused",
            name(id, None)
        )))
    }

    /// Marks whether a container stands still after a pause or a resume. True when it does and has not ended.
    pub fn finish_freeze(&mut self, id: &str, frozen: bool) -> bool {
        self.changed.notify_one();
        let Ok(container) = self.container_mut(id) else {
            return false;
        };
        container.freeze = if frozen { Freeze::Frozen } else { Freeze::Thawed };
        frozen && container.is_live()
    }

    /// Whether the container's limits may be changed.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended.
    pub fn check_update(&self, id: &str) -> Result<(), EngineError> {
        self.check_alive()?;
        let container = self.container(id)?;
        let ended = matches!(container.init.state(), State::Stopped(_));
        if ended || container.held.is_some() || container.phase != Phase::Ready {
            let name = name(id, None);
            return Err(EngineError::FailedPrecondition(format!("{name} has ended")));
        }
        Ok(())
    }

    /// The end of a process, when it comes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn watch(&self, id: &str, exec: Option<&str>) -> Result<watch::Receiver<Option<Exit>>, EngineError> {
        Ok(self.process(id, exec)?.watch())
    }

    /// Ends the input of a process that was started.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn close_input(&self, id: &str, exec: Option<&str>) -> Result<(), EngineError> {
        if let Some(streams) = &self.process(id, exec)?.streams {
            streams.close_input();
        }
        Ok(())
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`; `FailedPrecondition` when the container has ended or is paused.
    pub fn add_exec(
        &mut self,
        id: &str,
        exec: &str,
        json: Vec<u8>,
        terminal: bool,
    ) -> Result<(), EngineError> {
        self.check_alive()?;
        let container = self.container_mut(id)?;
        if container.execs.contains_key(exec) {
            return Err(EngineError::AlreadyExists(name(id, Some(exec))));
        }
        container.check_joinable(id)?;
        let process = Process::new(terminal, None);
        container.execs.insert(
            exec.to_owned(),
            Exec {
                process,
                plan: Some(json),
            },
        );
        Ok(())
    }

    /// Marks that the start of an init process is under way.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`, `SandboxEnded`.
    pub fn begin_start(&mut self, id: &str) -> Result<(), EngineError> {
        self.check_alive()?;
        self.process_mut(id, None)?.begin_start(&name(id, None))
    }

    /// Marks that the start of an exec is under way; gives what it is started with.
    ///
    /// # Errors
    /// As [`Table::begin_start`].
    pub fn begin_exec(&mut self, id: &str, exec: &str) -> Result<Vec<u8>, EngineError> {
        self.check_alive()?;
        let container = self.container_mut(id)?;
        let known = container.execs.contains_key(exec);
        if known {
            container.check_joinable(id)?;
        }
        let entry = container
            .execs
            .get_mut(exec)
            .ok_or_else(|| not_found(id, Some(exec)))?;
        entry.process.begin_start(&name(id, Some(exec)))?;
        entry.plan.take().ok_or_else(|| not_found(id, Some(exec)))
    }

    /// Gives a process its streams.
    pub fn set_streams(&mut self, id: &str, exec: &str, streams: Streams) {
        if let Ok(process) = self.process_mut(id, Some(exec)) {
            if let State::Stopped(_) = process.state() {
                streams.process_ended();
            }
            process.streams = Some(streams);
        }
    }

    /// Marks that a process runs; or that it could not be started, and has so ended. For an init process that is an
    /// exit like any other; an exec that did not start has none.
    pub fn finish_start(&mut self, id: &str, exec: Option<&str>, result: Result<Option<i32>, &EngineError>) {
        self.changed.notify_one();
        let Ok(process) = self.process_mut(id, exec) else {
            return;
        };
        match result {
            Ok(pid) => {
                process.started();
                process.guest_pid = pid.unwrap_or(process.guest_pid);
            }
            Err(error) => {
                let exit = Exit {
                    status: error.exit_code().into(),
                    at: SystemTime::now(),
                };
                let ended = process.stop(exit);
                // What it had of streams is of no use.
                process.streams = None;
                if ended && exec.is_none() {
                    self.send_exit(id, None, exit);
                }
                self.end_held(id);
            }
        }
    }

    /// Whether a signal may be sent to a process.
    ///
    /// # Errors
    /// `NotFound` when it has ended, `FailedPrecondition` when it is an exec that was not started.
    pub fn check_signal(&self, id: &str, exec: Option<&str>) -> Result<(), EngineError> {
        self.check_alive()?;
        match (self.process(id, exec)?.state(), exec) {
            (State::Stopped(_), _) => Err(EngineError::NotFound(format!("process of {}", name(id, exec)))),
            (State::Created, Some(_)) => Err(EngineError::FailedPrecondition(format!(
                "{} is not started",
                name(id, exec)
            ))),
            _ => Ok(()),
        }
    }

    /// The machine was killed for want of memory, and with it every container that runs.
    pub fn machine_starved(&mut self) {
        let live = |(id, container): (&String, &Container)| {
            let live = container.held.is_none() && container.init.state().is_live();
            live.then(|| id.clone())
        };
        let ids: Vec<String> = self.containers.iter().filter_map(live).collect();
        for container in ids {
            self.send(Event::Oom { container });
        }
    }

    /// What happened in the guest becomes so here. What names nothing known is left aside: the guest may say anything.
    pub fn guest_event(&mut self, event: GuestEvent, at: SystemTime) -> After {
        match event {
            GuestEvent::Oom { container } => {
                if self
                    .container(&container)
                    .is_ok_and(|known| known.init.state().is_live())
                {
                    self.send(Event::Oom { container });
                }
                After::Nothing
            }
            GuestEvent::Exited {
                container: id,
                exec,
                status,
            } => {
                let killed = self
                    .any_process(&id, exec.as_deref())
                    .and_then(|process| process.killed);
                let exit = Exit {
                    status: killed.unwrap_or(status),
                    at,
                };
                // The init process of a container whose creation is being answered may end already.
                let Some(container) = self.containers.get_mut(&id) else {
                    return After::Nothing;
                };
                match exec {
                    Some(exec) => {
                        let live = container
                            .execs
                            .get(&exec)
                            .is_some_and(|e| e.process.state().is_live());
                        if live {
                            self.exec_ended(&id, &exec, exit);
                        }
                        After::Nothing
                    }
                    None if matches!(container.init.state(), State::Stopped(_)) => After::Nothing,
                    None if container
                        .execs
                        .values()
                        .any(|exec| exec.process.state().is_live()) =>
                    {
                        container.held.get_or_insert(exit);
                        After::Held(id)
                    }
                    None => {
                        self.init_ended(&id, exit);
                        After::Nothing
                    }
                }
            }
        }
    }

    /// Ends the wait for the ends of a container's execs: those that are still awaited were killed with it.
    pub fn release(&mut self, id: &str, at: SystemTime) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if container.held.is_none() {
            return;
        }
        let live: Vec<String> = container
            .execs
            .iter()
            .filter(|(_, exec)| exec.process.state().is_live())
            .map(|(exec, _)| exec.clone())
            .collect();
        for exec in live {
            self.exec_ended(id, &exec, Exit { status: KILLED, at });
        }
    }

    /// The machine is gone, and every process with it.
    pub fn machine_ended(&mut self, reason: &str, at: SystemTime) {
        self.ended.get_or_insert_with(|| reason.to_owned());
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let Some(container) = self.containers.get_mut(&id) else {
                continue;
            };
            let exit = container.held.unwrap_or(Exit { status: KILLED, at });
            container.held.get_or_insert(exit);
            // An exec that was never started ends for those who wait for it, but did not exit.
            for exec in container
                .execs
                .values_mut()
                .filter(|exec| exec.process.state() == State::Created)
            {
                exec.process.stop(Exit { status: KILLED, at });
            }
            self.release(&id, at);
            self.init_ended(&id, exit);
        }
    }

    fn exec_ended(&mut self, id: &str, exec: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(entry) = container.execs.get_mut(exec) else {
            return;
        };
        if entry.process.stop(exit) {
            self.send_exit(id, Some(exec), exit);
        }
        self.end_held(id);
    }

    /// Tells the init process's end that was held back, if none of its execs lives any more.
    fn end_held(&mut self, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let live = container
            .execs
            .values()
            .any(|exec| exec.process.state().is_live());
        if let (Some(held), false) = (container.held, live) {
            self.init_ended(id, held);
        }
    }

    fn init_ended(&mut self, id: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.held = None;
        let seen = container.phase != Phase::Creating;
        if container.init.stop(exit) && seen {
            self.send_exit(id, None, exit);
        }
    }

    fn send_exit(&self, id: &str, exec: Option<&str>, exit: Exit) {
        self.changed.notify_one();
        let Exit { status, at } = exit;
        let pid = self.host_pid(id, exec).unwrap_or(0);
        let exec = exec.map(str::to_owned);
        self.send(Event::Exited {
            container: id.to_owned(),
            exec,
            status,
            at,
            pid,
        });
    }

    /// Sends an event. Nobody listening is fine: they are gone.
    pub fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Marks that a container is being removed. `Some`: it has ended; `None`: it was never started and has to be ended.
    ///
    /// # Errors
    /// `NotFound`, also while it is being removed already; `FailedPrecondition` while it runs.
    pub fn begin_delete(&mut self, id: &str) -> Result<Option<Exit>, EngineError> {
        let container = self.container_mut(id)?;
        if container.phase == Phase::Deleting {
            return Err(not_found(id, None));
        }
        let exit = match container.init.state() {
            State::Stopped(exit) => Some(exit),
            State::Created => None,
            State::Starting | State::Running => {
                container.check_thawed(id)?;
                return Err(EngineError::FailedPrecondition(format!(
                    "{} is running",
                    name(id, None)
                )));
            }
        };
        container.phase = Phase::Deleting;
        Ok(exit)
    }

    /// Removes a container; gives what takes it back on the host.
    pub fn finish_delete(&mut self, id: &str) -> Undo {
        self.changed.notify_one();
        self.containers
            .remove(id)
            .map(|container| container.undo)
            .unwrap_or_default()
    }

    /// The live processes of a container as the engine knows them: the first of each.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn known_processes(&self, id: &str) -> Result<Vec<ProcessInfo>, EngineError> {
        let container = self.container(id)?;
        let init = [(None, &container.init)].into_iter();
        let execs = container
            .execs
            .iter()
            .map(|(id, exec)| (Some(id.clone()), &exec.process));
        Ok(init
            .filter(|(_, init)| !matches!(init.state(), State::Stopped(_)))
            .chain(execs.filter(|(_, exec)| exec.state() == State::Running))
            .map(|(exec, process)| ProcessInfo {
                pid: process.guest_pid,
                exec,
            })
            .collect())
    }

    /// Takes out the undos of all containers.
    pub fn take_undos(&mut self) -> Vec<Undo> {
        self.containers
            .values_mut()
            .map(|container| std::mem::take(&mut container.undo))
            .collect()
    }

    /// Removes an exec.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub fn delete_exec(&mut self, id: &str, exec: &str) -> Result<Exit, EngineError> {
        let container = self.container_mut(id)?;
        let entry = container
            .execs
            .get(exec)
            .ok_or_else(|| not_found(id, Some(exec)))?;
        let exit = match entry.process.state() {
            State::Stopped(exit) => exit,
            // One that was never started did nothing.
            State::Created => Exit {
                status: 0,
                at: SystemTime::now(),
            },
            State::Starting | State::Running => {
                return Err(EngineError::FailedPrecondition(format!(
                    "{} is running",
                    name(id, Some(exec))
                )));
            }
        };
        container.execs.remove(exec);
        Ok(exit)
    }
}

impl Container {
    /// Whether the init process runs, for all that is known.
    fn is_live(&self) -> bool {
        self.init.state() == State::Running && self.held.is_none() && self.phase == Phase::Ready
    }

    fn check_running(&self, id: &str) -> Result<(), EngineError> {
        self.check_thawed(id)?;
        if self.is_live() {
            return Ok(());
        }
        Err(not_running(id))
    }

    /// Whether a further process may be started: from the container's creation to its end.
    fn check_joinable(&self, id: &str) -> Result<(), EngineError> {
        self.check_thawed(id)?;
        let ended = matches!(self.init.state(), State::Stopped(_));
        if ended || self.held.is_some() || self.phase != Phase::Ready {
            return Err(not_running(id));
        }
        Ok(())
    }

    fn check_thawed(&self, id: &str) -> Result<(), EngineError> {
        let how = match self.freeze {
            _ if !self.is_live() => return Ok(()),
            Freeze::Thawed => return Ok(()),
            Freeze::Freezing => "is being paused",
            Freeze::Frozen => "is paused",
            Freeze::Thawing => "is being resumed",
        };
        let name = name(id, None);
        Err(EngineError::FailedPrecondition(format!("{name} {how}")))
    }
}

fn not_running(id: &str) -> EngineError {
    EngineError::FailedPrecondition(format!("{} is not running", name(id, None)))
}

/// A process, for a message.
pub fn name(id: &str, exec: Option<&str>) -> String {
    match exec {
        None => format!("container {id}"),
        Some(exec) => format!("exec {exec} of container {id}"),
    }
}

fn not_found(id: &str, exec: Option<&str>) -> EngineError {
    EngineError::NotFound(name(id, exec))
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
