//! A kernel that attacks its machine's devices. All that it tries has no effect, so that it gets to its end, where it
//! asks for a reset.

use std::time::Duration;

use super::{assert_says, config, husk_run, program};
use crate::census::Census;
use crate::command::{ok, run};
use crate::containerd::{BUSYBOX, Detached, ctr_run};
use crate::foreground::Bundle;
use crate::network::Netns;
use crate::operator::Config;

/// What one attack may take.
const DEADLINE: Duration = Duration::from_secs(200);

/// A configuration that boots the hostile kernel for an attack.
fn hostile(word: &str, more: &str) -> Config {
    let kernel = program("hostile-guest");
    config(
        word,
        &format!(
            "[machine]\nmemory_mib = 96\n[guest]\nkernel = \"{kernel}\"\nkernel_params = \"hostile={word}\"\n{more}"
        ),
    )
}

/// Boots the hostile kernel for these attacks, one after the other. Each must have tried all and found nothing wrong.
#[track_caller]
fn attack(words: &[&str], prepare: impl Fn(&Bundle)) {
    for word in words {
        let config = hostile(word, "");
        let bundle = Bundle::busybox(&["true"]);
        prepare(&bundle);
        let done = husk_run(&config, &bundle, &format!("hostile-{word}"), DEADLINE).expect_code(125);
        assert_says(
            &done.err(),
            &[&format!("hostile: {word}: all was tried, 0 wrong")],
        );
    }
}

#[test]
fn malformed_queues_and_registers_are_refused_and_others_run_on() {
    let census = Census::take();
    let neighbour = Detached::start("hostile-neighbour", &["sleep", "1000"]);
    attack(&["registers", "rings"], |_| ());
    let done = neighbour.exec("after", &["echo", "undisturbed"]).expect_code(0);
    assert_eq!(done.out(), "undisturbed\n");
    neighbour.remove();
    census.assert_unchanged();
}

#[test]
fn sockets_and_files_withstand_lies_and_floods() {
    let census = Census::take();
    let secret = std::fs::read("/etc/shadow").unwrap();
    attack(&["vsock", "fs"], |_| ());
    assert_eq!(std::fs::read("/etc/shadow").unwrap(), secret);
    let done = ctr_run("hostile-after", BUSYBOX, &["echo", "as ever"]).expect_code(0);
    assert_eq!(done.out(), "as ever\n");
    census.assert_unchanged();
}

#[test]
fn consoles_and_logs_can_be_flooded() {
    let census = Census::take();
    attack(&["console", "cpu"], |_| ());
    census.assert_unchanged();
}

/// The bridge on the other side learns the addresses of all frames that reach it.
#[test]
fn frames_under_other_addresses_go_nowhere() {
    let census = Census::take();
    let netns = Netns::new("hostile");
    netns.nic("eth0", "hostile0", 1500);
    ok(&[
        "sh",
        "-ec",
        "ip link add hostilebr type bridge; ip link set hostile0 master hostilebr; ip link set hostilebr up",
    ]);
    let own = netns.sh("cat /sys/class/net/eth0/address");
    attack(&["net"], |bundle| {
        bundle.edit(|spec| {
            let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
            all.retain(|namespace| namespace["type"] != "network");
            all.push(serde_json::json!({"type": "network", "path": netns.path()}));
        });
    });
    let learned = ok(&["bridge", "fdb", "show", "br", "hostilebr"]);
    assert_eq!(netns.leftovers(), "");
    run(&["ip", "link", "del", "hostilebr"]);
    drop(netns);
    assert!(learned.contains(own.trim()), "no frame came at all: {learned}");
    assert!(!learned.contains("02:ba:ad"), "{learned}");
    census.assert_unchanged();
}
