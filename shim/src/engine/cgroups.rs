//! The cgroups of a sandbox on the host: one for its own processes, and one for the stand-in of each further container.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::Deserialize;

use super::{
    EngineError, Sandbox, SandboxConfig, StartError, container::chain, places::Places, record::Record,
    standins::update, undo::Undo,
};
use crate::host::{
    cgroup::{self, Cgroup, CgroupError, Driver, Hierarchies, Limits, Plan, Wanted},
    child::Child,
};

/// Where a sandbox's processes are on the host, and what they may use.
#[derive(Clone, Debug, Default)]
pub struct CgroupConfig {
    /// `linux.cgroupsPath` of the first container.
    pub path: Option<String>,
    /// The id of the first container.
    pub container: String,
    /// The engine says that systemd makes cgroups.
    pub by_systemd: bool,
    /// What all of them may use together.
    pub limits: Limits,
    /// The limits are for all containers that will be, not for the first alone.
    pub whole: bool,
}

/// Those of one sandbox.
#[derive(Clone, Debug)]
pub(super) struct Cgroups {
    hierarchies: Hierarchies,
    driver: Driver,
    config: CgroupConfig,
    /// That of the sandbox's own processes; `None`: they are where the engine was started.
    own: Option<Arc<Cgroup>>,
    /// Other containers than the first have come, and its limits are not the sandbox's any more.
    lifted: Arc<AtomicBool>,
}

impl Cgroups {
    /// Makes the sandbox's own cgroup, with its limits but for that of CPU time, which would make the boot slow.
    pub async fn make(
        config: &SandboxConfig,
        places: &Places,
        dir: &Path,
        record: &mut Record,
        undo: &mut Undo,
    ) -> Result<Self, StartError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| StartError::Host { what, source }
        };
        let driver = config.operator.cgroup.driver;
        let mut this = Self {
            hierarchies: Hierarchies::default(),
            driver,
            config: config.cgroup.clone(),
            own: None,
            lifted: Arc::default(),
        };
        if driver == Driver::None {
            return Ok(this);
        }
        this.hierarchies = match &places.cgroups {
            Some(hierarchies) => hierarchies.clone(),
            None => Hierarchies::of_this_host().map_err(failed("cannot tell the host's cgroups"))?,
        };
        if this.hierarchies.0.is_empty() {
            tracing::debug!("the host has no cgroups");
            return Ok(this);
        }
        let plan = this
            .plan(config.cgroup.path.as_deref(), &config.cgroup.container)
            .map_err(|error| StartError::InvalidArgument(error.to_string()))?;
        let Some(plan) = plan else { return Ok(this) };
        let trace = plan.trace();
        record.cgroups.push(trace.clone());
        undo.push("remove the cgroup", move || {
            if let Err(error) = cgroup::move_back() {
                tracing::debug!(%error, "husk's own process is still in the sandbox's cgroup");
            }
            trace.remove()
        });
        record
            .save(dir)
            .map_err(failed("cannot write the sandbox's record"))?;
        places.step("cgroup").map_err(failed("cannot make the cgroup"))?;
        let (limits, _) = config.cgroup.limits.split_cpu();
        let made = tokio::task::spawn_blocking(move || plan.make(std::process::id(), &limits));
        let made = made
            .await
            .map_err(io::Error::other)
            .map_err(failed("cannot make the cgroup"))?;
        this.own = Some(Arc::new(made.map_err(not_made)?));
        Ok(this)
    }

    fn plan(&self, path: Option<&str>, container: &str) -> Result<Option<Plan>, CgroupError> {
        let by_systemd = self.config.by_systemd;
        let wanted = Wanted::read(path, container, self.driver, by_systemd, cgroup::systemd_runs())?;
        Ok(wanted.map(|wanted| Plan::new(&self.hierarchies, &wanted)))
    }

    /// That of the sandbox's own processes.
    pub fn own(&self) -> Option<Arc<Cgroup>> {
        self.own.clone()
    }

    /// Moves this process in.
    pub async fn move_in(&self) -> Result<(), StartError> {
        let Some(own) = self.own() else { return Ok(()) };
        let hierarchies = self.hierarchies.clone();
        let moved = tokio::task::spawn_blocking(move || cgroup::move_in(&hierarchies, &own)).await;
        let moved = moved
            .map_err(io::Error::other)
            .map_err(|source| StartError::Host {
                what: "cannot move husk's own process into the cgroup".into(),
                source,
            })?;
        moved.map_err(not_made)
    }

    /// The guest has booted: from now on its CPU time is limited, too.
    pub async fn booted(&self) {
        if !self.lifted.load(Ordering::Relaxed) {
            let (_, cpu) = self.config.limits.split_cpu();
            self.set(cpu).await;
        }
    }

    /// A container other than the first has come: limits that were the first one's no longer are the sandbox's.
    async fn joined(&self) {
        let limits = &self.config.limits;
        if !self.config.whole && !self.lifted.swap(true, Ordering::Relaxed) {
            self.set(Limits {
                cpu: limits.cpu.map(|(_, period)| (Limits::UNLIMITED, period)),
                pids: limits.pids.map(|_| Limits::UNLIMITED),
                ..Limits::default()
            })
            .await;
        }
    }

    /// A container's limits were changed: those of the host follow, if they are this container's.
    pub async fn updated(&self, container: &str, resources: &[u8]) {
        let others = self.lifted.load(Ordering::Relaxed);
        if self.config.whole || others || self.config.container != container {
            return;
        }
        if let Ok(resources) = serde_json::from_slice::<Resources>(resources) {
            self.set(resources.into_limits()).await;
        }
    }

    async fn set(&self, limits: Limits) {
        let limited = self.config.limits != Limits::default();
        if let (Some(own), true) = (self.own(), limited && limits != Limits::default()) {
            // What fails is told in the log.
            let _ = tokio::task::spawn_blocking(move || own.set(&limits)).await;
        }
    }

    /// Adds to the reason of a machine's end that the host killed it for want of memory, if it did.
    pub fn explain(&self, reason: String) -> (String, bool) {
        explain(self.own.as_deref(), reason)
    }
}

