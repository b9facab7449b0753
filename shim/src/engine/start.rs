//! The start of a sandbox, top to bottom, each step with its undo.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use husk_agent_protocol::limits::is_valid_id;
use tokio::{
    sync::{OnceCell, mpsc::UnboundedSender, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    Event, Sandbox, SandboxConfig, StartError,
    cgroups::{Cgroups, explain},
    cleanup::remove_leftovers,
    hooks::Lives,
    localhost::Localhost,
    lock,
    mirrors::Mirrors,
    network::{self, Network},
    places::Places,
    record::{self, Record},
    sandbox::{EXEC_GRACE, Ended, Parts},
    standins::StandIns,
    status::{self, Keeper, Status},
    table::{After, Table},
    undo::Undo,
    volumes::Volumes,
};
use crate::{
    guest::{
        agent::{self, Agent, Events, Hello},
        vm::{self, LaunchError, Machine},
    },
    host::{
        cgroup::Cgroup,
        mount::unmount_below,
        pid::Identity,
        ringlog::RingLog,
        share,
        statedir::{self, Claim, StateDir},
    },
};

/// Longest hostname, in bytes (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

/// How long somebody else may have the sandbox's directory.
const TAKEN: Duration = Duration::from_secs(3);

/// How long the machine may take to tell of its own end after the agent was lost with it.
const EXPLANATION: Duration = Duration::from_secs(2);

/// The recipe.
pub(super) async fn start(
    config: SandboxConfig,
    events: UnboundedSender<Event>,
    places: Places,
) -> Result<Arc<Sandbox>, StartError> {
    let hostname = check(&config)?;
    let mut undo = Undo::default();

    // The directory, and with it the right to the id.
    let dir = claim(&config, &places).await?;
    let path = dir.path().to_owned();
    undo.push("remove the sandbox's directory", move || {
        statedir::remove(dir.path())
    });
    let failed = |what: &str| {
        let what = format!("{what} ({})", path.display());
        move |source| StartError::Host { what, source }
    };

    // What takes the sandbox away when we are not there to do it.
    let mut record = Record {
        version: record::VERSION,
        ..Record::default()
    };
    let recorded = path.clone();
    undo.push("remove the record", move || Record::remove(&recorded));
    places
        .step("record")
        .and_then(|()| {
            record.engine = Some(Identity::of(std::process::id())?);
            record.save(&path)
        })
        .map_err(failed("cannot write the sandbox's record"))?;

    // What an operator sees of it: our log, and the guest's console.
    let operator = &config.operator;
    let (log, console) = (config.log.clone(), RingLog::default());
    let (our_log, guest_console) = (log.clone(), console.clone());
    undo.push("remove the logs", move || {
        // Both, whatever becomes of the first.
        our_log.close().and(guest_console.close())
    });
    places
        .step("logs")
        .and_then(|()| log.open(&path.join(status::LOG), operator.log.kept))
        .and_then(|()| console.open(&path.join(status::CONSOLE), operator.log.console_kept))
        .map_err(failed("cannot make the sandbox's logs"))?;

    // The share.
    let share = path.join("share");
    let shared = share.clone();
    undo.push("remove the share", move || {
        unmount_below(&shared)?;
        share::remove_mount_points(&shared)
    });
    places
        .step("share")
        .and_then(|()| share::make(&share))
        .map_err(failed("cannot make the share"))?;

    // The cgroup that its processes are born in; our own moves there meanwhile.
    let cgroups = Cgroups::make(&config, &places, &path, &mut record, &mut undo).await?;

    // The network, with what its NICs are plugged into.
    let mut plugged = network::plug(&config, &places, &path, &mut record, &mut undo).await?;

    // The machine and its file server, side by side.
    places
        .step("launch")
        .map_err(failed("cannot launch the machine"))?;
    let launched = vm::launch(
        vm::Launch {
            programs: &config.programs,
            kvm: &places.kvm,
            share: &share,
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel_params: &config.kernel_params,
            console,
            cgroup: cgroups.own(),
            taps: std::mem::take(&mut plugged.taps),
        },
        #[cfg(test)]
        |ends| {
            if let Some(player) = &places.player {
                player.play(ends);
            }
        },
    );
    let (launched, moved) = tokio::join!(launched, cgroups.move_in());
    let machine = launched.map_err(launch_failed)?;
    if let Err(error) = moved {
        machine.kill();
        machine.ended().await;
        return Err(error);
    }
    let machine = Arc::new(machine);

    // The agent: it finds Setup waiting when it dials.
    let connected = async {
        record.vmm = Some(machine.vmm().identity());
        record.fsd = Some(machine.fsd().identity());
        places.step("pids").and_then(|()| record.save(&path))?;
        places.step("agent")?;
        let namespace = plugged.namespace.try_clone()?;
        let connected =
            agent::connect(&machine, &hostname, plugged.to_wire(), config.operator.timeouts).await?;
        let (agent, events) = connected;
        let agent = Arc::new(agent);
        let localhost = Localhost::open(plugged.namespace.try_clone()?, &machine, &agent);
        let network = Network::follow(plugged, Arc::clone(&agent))?;
        io::Result::Ok((agent, events, network, localhost, namespace))
    }
    .await;
    let (agent, guest_events, network, localhost, namespace) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            // A machine that is gone can tell why.
            let gone = error.kind() == io::ErrorKind::BrokenPipe;
            let patience = if gone { EXPLANATION } else { Duration::ZERO };
            let ended = machine.ended();
            tokio::pin!(ended);
            let mut own = timeout(patience, &mut ended).await.ok();
            if own.is_none() {
                machine.kill();
                // As it is killed here, that it was is no reason.
                own = Some(ended.await).filter(|own| gone && !own.contains("was killed by SIGKILL"));
            }
            let console_tail = machine.console_tail();
            return Err(match own {
                Some(reason) => StartError::Guest {
                    reason: cgroups.explain(reason).0,
                    console_tail,
                },
                None => failed("cannot reach the guest")(error),
            });
        }
    };

    let mirrors = Mirrors::new(config.operator.volumes.watched.clone(), Arc::clone(&agent));
    let table = Arc::new(Mutex::new(Table::new(events)));
    let described = Status {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        created: status::seconds(SystemTime::now()),
        containers: Vec::new(),
    };
    let keeper = Keeper::begin(&path, described, Arc::clone(&table));
    undo.push("remove the status", move || keeper.close());
    let (ended_sender, ended) = watch::channel(None);
    let stopping = Arc::new(OnceCell::new());
    let watcher = Watcher {
        machine: Arc::clone(&machine),
        table: Arc::clone(&table),
        hello: agent.hello(),
        ended: ended_sender,
        stopping: Arc::clone(&stopping),
        cgroup: cgroups.own(),
    };
    tokio::spawn(watcher.watch(guest_events));
    let (limited, mut hello) = (cgroups.clone(), agent.hello());
    tokio::spawn(async move {
        let booted = hello.wait_for(Option::is_some).await.is_ok();
        if booted {
            limited.booted().await;
        }
    });
    Ok(Arc::new(Sandbox::assemble(Parts {
        dir: path,
        machine,
        agent,
        network,
        localhost,
        table,
        record: Arc::new(Mutex::new(record)),
        standins: Arc::new(StandIns::new(config.programs.standin, namespace)),
        cgroups,
        lives: Lives::default(),
        volumes: Arc::new(Volumes::new(&share, mirrors)),
        undo: Mutex::new(undo),
        ended,
        stopping,
        operator: config.operator,
        places,
    })))
}

