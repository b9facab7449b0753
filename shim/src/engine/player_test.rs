//! A machine for tests: two scripts in place of the programs, and an agent in this process that they would carry.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use husk_agent_protocol::{
    limits::{AGENT_PORT, MAX_STATS_LEN},
    messages::{self as wire, failure::Kind},
    service,
};
use husk_vmm_protocol::{config::MachineConfig, control::Report, vsock::StreamOffer};
use nix::{
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send},
        stat::Mode,
    },
    unistd::mkfifo,
};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext, transport::Listener};

use super::Programs;
use crate::{guest::vm::ChildEnds, test_help};

/// How the player behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Character {
    /// As an agent should.
    #[default]
    Good,
    /// Setup fails.
    NoSetup,
    /// Containers have no pid.
    NoPid,
    /// Sends an event that cannot be.
    Nonsense,
    /// The VMM tells that it failed, and ends.
    Failing,
    /// Never dials.
    Silent,
    /// Answers everything but DeleteContainer.
    Clinging,
    /// Answers everything but SignalProcess.
    Deaf,
    /// Refuses to pause and to kill, and sends more statistics than it may.
    Stubborn,
    /// Answers everything but PauseContainer and ForwardDns.
    Sluggish,
}

/// The files of a machine for tests, and who plays it.
#[derive(Clone, Debug)]
pub struct Player {
    dir: PathBuf,
    character: Character,
    calls: Arc<Mutex<Vec<String>>>,
    config: Arc<Mutex<Option<MachineConfig>>>,
    network: tokio::sync::watch::Sender<wire::Network>,
}

impl Player {
    pub fn new(dir: &Path, character: Character) -> Self {
        let script = |name: &str, text: &str| test_help::script(&dir.join(name), text);
        // The VMM ends when a line is written to its kernel, which is a FIFO.
        script(
            "husk-vmm",
            "echo the vmm is here >&2; echo Booting >&8; read word <&6; exit 0",
        );
        script("husk-fsd", "exec sleep 1000");
        // As the real one, but for its rights: it tells SIGTERM only, and ends as it is told.
        script(
            "husk-standin",
            r#"trap 'printf "i\017\000\000\000" >&3' TERM
            dd bs=16 count=1 <&3 >/dev/null 2>&1
            printf r >&3
            dd bs=16 count=1 <&3 2>/dev/null >"$0.$$" &
            while kill -0 $! 2>/dev/null; do wait $!; done
            set -- $(od -An -tu1 "$0.$$")
            exit ${2:-137}"#,
        );
        mkfifo(&dir.join("vmlinux"), Mode::S_IRWXU).unwrap();
        fs::write(dir.join("initramfs.cpio"), "").unwrap();
        Self {
            dir: dir.to_owned(),
            character,
            calls: Arc::default(),
            config: Arc::default(),
            network: Default::default(),
        }
    }

    pub fn programs(&self) -> Programs {
        Programs {
            vmm: self.dir.join("husk-vmm"),
            fsd: self.dir.join("husk-fsd"),
            standin: self.dir.join("husk-standin"),
            kernel: self.dir.join("vmlinux"),
            initramfs: self.dir.join("initramfs.cpio"),
        }
    }

    /// The calls that reached the agent.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// The network that the agent was told last.
    pub fn network(&self) -> tokio::sync::watch::Receiver<wire::Network> {
        self.network.subscribe()
    }

    /// The configuration that the VMM was given.
    pub fn config(&self) -> MachineConfig {
        self.config.lock().unwrap().clone().unwrap()
    }

    /// Makes the kernel's FIFO such that opening it waits for nobody.
    pub fn hold(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.dir.join("vmlinux"))
            .unwrap()
    }

    /// Plays the machine behind `ends`. Called while the engine launches it.
    pub fn play(&self, ends: ChildEnds) {
        let player = self.clone();
        let kernel = self.hold();
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || player.run(ends, kernel, &runtime));
    }

    fn run(self, ends: ChildEnds, kernel: File, runtime: &tokio::runtime::Handle) {
        let ChildEnds {
            control,
            vsock,
            console,
        } = ends;
        let mut packet = [0; 4096];
        let length = recv(control.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        *self.config.lock().unwrap() = Some(MachineConfig::decode(&packet[..length]).unwrap());
        File::from(console).write_all(b"Linux version test\n").unwrap();
        if self.character == Character::Failing {
            report(
                &control,
                &Report::Failed {
                    message: "no such machine".into(),
                },
            );
            (&kernel).write_all(b"end\n").unwrap();
            return;
        }
        report(&control, &Report::Running);
        let machine = Arc::new(Machine {
            control: Mutex::new(Some(control)),
            kernel,
            streams: Mutex::default(),
            secret: Mutex::default(),
            gone: Notify::new(),
        });
        while let Some((offer, stream)) = next_offer(&vsock) {
            match offer {
                StreamOffer::Listen(AGENT_PORT) if self.character != Character::Silent => {
                    let agent = FakeAgent::new(self.clone(), Arc::clone(&machine));
                    serve_apart(stream, agent, runtime);
                }
                StreamOffer::Listen(port) => drop(machine.streams.lock().unwrap().insert(port, stream)),
                StreamOffer::Connect(_) => panic!("nobody connects to the guest"),
            }
        }
    }
}

