//! The agent: calls with deadlines, and answers that are checked before anybody believes them. The guest is hostile.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::Ipv4Addr,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use husk_agent_protocol::{
    limits::{
        AGENT_PORT, MAX_MESSAGE_LEN, MAX_MIRROR_UPDATE, MAX_PROCESSES, MAX_SPEC_LEN, MAX_STATS_LEN,
        is_valid_id,
    },
    messages::{self as wire, event::Kind as EventKind, failure::Kind as FailureKind},
    service::AgentClient,
};
use husk_vmm_protocol::vsock::StreamOffer;
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{Instant, timeout_at},
};
use ttrpc::{
    Code,
    asynchronous::{Client, ClientStreamReceiver, transport::Socket},
    context::Context,
};

use super::{console::printable, paced::Paced, vm::Machine};
use crate::{
    config::Timeouts,
    engine::{EngineError, ProcessInfo},
    host::{namespaces::Kind, stdio::stream_pair},
};

/// Highest exit status there is: 8 bits of exit code, or 128 and a signal's number.
const MAX_STATUS: u32 = 255;

/// What the agent told of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestInfo {
    /// The agent's version.
    pub agent_version: String,
    /// The release of the guest's kernel.
    pub kernel_release: String,
}

/// The agent's first answer, once it is there.
pub type Hello = Option<Result<GuestInfo, String>>;

/// What happened in the guest, checked for form: ids may name something, statuses are in range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The kernel killed a process for want of memory.
    Oom {
        /// The container.
        container: String,
    },
    /// A process ended.
    Exited {
        /// The container.
        container: String,
        /// The exec; `None`: the init process.
        exec: Option<String>,
        /// As a shell reports it.
        status: u32,
    },
}

/// The vsock ports of a process's streams; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StdioPorts {
    /// Port of stdin.
    pub stdin: u32,
    /// Port of stdout.
    pub stdout: u32,
    /// Port of stderr.
    pub stderr: u32,
}

/// The guest's agent, reached or not yet reached.
pub struct Agent {
    client: AgentClient,
    hello: watch::Receiver<Hello>,
    hello_by: Instant,
    /// How long a call may take once the agent has answered for the first time.
    patience: Duration,
    /// The connection broke.
    lost: AtomicBool,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("hello", &*self.hello.borrow())
            .finish_non_exhaustive()
    }
}

/// The events of a guest.
pub struct Events(ClientStreamReceiver<wire::Event>);

/// Offers the agent a connection and sends Setup on it, ahead of all other calls and without waiting for the guest.
///
/// # Errors
/// When the machine takes no offer: `BrokenPipe` when it is gone.
pub async fn connect(
    machine: &Machine,
    hostname: &str,
    network: wire::Network,
    timeouts: Timeouts,
) -> io::Result<(Agent, Events)> {
    let (own, guest) = stream_pair()?;
    machine.offer(StreamOffer::Listen(AGENT_PORT), guest).await?;
    let mut entropy = vec![0; 64];
    getrandom(&mut entropy)?;
    let request = wire::SetupRequest {
        hostname: hostname.to_owned(),
        share_tag: "share".into(),
        // KVM's clock gives a booted guest the host's time.
        realtime_ns: 0,
        entropy,
        network: Some(network).into(),
        stream_secret: machine.secret().bytes().to_vec(),
        ..Default::default()
    };
    greet(own, request, timeouts).await
}

/// Sends `request` on `own`, at whose other end the agent will be; see [`connect`].
///
/// # Errors
/// When the stream is closed.
pub async fn greet(
    own: UnixStream,
    request: wire::SetupRequest,
    timeouts: Timeouts,
) -> io::Result<(Agent, Events)> {
    let client = AgentClient::new(Client::new(Socket::new(Paced::new(own))));
    let (sender, hello) = watch::channel(None);
    let hello_by = Instant::now() + timeouts.boot;
    let setup = {
        let client = client.clone();
        async move {
            let answer = timeout_at(hello_by, client.setup(Context::default(), &request)).await;
            sender.send_replace(Some(match answer {
                Ok(Ok(answer)) => Ok(GuestInfo {
                    agent_version: text(&answer.agent_version, 128),
                    kernel_release: text(&answer.kernel_release, 128),
                }),
                Ok(Err(error)) => Err(format!(
                    "the guest's agent failed at Setup: {}",
                    error_text(&error)
                )),
                Err(_) => Err(format!(
                    "the guest's agent was silent for {} s",
                    timeouts.boot.as_secs()
                )),
            }));
        }
    };
    let mut setup = Box::pin(setup);
    // The first poll puts the request into the queue, so that it is the first on the wire.
    if futures::poll!(&mut setup).is_pending() {
        tokio::spawn(setup);
    }
    let events = client
        .events(Context::default(), &wire::Empty::default())
        .await
        .map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error_text(&error)))?;
    Ok((
        Agent {
            client,
            hello,
            hello_by,
            patience: timeouts.call,
            lost: AtomicBool::new(false),
        },
        Events(events),
    ))
}

