//! The stand-ins of a sandbox: one for each container and each running exec, attended to their end.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::watch, time::timeout};

use super::{
    EngineError, Exit, Sandbox,
    container::chain,
    lock,
    record::Record,
    table::{KILLED, Table, name},
    undo::Undo,
};
use crate::{
    guest::{agent::Agent, vm::Machine},
    host::{
        cgroup::Cgroup,
        namespaces::{self, Kind, Namespace, Neighbour, Plan, Wanted},
        standin::{Happening, Role, StandIn, StandInError},
    },
};

/// How long a guest may take to end a container that was killed, before the machine is ended.
pub(super) const OBEY: Duration = Duration::from_secs(30);

/// How long a killed stand-in may take to be gone.
const GONE: Duration = Duration::from_secs(3);

/// Those of the containers, and what they share.
#[derive(Debug)]
pub(super) struct StandIns {
    program: PathBuf,
    containers: Mutex<BTreeMap<String, Arc<StandIn>>>,
    /// The sandbox's network namespace.
    network: Namespace,
}

impl StandIns {
    /// None yet; they will run `program` in the network namespace `network`.
    pub fn new(program: PathBuf, network: Namespace) -> Self {
        Self {
            program,
            containers: Mutex::default(),
            network,
        }
    }

    /// What `linux.namespaces` means here.
    ///
    /// # Errors
    /// `InvalidSpec` when one cannot be had.
    pub fn plan(&self, wanted: &[Wanted]) -> Result<Plan, EngineError> {
        let neighbours: Vec<Neighbour> = lock(&self.containers)
            .iter()
            .map(|(id, standin)| Neighbour {
                id: id.clone(),
                pid: standin.pid(),
            })
            .collect();
        namespaces::plan(wanted, &neighbours, Some(&self.network))
            .map_err(|error| EngineError::InvalidSpec(chain(&error)))
    }

    /// The namespaces of a container's stand-in that are not this process's by nature.
    ///
    /// # Errors
    /// When it has ended.
    pub fn namespaces(&self, container: &str) -> io::Result<Vec<OwnedFd>> {
        let standin = self
            .of(container)
            .ok_or_else(|| io::Error::other("it has no stand-in"))?;
        [Kind::Network, Kind::Ipc, Kind::Uts]
            .into_iter()
            .map(|kind| standin.namespace(kind).map(|namespace| namespace.fd))
            .collect()
    }

    fn of(&self, container: &str) -> Option<Arc<StandIn>> {
        lock(&self.containers).get(container).cloned()
    }

    async fn start(
        &self,
        container: &str,
        exec: Option<&str>,
        plan: Plan,
        cgroup: Option<Arc<Cgroup>>,
    ) -> Result<Arc<StandIn>, StandInError> {
        let name = match exec {
            None => container.to_owned(),
            Some(exec) => format!("{container} exec {exec}"),
        };
        let role = Role {
            program: &self.program,
            name: &name,
            join: plan.join,
            unshare: plan.unshare,
            cgroup,
        };
        Ok(Arc::new(StandIn::start(role).await?))
    }
}

/// What attends to a stand-in.
struct Attendant {
    standin: Arc<StandIn>,
    agent: Arc<Agent>,
    machine: Arc<Machine>,
    table: Arc<Mutex<Table>>,
    container: String,
    exec: Option<String>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Sandbox {
    /// The network namespace of the sandbox on the host: the one that is wired.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn network(&self) -> io::Result<Namespace> {
        self.parts.standins.network.try_clone()
    }

