//! Making a container.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use husk_agent_protocol::messages;
use oci_spec::runtime::Spec;

use super::{
    Error, Sandbox,
    launching::{Forked, copy, descriptors, process_stdio, ready},
    state::{Container, Phase, Process},
};
use crate::{
    container::{cgroup::Cgroup, create, plan::ContainerPlan},
    fault::Fault,
    log,
    process::launch,
    stdio, sys,
};

/// How long a CreateContainer waits for a Setup that was sent before it.
const SETUP: Duration = Duration::from_secs(30);

impl Sandbox {
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
        create::visit_mounts(&plan);
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
}
