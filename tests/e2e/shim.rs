//! A client of a shim, such as containerd is: it starts the shim's program in a bundle and makes the calls of the
//! task service, also those that no `ctr` makes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::Value;
use ttrpc::Code;

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::command::{eventually, run};

const CALL: Duration = Duration::from_secs(90);

/// A call's answer, or the code and the message of its refusal.
pub type Answer<T> = Result<T, (Code, String)>;

/// The server of a bundle's sandbox. Whatever became of its tasks, it is gone with this.
pub struct Shim {
    pub runtime: Runtime,
    pub id: String,
    pub bundle: Bundle,
    service: String,
    client: ttrpc::Client,
}

/// The standard streams of a process: FIFOs, as containerd makes them. What comes on stderr is thrown away.
pub struct Streams {
    directory: PathBuf,
    stdin: Option<File>,
    stdout: Arc<Mutex<Vec<u8>>>,
    ended: Arc<Mutex<bool>>,
}

impl Streams {
    /// Makes the FIFOs and begins to read.
    fn new(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            nix::unistd::mkfifo(
                &directory.join(name),
                nix::sys::stat::Mode::from_bits_truncate(0o600),
            )
            .unwrap();
        }
        let stdout = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(Mutex::new(false));
        let (path, kept, over) = (directory.join("stdout"), stdout.clone(), ended.clone());
        thread::spawn(move || {
            let mut from = File::open(path).unwrap();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                kept.lock().unwrap().extend(&buffer[..n]);
            }
            *over.lock().unwrap() = true;
        });
        let path = directory.join("stderr");
        thread::spawn(move || std::io::copy(&mut File::open(path).unwrap(), &mut std::io::sink()));
        Self {
            directory,
            stdin: None,
            stdout,
            ended,
        }
    }

    /// The path of stderr: there is none with a terminal.
    fn stderr(&self, terminal: bool) -> String {
        if terminal {
            String::new()
        } else {
            self.path("stderr")
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_str().unwrap().to_owned()
    }

    /// What has been written so far.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().unwrap()).into_owned()
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        eventually(&format!("{text:?} on stdout; there is {:?}", self.out()), || {
            self.out().contains(text).then_some(())
        });
    }

    /// The last writer has closed stdout.
    pub fn ended(&self) -> bool {
        *self.ended.lock().unwrap()
    }

    /// Holds stdin's FIFO open from now on, whether or not the other side has opened it yet.
    pub fn open_stdin(&mut self) {
        let path = self.directory.join("stdin");
        self.stdin = Some(OpenOptions::new().read(true).write(true).open(path).unwrap());
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Goes away from stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        // A reader whose FIFO nobody ever wrote to ends by this.
        for name in ["stdout", "stderr"] {
            let path = self.directory.join(name);
            let _ = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
        }
    }
}

impl Shim {
    /// Starts the shim in `bundle`, as containerd does, for the container `id`.
    #[track_caller]
    pub fn start(runtime: Runtime, id: &str, bundle: Bundle) -> Self {
        bundle.write();
        let log = bundle.path().join("log");
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let mut from = OpenOptions::new().read(true).write(true).open(&log).unwrap();
        thread::spawn(move || std::io::copy(&mut from, &mut std::io::sink()));
        let output = Command::new(runtime.shim())
            .args([
                "-namespace",
                "default",
                "-address",
                "/run/containerd/containerd.sock",
            ])
            .args(["-publish-binary", "/usr/bin/containerd", "-id", id, "start"])
            .current_dir(bundle.path())
            .env("TTRPC_ADDRESS", "/run/containerd/containerd.sock.ttrpc")
            .env("GRPC_ADDRESS", "/run/containerd/containerd.sock")
            .env("NAMESPACE", "default")
            .env("MAX_SHIM_VERSION", "2")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{runtime:?} start: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let answer: Value = serde_json::from_str(&text)
            .unwrap_or_else(|_| serde_json::json!({"version": 2, "address": text}));
        let version = answer["version"].as_u64().unwrap_or(2);
        let client = ttrpc::Client::connect(answer["address"].as_str().unwrap().trim()).unwrap();
        Self {
            runtime,
            id: id.to_owned(),
            bundle,
            service: format!("containerd.task.v{version}.Task"),
            client,
        }
    }

    fn call<Q: Message, A: Message>(&self, method: &str, request: &Q) -> Answer<A> {
        self.call_within(method, request, CALL)
    }