fn report(control: &OwnedFd, report: &Report) {
    let packet = serde_json::to_vec(report).unwrap();
    send(control.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
}

fn next_offer(vsock: &OwnedFd) -> Option<(StreamOffer, UnixStream)> {
    let mut packet = [0; 64];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<()>(
        vsock.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .ok()?;
    let length = message.bytes;
    let fd = message.cmsgs().unwrap().find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    })?;
    // SAFETY: the kernel just gave us this descriptor.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    Some((StreamOffer::decode(&packet[..length]).unwrap(), stream))
}

/// Serves as long as the test's runtime lives. On one thread, which takes calls in the order in which they were sent.
fn serve_apart(stream: UnixStream, agent: FakeAgent, test: &tokio::runtime::Handle) {
    let (mut lives, over) = tokio::sync::oneshot::channel::<()>();
    test.spawn(async move { lives.closed().await });
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap().block_on(async {
            tokio::select! {
                () = serve(stream, Arc::new(agent)) => {}
                _ = over => {}
            }
        });
    });
}

async fn serve(stream: UnixStream, agent: Arc<FakeAgent>) {
    let gone = Arc::clone(&agent.machine);
    let gone = &gone.gone;
    stream.set_nonblocking(true).unwrap();
    let connection = stream.try_clone().unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    let once = futures::stream::iter([Ok(stream)]);
    let forever = futures::StreamExt::chain(once, futures::stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(forever))
        .register_service(service::create_agent(agent));
    server.start().await.unwrap();
    // With the machine goes the connection.
    gone.notified().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    connection.shutdown(std::net::Shutdown::Both).unwrap();
}

struct Machine {
    control: Mutex<Option<OwnedFd>>,
    kernel: File,
    streams: Mutex<HashMap<u32, UnixStream>>,
    /// What the agent was told that streams begin with.
    secret: Mutex<Vec<u8>>,
    gone: Notify,
}

impl Machine {
    /// The guest's end of a stream: as the VMM hands it to whoever dials the port.
    fn dial(&self, port: u32) -> Option<UnixStream> {
        if port == 0 {
            return None;
        }
        for _ in 0..500 {
            if let Some(mut stream) = self.streams.lock().unwrap().remove(&port) {
                stream.write_all(&self.secret.lock().unwrap()).unwrap();
                return Some(stream);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("port {port} was not offered");
    }
}

struct FakeAgent {
    player: Player,
    machine: Arc<Machine>,
    commands: Mutex<HashMap<String, (String, wire::Stdio)>>,
    frozen: Mutex<HashSet<String>>,
    events: UnboundedSender<wire::Event>,
    pending: Mutex<Option<UnboundedReceiver<wire::Event>>>,
}

impl FakeAgent {
    fn new(player: Player, machine: Arc<Machine>) -> Self {
        let (events, pending) = unbounded_channel();
        Self {
            player,
            machine,
            commands: Mutex::default(),
            frozen: Mutex::default(),
            events,
            pending: Mutex::new(Some(pending)),
        }
    }

    fn called(&self, call: &str, id: &str) {
        self.player
            .calls
            .lock()
            .unwrap()
            .push(format!("{call} {id}").trim().to_owned());
    }

    /// What the command word of a process means.
    fn run(&self, container: &str, exec: &str, command: &str, stdio: wire::Stdio) {
        let exited = {
            let (events, container, exec) = (self.events.clone(), container.to_owned(), exec.to_owned());
            move |status| {
                let exit = wire::event::Exit {
                    container_id: container,
                    exec_id: exec,
                    status,
                    ..Default::default()
                };
                let kind = Some(wire::event::Kind::Exit(exit));
                events
                    .send(wire::Event {
                        kind,
                        ..Default::default()
                    })
                    .unwrap();
            }
        };
        match command {
            "sleep" => {}
            "oom" => {
                let oom = wire::event::Oom {
                    container_id: container.to_owned(),
                    ..Default::default()
                };
                let kind = Some(wire::event::Kind::Oom(oom));
                self.events
                    .send(wire::Event {
                        kind,
                        ..Default::default()
                    })
                    .unwrap();
                exited(137);
            }
            // `cat` leaves its stderr undialled; `tee` writes what it reads there, too.
            "cat" | "tee" => {
                let machine = Arc::clone(&self.machine);
                let tee = command == "tee";
                std::thread::spawn(move || {
                    let (input, output) = (machine.dial(stdio.stdin_port), machine.dial(stdio.stdout_port));
                    let mut bytes = Vec::new();
                    input.unwrap().read_to_end(&mut bytes).unwrap();
                    let mut output = output.unwrap();
                    exited(0);
                    // Output is drained on its own, after the exit.
                    std::thread::sleep(Duration::from_millis(50));
                    output.write_all(&bytes).unwrap();
                    if tee {
                        machine
                            .dial(stdio.stderr_port)
                            .unwrap()
                            .write_all(&bytes)
                            .unwrap();
                    }
                });
            }
            code => exited(code.strip_prefix("exit").unwrap().parse().unwrap()),
        }
    }
}

fn command(json: &[u8], pointer: &str) -> String {
    let value: Value = serde_json::from_slice(json).unwrap();
    value.pointer(pointer).and_then(Value::as_str).unwrap().to_owned()
}

fn failure(command: &str) -> protobuf::MessageField<wire::Failure> {
    if command != "nope" {
        return None.into();
    }
    let message = "exec: \"nope\": executable file not found in $PATH".into();
    Some(wire::Failure {
        kind: Kind::COMMAND_NOT_FOUND.into(),
        message,
        ..Default::default()
    })
    .into()
}

fn status(code: ttrpc::Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text.to_owned()))
}