/// Checks what was asked for; gives the hostname.
fn check(config: &SandboxConfig) -> Result<String, StartError> {
    for (what, id) in [("namespace", &config.namespace), ("sandbox id", &config.id)] {
        if !is_valid_id(id) {
            return Err(StartError::InvalidArgument(format!(
                "the {what} {id:?} is not valid: letters, digits and _.+- are allowed, at most 128, no - . or + first"
            )));
        }
    }
    let hostname = match config.hostname.as_str() {
        "" => config.id.chars().take(MAX_HOSTNAME).collect(),
        name if name.len() > MAX_HOSTNAME || name.contains('\0') => {
            return Err(StartError::InvalidArgument(format!(
                "the hostname {name:?} is not valid: at most {MAX_HOSTNAME} bytes are allowed"
            )));
        }
        name => name.to_owned(),
    };
    Ok(hostname)
}

/// Takes the sandbox's directory; what an engine that died left in it is removed first.
async fn claim(config: &SandboxConfig, places: &Places) -> Result<StateDir, StartError> {
    let path = StateDir::path_of(&places.run, &config.namespace, &config.id);
    let failed = |source| StartError::Host {
        what: format!("cannot make the directory {}", path.display()),
        source,
    };
    // Who cleans up after an earlier one, or is about to end, has it for a moment.
    let end = Instant::now() + TAKEN;
    let claim = loop {
        match StateDir::claim(&places.run, &config.namespace, &config.id).map_err(failed)? {
            Claim::Taken if Instant::now() < end => sleep(Duration::from_millis(50)).await,
            claim => break claim,
        }
    };
    match claim {
        Claim::New(dir) => Ok(dir),
        Claim::Taken => Err(StartError::AlreadyExists(config.id.clone())),
        Claim::Stale(dir) => {
            tracing::warn!(path = %path.display(), "removing what is left of an earlier sandbox");
            let old = path.clone();
            let removed = tokio::task::spawn_blocking(move || remove_leftovers(&old)).await;
            let poststop = removed
                .map_err(io::Error::other)
                .and_then(|result| result)
                .map_err(failed)?;
            for poststop in poststop {
                poststop.run().await;
            }
            Ok(dir)
        }
    }
}

fn launch_failed(error: LaunchError) -> StartError {
    match error {
        LaunchError::Config(error) => StartError::InvalidArgument(error.to_string()),
        LaunchError::Kvm { ref source, .. }
        | LaunchError::Image { ref source, .. }
        | LaunchError::Resource { ref source, .. }
        | LaunchError::Execute { ref source, .. } => {
            let source = io::Error::new(source.kind(), source.to_string());
            StartError::Host {
                what: error.to_string(),
                source,
            }
        }
    }
}