    fn call_within<Q: Message, A: Message>(&self, method: &str, request: &Q, limit: Duration) -> Answer<A> {
        let request = ttrpc::Request {
            service: self.service.clone(),
            method: method.to_owned(),
            timeout_nano: limit.as_nanos() as i64,
            payload: request.write_to_bytes().unwrap(),
            ..ttrpc::Request::default()
        };
        match self.client.request(request) {
            Ok(answer) => Ok(A::parse_from_bytes(&answer.payload).unwrap()),
            Err(ttrpc::Error::RpcStatus(status)) => Err((status.code(), status.message().to_owned())),
            Err(error) => Err((Code::UNAVAILABLE, error.to_string())),
        }
    }

    /// Create, with FIFOs for the streams.
    pub fn create(&self) -> (Streams, Answer<CreateTaskResponse>) {
        let streams = Streams::new(self.bundle.path().join("io"));
        let terminal = self.bundle.spec["process"]["terminal"].as_bool().unwrap_or(false);
        let answer = self.call(
            "Create",
            &CreateTaskRequest {
                id: self.id.clone(),
                bundle: self.bundle.path().to_str().unwrap().to_owned(),
                terminal,
                stdin: streams.path("stdin"),
                stdout: streams.path("stdout"),
                stderr: streams.stderr(terminal),
                ..CreateTaskRequest::default()
            },
        );
        (streams, answer)
    }

    /// Create with one URI for stdout and stderr and nothing else.
    pub fn create_logged(&self, uri: &str) -> Answer<CreateTaskResponse> {
        self.call(
            "Create",
            &CreateTaskRequest {
                id: self.id.clone(),
                bundle: self.bundle.path().to_str().unwrap().to_owned(),
                stdout: uri.to_owned(),
                stderr: uri.to_owned(),
                ..CreateTaskRequest::default()
            },
        )
    }

