//! The task service's semantics, on the engine with a machine that is played.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{Empty, ForwardRequest},
    events::task::{TaskDelete, TaskExit},
    shim_async::{Events, create_events},
};
use protobuf::Message;
use tempfile::TempDir;
use tokio::{sync::mpsc::UnboundedSender, time::timeout};
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

use super::*;
use crate::config::Source;
use crate::engine::{Character, Player, SandboxConfig, StartError, start_played};
use crate::front::options::Options;
use crate::test_help;

const PATIENCE: Duration = Duration::from_secs(20);
const PROCESS: &str = r#"{"args":["sleep"]}"#;

/// Where a played machine lives.
pub struct Stage {
    pub player: Player,
    run: PathBuf,
}

impl Stage {
    pub async fn start(
        &self,
        config: SandboxConfig,
        events: UnboundedSender<Event>,
    ) -> Result<Arc<Sandbox>, StartError> {
        start_played(config, events, &self.player, self.run.clone()).await
    }
}

/// containerd's ear.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Events for Heard {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        let value = &envelope.event.value;
        let text = match envelope.topic.as_str() {
            "/tasks/exit" => {
                let exit = TaskExit::parse_from_bytes(value).unwrap();
                format!("exit {} {}", exit.id, exit.exit_status)
            }
            "/tasks/delete" => {
                let delete = TaskDelete::parse_from_bytes(value).unwrap();
                format!("delete {} {}", delete.container_id, delete.exit_status)
            }
            topic => topic.trim_start_matches("/tasks/").to_owned(),
        };
        self.0.lock().unwrap().push(text);
        Ok(Empty::new())
    }
}

pub struct Theatre {
    pub pod: Arc<Pod>,
    heard: Heard,
    pub dir: TempDir,
    /// The operator's configuration.
    config: String,
    /// Those of the next container.
    annotations: serde_json::Value,
    _server: Server,
}

impl Theatre {
    pub async fn open() -> Self {
        Self::played_by(Character::Good).await
    }

    pub async fn played_by(character: Character) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let heard = Heard::default();
        let address = format!("unix://{}", dir.path().join("events").display());
        let mut server = Server::new()
            .add_listener(Listener::bind(&address).unwrap())
            .register_service(create_events(Arc::new(heard.clone())));
        server.start().await.unwrap();
        let (mut pod, events) = Pod::assemble("ns".into(), "pod".into(), Publisher::start(&address, "ns"));
        pod.stage = Some(Stage {
            player: Player::new(dir.path(), character),
            run: dir.path().join("run"),
        });
        let pod = Arc::new(pod);
        tokio::spawn(pod.clone().follow(events));
        Self {
            pod,
            heard,
            dir,
            config: String::new(),
            annotations: serde_json::json!({}),
            _server: server,
        }
    }

    pub async fn create(&self, id: &str, command: &str) -> ttrpc::Result<u32> {
        self.create_with(id, command, Names::default()).await
    }

    async fn create_with(&self, id: &str, command: &str, names: Names) -> ttrpc::Result<u32> {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = serde_json::json!({
            "process": { "args": [command] },
            "root": { "path": "rootfs" },
            "annotations": self.annotations,
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let config = TaskConfig {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            options: Options {
                config: Source::Text(self.config.clone()),
                ..Options::default()
            },
            names,
            rootfs: vec![],
            announced_rootfs: vec![],
        };
        soon(self.pod.create(config)).await
    }

    pub async fn exec(&self, id: &str, exec: &str, process: &str) -> ttrpc::Result<()> {
        soon(self.pod.exec(id, exec, Names::default(), process.into())).await
    }

    /// What containerd was told until now.
    pub async fn heard(&self) -> Vec<String> {
        self.pod.publisher.flush(PATIENCE).await;
        std::mem::take(&mut *self.heard.0.lock().unwrap())
    }

    /// Whether nothing of a sandbox is left.
    fn is_bare(&self) -> bool {
        let run = self.dir.path().join("run");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        !mounts.contains(self.dir.path().to_str().unwrap())
            && fs::read_dir(run).map_or(true, |mut entries| entries.next().is_none())
    }
}

pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap()
}