#[async_trait]
impl service::Agent for FakeAgent {
    async fn setup(
        &self,
        _: &TtrpcContext,
        request: wire::SetupRequest,
    ) -> ttrpc::Result<wire::SetupResponse> {
        self.called("Setup", &request.hostname);
        assert_eq!((request.share_tag.as_str(), request.entropy.len()), ("share", 64));
        self.player.network.send_replace(request.network.unwrap());
        *self.machine.secret.lock().unwrap() = request.stream_secret;
        if self.player.character == Character::NoSetup {
            return Err(status(ttrpc::Code::INTERNAL, "no share\u{1b}[2J"));
        }
        if self.player.character == Character::Nonsense {
            self.events.send(wire::Event::default()).unwrap();
        }
        Ok(wire::SetupResponse {
            agent_version: "1".into(),
            kernel_release: "6".into(),
            ..Default::default()
        })
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: wire::SetNetworkRequest,
    ) -> ttrpc::Result<wire::SetNetworkResponse> {
        let network = request.network.unwrap();
        let mut response = wire::SetNetworkResponse::new();
        if network.nics.iter().any(|nic| nic.name == "broken0") {
            response.failure = Some(wire::Failure {
                kind: Kind::SYSTEM.into(),
                message: "network: NIC broken0: it is broken".into(),
                ..Default::default()
            })
            .into();
        }
        self.player.network.send_replace(network);
        Ok(response)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: wire::CreateContainerRequest,
    ) -> ttrpc::Result<wire::CreateContainerResponse> {
        let mirrored: Vec<String> = request.mirrored.iter().map(u32::to_string).collect();
        self.called(
            "CreateContainer",
            &[vec![request.container_id.clone()], mirrored].concat().join(" "),
        );
        let command = command(&request.spec_json, "/process/args/0");
        let failure = failure(&command);
        if failure.is_none() {
            let stdio = request.stdio.into_option().unwrap_or_default();
            self.commands
                .lock()
                .unwrap()
                .insert(request.container_id, (command, stdio));
        }
        let pid = if self.player.character == Character::NoPid {
            0
        } else {
            7
        };
        Ok(wire::CreateContainerResponse {
            pid,
            failure,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: wire::StartContainerRequest,
    ) -> ttrpc::Result<wire::StartContainerResponse> {
        let id = request.container_id;
        self.called("StartContainer", &id);
        let (command, stdio) = self.commands.lock().unwrap().get(&id).cloned().unwrap();
        self.run(&id, "", &command, stdio);
        Ok(wire::StartContainerResponse::default())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: wire::ExecProcessRequest,
    ) -> ttrpc::Result<wire::ExecProcessResponse> {
        self.called("ExecProcess", &request.exec_id);
        let command = command(&request.process_json, "/args/0");
        let failure = failure(&command);
        if failure.is_none() {
            let stdio = request.stdio.into_option().unwrap_or_default();
            self.run(&request.container_id, &request.exec_id, &command, stdio);
        }
        Ok(wire::ExecProcessResponse {
            pid: 9,
            failure,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: wire::SignalProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.called("SignalProcess", &request.container_id);
        if self.player.character == Character::Deaf {
            std::future::pending::<()>().await;
        }
        if self.player.character == Character::Stubborn {
            return Err(status(ttrpc::Code::INTERNAL, "cgroup.kill: no"));
        }
        let code = format!("exit{}", 128 + request.signal);
        self.run(
            &request.container_id,
            &request.exec_id,
            &code,
            wire::Stdio::default(),
        );
        Ok(wire::Empty::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: wire::PauseContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.called("PauseContainer", &request.container_id);
        if self.player.character == Character::Stubborn {
            return Err(status(ttrpc::Code::INTERNAL, "cgroup.freeze: busy"));
        }
        if self.player.character == Character::Sluggish {
            std::future::pending::<()>().await;
        }
        assert!(self.frozen.lock().unwrap().insert(request.container_id));
        Ok(wire::Empty::default())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: wire::ResumeContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.called("ResumeContainer", &request.container_id);
        if self.player.character == Character::Sluggish {
            return Err(status(ttrpc::Code::FAILED_PRECONDITION, "it is not paused"));
        }
        assert!(self.frozen.lock().unwrap().remove(&request.container_id));
        Ok(wire::Empty::default())
    }

    async fn forward_dns(
        &self,
        _: &TtrpcContext,
        _: wire::ForwardDnsRequest,
    ) -> ttrpc::Result<wire::ForwardDnsResponse> {
        self.called("ForwardDns", "");
        if self.player.character == Character::Sluggish {
            std::future::pending::<()>().await;
        }
        Err(status(ttrpc::Code::INTERNAL, "no"))
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: wire::UpdateContainerRequest,
    ) -> ttrpc::Result<wire::UpdateContainerResponse> {
        let resources = String::from_utf8(request.resources_json).unwrap();
        self.called(
            "UpdateContainer",
            &format!("{} {resources}", request.container_id),
        );
        let failure = resources.contains("nope").then(|| wire::Failure {
            kind: Kind::INVALID_SPEC.into(),
            message: "linux.resources.nope: no".into(),
            ..Default::default()
        });
        Ok(wire::UpdateContainerResponse {
            failure: failure.into(),
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: wire::ContainerStatsRequest,
    ) -> ttrpc::Result<wire::ContainerStatsResponse> {
        self.called("ContainerStats", &request.container_id);
        let mut text = "7\n".to_owned();
        if self.player.character == Character::Stubborn {
            text = "7".repeat(MAX_STATS_LEN);
        }
        Ok(wire::ContainerStatsResponse {
            files: [("pids.current".to_owned(), text)].into(),
            ..Default::default()
        })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: wire::ListProcessesRequest,
    ) -> ttrpc::Result<wire::ListProcessesResponse> {
        let process = |pid, exec: &str| wire::list_processes_response::Process {
            pid,
            exec_id: exec.into(),
            ..Default::default()
        };
        let processes = vec![process(7, ""), process(8, ""), process(9, "e")];
        Ok(wire::ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: wire::DeleteContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.called("DeleteContainer", &request.container_id);
        if self.player.character == Character::Clinging {
            return Err(status(ttrpc::Code::FAILED_PRECONDITION, "it is mine"));
        }
        Ok(wire::Empty::default())
    }

    async fn update_mirror(
        &self,
        _: &TtrpcContext,
        request: wire::UpdateMirrorRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let changes = request.changes.iter().map(|change| {
            let kind = change.kind.enum_value().unwrap();
            format!(" {kind:?} {}", String::from_utf8_lossy(&change.path))
                .trim_end()
                .to_owned()
        });
        let changes: String = changes.collect();
        self.called("UpdateMirror", &format!("{}{changes}", request.volume));
        Ok(wire::Empty::default())
    }

    async fn remove_mirror(
        &self,
        _: &TtrpcContext,
        request: wire::RemoveMirrorRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.called("RemoveMirror", &request.volume.to_string());
        Ok(wire::Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: wire::Empty) -> ttrpc::Result<wire::Empty> {
        self.called("Shutdown", "");
        let reason = husk_vmm_protocol::control::EndReason::Reset;
        if let Some(control) = self.machine.control.lock().unwrap().take() {
            report(&control, &Report::Ended { reason });
        }
        (&self.machine.kernel).write_all(b"end\n").unwrap();
        self.machine.gone.notify_one();
        Ok(wire::Empty::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: wire::Empty,
        sender: ServerStreamSender<wire::Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.pending.lock().unwrap().take().unwrap();
        while let Some(event) = events.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }
}