/// What the guest has to know of a container's files in the share.
#[derive(Debug, Default)]
pub struct Shown {
    /// Place in the spec's mounts, and number, of each volume.
    pub volumes: Vec<(u32, u32)>,
    /// Places of those that are mounted from their mirrors.
    pub mirrored: Vec<u32>,
    /// Paths in the share on which something is mounted, at most `MAX_SUBMOUNTS`.
    pub submounts: Vec<Vec<u8>>,
}

impl Agent {
    /// The agent's first answer, when it comes. For a guest that never answers there is a deadline, the
    /// configured one.
    pub fn hello(&self) -> watch::Receiver<Hello> {
        self.hello.clone()
    }

    /// Whether a call failed because the connection broke, as it does with the machine's end.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Makes the network of the guest's containers what `network` says.
    ///
    /// # Errors
    /// What the guest could not do.
    pub async fn set_network(&self, network: wire::Network) -> Result<(), EngineError> {
        let request = wire::SetNetworkRequest {
            network: Some(network).into(),
            ..Default::default()
        };
        let answer = self
            .call("SetNetwork", self.client.set_network(context(), &request))
            .await?;
        failed(answer.failure.into_option())
    }

    /// Makes a container and its init process, stopped before its exec. It joins the namespaces `joined` of other
    /// containers. Tells its pid in the guest.
    ///
    /// # Errors
    /// What was wrong with the request, or with the agent.
    pub async fn create_container(
        &self,
        id: &str,
        spec: Vec<u8>,
        ports: StdioPorts,
        shown: Shown,
        joined: impl IntoIterator<Item = (Kind, String)>,
        bundle: &Path,
    ) -> Result<i32, EngineError> {
        check_length("config.json", &spec)?;
        let request = wire::CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json: spec,
            stdio: Some(stdio(ports)).into(),
            volumes: shown.volumes.into_iter().collect(),
            mirrored: shown.mirrored,
            submounts: shown.submounts,
            joined_namespaces: joined
                .into_iter()
                .map(|(kind, container)| (kind.name().to_owned(), container))
                .collect(),
            bundle: bundle.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let answer = self
            .call(
                "CreateContainer",
                self.client.create_container(context(), &request),
            )
            .await?;
        failed(answer.failure.into_option())?;
        pid("CreateContainer", answer.pid)
    }

    /// Lets the init process exec, once its hooks have run, which may take `in_hooks`.
    ///
    /// # Errors
    /// As [`Agent::create_container`].
    pub async fn start_container(&self, id: &str, in_hooks: Duration) -> Result<(), EngineError> {
        let request = wire::StartContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let answer = self
            .call_within(
                "StartContainer",
                self.patience + in_hooks,
                self.client.start_container(context(), &request),
            )
            .await?;
        failed(answer.failure.into_option())
    }