#[track_caller]
pub fn code<T>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it succeeded"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_from_its_creation_to_the_server_s_end() {
    let theatre = Theatre::open().await;
    let pod = &theatre.pod;
    let pid = theatre.create("c", "exit7").await.unwrap();
    assert_ne!(pid, 0);
    assert_eq!(pod.pid_of("c"), Some(pid));
    assert_eq!(
        fs::read_to_string(theatre.dir.path().join("c/init.pid")).unwrap(),
        pid.to_string()
    );
    assert_eq!(pod.view("c", None).unwrap().status, ProcessStatus::Created);
    assert_eq!(pod.processes("c").unwrap(), [(pid, None)]);
    assert_eq!(code(theatre.create("c", "exit7").await), Code::ALREADY_EXISTS);
    let waiting = tokio::spawn({
        let pod = pod.clone();
        async move { pod.wait("c", None).await }
    });
    assert_eq!(soon(pod.start("c", None)).await.unwrap(), pid);
    assert_eq!(soon(waiting).await.unwrap().unwrap().status, 7);
    assert_eq!(code(soon(pod.start("c", None)).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(soon(pod.kill("c", None, 9, true)).await), Code::NOT_FOUND);
    assert_eq!(
        code(soon(pod.kill("c", None, 65, false)).await),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(pod.processes("c").unwrap(), []);
    let View { status, .. } = pod.view("c", None).unwrap();
    assert!(matches!(status, ProcessStatus::Stopped { status: 7, .. }));
    // While it has a container the server stays.
    soon(pod.shutdown_if_empty()).await;
    let (deleted, exit) = soon(pod.delete("c", None)).await.unwrap();
    assert_eq!((deleted, exit.status), (pid, 7));
    assert_eq!(code(soon(pod.delete("c", None)).await), Code::NOT_FOUND);
    assert_eq!(code(soon(pod.wait("c", None)).await), Code::NOT_FOUND);
    assert_eq!(
        theatre.heard().await,
        ["create", "start", "exit c 7", "delete c 7"]
    );
    soon(pod.shutdown_if_empty()).await;
    soon(pod.finished()).await;
    assert!(theatre.is_bare());
    assert_eq!(code(theatre.create("d", "exit0").await), Code::UNAVAILABLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_end_before_their_container() {
    let theatre = Theatre::open().await;
    let pod = &theatre.pod;
    let pid = theatre.create("c", "sleep").await.unwrap();
    soon(pod.start("c", None)).await.unwrap();
    theatre.exec("c", "a", PROCESS).await.unwrap();
    theatre.exec("c", "b", r#"{"args":["nope"]}"#).await.unwrap();
    assert_eq!(code(theatre.exec("c", "a", PROCESS).await), Code::ALREADY_EXISTS);
    assert_eq!(
        code(theatre.exec("c", "../x", PROCESS).await),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(code(theatre.exec("none", "a", PROCESS).await), Code::NOT_FOUND);
    assert_eq!(pod.view("c", Some("a")).unwrap().pid, 0);
    assert_eq!(
        code(soon(pod.kill("c", Some("a"), 9, false)).await),
        Code::FAILED_PRECONDITION
    );
    let exec_pid = soon(pod.start("c", Some("a"))).await.unwrap();
    assert!(exec_pid != 0 && exec_pid != pid);
    assert_eq!(pod.view("c", Some("a")).unwrap().pid, exec_pid);
    assert_eq!(
        pod.processes("c").unwrap(),
        [(pid, None), (exec_pid, Some("a".into()))]
    );
    assert_eq!(
        code(soon(pod.delete("c", Some("a"))).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(soon(pod.delete("c", None)).await), Code::FAILED_PRECONDITION);
    assert_eq!(
        code(soon(pod.start("c", Some("b"))).await),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(soon(pod.delete("c", Some("b"))).await.unwrap().1.status, 127);
    // Without a terminal there is nothing to size.
    soon(pod.resize("c", None, 80, 24)).await.unwrap();
    pod.close_io("c", None, true).unwrap();
    pod.close_io("c", None, true).unwrap();
    soon(pod.kill("c", Some("a"), 15, false)).await.unwrap();
    assert_eq!(soon(pod.wait("c", Some("a"))).await.unwrap().status, 143);
    assert_eq!(soon(pod.delete("c", Some("a"))).await.unwrap().1.status, 143);
    soon(pod.kill("c", None, 9, true)).await.unwrap();
    assert_eq!(soon(pod.wait("c", None)).await.unwrap().status, 137);
    theatre.exec("c", "late", PROCESS).await.unwrap_err();
    soon(pod.delete("c", None)).await.unwrap();
    assert_eq!(
        theatre.heard().await,
        [
            "create",
            "start",
            "exec-added",
            "exec-added",
            "exec-started",
            "exit a 143",
            "exit c 137",
            "delete c 137"
        ]
    );
    soon(pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_was_never_started_can_be_deleted() {
    let theatre = Theatre::open().await;
    theatre.create("c", "sleep").await.unwrap();
    theatre.create("d", "sleep").await.unwrap();
    assert_eq!(soon(theatre.pod.delete("c", None)).await.unwrap().1.status, 137);
    assert_eq!(
        theatre.pod.view("d", None).unwrap().status,
        ProcessStatus::Created
    );
    assert_eq!(
        theatre.heard().await,
        ["create", "create", "exit c 137", "delete c 137"]
    );
    soon(theatre.pod.end()).await;
    assert!(theatre.is_bare());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_not_there_leaves_nothing_and_the_next_one_runs() {
    let theatre = Theatre::open().await;
    let error = theatre.create("c", "nope").await.unwrap_err();
    assert!(
        error.to_string().contains("executable file not found in $PATH"),
        "{error}"
    );
    assert_eq!(code::<u32>(Err(error)), Code::INVALID_ARGUMENT);
    assert_eq!(theatre.pod.pid_of("c"), None);
    assert!(theatre.is_bare());
    assert_eq!(theatre.heard().await, [] as [&str; 0]);
    soon(theatre.pod.shutdown_if_empty()).await;
    soon(theatre.pod.finished()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_s_end_is_told_for_all_that_ran() {
    let theatre = Theatre::open().await;
    theatre.create("c", "sleep").await.unwrap();
    soon(theatre.pod.start("c", None)).await.unwrap();
    theatre.exec("c", "e", PROCESS).await.unwrap();
    soon(theatre.pod.start("c", Some("e"))).await.unwrap();
    soon(theatre.pod.end()).await;
    let heard = theatre.heard().await;
    assert_eq!(
        heard,
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit e 137",
            "exit c 137"
        ]
    );
    assert!(theatre.is_bare());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_and_a_resume_are_told_in_order() {
    let theatre = Theatre::open().await;
    let pod = &theatre.pod;
    let pid = theatre.create("c", "sleep").await.unwrap();
    assert_eq!(code(soon(pod.pause("c")).await), Code::FAILED_PRECONDITION);
    soon(pod.start("c", None)).await.unwrap();
    theatre.exec("c", "e", PROCESS).await.unwrap();
    let exec_pid = soon(pod.start("c", Some("e"))).await.unwrap();
    assert_eq!(code(soon(pod.resume("c")).await), Code::FAILED_PRECONDITION);
    theatre.exec("c", "late", PROCESS).await.unwrap();
    soon(pod.pause("c")).await.unwrap();
    assert_eq!(
        code(soon(pod.start("c", Some("late"))).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(soon(pod.pause("c")).await), Code::FAILED_PRECONDITION);
    assert_eq!(pod.view("c", None).unwrap().status, ProcessStatus::Paused);
    assert_eq!(pod.view("c", Some("e")).unwrap().status, ProcessStatus::Paused);
    // What containerd asks first after its own restart.
    assert_eq!(pod.pid_of("c"), Some(pid));
    assert_eq!(
        pod.processes("c").unwrap(),
        [(pid, None), (exec_pid, Some("e".into()))]
    );
    assert_eq!(
        code(theatre.exec("c", "f", PROCESS).await),
        Code::FAILED_PRECONDITION
    );
    for exec in [None, Some("e")] {
        assert_eq!(code(soon(pod.delete("c", exec)).await), Code::FAILED_PRECONDITION);
        assert_eq!(code(soon(pod.start("c", exec)).await), Code::FAILED_PRECONDITION);
    }
    pod.close_io("c", None, true).unwrap();
    soon(pod.resume("c")).await.unwrap();
    assert_eq!(code(soon(pod.resume("c")).await), Code::FAILED_PRECONDITION);
    // What was refused while it was paused can be done now.
    soon(pod.start("c", Some("late"))).await.unwrap();
    soon(pod.kill("c", Some("late"), 9, false)).await.unwrap();
    soon(pod.wait("c", Some("late"))).await.unwrap();
    soon(pod.pause("c")).await.unwrap();
    soon(pod.kill("c", Some("e"), 9, false)).await.unwrap();
    soon(pod.wait("c", Some("e"))).await.unwrap();
    soon(pod.kill("c", None, 9, true)).await.unwrap();
    assert_eq!(soon(pod.wait("c", None)).await.unwrap().status, 137);
    assert_eq!(code(soon(pod.resume("c")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(soon(pod.pause("c")).await), Code::FAILED_PRECONDITION);
    soon(pod.delete("c", None)).await.unwrap();
    assert_eq!(code(soon(pod.pause("c")).await), Code::NOT_FOUND);
    assert_eq!(
        theatre.heard().await,
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exec-added",
            "paused",
            "resumed",
            "exec-started",
            "exit late 137",
            "paused",
            "exit e 137",
            "exit c 137",
            "delete c 137"
        ]
    );
    soon(pod.end()).await;
    assert!(theatre.is_bare());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_fails_is_not_told() {
    let theatre = Theatre::played_by(Character::Stubborn).await;
    let pod = &theatre.pod;
    theatre.create("c", "sleep").await.unwrap();
    soon(pod.start("c", None)).await.unwrap();
    assert_eq!(code(soon(pod.pause("c")).await), Code::INTERNAL);
    assert_eq!(pod.view("c", None).unwrap().status, ProcessStatus::Running);
    assert_eq!(theatre.heard().await, ["create", "start"]);
    soon(pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_is_told_before_the_exit() {
    let theatre = Theatre::open().await;
    let pod = &theatre.pod;
    theatre.create("c", "oom").await.unwrap();
    soon(pod.start("c", None)).await.unwrap();
    assert_eq!(soon(pod.wait("c", None)).await.unwrap().status, 137);
    soon(pod.delete("c", None)).await.unwrap();
    assert_eq!(
        theatre.heard().await,
        ["create", "start", "oom", "exit c 137", "delete c 137"]
    );
    soon(pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_complete_when_the_container_is_deleted() {
    let theatre = Theatre::open().await;
    let dir = theatre.dir.path();
    let (logger, log, input) = (dir.join("logger"), dir.join("log"), dir.join("input"));
    // It takes its time, and only it knows that the log is complete.
    let script = format!(
        "exec 5>&-; cat <&3 >{log}.part; cat <&4 >>{log}.part; sleep 0.3; echo $CONTAINER_NAMESPACE/$CONTAINER_ID >>{log}.part; mv {log}.part {log}",
        log = log.display()
    );
    test_help::script(&logger, &script);
    fs::write(&input, "logged\n").unwrap();
    let names = Names {
        stdin: input.to_str().unwrap().to_owned(),
        stdout: format!("binary://{}", logger.display()),
        ..Names::default()
    };
    theatre.create_with("c", "tee", names.clone()).await.unwrap();
    soon(theatre.pod.start("c", None)).await.unwrap();
    soon(theatre.pod.wait("c", None)).await.unwrap();
    soon(theatre.pod.delete("c", None)).await.unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "logged\nlogged\nns/c\n");
    // One that is never started has a log, too, which ends.
    theatre.create_with("d", "cat", names.clone()).await.unwrap();
    soon(theatre.pod.delete("d", None)).await.unwrap();
    let none = Names {
        stdout: "binary:///nonexistent".into(),
        ..Names::default()
    };
    assert_eq!(code(theatre.create_with("e", "cat", none).await), Code::INTERNAL);
    soon(theatre.pod.end()).await;
    assert!(theatre.is_bare());
    assert_eq!(fs::read_to_string(&log).unwrap(), "ns/d\n");
}

fn message<T>(result: ttrpc::Result<T>) -> String {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.message().to_owned(),
        _ => panic!("not refused"),
    }
}

#[tokio::test]
async fn a_configuration_that_is_wrong_is_refused_and_leaves_nothing() {
    let mut theatre = Theatre::open().await;
    theatre.config = "[machine]\nmemory = 3".into();
    let refused = theatre.create("c", "sleep").await;
    assert_eq!(code(refused), Code::INVALID_ARGUMENT);
    let told = message(theatre.create("c", "sleep").await);
    assert!(
        told.starts_with("the runtime's options:2: machine.memory: there is no such option"),
        "{told}"
    );
    assert!(theatre.is_bare());
    theatre.config.clear();
    theatre.create("c", "sleep").await.unwrap();
    theatre.pod.end().await;
}

#[tokio::test]
async fn annotations_are_refused_by_name_unless_they_are_allowed() {
    let mut theatre = Theatre::open().await;
    theatre.annotations = serde_json::json!({ "io.husk.memory_mib": "128", "org.example": "x" });
    let told = message(theatre.create("c", "sleep").await);
    assert!(
        told.contains("annotation io.husk.memory_mib: not allowed"),
        "{told}"
    );
    theatre.config = "annotations.allowed = [\"io.husk.memory_mib\"]".into();
    theatre.create("c", "sleep").await.unwrap();
    let status = theatre.dir.path().join("run/ns/pod/status.json");
    soon(async {
        while !fs::read_to_string(&status).is_ok_and(|text| text.contains(r#""memory_mib":128"#)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // The sandbox is as it was started.
    theatre.create("same", "sleep").await.unwrap();
    theatre.annotations = serde_json::json!({ "io.husk.memory_mib": "256" });
    assert_eq!(
        code(theatre.create("other", "sleep").await),
        Code::INVALID_ARGUMENT
    );
    theatre.pod.end().await;
    assert!(theatre.is_bare());
}
