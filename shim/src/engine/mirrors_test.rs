//! Mirrored volumes, with a machine that is played.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    CreateContainer, Stdio,
    player_test::Character,
    sandbox_test::{Stage, soon},
};

/// A configuration as a kubelet lays it out, in a place where it would be.
fn configuration(stage: &Stage) -> PathBuf {
    let path = stage.dir.path().join("volumes/kubernetes.io~configmap/conf");
    fs::create_dir_all(path.join("..1")).unwrap();
    fs::write(path.join("..1/key"), "one").unwrap();
    symlink("..1", path.join("..data")).unwrap();
    path
}

fn request(stage: &Stage, id: &str, volume: &Path, options: &[&str]) -> CreateContainer {
    let mut request = stage.request(id, "sleep", Stdio::default());
    let mut spec: Value = serde_json::from_slice(&request.spec).unwrap();
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/config", "type": "bind", "source": volume, "options": options}));
    request.spec = spec.to_string().into_bytes();
    request
}

/// The calls with any of `words`, once they are as many as that or more.
async fn calls(stage: &Stage, count: usize, words: &[&str]) -> Vec<String> {
    let calls = async {
        loop {
            let mut calls = stage.player.calls();
            calls.retain(|call| words.iter().any(|word| call.contains(word)));
            if calls.len() >= count {
                return calls;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon(calls).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_is_told_of_changes_as_long_as_a_container_has_the_volume() {
    let stage = Stage::new(Character::Good);
    let volume = configuration(&stage);
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(request(&stage, "a", &volume, &["rbind", "ro"])))
        .await
        .unwrap();
    soon(sandbox.create(request(&stage, "b", &volume, &["bind", "ro"])))
        .await
        .unwrap();
    soon(sandbox.create(request(&stage, "c", &volume, &["rbind", "ro"])))
        .await
        .unwrap();
    let fill = "CREATE ..1 CREATE ..1/key CREATE ..data ATTRIBUTES ..1 ATTRIBUTES";
    let expected = [
        // Ahead of who has it; once for all that have the same.
        format!("UpdateMirror 1 {fill}"),
        "CreateContainer a 2".to_owned(),
        format!("UpdateMirror 2 {fill}"),
        "CreateContainer b 2".to_owned(),
        "CreateContainer c 2".to_owned(),
    ];
    let told = calls(&stage, expected.len(), &["Mirror", "Create"]).await;
    assert_eq!(told, expected);

    // Both mirrors of it are told of a change.
    fs::write(volume.join("..1/key"), "two").unwrap();
    for number in 1..=2 {
        calls(&stage, 1, &[&format!("UpdateMirror {number} WRITE ..1/key")]).await;
    }
    for id in ["a", "b", "c"] {
        soon(sandbox.delete_container(id)).await.unwrap();
    }
    let told = calls(&stage, 2, &["RemoveMirror"]).await;
    assert_eq!(told, ["RemoveMirror 2", "RemoveMirror 1"]);
    fs::write(volume.join("..1/key"), "three").unwrap();
    soon(sandbox.shutdown()).await;
    assert_eq!(stage.player.calls().last().unwrap(), "Shutdown");
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_mirrored_is_shared() {
    let stage = Stage::new(Character::Good);
    let volume = configuration(&stage);
    let large = stage.dir.path().join("volumes/kubernetes.io~secret/large");
    fs::create_dir_all(&large).unwrap();
    fs::write(large.join("file"), vec![0; 5 << 20]).unwrap();
    let (sandbox, _events) = stage.start().await;
    for (id, volume, options) in [
        ("writable", volume.as_path(), ["rbind", "rw"]),
        ("elsewhere", &stage.dir.path().join("volume"), ["rbind", "ro"]),
        ("file", &volume.join("..1/key"), ["rbind", "ro"]),
        ("large", &large, ["rbind", "ro"]),
    ] {
        soon(sandbox.create(request(&stage, id, volume, &options)))
            .await
            .unwrap();
        soon(sandbox.delete_container(id)).await.unwrap();
    }
    soon(sandbox.shutdown()).await;
    assert!(
        stage.player.calls().iter().all(|call| !call.contains("Mirror")),
        "{:?}",
        stage.player.calls()
    );
    stage.assert_nothing_is_left();
}