    /// Starts a further process. Tells its pid in the guest.
    ///
    /// # Errors
    /// As [`Agent::create_container`].
    pub async fn exec_process(
        &self,
        container: &str,
        exec: &str,
        process: Vec<u8>,
        ports: StdioPorts,
    ) -> Result<i32, EngineError> {
        check_length("the process", &process)?;
        let request = wire::ExecProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            process_json: process,
            stdio: Some(stdio(ports)).into(),
            ..Default::default()
        };
        let answer = self
            .call("ExecProcess", self.client.exec_process(context(), &request))
            .await?;
        failed(answer.failure.into_option())?;
        pid("ExecProcess", answer.pid)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when the process has ended.
    pub async fn signal(
        &self,
        container: &str,
        exec: Option<&str>,
        signal: u32,
        all: bool,
    ) -> Result<(), EngineError> {
        let request = wire::SignalProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call("SignalProcess", self.client.signal_process(context(), &request))
            .await
            .map(drop)
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// `NotFound` when the process has ended.
    pub async fn resize(
        &self,
        container: &str,
        exec: Option<&str>,
        columns: u16,
        rows: u16,
    ) -> Result<(), EngineError> {
        let request = wire::ResizeTerminalRequest {
            container_id: container.to_owned(),
            exec_id: exec.unwrap_or_default().to_owned(),
            columns: columns.into(),
            rows: rows.into(),
            ..Default::default()
        };
        self.call("ResizeTerminal", self.client.resize_terminal(context(), &request))
            .await
            .map(drop)
    }

    /// Freezes a container's processes; they stand still when this returns.
    ///
    /// # Errors
    /// `FailedPrecondition` unless its init process runs.
    pub async fn pause_container(&self, id: &str) -> Result<(), EngineError> {
        let request = wire::PauseContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call("PauseContainer", self.client.pause_container(context(), &request))
            .await
            .map(drop)
    }

    /// Thaws a container's processes.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it is frozen.
    pub async fn resume_container(&self, id: &str) -> Result<(), EngineError> {
        let request = wire::ResumeContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.call(
            "ResumeContainer",
            self.client.resume_container(context(), &request),
        )
        .await
        .map(drop)
    }

    /// Changes a container's limits: `resources` is an OCI `linux.resources` object.
    ///
    /// # Errors
    /// What is wrong with the document, by name; what the kernel refused.
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), EngineError> {
        check_length("linux.resources", &resources)?;
        let request = wire::UpdateContainerRequest {
            container_id: id.to_owned(),
            resources_json: resources,
            ..Default::default()
        };
        let answer = self
            .call(
                "UpdateContainer",
                self.client.update_container(context(), &request),
            )
            .await?;
        failed(answer.failure.into_option())
    }

    /// The files of a container's cgroup: name -> text, at most [`MAX_STATS_LEN`] bytes of both. They are the
    /// guest's words.
    ///
    /// # Errors
    /// When the agent fails or sends more.
    pub async fn container_stats(&self, id: &str) -> Result<BTreeMap<String, String>, EngineError> {
        const CALL: &str = "ContainerStats";
        let request = wire::ContainerStatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let answer = self
            .call(CALL, self.client.container_stats(context(), &request))
            .await?;
        let length: usize = answer
            .files
            .iter()
            .map(|(name, text)| name.len() + text.len())
            .sum();
        if length > MAX_STATS_LEN {
            let message = format!("it sent {length} bytes; at most {MAX_STATS_LEN} are allowed");
            return Err(unreliable(CALL, message));
        }
        Ok(answer.files.into_iter().collect())
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// When the agent fails or answers nonsense.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, EngineError> {
        const CALL: &str = "ListProcesses";
        let request = wire::ListProcessesRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let answer = self
            .call(CALL, self.client.list_processes(context(), &request))
            .await?;
        let nonsense = |message: &str| unreliable(CALL, message.to_owned());
        if answer.processes.len() > MAX_PROCESSES {
            return Err(nonsense("more processes than there can be"));
        }
        answer
            .processes
            .into_iter()
            .map(|process| match process {
                process if process.pid <= 0 => Err(nonsense("a process without a pid")),
                process if process.exec_id.is_empty() => Ok(ProcessInfo {
                    pid: process.pid,
                    exec: None,
                }),
                process if is_valid_id(&process.exec_id) => Ok(ProcessInfo {
                    pid: process.pid,
                    exec: Some(process.exec_id),
                }),
                _ => Err(nonsense("an exec id that cannot be one")),
            })
            .collect()
    }

