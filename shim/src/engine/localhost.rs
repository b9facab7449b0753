//! Localhost in the sandbox's network namespace: connections made to it on the host reach the guest, and DNS queries
//! made to it in the guest reach the host.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::oneshot,
    task::{AbortHandle, JoinHandle},
    time::timeout,
};

use super::{EngineError, container::chain, lock, streams::offer, undo::Undo};
use crate::{
    guest::{agent::Agent, proof::Unproven, vm::Machine},
    host::{
        dns,
        localhost::{Guest, Localhost as Taken},
        namespaces::Namespace,
    },
};

/// Most bytes that are read of a resolv.conf.
const LONGEST: u64 = 64 << 10;

/// How long a stream that the agent says it has dialled may take to prove that.
const PROOF: Duration = Duration::from_secs(10);

/// Localhost of a sandbox.
#[derive(Debug)]
pub(super) struct Localhost {
    namespace: Arc<Namespace>,
    way: Way,
    connections: Mutex<Option<Carrying>>,
    /// The servers whose queries are forwarded; `None` while that is being arranged.
    servers: Mutex<BTreeMap<Ipv4Addr, Option<AbortHandle>>>,
    /// The files that are the containers' `/etc/resolv.conf`.
    resolv_confs: Arc<Mutex<BTreeMap<String, PathBuf>>>,
}

/// What carries connections.
#[derive(Debug)]
struct Carrying {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// How streams get to the guest.
#[derive(Clone, Debug)]
struct Way {
    machine: Arc<Machine>,
    agent: Arc<Agent>,
}

/// The stream that the agent says it has dialled.
async fn proven(stream: Unproven) -> Result<UnixStream, EngineError> {
    let proven = timeout(PROOF, stream.proven()).await;
    proven
        .unwrap_or_else(|late| Err(late.into()))
        .map_err(|source| EngineError::Host {
            what: "a stream of the guest's cannot be used".into(),
            source,
        })
}

impl Guest for Way {
    fn connect(&self, to: SocketAddr) -> impl Future<Output = io::Result<UnixStream>> + Send {
        let way = self.clone();
        async move {
            let connected = async {
                let (port, stream) = offer(&way.machine).await?;
                way.agent.connect_localhost(to.port(), to.is_ipv6(), port).await?;
                proven(stream).await
            };
            let connected: Result<_, EngineError> = connected.await;
            connected.map_err(|error| io::Error::other(chain(&error)))
        }
    }
}

impl Localhost {
    /// Takes connections to localhost in `namespace` from now on. Where that cannot be, the log tells so, and a sandbox
    /// does without.
    pub fn open(namespace: Namespace, machine: &Arc<Machine>, agent: &Arc<Agent>) -> Self {
        let way = Way {
            machine: Arc::clone(machine),
            agent: Arc::clone(agent),
        };
        let connections = match Taken::take(&namespace) {
            Ok(taken) => {
                let (stop, stopped) = oneshot::channel();
                let task = tokio::spawn(taken.carry(way.clone(), stopped));
                Some(Carrying { stop, task })
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "connections to localhost in the sandbox's network namespace will not reach the guest, so \
                     port-forward will not work; it needs Linux 5.9 with CONFIG_BPF_SYSCALL, CAP_BPF and CAP_NET_ADMIN"
                );
                None
            }
        };
        Self {
            namespace: Arc::new(namespace),
            way,
            connections: Mutex::new(connections),
            servers: Mutex::default(),
            resolv_confs: Arc::default(),
        }
    }

    /// Says which file is a container's `/etc/resolv.conf`, and looks at it.
    pub async fn resolve_by(&self, container: &str, resolv_conf: Option<&Path>, undo: &mut Undo) {
        let Some(path) = resolv_conf else { return };
        lock(&self.resolv_confs).insert(container.to_owned(), path.to_owned());
        let (files, id) = (Arc::clone(&self.resolv_confs), container.to_owned());
        undo.push("forget the container's resolv.conf", move || {
            lock(&files).remove(&id);
            Ok(())
        });
        self.look(container).await;
    }

    /// Looks at a container's resolv.conf: has the queries to loopback servers that it names forwarded. An engine may
    /// have changed it since the container was made.
    pub async fn look(&self, container: &str) {
        let path = lock(&self.resolv_confs).get(container).cloned();
        let Some(path) = path else { return };
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a resolv.conf cannot be read");
                return;
            }
        };
        for server in dns::loopback_nameservers(&text) {
            if !self.reserve(server) {
                continue;
            }
            match self.forward(server).await {
                Ok(forwarding) => drop(lock(&self.servers).insert(server, Some(forwarding))),
                Err(error) => {
                    lock(&self.servers).remove(&server);
                    let waited = matches!(error, EngineError::Deadline { .. } | EngineError::Host { .. });
                    let error = chain(&error);
                    tracing::warn!(error, %server, "DNS queries of the guest are not forwarded");
                    if waited {
                        // So would the others, one after the other, and the container with them.
                        return;
                    }
                }
            }
        }
    }

    /// Whether a server is still to be arranged for, by the caller.
    fn reserve(&self, server: Ipv4Addr) -> bool {
        let mut servers = lock(&self.servers);
        let wanted = match servers.get(&server) {
            None => true,
            Some(None) => false,
            Some(Some(forwarding)) => forwarding.is_finished(),
        };
        if wanted {
            servers.insert(server, None);
        }
        wanted
    }

    async fn forward(&self, server: Ipv4Addr) -> Result<AbortHandle, EngineError> {
        let (port, stream) = offer(&self.way.machine).await?;
        self.way.agent.forward_dns(server, port).await?;
        let stream = proven(stream).await?;
        let namespace = Arc::clone(&self.namespace);
        let serving = tokio::spawn(async move {
            let served = dns::serve(stream, SocketAddr::from((server, dns::PORT)), namespace).await;
            if let Err(error) = served {
                tracing::warn!(%error, %server, "DNS queries of the guest are not forwarded any more");
            }
        });
        Ok(serving.abort_handle())
    }

    /// Lets go of localhost: when this returns, no listener and no connection of it is left in the namespace.
    pub async fn stop(&self) {
        self.stop_forwarding();
        let connections = lock(&self.connections).take();
        if let Some(Carrying { stop, task }) = connections {
            // It may have ended already.
            let _ = stop.send(());
            if let Err(error) = task.await {
                tracing::error!(%error, "connections to localhost were not carried to their end");
            }
        }
    }

    fn stop_forwarding(&self) {
        for forwarding in std::mem::take(&mut *lock(&self.servers)).into_values().flatten() {
            forwarding.abort();
        }
    }
}

impl Drop for Localhost {
    fn drop(&mut self) {
        self.stop_forwarding();
        // With its sender the task ends, if it has not.
    }
}

/// The beginning of a regular file.
fn read(path: &Path) -> io::Result<String> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