/// See [`Cgroups::explain`].
pub(super) fn explain(cgroup: Option<&Cgroup>, reason: String) -> (String, bool) {
    let killed = reason.contains("was killed by SIGKILL");
    match cgroup.filter(|cgroup| killed && cgroup.oom_kills() > 0) {
        None => (reason, false),
        Some(cgroup) => {
            let path = cgroup.path();
            let text = format!(
                "{reason}: the host's kernel was out of memory for it; raise the memory limit of the cgroup {} or of \
                 those above it to the machine's memory and what husk needs besides",
                path.display()
            );
            (text, true)
        }
    }
}

/// What of an update is of the host's concern.
#[derive(Deserialize)]
struct Resources {
    cpu: Option<Cpu>,
    pids: Option<Pids>,
}

#[derive(Deserialize)]
struct Cpu {
    quota: Option<i64>,
    period: Option<u64>,
    shares: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
}

#[derive(Deserialize)]
struct Pids {
    limit: Option<i64>,
}

impl Resources {
    fn into_limits(self) -> Limits {
        let mut limits = Limits::default();
        if let Some(cpu) = self.cpu {
            limits.cpu = cpu.quota.map(|quota| Limits::cpu_with_room(quota, cpu.period));
            limits.cpu_shares = cpu.shares.filter(|shares| *shares > 0);
            limits.cpus = cpu.cpus.filter(|list| !list.is_empty());
            limits.mems = cpu.mems.filter(|list| !list.is_empty());
        }
        let pids = self.pids.and_then(|pids| pids.limit);
        limits.pids = pids.map(Limits::pids_with_room);
        limits
    }
}

