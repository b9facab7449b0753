//! What cannot be had is refused with what to do, and nothing is left of it: not after a crash either.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Container, Netns, sh};
use crate::case::{Runtime, ctr_run_bundle};
use crate::census::Census;
use crate::command::{ok, run};
use crate::host;

#[test]
fn a_network_of_another_sandbox() {
    let netns = Netns::new("husk-taken");
    netns.nic("eth0", "hk-eth0", 1500);
    let first = Container::start(
        Runtime::Husk,
        Container::bundle("taken-first", Some(&netns.path())),
        "taken-first",
    );
    let second = Container::bundle("taken-second", Some(&netns.path()));
    let done = ctr_run_bundle(Runtime::Husk, "taken-second", &second);
    assert_ne!(done.code, 0);
    for word in ["belongs to another sandbox", "must be of one sandbox"] {
        assert!(done.err().contains(word), "{}", done.err());
    }
    // The first still has it.
    first.sh("ip link show eth0");
    assert!(netns.leftovers().contains("ingress"));
}

#[test]
fn more_nics_than_a_machine_can_have() {
    let netns = Netns::new("husk-many");
    for number in 0..9 {
        netns.nic(&format!("eth{number}"), &format!("hk-many{number}"), 1500);
    }
    let census = Census::take();
    let bundle = Container::bundle("many", Some(&netns.path()));
    let done = ctr_run_bundle(Runtime::Husk, "many", &bundle);
    assert_ne!(done.code, 0);
    for word in ["NIC eth", "at most 8 NICs"] {
        assert!(done.err().contains(word), "{}", done.err());
    }
    drop(bundle);
    netns.assert_clean();
    census.assert_unchanged();
}

#[test]
fn a_killed_shim_leaves_the_namespace_clean() {
    let netns = Netns::new("husk-killed");
    netns.nic("eth0", "hk-eth0", 1500);
    netns.sh("ip addr add 10.9.0.2/24 dev eth0");
    sh("ip addr add 10.9.0.1/24 dev hk-eth0");
    let container = Container::start(
        Runtime::Husk,
        Container::bundle("killed", Some(&netns.path())),
        "killed",
    );
    assert!(netns.leftovers().contains("husk-tap0"));
    kill(
        Pid::from_raw(host::pid_of("containerd-shim-husk-v2")),
        Signal::SIGKILL,
    )
    .unwrap();
    netns.assert_clean();
    drop(container);
    // The namespace's own stack has its NIC back.
    ok(&["ping", "-n", "-c", "2", "-W", "10", "10.9.0.2"]);
    // And it is as good as new.
    let again = Container::start(
        Runtime::Husk,
        Container::bundle("killed2", Some(&netns.path())),
        "killed2",
    );
    again.sh("/usr/bin/ping -n -c 2 -W 10 10.9.0.1");
    drop(again);
    netns.assert_clean();
    run(&["ip", "link", "del", "hk-eth0"]);
}
