//! A host for the agent without a VM: the agent runs as PID 1 of namespaces of its own, the host's vsock ports are
//! unix sockets, and containers' roots hold a static busybox.
//!
//! Needs root, cgroup v2 mounted somewhere, util-linux's `unshare`, and Debian's `busybox-static`.

#![allow(dead_code, clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::{HashMap, VecDeque},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use husk_agent_protocol::{
    limits::{AGENT_PORT, FIRST_STDIO_PORT},
    messages::{
        ContainerStatsRequest, CreateContainerRequest, DeleteContainerRequest, Empty, Event,
        ExecProcessRequest, Failure, ListProcessesRequest, PauseContainerRequest, ResizeTerminalRequest,
        ResumeContainerRequest, SetupRequest, SignalProcessRequest, StartContainerRequest, Stdio,
        UpdateContainerRequest, event,
    },
    service::AgentClient,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::Notify,
    time::timeout,
};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context,
};

/// Longest that anything here may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where cgroup v2 is mounted on this machine.
fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    line.expect("cgroup v2 is not mounted")
        .split(' ')
        .nth(1)
        .unwrap()
        .into()
}

fn busybox() -> PathBuf {
    let paths = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    paths
        .into_iter()
        .find(|path| path.exists())
        .expect("busybox is missing: apt-get install busybox-static")
}

#[derive(Default)]
struct Seen {
    events: Mutex<VecDeque<Event>>,
    changed: Notify,
}

/// The host side of one agent.
pub struct Host {
    pub directory: TempDir,
    pub cgroups: PathBuf,
    agent: Child,
    listener: UnixListener,
    pub client: AgentClient,
    /// The connection to the agent once more, to hang up.
    connection: std::os::unix::net::UnixStream,
    seen: Arc<Seen>,
    ports: AtomicU32,
}

/// The host's ends of a process's streams.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

impl Streams {
    /// All of stdout and stderr, to their ends.
    pub async fn read(&mut self) -> (String, String) {
        let read = async |stream: &mut Option<UnixStream>| {
            let mut bytes = Vec::new();
            if let Some(stream) = stream {
                timeout(PATIENCE, stream.read_to_end(&mut bytes))
                    .await
                    .expect("output does not end")
                    .unwrap();
            }
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let stdout = read(&mut self.stdout).await;
        (stdout, read(&mut self.stderr).await)
    }
}

struct Offer {
    stdio: Stdio,
    listeners: [Option<UnixListener>; 3],
}

impl Host {
    /// Starts an agent and sets it up.
    pub async fn new() -> Self {
        let host = Self::without_setup().await;
        host.setup().await;
        host
    }