/// Watches a sandbox to its end.
struct Watcher {
    machine: Arc<Machine>,
    table: Arc<Mutex<Table>>,
    hello: watch::Receiver<Hello>,
    ended: watch::Sender<Option<Ended>>,
    stopping: Arc<OnceCell<()>>,
    cgroup: Option<Arc<Cgroup>>,
}

impl Watcher {
    async fn watch(mut self, events: Events) {
        let mut pump = tokio::spawn(pump(events, Arc::clone(&self.table)));
        let machine = Arc::clone(&self.machine);
        let machine_end = machine.ended();
        tokio::pin!(machine_end);
        let agent_lost = agent_lost(&mut self.hello, &mut pump);
        let reason = tokio::select! {
            biased;
            reason = &mut machine_end => reason,
            fault = agent_lost => match timeout(EXPLANATION, &mut machine_end).await {
                Ok(reason) => reason,
                Err(_) => {
                    machine.kill();
                    let own = machine_end.await;
                    let (_, starved) = explain(self.cgroup.as_deref(), own.clone());
                    // Of a machine that ended by this it says nothing; one may also be slow to be taken down.
                    if own.contains("was killed by SIGKILL") && !starved {
                        fault
                    } else {
                        own
                    }
                }
            },
        };
        // What the agent said last is still to be read.
        if !pump.is_finished() {
            let _ = timeout(EXPLANATION, &mut pump).await;
            pump.abort();
        }
        let (reason, starved) = if self.stopping.initialized() {
            ("it was shut down".to_owned(), false)
        } else {
            explain(self.cgroup.as_deref(), reason)
        };
        let console_tail = machine.console_tail();
        if self.stopping.initialized() {
            tracing::info!(reason, "the sandbox has ended");
        } else {
            tracing::warn!(reason, console = console_tail, "the sandbox has ended by itself");
        }
        {
            let mut table = lock(&self.table);
            if starved {
                table.machine_starved();
            }
            table.machine_ended(&reason, SystemTime::now());
            table.send(Event::SandboxEnded {
                reason: reason.clone(),
                console_tail: console_tail.clone(),
            });
        }
        self.ended.send_replace(Some(Ended { reason, console_tail }));
    }
}

/// Waits until the agent cannot be relied on; tells why.
async fn agent_lost(hello: &mut watch::Receiver<Hello>, pump: &mut JoinHandle<String>) -> String {
    let mut answer = hello.clone();
    let silent = async move {
        match answer.wait_for(Option::is_some).await.map(|hello| hello.clone()) {
            Ok(Some(Err(reason))) => reason,
            _ => std::future::pending().await,
        }
    };
    tokio::pin!(silent);
    tokio::select! {
        biased;
        reason = &mut silent => reason,
        reason = pump => {
            let reason = reason.unwrap_or_else(|error| error.to_string());
            let reason = format!("the guest's agent was lost: {reason}");
            if matches!(*hello.borrow(), Some(Ok(_))) {
                return reason;
            }
            // Setup fails by the same loss in a moment, and says more.
            timeout(EXPLANATION, silent).await.unwrap_or(reason)
        }
    }
}

/// Carries events of the guest into the table, until there are no more; tells why.
async fn pump(mut events: Events, table: Arc<Mutex<Table>>) -> String {
    loop {
        let event = match events.next().await {
            Ok(event) => event,
            Err(reason) => return reason,
        };
        let after = lock(&table).guest_event(event, SystemTime::now());
        if let After::Held(id) = after {
            let table = Arc::clone(&table);
            tokio::spawn(async move {
                sleep(EXEC_GRACE).await;
                lock(&table).release(&id, SystemTime::now());
            });
        }
    }
}

/// Whether the agent has said its first word.
pub(super) fn has_answered(agent: &Agent) -> bool {
    agent.hello().borrow().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::agent::GuestInfo;

    /// What is told of an agent whose connection is gone, and that has answered so before or after.
    async fn told(before: Hello, after: Hello) -> String {
        let (sender, mut hello) = watch::channel(before);
        let mut pump = tokio::spawn(async { "it hung up".to_owned() });
        let answer = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            sender.send_replace(after);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            reason = agent_lost(&mut hello, &mut pump) => reason,
            () = answer => String::new(),
        }
    }

    #[tokio::test]
    async fn a_setup_that_fails_by_the_loss_of_the_agent_is_told_and_not_the_loss() {
        let (answered, failed) = (Ok(GuestInfo::default()), Err("failed at Setup".to_owned()));
        let lost = "the guest's agent was lost: it hung up";
        for _ in 0..20 {
            assert_eq!(told(None, Some(failed.clone())).await, "failed at Setup");
            assert_eq!(told(Some(failed.clone()), None).await, "failed at Setup");
        }
        assert_eq!(told(Some(answered.clone()), Some(answered)).await, lost);
        assert_eq!(told(None, None).await, lost);
    }
}
