//! Stand-ins, hooks and namespaces of containers, with a machine that is played.

use std::{fs, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    player_test::Character,
    sandbox_test::{Stage, soon, story},
    *,
};
use crate::host::pid::Identity;

/// A request whose spec is changed by `change`: its fields are replaced.
fn request(stage: &Stage, id: &str, command: &str, change: &Value) -> CreateContainer {
    let mut request = stage.request(id, command, Stdio::default());
    let mut spec: Value = serde_json::from_slice(&request.spec).unwrap();
    for (key, value) in change.as_object().unwrap() {
        spec[key] = value.clone();
    }
    request.spec = spec.to_string().into_bytes();
    request
}

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
}

fn log(stage: &Stage) -> String {
    fs::read_to_string(stage.dir.path().join("bundle/log")).unwrap_or_default()
}

fn send(pid: u32, signal: i32) {
    // SAFETY: kill takes two numbers.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

async fn gone(pid: u32) {
    let gone = async {
        while std::path::Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(gone).await;
}

async fn run(sandbox: &Arc<Sandbox>, request: CreateContainer) -> u32 {
    let id = request.id.clone();
    soon(sandbox.create(request)).await.unwrap();
    soon(sandbox.start_container(&id)).await.unwrap();
    sandbox.host_pid(&id, None).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_process_has_a_pid_that_ends_with_it() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let c = run(&sandbox, request(&stage, "c", "sleep", &json!({}))).await;
    let d = run(&sandbox, request(&stage, "d", "sleep", &json!({}))).await;
    let process = br#"{"args":["sleep"]}"#.to_vec();
    sandbox.add_exec("c", "e", process, false).await.unwrap();
    soon(sandbox.start_exec("c", "e", Stdio::default()))
        .await
        .unwrap();
    let e = sandbox.host_pid("c", Some("e")).unwrap();
    assert!(c != d && c != e && d != e);
    let [_, last, _] = [c, d, e].map(|pid| Identity::of(pid).unwrap());
    soon(sandbox.signal("c", Some("e"), 15, false)).await.unwrap();
    gone(e).await;
    assert_eq!(sandbox.host_pid("c", Some("e")).unwrap(), e);
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    gone(c).await;
    assert_eq!(sandbox.host_pid("c", None).unwrap(), c);
    soon(sandbox.shutdown()).await;
    assert!(!last.lives());
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_kills_the_stand_in_kills_the_container() {
    let stage = Stage::new(Character::Good);
    let (sandbox, mut events) = stage.start().await;
    let pid = run(&sandbox, request(&stage, "c", "sleep", &json!({}))).await;
    let process = br#"{"args":["sleep"]}"#.to_vec();
    sandbox.add_exec("c", "e", process, false).await.unwrap();
    soon(sandbox.start_exec("c", "e", Stdio::default()))
        .await
        .unwrap();
    send(sandbox.host_pid("c", Some("e")).unwrap(), libc::SIGKILL);
    assert_eq!(soon(sandbox.wait("c", Some("e"))).await.unwrap().status, 137);
    send(pid, libc::SIGKILL);
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 137);
    // One that was not started is killed as well, and by another signal ends with that.
    soon(sandbox.create(request(&stage, "d", "sleep", &json!({}))))
        .await
        .unwrap();
    send(sandbox.host_pid("d", None).unwrap(), libc::SIGSEGV);
    assert_eq!(soon(sandbox.wait("d", None)).await.unwrap().status, 139);
    soon(sandbox.shutdown()).await;
    let told = story(&mut events).await;
    assert_eq!(told[..3], ["c/e:137", "c/:137", "d/:139"]);
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_to_the_stand_in_is_the_containers() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let pid = run(&sandbox, request(&stage, "c", "sleep", &json!({}))).await;
    send(pid, libc::SIGTERM);
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 143);
    gone(pid).await;
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_at_their_time_and_are_told_the_pid() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let say = |name: &str| {
        let share = "../run/ns/s/share/c/rootfs/bin";
        hook(&format!(
            "state=$(cat | sed 's/.*\"status\":\"\\([a-z]*\\)\".*\"pid\":\\([0-9]*\\).*/\\1 \\2/'); \
             echo {name} $state $(test -d {share} && echo shown) >> log"
        ))
    };
    let hooks = json!({"hooks": {
        "prestart": [say("prestart"), say("prestart2")], "createRuntime": [say("createRuntime")],
        "createContainer": [say("createContainer")], "poststart": [say("poststart")],
        "poststop": [hook("echo poststop $(cat | grep -c pid) >> log")],
    }});
    let pid = run(&sandbox, request(&stage, "c", "sleep", &hooks)).await;
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    soon(sandbox.wait("c", None)).await.unwrap();
    soon(sandbox.delete_container("c")).await.unwrap();
    let expected = format!(
        "prestart creating {pid}\nprestart2 creating {pid}\ncreateRuntime creating {pid}\n\
         createContainer creating {pid} shown\npoststart running {pid} shown\npoststop 0\n"
    );
    assert_eq!(log(&stage), expected);
    soon(sandbox.shutdown()).await;
    assert_eq!(log(&stage), expected, "poststop hooks run once");
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_undoes_the_creation() {
    for phase in ["prestart", "createRuntime", "createContainer"] {
        let stage = Stage::new(Character::Good);
        let (sandbox, _events) = stage.start().await;
        let hooks = json!({"hooks": {
            phase: [hook("echo bad luck >&2; exit 3")], "poststop": [hook("exit 1"), hook("echo after >> log")],
        }});
        let error = soon(sandbox.create(request(&stage, "c", "sleep", &hooks)))
            .await
            .unwrap_err();
        let EngineError::Host { source, .. } = &error else {
            panic!("{error}")
        };
        let text = source.to_string();
        assert!(
            text.contains(&format!("hooks.{phase}[0] (/bin/sh)")) && text.contains("bad luck"),
            "{text}"
        );
        assert_eq!(log(&stage), "after\n");
        assert!(sandbox.containers().is_empty());
        assert!(!stage.player.calls().contains(&"CreateContainer c".to_owned()));
        run(&sandbox, request(&stage, "c", "sleep", &json!({}))).await;
        soon(sandbox.shutdown()).await;
        stage.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poststart_hook_that_fails_ends_the_container() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let hooks = json!({"hooks": {"poststart": [hook("exit 3")], "poststop": [hook("echo after >> log")]}});
    soon(sandbox.create(request(&stage, "c", "sleep", &hooks)))
        .await
        .unwrap();
    let error = soon(sandbox.start_container("c")).await.unwrap_err();
    assert!(matches!(error, EngineError::Host { .. }), "{error}");
    let status = sandbox.status("c", None).unwrap();
    assert!(
        matches!(status, ProcessStatus::Stopped { status: 137, .. }),
        "{status:?}"
    );
    // With the sandbox go those that are left.
    soon(sandbox.shutdown()).await;
    assert_eq!(log(&stage), "after\n");
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_hangs_holds_up_nobody_else_and_ends_with_the_sandbox() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let hooks = json!({"hooks": {"prestart": [hook("echo $$ > pid; exec sleep 1000")]}});
    let hanging = tokio::spawn({
        let (sandbox, request) = (Arc::clone(&sandbox), request(&stage, "c", "sleep", &hooks));
        async move { sandbox.create(request).await }
    });
    let file = stage.dir.path().join("bundle/pid");
    let pid = soon(async {
        loop {
            if let Ok(pid) = fs::read_to_string(&file)
                .unwrap_or_default()
                .trim()
                .parse::<u32>()
            {
                return pid;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    run(&sandbox, request(&stage, "d", "sleep", &json!({}))).await;
    assert!(Identity::of(pid).is_ok());
    assert!(!hanging.is_finished());
    soon(sandbox.shutdown()).await;
    let error = soon(hanging).await.unwrap().unwrap_err();
    assert!(matches!(error, EngineError::SandboxEnded(_)), "{error}");
    gone(pid).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_engine_left_is_ended_and_its_last_hooks_are_run() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let hooks = json!({"hooks": {"poststop": [hook("grep -c stopped >> log")]}});
    let pid = run(&sandbox, request(&stage, "c", "sleep", &hooks)).await;
    let standin = Identity::of(pid).unwrap();
    stage.clean_up().await;
    assert!(!standin.lives());
    assert_eq!(log(&stage), "1\n");
    stage.assert_nothing_is_left();
    assert!(timeout(Duration::from_secs(20), sandbox.shutdown()).await.is_ok());
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_of_the_host_are_refused_and_those_of_a_neighbour_joined() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    let namespaces = |with: Value, without: &str| {
        let mut list = vec![json!({"type": "mount"})];
        for kind in ["network", "pid", "ipc", "uts"] {
            if let Some(path) = with.get(kind) {
                list.push(json!({"type": kind, "path": path}));
            } else if kind != without {
                list.push(json!({"type": kind}));
            }
        }
        json!({"linux": {"namespaces": list}})
    };
    for (refused, word) in [
        (namespaces(json!({}), "network"), "network"),
        (namespaces(json!({"ipc": "/proc/self/ns/ipc"}), ""), "ipc"),
        (namespaces(json!({"pid": "/proc/1/ns/pid"}), ""), "pid"),
        (namespaces(json!({"network": "/nonexistent"}), ""), "/nonexistent"),
    ] {
        let error = soon(sandbox.create(request(&stage, "c", "sleep", &refused)))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, EngineError::InvalidSpec(_)), "{text}");
        assert!(text.contains("linux.namespaces") && text.contains(word), "{text}");
    }
    let first = request(&stage, "a", "sleep", &namespaces(json!({}), ""));
    let pid = run(&sandbox, first).await;
    let path = format!("/proc/{pid}/ns/pid");
    let second = request(&stage, "b", "sleep", &namespaces(json!({ "pid": path }), ""));
    run(&sandbox, second).await;
    assert!(sandbox.network().is_ok());
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}