    pub async fn without_setup() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make containers and need root"
        );
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sockets")).unwrap();
        fs::create_dir(directory.path().join("share")).unwrap();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroups = cgroup2().join(format!("husk-agent-test-{}-{count}", std::process::id()));
        let listener =
            UnixListener::bind(directory.path().join("sockets").join(AGENT_PORT.to_string())).unwrap();
        let agent = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .arg(env!("CARGO_BIN_EXE_husk-agent"))
            .arg("--outside")
            .args([
                directory.path().join("sockets"),
                directory.path().join("share"),
                cgroups.clone(),
            ])
            .spawn()
            .unwrap();
        let (client, connection, seen) = Self::accept(&listener).await;
        Self {
            directory,
            cgroups,
            agent,
            listener,
            client,
            connection,
            seen,
            ports: AtomicU32::new(FIRST_STDIO_PORT),
        }
    }

    async fn accept(listener: &UnixListener) -> (AgentClient, std::os::unix::net::UnixStream, Arc<Seen>) {
        let (stream, _) = timeout(PATIENCE, listener.accept())
            .await
            .expect("the agent does not dial")
            .unwrap();
        let stream = stream.into_std().unwrap();
        let connection = stream.try_clone().unwrap();
        let client = AgentClient::new(Client::new(Socket::new(UnixStream::from_std(stream).unwrap())));
        let seen = Arc::new(Seen::default());
        let mut stream = client
            .events(context::with_timeout(0), &Empty::new())
            .await
            .unwrap();
        let copy = seen.clone();
        tokio::spawn(async move {
            while let Ok(Some(event)) = stream.recv().await {
                copy.events.lock().unwrap().push_back(event);
                copy.changed.notify_waiters();
            }
        });
        (client, connection, seen)
    }

    /// Hangs up, and takes the agent's next call.
    pub async fn reconnect(&mut self) {
        self.connection.shutdown(std::net::Shutdown::Both).unwrap();
        (self.client, self.connection, self.seen) = Self::accept(&self.listener).await;
    }

    pub async fn setup(&self) {
        let request = SetupRequest {
            hostname: "sandbox".into(),
            entropy: vec![7; 64],
            ..Default::default()
        };
        let response = self.client.setup(deadline(), &request).await.unwrap();
        assert_eq!(response.agent_version, env!("CARGO_PKG_VERSION"));
    }

    /// Pid of the agent on this machine.
    pub fn agent_pid(&self) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.agent.id());
        fs::read_to_string(children).unwrap().trim().parse().unwrap()
    }

    /// Pid on this machine of the container's process that is `pid` to the agent.
    pub fn pid_here(&self, id: &str, pid: i32) -> i32 {
        let pids = self.cgroup_file(id, "cgroup.procs");
        let mut pids = pids.lines().map(|here| here.parse().unwrap());
        pids.find(|here: &i32| {
            let status = fs::read_to_string(format!("/proc/{here}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            line.unwrap_or_default().split_whitespace().nth(1) == Some(&pid.to_string())
        })
        .expect("no such process")
    }

    /// Makes the root file system of a container and answers its path.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let root = self.directory.path().join("share").join(id).join("rootfs");
        for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
        fs::copy(busybox(), root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "echo", "sleep", "id", "pwd", "stty", "tty", "yes", "hostname", "ls", "mount",
            "touch", "true", "head", "kill", "ps", "stat", "env", "mkdir", "test", "wc", "dd", "umount",
            "readlink", "sed", "unshare", "linux32", "ionice", "uname", "chmod", "sync", "chroot", "cut",
            "grep",
        ] {
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/home/u:/bin/sh\n",
        )
        .unwrap();
        root
    }

    fn offer(&self, terminal: bool, stdin: bool) -> Offer {
        let listen = |wanted: bool| {
            let port = self.ports.fetch_add(1, Ordering::Relaxed);
            let path = self.directory.path().join("sockets").join(port.to_string());
            wanted.then(|| (port, UnixListener::bind(path).unwrap()))
        };
        let listeners = [listen(stdin), listen(true), listen(!terminal)];
        let port = |listener: &Option<(u32, UnixListener)>| listener.as_ref().map_or(0, |(port, _)| *port);
        let stdio = Stdio {
            stdin_port: port(&listeners[0]),
            stdout_port: port(&listeners[1]),
            stderr_port: port(&listeners[2]),
            ..Default::default()
        };
        Offer {
            stdio,
            listeners: listeners.map(|listener| listener.map(|(_, listener)| listener)),
        }
    }

    async fn take(listeners: [Option<UnixListener>; 3]) -> Streams {
        let take = async |listener: Option<UnixListener>| match listener {
            Some(listener) => Some(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0),
            None => None,
        };
        let [stdin, stdout, stderr] = listeners;
        Streams {
            stdin: take(stdin).await,
            stdout: take(stdout).await,
            stderr: take(stderr).await,
        }
    }

    /// Makes a container, whose root is there.
    pub async fn try_create(&self, id: &str, spec: &Value) -> Result<Streams, Failure> {
        self.try_create_with(id, spec, HashMap::new()).await
    }

    pub async fn try_create_with(
        &self,
        id: &str,
        spec: &Value,
        volumes: HashMap<u32, u32>,
    ) -> Result<Streams, Failure> {
        self.try_create_mirrored(id, spec, volumes, Vec::new()).await
    }

    /// As [`Self::try_create_with`]; the sources of the mounts at `mirrored` are in mirrors.
    pub async fn try_create_mirrored(
        &self,
        id: &str,
        spec: &Value,
        volumes: HashMap<u32, u32>,
        mirrored: Vec<u32>,
    ) -> Result<Streams, Failure> {
        let request = CreateContainerRequest {
            volumes,
            mirrored,
            ..Default::default()
        };
        let created = self.try_create_as(id, spec, request).await;
        created.unwrap_or_else(|error| panic!("create: {error}"))
    }

    /// As [`Self::try_create`], with namespaces (type, container) to join.
    pub async fn try_create_joined(
        &self,
        id: &str,
        spec: &Value,
        volumes: HashMap<u32, u32>,
        joined: &[(&str, &str)],
    ) -> Result<Result<Streams, Failure>, ttrpc::Error> {
        let request = CreateContainerRequest {
            volumes,
            joined_namespaces: joined
                .iter()
                .map(|(kind, id)| (kind.to_string(), id.to_string()))
                .collect(),
            ..Default::default()
        };
        self.try_create_as(id, spec, request).await
    }

    async fn try_create_as(
        &self,
        id: &str,
        spec: &Value,
        request: CreateContainerRequest,
    ) -> Result<Result<Streams, Failure>, ttrpc::Error> {
        let offer = self.offer(spec["process"]["terminal"] == json!(true), true);
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: serde_json::to_vec(spec).unwrap(),
            stdio: Some(offer.stdio).into(),
            bundle: format!("/bundle/{id}"),
            ..request
        };
        let response = self.client.create_container(deadline(), &request).await?;
        Ok(match response.failure.into_option() {
            Some(failure) => Err(failure),
            None => {
                assert!(response.pid > 1);
                Ok(Self::take(offer.listeners).await)
            }
        })
    }

    pub async fn create(&self, id: &str, spec: &Value) -> Streams {
        self.rootfs(id);
        self.try_create(id, spec)
            .await
            .unwrap_or_else(|failure| panic!("create: {}", failure.message))
    }

    pub async fn try_start(&self, id: &str) -> Result<(), Failure> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let response = self.client.start_container(deadline(), &request).await.unwrap();
        response.failure.into_option().map_or(Ok(()), Err)
    }

    /// Makes and starts a container.
    pub async fn run(&self, id: &str, spec: &Value) -> Streams {
        let streams = self.create(id, spec).await;
        self.try_start(id)
            .await
            .unwrap_or_else(|failure| panic!("start: {}", failure.message));
        streams
    }

    pub async fn exec(&self, id: &str, exec: &str, process: &Value) -> Result<Streams, Failure> {
        let started = self.try_exec(id, exec, process).await;
        started.map_err(|failure| failure.unwrap_or_else(|code| panic!("exec: {code:?}")))
    }

    /// `Err(Err)`: a code rather than a failure.
    pub async fn try_exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
    ) -> Result<Streams, Result<Failure, Code>> {
        let offer = self.offer(process["terminal"] == json!(true), true);
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: serde_json::to_vec(process).unwrap(),
            stdio: Some(offer.stdio).into(),
            ..Default::default()
        };
        let response = self.client.exec_process(deadline(), &request).await;
        let response = response.map_err(|error| Err(code(error)))?;
        match response.failure.into_option() {
            Some(failure) => Err(Ok(failure)),
            None => Ok(Self::take(offer.listeners).await),
        }
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) -> Result<(), Code> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client
            .signal_process(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    pub async fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<(), Code> {
        let request = ResizeTerminalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            columns,
            rows,
            ..Default::default()
        };
        self.client
            .resize_terminal(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    pub async fn processes(&self, id: &str) -> Vec<(i32, String)> {
        let request = ListProcessesRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let response = self.client.list_processes(deadline(), &request).await.unwrap();
        response
            .processes
            .into_iter()
            .map(|process| (process.pid, process.exec_id))
            .collect()
    }

    pub async fn pause(&self, id: &str) -> Result<(), Code> {
        let request = PauseContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let paused = self.client.pause_container(deadline(), &request).await;
        paused.map(drop).map_err(code)
    }

    pub async fn resume(&self, id: &str) -> Result<(), Code> {
        let request = ResumeContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let resumed = self.client.resume_container(deadline(), &request).await;
        resumed.map(drop).map_err(code)
    }

    /// `Err(Err)`: a code rather than a failure.
    pub async fn update(&self, id: &str, resources: &Value) -> Result<(), Result<Failure, Code>> {
        let request = UpdateContainerRequest {
            container_id: id.into(),
            resources_json: serde_json::to_vec(resources).unwrap(),
            ..Default::default()
        };
        let response = self.client.update_container(deadline(), &request).await;
        let response = response.map_err(|error| Err(code(error)))?;
        response
            .failure
            .into_option()
            .map_or(Ok(()), |failure| Err(Ok(failure)))
    }

    pub async fn stats(&self, id: &str) -> Result<HashMap<String, String>, Code> {
        let request = ContainerStatsRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let response = self.client.container_stats(deadline(), &request).await;
        response.map(|response| response.files).map_err(code)
    }

    /// A file of the container's cgroup, without its last newline.
    pub fn cgroup_file(&self, id: &str, file: &str) -> String {
        let text = fs::read_to_string(self.cgroups.join(id).join(file)).unwrap();
        text.trim_end().to_owned()
    }

    pub async fn delete(&self, id: &str) -> Result<(), Code> {
        let request = DeleteContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .delete_container(deadline(), &request)
            .await
            .map(drop)
            .map_err(code)
    }

    /// Lets containers have limits by `controllers`. `false`: this machine's cgroup v2 does not have them (they may be
    /// with version 1).
    pub fn enable_controllers(&self, controllers: &[&str]) -> bool {
        let parent = self.cgroups.parent().unwrap();
        controllers.iter().all(|controller| {
            [parent, &self.cgroups]
                .iter()
                .all(|path| fs::write(path.join("cgroup.subtree_control"), format!("+{controller}")).is_ok())
        })
    }

    /// The next exit, whoever's: (container, exec, status).
    pub async fn next_exit(&self) -> (String, String, u32) {
        match self.next_event().await {
            event::Kind::Exit(exit) => (exit.container_id, exit.exec_id, exit.status),
            other => panic!("unexpected event {other:?}"),
        }
    }

    pub async fn next_event(&self) -> event::Kind {
        let wait = async {
            loop {
                let changed = self.seen.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(event) = self.seen.events.lock().unwrap().pop_front() {
                    return event.kind.unwrap();
                }
                changed.await;
            }
        };
        timeout(PATIENCE, wait).await.expect("no event")
    }

    pub fn no_event(&self) -> bool {
        self.seen.events.lock().unwrap().is_empty()
    }

    /// Runs a container to its end: stdout, stderr, status.
    pub async fn output(&self, id: &str, spec: &Value) -> (String, String, u32) {
        let mut streams = self.run(id, spec).await;
        streams.stdin = None;
        let (stdout, stderr) = streams.read().await;
        let (container, exec, status) = self.next_exit().await;
        assert_eq!((container.as_str(), exec.as_str()), (id, ""));
        self.delete(id).await.unwrap();
        (stdout, stderr, status)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // All processes in it die with the agent's pid namespace.
        for _ in 0..100 {
            let directories = fs::read_dir(&self.cgroups).into_iter().flatten().flatten();
            for child in directories.filter(|entry| entry.path().is_dir()) {
                let _ = fs::remove_dir(child.path());
            }
            if fs::remove_dir(&self.cgroups).is_ok() || !self.cgroups.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        eprintln!("left behind: {}", self.cgroups.display());
    }
}

pub fn deadline() -> context::Context {
    context::with_duration(PATIENCE)
}

pub fn code(error: ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

/// An OCI `process` that runs `args`.
pub fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "args": args,
        "env": ["PATH=/bin"],
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_CHOWN"],
            "effective": ["CAP_KILL", "CAP_CHOWN"],
            "permitted": ["CAP_KILL", "CAP_CHOWN"]
        }
    })
}

/// The spec that engines write for a small container that runs `args`.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "container",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                {"type": "network"}
            ],
            "maskedPaths": ["/proc/keys", "/proc/scsi", "/proc/nonexistent"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"]
        }
    })
}

/// As [`spec`], for a shell script.
pub fn script(text: &str) -> Value {
    spec(&["sh", "-c", text])
}

/// Directories left below `path`.
pub fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}
