//! The engine with a machine that is played: all of it but the guest.

use std::{
    fs,
    io::{self, Read, Write},
    path::Path,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    time::timeout,
};

pub use super::player_test::Player;
use super::{
    cleanup::{cleanup_in, cleanup_of_dead},
    places::Places,
    player_test::Character,
    start::start,
    table::KILLED,
    *,
};
use crate::host::{pid::Identity, rootfs::Mount};

const PATIENCE: Duration = Duration::from_secs(20);

/// A host of its own for a test. What a sandbox leaves on it is found when it is dropped.
pub(super) struct Stage {
    pub dir: TempDir,
    pub places: Places,
    pub player: Player,
}

impl Stage {
    pub fn new(character: Character) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let player = Player::new(dir.path(), character);
        let places = Places {
            run: dir.path().join("run"),
            kvm: "/dev/null".into(),
            cgroups: Some(Default::default()),
            fault: None,
            player: Some(player.clone()),
        };
        let rootfs = dir.path().join("bundle/rootfs");
        fs::create_dir_all(rootfs.join("bin")).unwrap();
        fs::create_dir(dir.path().join("volume")).unwrap();
        fs::write(dir.path().join("volume/precious"), "data").unwrap();
        Self { dir, places, player }
    }

    fn config(&self, id: &str) -> SandboxConfig {
        SandboxConfig {
            namespace: "ns".into(),
            id: id.into(),
            programs: self.player.programs(),
            vcpus: 2,
            memory_mib: 64,
            hostname: String::new(),
            kernel_params: "quiet".into(),
            operator: Arc::default(),
            cgroup: Default::default(),
            network: None,
            log: Default::default(),
        }
    }

    pub async fn start(&self) -> (Arc<Sandbox>, UnboundedReceiver<Event>) {
        let (sender, events) = unbounded_channel();
        (self.start_with(sender).await.unwrap(), events)
    }

    async fn start_with(&self, sender: UnboundedSender<Event>) -> Result<Arc<Sandbox>, StartError> {
        // Opening the kernel's FIFO must not wait.
        let _held = self.player.hold();
        start(self.config("s"), sender, self.places.clone()).await
    }

    /// Starts one that waits as long for the guest's answers.
    pub async fn start_waiting(&self, call: Duration) -> (Arc<Sandbox>, UnboundedReceiver<Event>) {
        let mut config = self.config("s");
        let mut operator = crate::config::Config::default();
        operator.timeouts.call = call;
        config.operator = Arc::new(operator);
        let _held = self.player.hold();
        let (sender, events) = unbounded_channel();
        let sandbox = start(config, sender, self.places.clone()).await;
        (sandbox.unwrap(), events)
    }

    /// Starts one in a network namespace that is there.
    pub async fn start_in(&self, network: PathBuf) -> Result<Arc<Sandbox>, StartError> {
        let _held = self.player.hold();
        let (sender, _) = unbounded_channel();
        let network = Some(network);
        start(
            SandboxConfig {
                network,
                ..self.config("s")
            },
            sender,
            self.places.clone(),
        )
        .await
    }

    pub fn request(&self, id: &str, command: &str, stdio: Stdio) -> CreateContainer {
        let volume = self.dir.path().join("volume");
        let spec = serde_json::json!({
            "process": {"args": [command]},
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc"},
                {"destination": "/v", "type": "bind", "source": volume, "options": ["rbind"]},
            ],
        });
        CreateContainer {
            id: id.into(),
            bundle: self.dir.path().join("bundle"),
            spec: spec.to_string().into_bytes(),
            rootfs: vec![],
            stdio,
        }
    }

    fn share(&self) -> PathBuf {
        self.dir.path().join("run/ns/s/share")
    }

    /// How many containers and volumes are in the share.
    fn shown(&self) -> usize {
        let count = |path: &Path| fs::read_dir(path).into_iter().flatten().count();
        let volumes = self.share().join(".volumes");
        count(&self.share()) - usize::from(volumes.exists()) + count(&volumes)
    }

    fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below = self.dir.path().to_str().unwrap();
        table
            .lines()
            .filter(|line| line.contains(below))
            .map(str::to_owned)
            .collect()
    }

    /// The command lines of processes that were started with a path of this stage.
    fn processes(&self) -> Vec<String> {
        let ours = self.dir.path().to_str().unwrap();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|process| fs::read_to_string(process.path().join("cmdline")).ok())
            .filter(|cmdline| cmdline.contains(ours))
            .collect()
    }

    /// Removes the sandbox as if its engine had died. It has not, and may write its record when it sees its programs
    /// gone; then it is done again.
    pub async fn clean_up(&self) {
        let cleaned = async {
            while let Err(error) = cleanup_in(self.places.clone(), "ns", "s").await {
                let CleanupError::Host { source, .. } = &error else {
                    panic!("{error}");
                };
                assert_eq!(source.kind(), io::ErrorKind::DirectoryNotEmpty, "{error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(cleaned).await;
    }

    /// No mount, no directory, no process.
    pub fn assert_nothing_is_left(&self) {
        assert_eq!(self.mounts(), [] as [&str; 0]);
        let run = self.dir.path().join("run");
        if run.exists() {
            assert_eq!(fs::read_dir(run).unwrap().count(), 0);
        }
        // What a played program (a shell) started ends a moment after it.
        let until = Instant::now() + PATIENCE;
        while !self.processes().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(self.processes(), [] as [&str; 0]);
        assert_eq!(
            fs::read(self.dir.path().join("volume/precious")).unwrap(),
            b"data"
        );
    }
}

use std::sync::Arc;
use tokio::sync::mpsc::UnboundedSender;

pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap()
}

/// The events until the sandbox's end: `container/exec:status`.
pub(super) async fn story(events: &mut UnboundedReceiver<Event>) -> Vec<String> {
    let mut story = Vec::new();
    loop {
        match soon(events.recv()).await.unwrap() {
            Event::Oom { container } => story.push(format!("{container} oom")),
            Event::Exited {
                container,
                exec,
                status,
                ..
            } => {
                story.push(format!("{container}/{}:{status}", exec.unwrap_or_default()));
            }
            Event::SandboxEnded { reason, .. } => {
                story.push(reason);
                return story;
            }
        }
    }
}

const PROCESS: &[u8] = br#"{"args":["sleep"]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_and_nothing_is_left() {
    let stage = Stage::new(Character::Good);
    let (sandbox, mut events) = stage.start().await;
    assert_eq!(soon(sandbox.ready()).await.unwrap().kernel_release, "6");
    assert_eq!(stage.player.config().kernel_params, "quiet");
    soon(sandbox.create(stage.request("c", "exit7", Stdio::default())))
        .await
        .unwrap();
    assert_eq!(
        fs::read(stage.share().join(".volumes/0/precious")).unwrap(),
        b"data"
    );
    assert!(stage.share().join("c/rootfs/bin").is_dir());
    assert_eq!(sandbox.status("c", None).unwrap(), ProcessStatus::Created);
    assert_eq!(sandbox.containers(), ["c"]);
    let waiting = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.wait("c", None).await }
    });
    soon(sandbox.start_container("c")).await.unwrap();
    assert_eq!(soon(waiting).await.unwrap().unwrap().status, 7);
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 7);
    assert_eq!(soon(sandbox.delete_container("c")).await.unwrap().status, 7);
    assert!(matches!(
        sandbox.wait("c", None).await,
        Err(EngineError::NotFound(_))
    ));
    assert_eq!(stage.shown(), 0);
    tokio::join!(soon(sandbox.shutdown()), soon(sandbox.shutdown()));
    assert_eq!(story(&mut events).await, ["c/:7", "it was shut down"]);
    let calls = [
        "Setup s",
        "CreateContainer c",
        "StartContainer c",
        "DeleteContainer c",
        "Shutdown",
    ];
    assert_eq!(stage.player.calls(), calls);
    stage.assert_nothing_is_left();
    assert!(matches!(
        sandbox
            .create(stage.request("d", "exit0", Stdio::default()))
            .await,
        Err(EngineError::SandboxEnded(_))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_carried_and_closed_after_the_exit() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let (stdin, to_stdin) = pipe();
    let (from_stdout, stdout) = pipe();
    let (from_stderr, stderr) = pipe();
    let stdio = Stdio {
        terminal: false,
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: Some(stderr),
    };
    soon(sandbox.create(stage.request("c", "cat", stdio)))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000u32)
        .flat_map(|at| (at % 65_521).to_le_bytes()[..2].to_vec())
        .collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || fs::File::from(to_stdin).write_all(&sent));
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        fs::File::from(from_stdout).read_to_end(&mut bytes).map(|_| bytes)
    });
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 0);
    let drained = timeout(Duration::from_millis(1), sandbox.drained("c", None)).await;
    assert!(drained.is_err(), "stderr was never dialled and is open");
    writer.join().unwrap().unwrap();
    assert!(
        soon(tokio::task::spawn_blocking(|| reader.join()))
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            == expected
    );
    soon(sandbox.shutdown()).await;
    drop(from_stderr);
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn stdin_can_be_closed() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let (stdin, to_stdin) = pipe();
    let (from_stdout, stdout) = pipe();
    let stdio = Stdio {
        terminal: false,
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: None,
    };
    soon(sandbox.create(stage.request("c", "cat", stdio)))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    fs::File::from(to_stdin.try_clone().unwrap())
        .write_all(b"before")
        .unwrap();
    sandbox.close_stdin("c", None).await.unwrap();
    sandbox.close_stdin("c", None).await.unwrap();
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 0);
    soon(sandbox.drained("c", None)).await;
    let mut text = String::new();
    fs::File::from(from_stdout).read_to_string(&mut text).unwrap();
    assert_eq!(text, "before");
    soon(sandbox.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_come_and_go() {
    let stage = Stage::new(Character::Good);
    let (sandbox, mut events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    let precondition = |result| matches!(result, Err(EngineError::FailedPrecondition(_)));
    soon(sandbox.start_container("c")).await.unwrap();
    sandbox.add_exec("c", "e", PROCESS.into(), false).await.unwrap();
    assert!(precondition(sandbox.signal("c", Some("e"), 15, false).await));
    soon(sandbox.start_exec("c", "e", Stdio::default()))
        .await
        .unwrap();
    let processes = soon(sandbox.processes("c")).await.unwrap();
    let exec = Some("e".to_owned());
    assert_eq!(processes[2], ProcessInfo { pid: 9, exec });
    soon(sandbox.signal("c", Some("e"), 15, false)).await.unwrap();
    assert_eq!(soon(sandbox.wait("c", Some("e"))).await.unwrap().status, 143);
    let gone = sandbox.signal("c", Some("e"), 15, false).await;
    assert!(matches!(gone, Err(EngineError::NotFound(_))));
    sandbox.delete_exec("c", "e").await.unwrap();

    let nope = br#"{"args":["nope"]}"#.to_vec();
    sandbox.add_exec("c", "f", nope, false).await.unwrap();
    let error = soon(sandbox.start_exec("c", "f", Stdio::default()))
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 127);
    assert_eq!(soon(sandbox.wait("c", Some("f"))).await.unwrap().status, 127);

    assert!(precondition(sandbox.delete_container("c").await.map(drop)));
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    soon(sandbox.wait("c", None)).await.unwrap();
    soon(sandbox.delete_container("c")).await.unwrap();
    soon(sandbox.shutdown()).await;
    assert_eq!(
        story(&mut events).await,
        ["c/e:143", "c/:137", "it was shut down"]
    );
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_was_never_started_can_be_deleted() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    assert_eq!(soon(sandbox.delete_container("c")).await.unwrap().status, KILLED);
    assert!(sandbox.containers().is_empty());
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_either_program_ends_all() {
    for (victim, reason) in [
        ("vmm", "husk-vmm was killed by SIGKILL"),
        ("fsd", "husk-fsd was killed by SIGKILL"),
    ] {
        let stage = Stage::new(Character::Good);
        let (sandbox, mut events) = stage.start().await;
        soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
            .await
            .unwrap();
        soon(sandbox.start_container("c")).await.unwrap();
        sandbox.add_exec("c", "e", PROCESS.into(), false).await.unwrap();
        soon(sandbox.start_exec("c", "e", Stdio::default()))
            .await
            .unwrap();
        let machine = &sandbox.parts.machine;
        if victim == "vmm" {
            machine.vmm().kill()
        } else {
            machine.fsd().kill()
        }
        let told = story(&mut events).await;
        assert_eq!(told[..2], ["c/e:137", "c/:137"]);
        assert!(told[2].starts_with(reason), "{told:?}");
        assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, KILLED);
        let error = sandbox.signal("c", None, 15, false).await.unwrap_err();
        assert!(matches!(error, EngineError::SandboxEnded(_)), "{error}");
        assert_eq!(soon(sandbox.delete_container("c")).await.unwrap().status, KILLED);
        soon(sandbox.shutdown()).await;
        stage.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_fails_tells_why() {
    let stage = Stage::new(Character::Failing);
    let (sender, _events) = unbounded_channel();
    let message = match stage.start_with(sender).await {
        Err(error) => error.to_string(),
        Ok(sandbox) => {
            let error = soon(sandbox.ready()).await.unwrap_err();
            soon(sandbox.shutdown()).await;
            error.to_string()
        }
    };
    assert!(message.contains("no such machine"), "{message}");
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_be_relied_on_ends_the_sandbox() {
    for (character, reason) in [
        (Character::NoSetup, "no share?[2J"),
        (Character::Nonsense, "it sent an event that makes no sense"),
    ] {
        let stage = Stage::new(character);
        let (sandbox, mut events) = stage.start().await;
        let told = story(&mut events).await;
        assert!(told[0].ends_with(reason), "{told:?}");
        soon(sandbox.shutdown()).await;
        stage.assert_nothing_is_left();
    }
    let stage = Stage::new(Character::NoPid);
    let (sandbox, _events) = stage.start().await;
    let error = soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::Agent {
                call: "CreateContainer",
                ..
            }
        ),
        "{error}"
    );
    assert!(sandbox.containers().is_empty());
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_clings_to_a_container_loses_it() {
    let stage = Stage::new(Character::Clinging);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "exit0", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    soon(sandbox.wait("c", None)).await.unwrap();
    soon(sandbox.delete_container("c")).await.unwrap();
    assert_eq!(stage.shown(), 0);
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_answer_when_it_is_to_kill_is_killed() {
    let stage = Stage::new(Character::Deaf);
    let (sandbox, mut events) = stage.start_waiting(Duration::from_secs(5)).await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let error = soon(sandbox.signal("c", None, 15, false)).await.unwrap_err();
    assert!(matches!(error, EngineError::Deadline { .. }), "{error}");
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 137);
    story(&mut events).await;
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_silent_is_ended() {
    let stage = Stage::new(Character::Silent);
    let (sandbox, mut events) = stage.start().await;
    assert!(
        timeout(Duration::from_millis(200), sandbox.ready())
            .await
            .is_err()
    );
    soon(sandbox.shutdown()).await;
    assert_eq!(story(&mut events).await, ["it was shut down"]);
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_at_any_step_leaves_nothing() {
    for fault in ["record", "share", "network", "launch", "pids", "agent"] {
        let mut stage = Stage::new(Character::Good);
        stage.places.fault = Some(fault);
        let (sender, _events) = unbounded_channel();
        let error = soon(stage.start_with(sender)).await.unwrap_err();
        assert!(matches!(error, StartError::Host { .. }), "{fault}: {error}");
        stage.assert_nothing_is_left();
        stage.places.fault = None;
        let (sandbox, _events) = stage.start().await;
        soon(sandbox.ready()).await.unwrap();
        soon(sandbox.shutdown()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_piece_is_named() {
    type Damage = fn(&mut Stage, &mut SandboxConfig);
    let cases: [(&str, Damage); 5] = [
        ("enable virtualization", |stage, _| {
            stage.places.kvm = "/nonexistent/kvm".into()
        }),
        ("the guest kernel /nonexistent", |_, config| {
            config.programs.kernel = "/nonexistent".into()
        }),
        ("cannot execute /nonexistent", |_, config| {
            config.programs.fsd = "/nonexistent".into()
        }),
        ("1 to 64 are possible", |_, config| config.vcpus = 0),
        ("is not valid", |_, config| config.id = "../x".into()),
    ];
    for (message, damage) in cases {
        let mut stage = Stage::new(Character::Good);
        let mut config = stage.config("s");
        damage(&mut stage, &mut config);
        let _held = stage.player.hold();
        let (sender, _events) = unbounded_channel();
        let error = soon(start(config, sender, stage.places.clone()))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        stage.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_fails_at_any_step_leaves_nothing() {
    for fault in ["mount", "rootfs", "volume", "mirror", "streams", "create"] {
        let mut stage = Stage::new(Character::Good);
        stage.places.fault = Some(fault);
        let (sandbox, _events) = stage.start().await;
        let mut request = stage.request("c", "exit0", Stdio::default());
        request.rootfs = vec![Mount {
            kind: "tmpfs".into(),
            source: "t".into(),
            ..Mount::default()
        }];
        soon(sandbox.create(request)).await.unwrap_err();
        assert_eq!(stage.shown(), 0, "{fault}");
        assert_eq!(stage.mounts().len(), 1, "only the share is mounted after {fault}");
        assert!(sandbox.containers().is_empty());
        assert_eq!(lock(&sandbox.parts.record).mounts, [] as [PathBuf; 0]);
        assert!(matches!(
            sandbox.wait("c", None).await,
            Err(EngineError::NotFound(_))
        ));
        soon(sandbox.shutdown()).await;
        stage.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_the_codes_that_users_know() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let create = async |change: &dyn Fn(&mut CreateContainer)| {
        let mut request = stage.request("c", "nope", Stdio::default());
        change(&mut request);
        soon(sandbox.create(request)).await.unwrap_err()
    };
    let error = create(&|_| {}).await;
    assert_eq!(
        (error.exit_code(), error.to_string().contains("\"nope\"")),
        (127, true)
    );
    let error = create(&|request| request.id = "a/b".into()).await;
    assert!(matches!(error, EngineError::InvalidArgument(_)));
    let error = create(&|request| request.spec = b"hello".into()).await;
    assert!(matches!(error, EngineError::InvalidSpec(_)));
    let error = create(&|request| request.bundle = "/nonexistent".into()).await;
    assert!(
        error.to_string().contains("/nonexistent/rootfs does not exist"),
        "{error}"
    );
    let error = create(&|request| {
        let spec = String::from_utf8(request.spec.clone()).unwrap();
        request.spec = spec.replace("/volume\"", "/missing\"").into_bytes();
    })
    .await;
    assert!(error.to_string().contains("missing"), "{error}");
    assert_eq!(stage.shown(), 0);
    soon(sandbox.create(stage.request("c", "exit0", Stdio::default())))
        .await
        .unwrap();
    let error = soon(sandbox.create(stage.request("c", "exit0", Stdio::default())))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::AlreadyExists(_)));
    assert_eq!(sandbox.containers(), ["c"]);
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_taken_while_its_engine_lives() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let (sender, _second) = unbounded_channel();
    let error = soon(stage.start_with(sender)).await.unwrap_err();
    assert!(matches!(error, StartError::AlreadyExists(_)), "{error}");
    assert!(soon(sandbox.ready()).await.is_ok());
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_engine_left_behind_is_removed_by_its_record() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let mut request = stage.request("c", "sleep", Stdio::default());
    request.rootfs = vec![Mount {
        kind: "tmpfs".into(),
        source: "t".into(),
        ..Mount::default()
    }];
    soon(sandbox.create(request)).await.unwrap();
    let vmm = Identity::of(sandbox.pid()).unwrap();
    assert_eq!(stage.mounts().len(), 4);
    stage.clean_up().await;
    assert!(!vmm.lives());
    stage.assert_nothing_is_left();
    stage.clean_up().await;
    assert!(cleanup_in(stage.places.clone(), "ns", "../s").await.is_err());
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_engine_has_is_not_removed() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    soon(cleanup_of_dead(stage.places.clone(), "ns", "s"))
        .await
        .unwrap();
    assert!(soon(sandbox.ready()).await.is_ok());
    soon(sandbox.create(stage.request("c", "exit0", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
    // Nor is anything made where there is nothing.
    soon(cleanup_of_dead(stage.places.clone(), "ns", "s"))
        .await
        .unwrap();
    stage.assert_nothing_is_left();
    fs::create_dir_all(stage.share().join("c/rootfs")).unwrap();
    soon(cleanup_of_dead(stage.places.clone(), "ns", "s"))
        .await
        .unwrap();
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_directory_is_taken_over() {
    let stage = Stage::new(Character::Good);
    fs::create_dir_all(stage.share().join("c/rootfs")).unwrap();
    fs::write(stage.dir.path().join("run/ns/s/state.json"), "torn").unwrap();
    let (sandbox, _events) = stage.start().await;
    assert_eq!(stage.shown(), 0);
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_sandbox_leaves_nothing() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    let vmm = sandbox.parts.machine.vmm().clone();
    drop(sandbox);
    soon(vmm.ended()).await;
    assert_eq!(stage.mounts(), [] as [&str; 0]);
    assert!(!Path::new(&stage.dir.path().join("run/ns")).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_paused_and_resumed() {
    let stage = Stage::new(Character::Good);
    let (sandbox, mut events) = stage.start().await;
    let precondition = |result| matches!(result, Err(EngineError::FailedPrecondition(_)));
    let not_found = |result| matches!(result, Err(EngineError::NotFound(_)));
    assert!(not_found(soon(sandbox.pause("c")).await.map(drop)));
    assert!(not_found(soon(sandbox.resume("c")).await));
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    assert!(precondition(soon(sandbox.pause("c")).await.map(drop)), "created");
    assert!(precondition(soon(sandbox.resume("c")).await), "created");
    soon(sandbox.start_container("c")).await.unwrap();
    sandbox.add_exec("c", "e", PROCESS.into(), false).await.unwrap();
    sandbox
        .add_exec("c", "unstarted", PROCESS.into(), false)
        .await
        .unwrap();
    soon(sandbox.start_exec("c", "e", Stdio::default()))
        .await
        .unwrap();
    assert!(precondition(soon(sandbox.resume("c")).await), "running");

    assert!(soon(sandbox.pause("c")).await.unwrap());
    assert_eq!(sandbox.status("c", None).unwrap(), ProcessStatus::Paused);
    assert_eq!(sandbox.status("c", Some("e")).unwrap(), ProcessStatus::Paused);
    assert_eq!(
        sandbox.status("c", Some("unstarted")).unwrap(),
        ProcessStatus::Created
    );
    let error = soon(sandbox.pause("c")).await.unwrap_err();
    assert_eq!(error.to_string(), "container c is paused");
    assert!(precondition(
        sandbox.add_exec("c", "f", PROCESS.into(), false).await
    ));
    assert!(precondition(
        soon(sandbox.start_exec("c", "unstarted", Stdio::default())).await
    ));
    assert!(precondition(soon(sandbox.start_container("c")).await));
    let error = soon(sandbox.delete_container("c")).await.unwrap_err();
    assert_eq!(error.to_string(), "container c is paused");
    soon(sandbox.update("c", b"{}".to_vec())).await.unwrap();
    assert_eq!(soon(sandbox.stats("c")).await.unwrap()["pids.current"], "7\n");

    soon(sandbox.resume("c")).await.unwrap();
    assert_eq!(sandbox.status("c", None).unwrap(), ProcessStatus::Running);
    soon(sandbox.start_exec("c", "unstarted", Stdio::default()))
        .await
        .unwrap();
    assert!(soon(sandbox.pause("c")).await.unwrap());
    // One that is paused can be killed.
    soon(sandbox.signal("c", Some("e"), 9, false)).await.unwrap();
    soon(sandbox.signal("c", Some("unstarted"), 9, false))
        .await
        .unwrap();
    assert_eq!(soon(sandbox.wait("c", Some("e"))).await.unwrap().status, 137);
    assert_eq!(sandbox.status("c", None).unwrap(), ProcessStatus::Paused);
    soon(sandbox.wait("c", Some("unstarted"))).await.unwrap();
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 137);
    assert!(matches!(
        sandbox.status("c", None).unwrap(),
        ProcessStatus::Stopped { .. }
    ));
    assert!(precondition(soon(sandbox.pause("c")).await.map(drop)), "stopped");
    assert!(precondition(soon(sandbox.resume("c")).await), "stopped");
    soon(sandbox.delete_container("c")).await.unwrap();
    soon(sandbox.shutdown()).await;
    assert!(matches!(
        soon(sandbox.pause("c")).await,
        Err(EngineError::SandboxEnded(_))
    ));
    assert_eq!(
        story(&mut events).await,
        ["c/e:137", "c/unstarted:137", "c/:137", "it was shut down"]
    );
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_fails_leaves_the_container_running() {
    let stage = Stage::new(Character::Stubborn);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let error = soon(sandbox.pause("c")).await.unwrap_err();
    assert!(error.to_string().contains("cgroup.freeze: busy"), "{error}");
    assert_eq!(sandbox.status("c", None).unwrap(), ProcessStatus::Running);
    let error = soon(sandbox.stats("c")).await.unwrap_err();
    assert!(
        error.to_string().contains("at most 262144 are allowed"),
        "{error}"
    );
    soon(sandbox.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_change_from_the_creation_to_the_end() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let update = async |json: &str| soon(sandbox.update("c", json.into())).await;
    assert!(matches!(update("{}").await, Err(EngineError::NotFound(_))));
    assert!(matches!(
        soon(sandbox.stats("c")).await,
        Err(EngineError::NotFound(_))
    ));
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    update(r#"{"pids":{"limit":5}}"#).await.unwrap();
    soon(sandbox.stats("c")).await.unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    update(r#"{"memory":{"limit":1}}"#).await.unwrap();
    for bad in ["", "[]", "7", "{"] {
        let error = update(bad).await.unwrap_err();
        assert!(matches!(error, EngineError::InvalidSpec(_)), "{error}");
    }
    let error = update(r#"{"nope":1}"#).await.unwrap_err();
    assert_eq!(error.to_string(), "linux.resources.nope: no");
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    soon(sandbox.wait("c", None)).await.unwrap();
    let error = update("{}").await.unwrap_err();
    assert_eq!(error.to_string(), "container c has ended");
    // What it used can be told to its deletion.
    soon(sandbox.stats("c")).await.unwrap();
    soon(sandbox.delete_container("c")).await.unwrap();
    assert!(matches!(update("{}").await, Err(EngineError::NotFound(_))));
    let updates: Vec<String> = stage
        .player
        .calls()
        .into_iter()
        .filter(|call| call.starts_with("Update"))
        .collect();
    assert_eq!(
        updates,
        [
            r#"UpdateContainer c {"pids":{"limit":5}}"#,
            r#"UpdateContainer c {"memory":{"limit":1}}"#,
            r#"UpdateContainer c {"nope":1}"#
        ]
    );
    soon(sandbox.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_may_come_before_the_start() {
    let stage = Stage::new(Character::Good);
    let (sandbox, mut events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    sandbox
        .add_exec("c", "e", br#"{"args":["exit3"]}"#.to_vec(), false)
        .await
        .unwrap();
    soon(sandbox.start_exec("c", "e", Stdio::default()))
        .await
        .unwrap();
    assert_eq!(soon(sandbox.wait("c", Some("e"))).await.unwrap().status, 3);
    soon(sandbox.start_container("c")).await.unwrap();
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    soon(sandbox.wait("c", None)).await.unwrap();
    soon(sandbox.shutdown()).await;
    assert_eq!(story(&mut events).await, ["c/e:3", "c/:137", "it was shut down"]);
}
