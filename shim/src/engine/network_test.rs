//! A sandbox's network, with a machine that is played.

use std::{os::fd::AsRawFd, path::PathBuf, process::Command};

use super::{
    EngineError, StartError, Stdio,
    player_test::Character,
    sandbox_test::{Stage, soon},
};
use crate::host::{
    namespaces::Namespace,
    netns::{make, within},
};

/// Where an open namespace is.
fn path(namespace: &Namespace) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.fd.as_raw_fd()).into()
}

fn sh(namespace: &Namespace, script: &'static str) -> String {
    within(namespace, move || {
        let output = Command::new("sh").args(["-ec", script]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {error}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .unwrap()
}

fn leftovers(namespace: &Namespace) -> String {
    sh(
        namespace,
        "tc qdisc show | grep ingress || true; ip -o link show | grep husk || true",
    )
}

fn names(network: &husk_agent_protocol::messages::Network) -> Vec<String> {
    network.nics.iter().map(|nic| nic.name.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nics_are_told_at_the_start_and_whenever_they_change() {
    let given = make().unwrap();
    sh(
        &given,
        "ip link add eth0 type bridge; ip link set eth0 up; ip addr add 10.3.0.2/24 dev eth0",
    );
    let stage = Stage::new(Character::Good);
    let mut told = stage.player.network();
    let sandbox = stage.start_in(path(&given)).await.unwrap();
    soon(sandbox.ready()).await.unwrap();
    assert_eq!(names(&told.borrow()), ["eth0"]);
    assert_eq!(stage.player.config().nics.len(), 1);
    assert_eq!(sandbox.network().unwrap().id, given.id);
    // Nobody asks for this one.
    sh(&given, "ip addr add 10.3.0.9/24 dev eth0");
    let changed = told.wait_for(|network| {
        network
            .addresses
            .iter()
            .any(|body| body.windows(4).any(|part| part == [10, 3, 0, 9]))
    });
    drop(soon(changed).await.unwrap());
    // There is no room for this one, and the container is not started without it.
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    sh(&given, "ip link add late0 type bridge");
    let error = soon(sandbox.start_container("c")).await.unwrap_err();
    assert!(matches!(error, EngineError::FailedPrecondition(_)), "{error}");
    assert!(error.to_string().contains("NIC late0"), "{error}");
    soon(sandbox.shutdown()).await;
    assert_eq!(leftovers(&given), "");
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_ones_own_has_room_for_late_nics() {
    let stage = Stage::new(Character::Good);
    let told = stage.player.network();
    let (sandbox, _events) = stage.start().await;
    soon(sandbox.create(stage.request("c", "sleep", Stdio::default())))
        .await
        .unwrap();
    assert_eq!(stage.player.config().nics.len(), 2);
    let network = sandbox.network().unwrap();
    sh(&network, "ip link add eth0 type veth peer name eth1");
    soon(sandbox.start_container("c")).await.unwrap();
    assert_eq!(
        told.borrow().nics.len(),
        2,
        "before the container's process began"
    );
    let mut told = told;
    sh(&network, "ip link del eth0");
    drop(
        soon(told.wait_for(|network| network.nics.is_empty()))
            .await
            .unwrap(),
    );
    sh(&network, "ip link add broken0 type bridge");
    drop(
        soon(told.wait_for(|network| names(network) == ["broken0"]))
            .await
            .unwrap(),
    );
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guest_refuses_fails_the_start() {
    let stage = Stage::new(Character::Good);
    let (sandbox, _events) = stage.start().await;
    sh(&sandbox.network().unwrap(), "ip link add broken0 type bridge");
    let error = soon(sandbox.create(stage.request("c", "sleep", Stdio::default()))).await;
    // The follower may have been first: then it has logged this.
    if let Err(error) = error {
        assert!(error.to_string().contains("broken0"), "{error}");
    }
    soon(sandbox.shutdown()).await;
    stage.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_belongs_to_one_sandbox() {
    let given = make().unwrap();
    sh(&given, "ip link add eth0 type bridge");
    let (first, second) = (Stage::new(Character::Good), Stage::new(Character::Good));
    let sandbox = first.start_in(path(&given)).await.unwrap();
    let error = second.start_in(path(&given)).await.unwrap_err();
    assert!(matches!(error, StartError::InvalidArgument(_)), "{error}");
    assert!(error.to_string().contains("another sandbox"), "{error}");
    second.assert_nothing_is_left();
    assert!(leftovers(&given).contains("ingress"), "the first keeps its NIC");
    soon(sandbox.shutdown()).await;
    assert_eq!(leftovers(&given), "");
    // What cannot be joined is for the container's making to refuse, by the field's name.
    let sandbox = second.start_in("/nonexistent/netns".into()).await.unwrap();
    assert_ne!(sandbox.network().unwrap().id, given.id);
    soon(sandbox.shutdown()).await;
}