    /// Starts the stand-in of a container in the making. Tells its pid.
    pub(super) async fn stand_in(
        &self,
        id: &str,
        plan: Plan,
        cgroup: Option<Arc<Cgroup>>,
        undo: &mut Undo,
    ) -> Result<u32, EngineError> {
        let failed = |source| EngineError::Host {
            what: format!("cannot make the stand-in of container {id}"),
            source,
        };
        let standins = &self.parts.standins;
        let standin = standins
            .start(id, None, plan, cgroup)
            .await
            .map_err(|error| failed(io::Error::other(chain(&error))))?;
        let (pid, identity) = (standin.pid(), standin.identity());
        lock(&standins.containers).insert(id.to_owned(), standin);
        let (all, record, dir, own_id) = (
            Arc::clone(standins),
            Arc::clone(&self.parts.record),
            self.parts.dir.clone(),
            id.to_owned(),
        );
        undo.push("end the stand-in", move || {
            lock(&all.containers).remove(&own_id);
            if !identity.kill(GONE)? {
                let text = format!("stand-in {pid} does not end");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            update(
                &record,
                |record| record.standins.retain(|known| *known != identity),
                &dir,
            )
        });
        update(
            &self.parts.record,
            |record| record.standins.push(identity),
            &self.parts.dir,
        )
        .map_err(failed)?;
        self.table().set_host_pid(id, None, pid);
        Ok(pid)
    }

    /// Starts the stand-in of an exec, in its container's namespaces. Without one the container's stands for it.
    pub(super) async fn exec_stand_in(&self, container: &str, exec: &str) -> Option<Arc<StandIn>> {
        let standins = &self.parts.standins;
        let first = standins.of(container)?;
        self.table().set_host_pid(container, Some(exec), first.pid());
        let started = async {
            let plan = Plan {
                join: standins.namespaces(container)?,
                ..Plan::default()
            };
            let started = standins.start(container, Some(exec), plan, first.cgroup()).await;
            started.map_err(|error| io::Error::other(chain(&error)))
        };
        match started.await {
            Ok(standin) => {
                self.table().set_host_pid(container, Some(exec), standin.pid());
                Some(standin)
            }
            Err(error) => {
                // As it does when the container is just ending.
                tracing::warn!(%error, container, exec, "the exec has no stand-in");
                None
            }
        }
    }

    /// Attends to a container's stand-in from now on.
    pub(super) fn attend_container(&self, id: &str) {
        if let Some(standin) = self.parts.standins.of(id) {
            self.attend(standin, id, None);
        }
    }

    /// Attends to a stand-in from now on.
    pub(super) fn attend(&self, standin: Arc<StandIn>, container: &str, exec: Option<&str>) {
        // One that is gone already needs no stand-in.
        let Ok(exit) = self.table().watch(container, exec) else {
            return;
        };
        let attendant = Attendant {
            standin,
            agent: Arc::clone(&self.parts.agent),
            machine: Arc::clone(&self.parts.machine),
            table: Arc::clone(&self.parts.table),
            container: container.to_owned(),
            exec: exec.map(str::to_owned),
            exit,
        };
        tokio::spawn(attendant.attend());
    }
}

impl Attendant {
    async fn attend(mut self) {
        loop {
            let happening = tokio::select! {
                biased;
                status = ended(&mut self.exit) => Err(status),
                happening = self.standin.next() => Ok(happening),
            };
            match happening {
                Err(status) => return self.standin.end(status).await,
                Ok(Happening::Signal(signal)) => self.signal(signal.unsigned_abs(), false).await,
                Ok(Happening::Killed(signal)) => return self.killed(signal.unsigned_abs()).await,
            }
        }
    }

    /// The stand-in was killed: whom it stands for is.
    async fn killed(mut self, signal: u32) {
        let exec = self.exec.as_deref();
        let name = name(&self.container, exec);
        tracing::info!("{name} was killed on the host by signal {signal}");
        lock(&self.table).set_killed(&self.container, exec, 128_u32.saturating_add(signal));
        self.signal(libc::SIGKILL.unsigned_abs(), exec.is_none()).await;
        let ended = timeout(OBEY, self.exit.wait_for(Option::is_some)).await.is_ok();
        if !ended && self.exec.is_none() {
            tracing::error!("the guest does not end {name}, which was killed: the machine is killed");
            self.machine.kill();
        }
    }

    async fn signal(&self, signal: u32, all: bool) {
        let exec = self.exec.as_deref();
        if let Err(error) = self.agent.signal(&self.container, exec, signal, all).await {
            // It may just have ended.
            tracing::debug!(%error, signal, "{} was not signalled", name(&self.container, exec));
        }
    }
}

/// Waits for the end of a process; tells its status.
async fn ended(exit: &mut watch::Receiver<Option<Exit>>) -> u32 {
    let exit = exit.wait_for(Option::is_some).await;
    exit.ok()
        .and_then(|exit| *exit)
        .map_or(KILLED, |exit| exit.status)
}

/// Changes the record, if the sandbox still has one.
pub(super) fn update(
    record: &Mutex<Record>,
    change: impl FnOnce(&mut Record),
    dir: &std::path::Path,
) -> io::Result<()> {
    let mut record = lock(record);
    change(&mut record);
    record.save(dir)
}
