//! A guest that does not answer, or refuses what it may not refuse.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    EngineError, ProcessStatus, Stdio,
    player_test::Character,
    sandbox_test::{Stage, soon},
};

/// How long the guest may take to answer.
const CALL: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_is_not_answered_takes_one_deadline_and_nobody_waits_for_it() {
    let stage = Stage::new(Character::Sluggish);
    let (sandbox, _events) = stage.start_waiting(CALL).await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let error = soon(sandbox.pause("c")).await.unwrap_err();
    assert!(matches!(error, EngineError::Deadline { .. }), "{error}");
    let running = async {
        while sandbox.status("c", None).unwrap() != ProcessStatus::Running {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(running).await;

    let again = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.pause("c").await }
    });
    let pausing = async {
        while sandbox.status("c", None).unwrap() != ProcessStatus::Pausing {
            tokio::task::yield_now().await;
        }
    };
    soon(pausing).await;
    let begun = Instant::now();
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    assert_eq!(soon(sandbox.wait("c", None)).await.unwrap().status, 137);
    soon(sandbox.delete_container("c")).await.unwrap();
    assert!(begun.elapsed() < CALL, "a kill waits for a pause");
    assert!(soon(again).await.unwrap().is_err());
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_forwards_no_queries_is_asked_once_for_all_servers() {
    let stage = Stage::new(Character::Sluggish);
    let (sandbox, _events) = stage.start_waiting(CALL).await;
    let resolv_conf = stage.dir.path().join("resolv.conf");
    let servers = ["127.0.0.11", "127.0.0.12", "127.0.0.13"];
    fs::write(
        &resolv_conf,
        servers.map(|server| format!("nameserver {server}\n")).concat(),
    )
    .unwrap();
    let mut request = stage.request("c", "sleep", Stdio::default());
    let mut spec: Value = serde_json::from_slice(&request.spec).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/etc/resolv.conf", "type": "bind", "source": resolv_conf, "options": ["rbind"]}),
    );
    request.spec = spec.to_string().into_bytes();
    soon(sandbox.create(request)).await.unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let asked = |call: &String| call.starts_with("ForwardDns");
    // When it is created, and when it is started.
    assert_eq!(stage.player.calls().into_iter().filter(asked).count(), 2);
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_refuse_to_kill() {
    let stage = Stage::new(Character::Stubborn);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    soon(sandbox.start_container("c")).await.unwrap();
    let error = soon(sandbox.signal("c", None, 15, false)).await.unwrap_err();
    assert!(error.to_string().contains("cgroup.kill: no"), "{error}");
    // With its machine, should it not end by itself.
    soon(sandbox.signal("c", None, 9, true)).await.unwrap();
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}