    /// Start: of the container, or of the exec that is named.
    pub fn start_process(&self, exec: &str) -> Answer<StartResponse> {
        self.call(
            "Start",
            &StartRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                ..Default::default()
            },
        )
    }

    /// Creates and starts; both must succeed.
    #[track_caller]
    pub fn run(&self) -> Streams {
        let (streams, created) = self.create();
        created.unwrap();
        self.start_process("").unwrap();
        streams
    }

    /// Exec, with `change` laid over the container's own process.
    pub fn exec(&self, exec: &str, args: &[&str], change: Value) -> (Streams, Answer<Empty>) {
        // An id may be given again, even to no avail.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let streams = Streams::new(self.bundle.path().join(format!("io-{number}")));
        let mut process = self.bundle.spec["process"].clone();
        process["args"] = args.iter().map(|word| Value::from(*word)).collect();
        crate::bundle::merge(&mut process, &change);
        let terminal = process["terminal"].as_bool().unwrap_or(false);
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: serde_json::to_vec(&process).unwrap(),
            ..Any::default()
        };
        let answer = self.call(
            "Exec",
            &ExecProcessRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                terminal,
                stdin: streams.path("stdin"),
                stdout: streams.path("stdout"),
                stderr: streams.stderr(terminal),
                spec: MessageField::some(spec),
                ..Default::default()
            },
        );
        (streams, answer)
    }

    /// Runs an exec to its end: its output and its exit code. It is deleted.
    #[track_caller]
    pub fn exec_to_end(&self, exec: &str, args: &[&str], change: Value) -> (String, u32) {
        let (streams, added) = self.exec(exec, args, change);
        added.unwrap();
        self.start_process(exec).unwrap();
        let code = self.wait(exec).unwrap().exit_status;
        self.delete(exec).unwrap();
        eventually("the exec's output to end", || streams.ended().then_some(()));
        (streams.out(), code)
    }

    pub fn state(&self, exec: &str) -> Answer<StateResponse> {
        self.call(
            "State",
            &StateRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                ..Default::default()
            },
        )
    }

    #[track_caller]
    pub fn status(&self, exec: &str) -> Status {
        self.state(exec).unwrap().status.enum_value().unwrap()
    }

    pub fn wait(&self, exec: &str) -> Answer<WaitResponse> {
        self.call(
            "Wait",
            &WaitRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                ..Default::default()
            },
        )
    }

    /// A wait in a thread of its own: its answer's exit status comes over the channel.
    pub fn wait_aside(&self, exec: &str) -> std::sync::mpsc::Receiver<Answer<WaitResponse>> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let request = ttrpc::Request {
            service: self.service.clone(),
            method: "Wait".to_owned(),
            timeout_nano: CALL.as_nanos() as i64,
            payload: request.write_to_bytes().unwrap(),
            ..ttrpc::Request::default()
        };
        let client = self.client.clone();
        thread::spawn(move || {
            let answer = match client.request(request) {
                Ok(answer) => Ok(WaitResponse::parse_from_bytes(&answer.payload).unwrap()),
                Err(ttrpc::Error::RpcStatus(status)) => Err((status.code(), status.message().to_owned())),
                Err(error) => Err((Code::UNAVAILABLE, error.to_string())),
            };
            let _ = sender.send(answer);
        });
        receiver
    }

    pub fn kill(&self, exec: &str, signal: i32, all: bool) -> Answer<Empty> {
        self.call(
            "Kill",
            &KillRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                signal: signal as u32,
                all,
                ..Default::default()
            },
        )
    }

    pub fn delete(&self, exec: &str) -> Answer<DeleteResponse> {
        self.call(
            "Delete",
            &DeleteRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                ..Default::default()
            },
        )
    }

    pub fn resize(&self, exec: &str, columns: u32, rows: u32) -> Answer<Empty> {
        self.call(
            "ResizePty",
            &ResizePtyRequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                width: columns,
                height: rows,
                ..Default::default()
            },
        )
    }

    pub fn close_stdin(&self, exec: &str) -> Answer<Empty> {
        self.call(
            "CloseIO",
            &CloseIORequest {
                id: self.id.clone(),
                exec_id: exec.to_owned(),
                stdin: true,
                ..Default::default()
            },
        )
    }

    pub fn pids(&self) -> Answer<PidsResponse> {
        self.call(
            "Pids",
            &PidsRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    pub fn stats(&self) -> Answer<StatsResponse> {
        self.call(
            "Stats",
            &StatsRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    pub fn update(&self, resources: &Value) -> Answer<Empty> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: serde_json::to_vec(resources).unwrap(),
            ..Any::default()
        };
        self.call(
            "Update",
            &UpdateTaskRequest {
                id: self.id.clone(),
                resources: MessageField::some(resources),
                ..Default::default()
            },
        )
    }

    pub fn pause(&self) -> Answer<Empty> {
        self.call(
            "Pause",
            &PauseRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    pub fn resume(&self) -> Answer<Empty> {
        self.call(
            "Resume",
            &ResumeRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        )
    }

    pub fn connect(&self, id: &str) -> Answer<ConnectResponse> {
        self.call(
            "Connect",
            &ConnectRequest {
                id: id.to_owned(),
                ..Default::default()
            },
        )
    }

    pub fn shutdown(&self) -> Answer<Empty> {
        let answer = self.call(
            "Shutdown",
            &ShutdownRequest {
                id: self.id.clone(),
                ..Default::default()
            },
        );
        match answer {
            // runc's may be gone before its answer is.
            Err((Code::UNAVAILABLE, _)) if self.runtime == Runtime::Runc => Ok(Empty::default()),
            answer => answer,
        }
    }

    /// Ends the task by force and deletes it; then the server goes.
    #[track_caller]
    pub fn end(&self) {
        let _ = self.kill("", libc::SIGKILL, false);
        self.wait("").unwrap();
        self.delete("").unwrap();
        let _ = self.shutdown();
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let limit = Duration::from_secs(10);
        let kill = KillRequest {
            id: self.id.clone(),
            signal: 9,
            ..Default::default()
        };
        if self.call_within::<_, Empty>("Kill", &kill, limit).is_ok() {
            let wait = WaitRequest {
                id: self.id.clone(),
                ..Default::default()
            };
            let _ = self.call_within::<_, WaitResponse>("Wait", &wait, limit);
        }
        let delete = DeleteRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let _ = self.call_within::<_, DeleteResponse>("Delete", &delete, limit);
        let shutdown = ShutdownRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let _ = self.call_within::<_, Empty>("Shutdown", &shutdown, limit);
        // What containerd does for a shim that is gone, should it not have tidied up.
        let directory = self.bundle.path().to_str().unwrap();
        run(&[
            "sh",
            "-c",
            &format!(
                "cd {directory} && {} -namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id {} -bundle {directory} delete </dev/null",
                self.runtime.shim(),
                self.id
            ),
        ]);
    }
}
