//! The sandbox's network: wired when it starts, followed from then on.
//!
//! Engines wire at different times: before the sandbox is there, in a hook while its first container is made, between
//! that and its start, or while it runs. So the network namespace is looked at before the machine starts, once more
//! where an engine may rely on it ([`Network::catch_up`]), and whenever the kernel tells of a change.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use husk_agent_protocol::{
    limits::MAX_NICS,
    messages::{self as wire, network::Setting},
};
use husk_netlink::Socket;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use super::{EngineError, SandboxConfig, StartError, lock, places::Places, record::Record, undo::Undo};
use crate::{
    guest::agent::Agent,
    host::{
        namespaces::{Id, Kind, Namespace},
        netns,
        network::{self as host, Followed, NetworkError, Size, Tap, view::View},
    },
};

/// How long the last look at the network may take when the sandbox ends.
const LAST: Duration = Duration::from_secs(10);

/// What the record says of the network: whose NICs are wired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wired {
    /// Where the namespace is.
    path: PathBuf,
    /// Which it is: there may be another by now.
    id: Id,
}

impl Wired {
    /// Takes back what was done to its NICs, when the machine is gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&self) -> io::Result<()> {
        match Namespace::open(&self.path, Kind::Network) {
            Ok(namespace) if namespace.id == self.id => host::clear_dead(&namespace),
            // It is gone, and its NICs with it.
            _ => Ok(()),
        }
    }
}

/// A network whose machine is not there yet.
#[derive(Debug)]
pub(super) struct Plugged {
    pub namespace: Namespace,
    pub taps: Vec<Tap>,
    network: host::Network,
    view: View,
}

/// Finds or makes the sandbox's network namespace, and wires what is in it.
pub(super) async fn plug(
    config: &SandboxConfig,
    places: &Places,
    dir: &Path,
    record: &mut Record,
    undo: &mut Undo,
) -> Result<Plugged, StartError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| StartError::Host { what, source }
    };
    places
        .step("network")
        .map_err(failed("cannot make the network"))?;
    // What cannot be joined is refused, with the field's name, when the container is made.
    let given = config.network.as_ref().and_then(|path| {
        let namespace = Namespace::open(path, Kind::Network).ok()?;
        (!netns::is_hosts(namespace.id)).then_some((path.clone(), namespace))
    });
    let namespace = match given {
        Some((path, namespace)) => {
            let id = namespace.id;
            record.network = Some(Wired { path, id });
            record
                .save(dir)
                .map_err(failed("cannot write the sandbox's record"))?;
            namespace
        }
        None => netns::make().map_err(failed("cannot make a network namespace"))?,
    };
    let size = Size {
        spare: config.operator.network.spare_nics.map(usize::from),
        most: MAX_NICS,
        queues: config.operator.network.queue_pairs.min(config.vcpus).max(1),
        vhost: config.operator.network.vhost,
    };
    let own = namespace.try_clone().map_err(failed("cannot make the network"))?;
    let opened = spawn_blocking(move || {
        let opened = host::Network::open(&own, size);
        if !matches!(opened, Ok(_) | Err(NetworkError::Taken(_))) {
            if let Err(error) = host::clear(&own) {
                tracing::error!(%error, "the network namespace could not be cleared");
            }
        }
        opened
    });
    let opened = opened.await.map_err(io::Error::other);
    let opened = opened.map_err(failed("cannot make the network"))?;
    let (network, taps, view) = match opened {
        Ok(opened) => opened,
        Err(NetworkError::Host { what, source }) => return Err(StartError::Host { what, source }),
        Err(error) => return Err(StartError::InvalidArgument(error.to_string())),
    };
    let own = namespace.try_clone().map_err(failed("cannot make the network"))?;
    undo.push("let go of the NICs", move || host::clear(&own));
    Ok(Plugged {
        namespace,
        taps,
        network,
        view,
    })
}

impl Plugged {
    /// For the guest.
    pub fn to_wire(&self) -> wire::Network {
        to_wire(&self.network, &self.view)
    }
}

/// The network of a sandbox that runs.
#[derive(Debug)]
pub(super) struct Network {
    orders: Mutex<Option<mpsc::Sender<Order>>>,
    follower: Mutex<Option<JoinHandle<()>>>,
}

/// To look at the network and tell when the guest has it.
type Order = oneshot::Sender<Result<(), EngineError>>;

