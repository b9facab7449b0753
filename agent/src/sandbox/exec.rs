//! Starting a further process in a container.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};

use husk_agent_protocol::messages;
use oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::watch;

use super::{
    Error, Sandbox,
    launching::{Forked, copy, descriptors, process_stdio, ready},
    state::{Container, Freezer, Phase, Process},
};
use crate::{
    container::create,
    document,
    fault::Fault,
    process::{
        launch::{self, Report},
        plan::ProcessPlan,
    },
    stdio, sys,
};

impl Sandbox {
    /// Starts a further process in a container, and answers its pid.
    pub async fn exec(
        self: Arc<Self>,
        id: String,
        exec: String,
        process: Vec<u8>,
        ports: messages::Stdio,
    ) -> Result<i32, Error> {
        let process: ProcessSpec = document::read(&process, "process")?;
        let mut plan = ProcessPlan::new(&process, "process")?;
        drop(process);
        plan.shared.inherit(&self.state().container(&id)?.shared);
        let Forked {
            pid,
            channel,
            pipes,
            mut ended,
        } = self
            .fork_exec(&id, &exec, &plan, &ports)
            .map_err(|error| self.unless_ending(&id, error))?;
        let _preparing = Preparing::new(self.state().container(&id)?);
        let started = async {
            let (master, streams) =
                tokio::try_join!(ready(&channel), stdio::connect(&self.config.dial, &ports))?;
            let terminal = copy(master, pipes, streams)?;
            match channel.report().await {
                Report::Fault(fault) => Err(fault),
                Report::Terminal(_) | Report::Ready | Report::Closed => Ok(terminal),
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
                Err(self.unless_ending(&id, fault.into()))
            }
        }
    }

    /// What made an exec fail; if its container is ending meanwhile, that. The kernel tells it in many ways: there is no
    /// such process to join, a pid namespace without its init has no memory for more, what is in it is killed.
    fn unless_ending(&self, id: &str, error: Error) -> Error {
        let mut state = self.state();
        let ending = state
            .container(id)
            .is_ok_and(|container| container.init.phase.has_ended() || is_exiting(container.init.pid));
        if ending { not_running(id) } else { error }
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
            return Err(not_running(id));
        }
        if container.freezer != Freezer::Thawed {
            return Err(Error::FailedPrecondition(format!("container {id} is paused")));
        }
        if container.execs.contains_key(exec) {
            return Err(Error::AlreadyExists(format!("process {exec} of container {id}")));
        }
        let (process_end, pipes) = process_stdio(plan, container.mappings.as_ref(), ports)?;
        let place = container.cgroup.for_exec(container.init.pid);
        let place = place.map_err(|error| Fault::system("open the container's cgroup", error))?;
        let (init, namespaces) = (&container.pidfd, &container.namespaces);
        let mut keep = descriptors(&process_end);
        keep.push(init.as_raw_fd());

        let fork = || {
            launch::fork_through(
                || create::approach(plan, init, namespaces),
                0,
                place.as_fd(),
                &keep,
                plan.shared.oom_score_adj,
                |reporter, ()| match create::join(plan, init, namespaces, &process_end, reporter) {
                    Err(fault) => fault,
                    Ok(never) => match never {},
                },
            )
        };
        let (pid, channel) = match &plan.shared.exec_affinity {
            Some(affinity) => affinity.start(fork),
            None => fork(),
        }?;
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
}

/// Whether a process, not reaped yet, has begun to exit: of an init the first that can be seen. See proc_pid_stat(5).
fn is_exiting(pid: i32) -> bool {
    const FLAGS: usize = 6;
    /// `linux/sched.h`.
    const PF_EXITING: u32 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // What follows the name, in which there can be anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let flags = fields.split_whitespace().nth(FLAGS);
    flags
        .and_then(|flags| flags.parse::<u32>().ok())
        .is_some_and(|flags| flags & PF_EXITING != 0)
}

fn not_running(id: &str) -> Error {
    Error::FailedPrecondition(format!("container {id} is not running"))
}

/// An exec on its way, which a pause waits for.
struct Preparing(watch::Sender<usize>);

impl Preparing {
    fn new(container: &Container) -> Self {
        container
            .preparing
            .send_modify(|count| *count = count.saturating_add(1));
        Self(container.preparing.clone())
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}