    /// Joins a stream to a port of loopback in the guest: the one that the agent finds at `stream_port`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect_localhost(
        &self,
        tcp_port: u16,
        ipv6_first: bool,
        stream_port: u32,
    ) -> Result<(), EngineError> {
        let request = wire::ConnectLocalhostRequest {
            tcp_port: tcp_port.into(),
            ipv6_first,
            stream_port,
            ..Default::default()
        };
        let answer = self
            .call(
                "ConnectLocalhost",
                self.client.connect_localhost(context(), &request),
            )
            .await?;
        failed(answer.failure.into_option())
    }

    /// Has DNS queries to an address of loopback sent over the stream that the agent finds at `stream_port`.
    ///
    /// # Errors
    /// What the guest could not do.
    pub async fn forward_dns(&self, server: Ipv4Addr, stream_port: u32) -> Result<(), EngineError> {
        let request = wire::ForwardDnsRequest {
            address: server.octets().to_vec(),
            stream_port,
            ..Default::default()
        };
        let answer = self
            .call("ForwardDns", self.client.forward_dns(context(), &request))
            .await?;
        failed(answer.failure.into_option())
    }

    /// Removes a container in the guest. One that is not there is fine.
    ///
    /// # Errors
    /// When the agent fails.
    pub async fn delete_container(&self, id: &str) -> Result<(), EngineError> {
        let request = wire::DeleteContainerRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        match self
            .call(
                "DeleteContainer",
                self.client.delete_container(context(), &request),
            )
            .await
        {
            Ok(_) | Err(EngineError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes changes in the mirror of a volume, by one of the requests of [`mirror_updates`].
    ///
    /// # Errors
    /// When the agent fails, also at a part of it.
    pub async fn update_mirror(&self, request: &wire::UpdateMirrorRequest) -> Result<(), EngineError> {
        self.call("UpdateMirror", self.client.update_mirror(context(), request))
            .await
            .map(drop)
    }

    /// Forgets the mirror of a volume. One that is not there is fine.
    ///
    /// # Errors
    /// When the agent fails.
    pub async fn remove_mirror(&self, volume: u32) -> Result<(), EngineError> {
        let request = wire::RemoveMirrorRequest {
            volume,
            ..Default::default()
        };
        self.call("RemoveMirror", self.client.remove_mirror(context(), &request))
            .await
            .map(drop)
    }

    /// Asks the guest to end in order. Whether it does is seen by the machine's end.
    pub async fn shutdown(&self) {
        if let Err(error) = self.client.shutdown(context(), &wire::Empty::default()).await {
            // The answer may be lost in the reset.
            tracing::debug!(error = error_text(&error), "Shutdown was not answered");
        }
    }

    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, EngineError> {
        self.call_within(call, self.patience, answer).await
    }

    async fn call_within<T>(
        &self,
        call: &'static str,
        patience: Duration,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, EngineError> {
        let now = Instant::now();
        // A call may be sent ahead of the agent's first answer; its time starts with that.
        let from = if self.hello.borrow().is_some() {
            now
        } else {
            self.hello_by.max(now)
        };
        match timeout_at(from + patience, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if !matches!(error, ttrpc::Error::RpcStatus(_)) {
                    self.lost.store(true, Ordering::Relaxed);
                }
                Err(refused(call, &error))
            }
            Err(_) => Err(EngineError::Deadline {
                call,
                after: now.elapsed(),
                console_tail: String::new(),
            }),
        }
    }
}

/// Requests that make `changes` in the mirror of `volume`, each of a length that can be sent; at least one.
pub fn mirror_updates(volume: u32, changes: Vec<wire::MirrorChange>) -> Vec<wire::UpdateMirrorRequest> {
    let request = || wire::UpdateMirrorRequest {
        volume,
        ..Default::default()
    };
    let mut requests = Vec::new();
    let (mut next, mut length) = (request(), 0);
    for change in changes {
        let content = change.file.as_ref().map_or(0, |file| file.content.len());
        // With what the other fields take.
        let size = change.path.len() + change.to.len() + content + 128;
        if length + size > MAX_MIRROR_UPDATE && !next.changes.is_empty() {
            requests.push(std::mem::replace(&mut next, request()));
            length = 0;
        }
        length += size;
        next.changes.push(change);
    }
    requests.push(next);
    requests
}

impl Events {
    /// The next event. `Err` when there will be no more: why.
    ///
    /// # Errors
    /// When the agent hung up, or sent an event that cannot be one.
    pub async fn next(&mut self) -> Result<GuestEvent, String> {
        let event = self.0.recv().await.map_err(|error| error_text(&error))?;
        let event = event.ok_or_else(|| "it ended its events".to_owned())?;
        checked(event).ok_or_else(|| "it sent an event that makes no sense".to_owned())
    }
}

/// An event, if it can be one.
fn checked(event: wire::Event) -> Option<GuestEvent> {
    match event.kind? {
        EventKind::Oom(oom) => is_valid_id(&oom.container_id).then_some(GuestEvent::Oom {
            container: oom.container_id,
        }),
        EventKind::Exit(exit) => {
            let exec = match exit.exec_id {
                id if id.is_empty() => None,
                id if is_valid_id(&id) => Some(id),
                _ => return None,
            };
            is_valid_id(&exit.container_id).then_some(GuestEvent::Exited {
                container: exit.container_id,
                exec,
                status: exit.status.min(MAX_STATUS),
            })
        }
        _ => None,
    }
}

/// The error in a failure of the agent's.
fn failed(failure: Option<wire::Failure>) -> Result<(), EngineError> {
    let Some(failure) = failure else { return Ok(()) };
    let message = match text(&failure.message, MAX_MESSAGE_LEN) {
        message if message.is_empty() => "the guest's agent gave no reason".to_owned(),
        message => message,
    };
    Err(match failure.kind.enum_value() {
        Ok(FailureKind::NONE) => return Ok(()),
        Ok(FailureKind::COMMAND_NOT_FOUND) => EngineError::CommandNotFound(message),
        Ok(FailureKind::COMMAND_NOT_EXECUTABLE) => EngineError::CommandNotExecutable(message),
        Ok(FailureKind::INVALID_SPEC) => EngineError::InvalidSpec(message),
        Ok(FailureKind::SYSTEM) | Err(_) => EngineError::Guest(message),
    })
}

/// A pid, if it can be one.
fn pid(call: &'static str, pid: i32) -> Result<i32, EngineError> {
    if pid > 0 {
        return Ok(pid);
    }
    Err(unreliable(call, "it told no pid".into()))
}

/// The error when the agent cannot be relied on.
fn unreliable(call: &'static str, message: String) -> EngineError {
    EngineError::Agent {
        call,
        message,
        console_tail: String::new(),
    }
}

/// The error in a call that was refused.
fn refused(call: &'static str, error: &ttrpc::Error) -> EngineError {
    let message = error_text(error);
    match error {
        ttrpc::Error::RpcStatus(status) => match status.code.enum_value() {
            Ok(Code::NOT_FOUND) => EngineError::NotFound(message),
            Ok(Code::ALREADY_EXISTS) => EngineError::AlreadyExists(message),
            Ok(Code::FAILED_PRECONDITION) => EngineError::FailedPrecondition(message),
            Ok(Code::INVALID_ARGUMENT) => EngineError::InvalidArgument(message),
            _ => unreliable(call, message),
        },
        _ => unreliable(call, message),
    }
}

fn error_text(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => text(&status.message, MAX_MESSAGE_LEN),
        ttrpc::Error::RemoteClosed | ttrpc::Error::Eof | ttrpc::Error::LocalClosed => "it hung up".into(),
        other => text(&other.to_string(), MAX_MESSAGE_LEN),
    }
}

/// Text of the guest's that is safe to show, of at most `length` bytes.
fn text(text: &str, length: usize) -> String {
    let mut end = length.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    printable(text.get(..end).unwrap_or_default())
}

fn check_length(what: &str, json: &[u8]) -> Result<(), EngineError> {
    if json.len() > MAX_SPEC_LEN {
        let length = json.len();
        return Err(EngineError::InvalidSpec(format!(
            "{what} has {length} bytes; at most {MAX_SPEC_LEN} are supported"
        )));
    }
    Ok(())
}

fn stdio(ports: StdioPorts) -> wire::Stdio {
    wire::Stdio {
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        ..Default::default()
    }
}

/// Without a deadline on the wire: the agent's work is not to be torn off half-way. Ours is in [`Agent::call`].
fn context() -> Context {
    Context::default()
}

pub(super) fn getrandom(buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is valid for its length; up to 256 bytes are never returned in part.
    let length = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if usize::try_from(length) == Ok(buffer.len()) {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
#[path = "agent_test.rs"]
mod tests;
