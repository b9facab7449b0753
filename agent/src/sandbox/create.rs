//! Making a container.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
    time::Duration,
};

use husk_agent_protocol::messages;
use oci_spec::runtime::Spec;
use tokio::sync::watch;

use super::{
    Error, Sandbox,
    launching::{Forked, copy, descriptors, process_stdio, ready},
    limits,
    state::{Container, Freezer, Phase, Process, State},
};
use crate::{
    container::{cgroup::Cgroup, create, namespaces::Origin, plan::ContainerPlan, stage::Stage},
    document,
    fault::Fault,
    log,
    process::launch::{self, Reporter},
    stdio, sys,
};

/// How long a CreateContainer waits for a Setup that was sent before it.
const SETUP: Duration = Duration::from_secs(30);

impl Sandbox {
    /// Makes a container whose init process waits for [`Sandbox::start`], and answers its pid.
    pub async fn create(self: Arc<Self>, request: messages::CreateContainerRequest) -> Result<i32, Error> {
        let id = request.container_id;
        let ports = request.stdio.unwrap_or_default();
        let mut is_set_up = self.is_set_up.subscribe();
        if tokio::time::timeout(SETUP, is_set_up.wait_for(|done| *done))
            .await
            .is_err()
        {
            return Err(Error::FailedPrecondition(
                "the sandbox has not been set up".into(),
            ));
        }
        let spec: Spec = document::read(&request.spec_json, "")?;
        let volumes = self.sources(&request.volumes, &request.mirrored)?;
        let mut plan = ContainerPlan::new(
            &spec,
            (&self.config.share, &id),
            &volumes,
            &request.joined_namespaces,
        )?;
        plan.start_hooks.bundle = request.bundle;
        create::visit_mounts(&plan, &self.config.share, &request.submounts);
        drop(spec);
        let Forked {
            pid,
            channel,
            pipes,
            mut ended,
        } = self.fork_init(&id, &plan, &ports)?;
        let cgroup = Arc::clone(&self.state().container(&id)?.cgroup);
        let prepared = tokio::select! {
            prepared = async { tokio::try_join!(ready(&channel), stdio::connect(&self.config.dial, &ports)) } => prepared,
            () = cgroup.out_of_memory() => Err(too_little_memory(&plan)),
        };
        let prepared = match prepared {
            // Who was killed cannot say why.
            Err(_) if cgroup.was_out_of_memory() => Err(too_little_memory(&plan)),
            prepared => prepared,
        };
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
        if state.containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("container {id}")));
        }
        let stage = if plan.namespaces.need_stage() {
            Some(state.stage(plan)?)
        } else {
            None
        };
        let held = state.peers.take(plan)?;
        let Entry::Vacant(place) = state.containers.entry(id.to_owned()) else {
            return Err(Error::AlreadyExists(format!("container {id}")));
        };
        let mappings = stage.as_ref().and_then(|stage| stage.user.as_ref());
        let mappings = mappings.map(|(_, mappings)| mappings.clone());
        let (process_end, pipes) = process_stdio(&plan.process, mappings.as_ref(), ports)?;
        let cgroup = Cgroup::create(self.config.cgroups.join(id), &plan.resources.settings)?;
        let rules = plan.resources.devices.as_ref();
        let filter = rules.map(|rules| limits::attach_filter(&cgroup, rules, None));
        let filter = match filter.transpose() {
            Ok(filter) => filter,
            Err(fault) => {
                cgroup.remove_empty();
                return Err(fault.into());
            }
        };
        let score = plan.process.shared.oom_score_adj;
        let mut keep = descriptors(&process_end);
        keep.extend(held.mounts.values().map(AsRawFd::as_raw_fd));
        let run = |stage, reporter: &Reporter| match create::run(
            id,
            plan,
            stage,
            &held.mounts,
            &process_end,
            reporter,
        ) {
            Err(fault) => fault,
            Ok(never) => match never {},
        };
        let flags = plan.namespaces.clone_flags();
        let forked = match &stage {
            None => launch::fork(flags, cgroup.directory(), &keep, score, |reporter| {
                run(None, reporter)
            }),
            Some(stage) => {
                keep.extend(stage.joined.iter().map(|(_, pidfd)| pidfd.as_raw_fd()));
                keep.extend(stage.user.iter().map(|(namespace, _)| namespace.as_raw_fd()));
                launch::fork_through(
                    || stage.enter(plan),
                    flags,
                    cgroup.directory(),
                    &keep,
                    score,
                    |reporter, handed| run(Some((stage, handed)), reporter),
                )
            }
        };
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
            _peers: held.peers,
            namespaces: plan.namespaces.clone(),
            mappings,
            shared: plan.process.shared.clone(),
            oom_kills: 0,
            oom_watch,
            deleting: false,
            freezer: Freezer::Thawed,
            preparing: watch::Sender::new(0),
            standing: plan.resources.standing.clone(),
            filter,
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

impl State {
    /// The namespaces that have to be entered before `plan` can be carried out.
    fn stage(&mut self, plan: &ContainerPlan) -> Result<Stage, Error> {
        let mut joined = Vec::new();
        let mut user = None;
        for (id, kinds) in plan.namespaces.joined() {
            let container = self.container(id)?;
            if !container.init.phase.can_be_joined() || container.deleting {
                return Err(Error::FailedPrecondition(format!(
                    "container {id}, whose namespaces are to be joined, is not running"
                )));
            }
            if kinds & libc::CLONE_NEWUSER != 0 {
                user = container.mappings.clone();
                if user.is_none() {
                    return Err(Error::FailedPrecondition(format!(
                        "container {id} has no user namespace of its own to join"
                    )));
                }
            }
            joined.push((kinds, Arc::clone(&container.pidfd)));
        }
        let user = match (&plan.namespaces.user, user, &plan.mappings) {
            (Origin::Joined(id), Some(theirs), ours) => {
                if ours.as_ref().is_some_and(|ours| *ours != theirs) {
                    return Err(Fault::spec(
                        "linux.uidMappings",
                        format_args!("are not those of container {id}, whose user namespace is to be joined"),
                    )
                    .into());
                }
                let pidfd = joined
                    .iter()
                    .find(|(kinds, _)| kinds & libc::CLONE_NEWUSER != 0)
                    .map(|(_, pidfd)| pidfd.as_fd().try_clone_to_owned());
                let namespace = pidfd.transpose().map_err(|error| Error::System {
                    what: "join a user namespace",
                    error,
                })?;
                namespace.map(|namespace| (namespace, theirs))
            }
            (Origin::New, _, Some(mappings)) => Some((mappings.make_namespace()?, mappings.clone())),
            _ => None,
        };
        Ok(Stage { joined, user })
    }
}

fn too_little_memory(plan: &ContainerPlan) -> Fault {
    let mut settings = plan.resources.settings.iter();
    let limit = settings.find(|setting| setting.file == "memory.max");
    match limit {
        Some(limit) => Fault::spec(
            &limit.field,
            format_args!(
                "container init was OOM-killed ({} bytes are too little)",
                limit.value
            ),
        ),
        None => Fault::system("container init was OOM-killed", nix::errno::Errno::ENOMEM),
    }
}