impl Network {
    /// Follows the network from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn follow(plugged: Plugged, agent: Arc<Agent>) -> io::Result<Self> {
        let monitor = host::monitor(&plugged.namespace)?;
        // SAFETY: the socket owns its descriptor and keeps it.
        let monitor = unsafe { AsyncFd::register_with_interest(monitor, Interest::READABLE) }?;
        let (sender, orders) = mpsc::channel(1);
        let follower = Follower {
            network: Some(plugged.network),
            told: plugged.view,
            said: String::new(),
            agent,
        };
        Ok(Self {
            orders: Mutex::new(Some(sender)),
            follower: Mutex::new(Some(tokio::spawn(follower.run(orders, monitor)))),
        })
    }

    /// Returns when the guest has the network as it is now.
    ///
    /// # Errors
    /// When there is no NIC left in the machine, or the guest cannot do it.
    pub async fn catch_up(&self) -> Result<(), EngineError> {
        let gone = || EngineError::FailedPrecondition("the sandbox's network is gone".into());
        let orders = lock(&self.orders).clone().ok_or_else(gone)?;
        let (sender, answer) = oneshot::channel();
        orders.send(sender).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Follows it no more. Returns when nobody does anything to the NICs any more.
    pub async fn stop(&self) {
        lock(&self.orders).take();
        let follower = lock(&self.follower).take();
        if let Some(follower) = follower {
            if timeout(LAST, follower).await.is_err() {
                tracing::error!("the sandbox's network is still being followed");
            }
        }
    }
}

/// Who follows it.
struct Follower {
    /// Elsewhere while somebody looks at it.
    network: Option<host::Network>,
    /// What the guest knows.
    told: View,
    /// The last problem that was logged.
    said: String,
    agent: Arc<Agent>,
}

impl Follower {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>, monitor: AsyncFd<Socket>) {
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    None => return,
                    Some(order) => {
                        let done = self.catch_up().await;
                        // Who has asked may not wait any more.
                        let _ = order.send(done);
                    }
                },
                changed = monitor.readable() => {
                    let drained = changed.and_then(|mut changed| {
                        changed.clear_ready();
                        monitor.get_ref().drain()
                    });
                    if let Err(error) = drained {
                        tracing::error!(%error, "the network's changes are not followed any more");
                        while let Some(order) = orders.recv().await {
                            let _ = order.send(self.catch_up().await);
                        }
                        return;
                    }
                    let problem = self.catch_up().await.err();
                    let problem = problem.map(|error| super::container::chain(&error)).unwrap_or_default();
                    if problem != self.said && !problem.is_empty() {
                        tracing::warn!("{problem}");
                    }
                    self.said = problem;
                }
            }
        }
    }

    async fn catch_up(&mut self) -> Result<(), EngineError> {
        let failed = |source| EngineError::Host {
            what: "cannot look at the sandbox's network".into(),
            source,
        };
        let mut network = self
            .network
            .take()
            .ok_or_else(|| failed(io::Error::other("it was lost")))?;
        let looked = spawn_blocking(move || {
            let followed = network.follow(MAX_NICS);
            (network, followed)
        });
        let (network, followed) = looked.await.map_err(|error| failed(io::Error::other(error)))?;
        let network = self.network.insert(network);
        let Followed { view, left_out } = followed.map_err(refused)?;
        if view != self.told {
            let wire = to_wire(network, &view);
            self.agent.set_network(wire).await?;
            // What it could not do is asked for again, by whoever looks next.
            self.told = view;
        }
        left_out.map_or(Ok(()), |error| Err(refused(error)))
    }
}

fn refused(error: NetworkError) -> EngineError {
    match error {
        NetworkError::Host { what, source } => EngineError::Host { what, source },
        other => EngineError::FailedPrecondition(other.to_string()),
    }
}

fn to_wire(network: &host::Network, view: &View) -> wire::Network {
    let nics = view.nics.iter().filter_map(|nic| {
        Some(wire::network::Nic {
            slot: u32::try_from(network.slot_of(nic.index)?).ok()?,
            index: nic.index,
            name: nic.name.clone(),
            mac: nic.mac.to_vec(),
            mtu: nic.mtu,
            queue_length: nic.queue_length,
            flags: nic.flags,
            address_mode: nic.address_mode.into(),
            settings: nic
                .settings
                .iter()
                .map(|(name, value)| Setting {
                    name: name.clone(),
                    value: *value,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        })
    });
    wire::Network {
        nics: nics.collect(),
        addresses: view.addresses.clone(),
        routes: view.routes.clone(),
        neighbours: view.neighbours.clone(),
        rules: view.rules.clone(),
        ..Default::default()
    }
}