fn not_made(error: CgroupError) -> StartError {
    match error {
        CgroupError::Host { what, source } => StartError::Host {
            what: format!("cannot {what}"),
            source,
        },
        error => StartError::InvalidArgument(error.to_string()),
    }
}

/// What a stand-in has to do with cgroups.
pub(super) enum Home {
    /// It is born in this one, or where the engine came from.
    Born(Option<Arc<Cgroup>>),
    /// It is born in the first, and systemd moves it into the second.
    Moved(Option<Arc<Cgroup>>, Plan),
}

impl Sandbox {
    /// The cgroup for a container's stand-in: the sandbox's own if it is that, or one that is made for it.
    pub(super) async fn home(
        &self,
        id: &str,
        path: Option<&str>,
        undo: &mut Undo,
    ) -> Result<Home, EngineError> {
        let cgroups = &self.parts.cgroups;
        let Some(own) = cgroups.own() else {
            return Ok(Home::Born(None));
        };
        let planned = cgroups
            .plan(path, id)
            .map_err(|error| EngineError::InvalidSpec(error.to_string()))?;
        let Some(plan) = planned.filter(|plan| !own.is(plan)) else {
            return Ok(Home::Born(Some(own)));
        };
        cgroups.joined().await;
        let trace = plan.trace();
        let (record, dir, recorded) = (
            Arc::clone(&self.parts.record),
            self.parts.dir.clone(),
            trace.clone(),
        );
        undo.push("remove the container's cgroup", move || {
            recorded.remove()?;
            update(
                &record,
                |record| record.cgroups.retain(|known| *known != recorded),
                &dir,
            )
        });
        let by_systemd = trace.unit.is_some();
        self.record_cgroup(trace)?;
        self.step("container-cgroup")?;
        if by_systemd {
            return Ok(Home::Moved(Some(own), plan));
        }
        Ok(Home::Born(Some(Arc::new(make(plan, 0).await?))))
    }

    /// Moves a stand-in to where systemd wants it.
    pub(super) async fn move_home(&self, plan: Plan, pid: u32) -> Result<(), EngineError> {
        let made = make(plan, pid).await?;
        made.entry().take(pid).map_err(|source| EngineError::Host {
            what: format!(
                "cannot move the stand-in into the cgroup {}",
                made.path().display()
            ),
            source,
        })
    }

    fn record_cgroup(&self, trace: cgroup::Trace) -> Result<(), EngineError> {
        let saved = update(
            &self.parts.record,
            |record| record.cgroups.push(trace),
            &self.parts.dir,
        );
        saved.map_err(|source| EngineError::Host {
            what: "cannot write the sandbox's record".into(),
            source,
        })
    }

    /// The kernel is to choose the machine among the first, as far as one of its containers wants to be.
    pub(super) fn offer_to_oom(&self, score: Option<i32>) {
        if let Some(score) = score {
            if let Err(error) = raise_oom_score(self.parts.machine.vmm(), score) {
                tracing::warn!(%error, score, "process.oomScoreAdj of the VMM is left as it is");
            }
        }
    }
}

async fn make(plan: Plan, first: u32) -> Result<Cgroup, EngineError> {
    let made = tokio::task::spawn_blocking(move || plan.make(first, &Limits::default())).await;
    let failed = |source| EngineError::Host {
        what: "cannot make the container's cgroup".into(),
        source,
    };
    made.map_err(io::Error::other)
        .map_err(failed)?
        .map_err(|error| match error {
            CgroupError::Host { .. } => failed(io::Error::other(chain(&error))),
            error => EngineError::InvalidSpec(error.to_string()),
        })
}

fn raise_oom_score(process: &Child, score: i32) -> io::Result<()> {
    let path = PathBuf::from(format!("/proc/{}/oom_score_adj", process.pid()));
    let now: i32 = fs::read_to_string(&path)?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    if score > now {
        fs::write(path, score.min(1000).to_string())?;
    }
    Ok(())
}
