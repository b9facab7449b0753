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
const DEADLINE: Duration = Duration::from_secs(400);

/// The devices of every machine, and those of one with a network.
const ALWAYS: &[&str] = &["console", "rng", "vsock", "fs"];
const WITH_NIC: &[&str] = &["net", "console", "rng", "vsock", "fs"];

/// What is said of a machine that needs nothing more.
const SMALL: &str = "memory_mib = 96\n";
/// And of one with a second processor, for the attacks that need it.
const TWO: &str = "memory_mib = 96\nvcpus = 2\nmax_vcpus = 2\n";
/// And of one that has memory on both sides of the gap for devices, which begins at 3 GiB.
const LARGE: &str = "memory_mib = 3500\n";

/// A configuration that boots the hostile kernel for an attack, on such a machine.
fn hostile(word: &str, machine: &str) -> Config {
    let kernel = program("hostile-guest");
    config(
        word,
        &format!("[guest]\nkernel = \"{kernel}\"\nkernel_params = \"hostile={word}\"\n[machine]\n{machine}"),
    )
}

/// Boots the hostile kernel for an attack on these devices. It must have tried all and found nothing wrong.
#[track_caller]
fn attack(word: &str, devices: &[&str], machine: &str, prepare: impl Fn(&Bundle)) {
    let said = attack_with(word, devices, machine, prepare);
    assert_says(&said, &[&format!("hostile: {word}: all was tried, 0 wrong")]);
}

/// Boots it for one attack on these devices. It must have tried all; gives what it said.
#[track_caller]
fn attack_with(word: &str, devices: &[&str], machine: &str, prepare: impl Fn(&Bundle)) -> String {
    let config = hostile(word, machine);
    let bundle = Bundle::busybox(&["true"]);
    prepare(&bundle);
    let done = husk_run(&config, &bundle, &format!("hostile-{word}"), DEADLINE).expect_code(125);
    assert_says(&done.err(), &[&format!("hostile: {word}: all was tried")]);
    for device in devices {
        assert_says(&done.err(), &[&format!("hostile: {word}: attacked: {device}")]);
    }
    done.err()
}

#[test]
fn malformed_queues_and_registers_are_refused_and_others_run_on() {
    let census = Census::take();
    let neighbour = Detached::start("hostile-neighbour", &["sleep", "1000"]);
    for word in ["registers", "rings"] {
        attack(word, ALWAYS, SMALL, |_| ());
    }
    let done = neighbour.exec("after", &["echo", "undisturbed"]).expect_code(0);
    assert_eq!(done.out(), "undisturbed\n");
    neighbour.remove();
    census.assert_unchanged();
}

#[test]
fn sockets_and_files_withstand_lies_and_floods() {
    let census = Census::take();
    let secret = std::fs::read("/etc/shadow").unwrap();
    for word in ["vsock", "fs"] {
        attack(word, &[word], SMALL, |_| ());
    }
    assert_eq!(std::fs::read("/etc/shadow").unwrap(), secret);
    let done = ctr_run("hostile-after", BUSYBOX, &["echo", "as ever"]).expect_code(0);
    assert_eq!(done.out(), "as ever\n");
    census.assert_unchanged();
}

#[test]
fn consoles_and_logs_can_be_flooded() {
    let census = Census::take();
    attack("console", &["console"], SMALL, |_| ());
    attack("cpu", &[], &format!("{SMALL}vcpus = 1\n"), |_| ());
    census.assert_unchanged();
}

/// A processor that starts at nonsense may end the machine, and ends nothing else.
#[test]
fn processors_can_be_started_anywhere() {
    let census = Census::take();
    let neighbour = Detached::start("hostile-neighbour", &["sleep", "1000"]);
    let config = hostile("cpu", TWO);
    let bundle = Bundle::busybox(&["true"]);
    let done = husk_run(&config, &bundle, "hostile-cpu", DEADLINE).expect_code(125);
    let said = done.err();
    assert_says(&said, &["hostile: cpu: other processors"]);
    let ends = [
        "hostile: cpu: all was tried, 0 wrong",
        "KVM has ended the machine",
        "triple fault",
    ];
    assert!(ends.iter().any(|end| said.contains(end)), "{said}");
    let done = neighbour.exec("after", &["echo", "undisturbed"]).expect_code(0);
    assert_eq!(done.out(), "undisturbed\n");
    neighbour.remove();
    census.assert_unchanged();
}

/// The bridge on the other side learns the addresses of all frames that reach it.
#[test]
fn frames_under_other_addresses_go_nowhere() {
    let census = Census::take();
    on_a_bridge("hostile", |join| attack("net", &["net"], SMALL, join));
    census.assert_unchanged();
}

#[test]
fn nics_with_several_pairs_of_queues() {
    let census = Census::take();
    on_a_bridge("hostile-pairs", |join| {
        let machine = format!("{TWO}[network]\nqueue_pairs = 2\n");
        attack("net", &["net"], &machine, join);
        attack("rings", WITH_NIC, &machine, join);
    });
    census.assert_unchanged();
}

/// A second processor changes descriptors, rings and headers while the devices read them.
#[test]
fn what_changes_after_it_was_sent_is_read_once() {
    let census = Census::take();
    let secret = std::fs::read("/etc/shadow").unwrap();
    on_a_bridge("hostile-fetches", |join| attack("fetches", WITH_NIC, TWO, join));
    assert_eq!(std::fs::read("/etc/shadow").unwrap(), secret);
    census.assert_unchanged();
}

/// The same on a connection in place of the agent's, which the engine gives up at some time.
#[test]
fn what_changes_on_an_agents_connection_gets_no_further() {
    let census = Census::take();
    let config = hostile("fetches-agent", TWO);
    let bundle = Bundle::busybox(&["true"]);
    let done = husk_run(&config, &bundle, "hostile-fetches-agent", DEADLINE).expect_code(125);
    assert_says(&done.err(), &["hostile: fetches-agent: connected"]);
    assert!(!done.err().contains("WRONG"), "{}", done.err());
    census.assert_unchanged();
}

/// Memory that ends at the gap for devices, begins again behind it, and ends for good.
#[test]
fn buffers_across_the_ends_of_memory_are_refused() {
    let census = Census::take();
    on_a_bridge("hostile-regions", |join| attack("regions", WITH_NIC, LARGE, join));
    census.assert_unchanged();
}

/// The host's kernel stops serving a queue that makes no sense, and says nothing of it: so what the attack finds to
/// stand still is not wrong. Of itself it may say only what the README tells.
#[test]
fn nics_served_by_vhost_net() {
    let census = Census::take();
    const MARK: &str = "husk-test: vhost-net is attacked";
    std::fs::write("/dev/kmsg", MARK).unwrap();
    on_a_bridge("hostile-vhost", |join| {
        let machine = |machine: &str| format!("{machine}[network]\nvhost = true\n");
        attack_with("net", &["net"], &machine(SMALL), join);
        attack_with("rings", WITH_NIC, &machine(SMALL), join);
        attack_with("registers", WITH_NIC, &machine(SMALL), join);
        attack_with("fetches", WITH_NIC, &machine(TWO), join);
        attack_with("regions", WITH_NIC, &machine(LARGE), join);
    });
    assert_eq!(kernel_faults_since(MARK), Vec::<String>::new());
    census.assert_unchanged();
}

/// What the host's kernel has found wrong with itself since the mark, but for its known fault with frames of 2 GiB and
/// more, and for the stalls of an emulated host.
fn kernel_faults_since(mark: &str) -> Vec<String> {
    let log = ok(&["dmesg"]);
    // Later lines may have pushed it out.
    let since = log.split_once(mark).map_or(log.as_str(), |(_, since)| since);
    let faults = since.lines().filter(|line| {
        ["BUG:", "WARNING:", "Oops"]
            .iter()
            .any(|word| line.contains(word))
            && !["copy_page_from_iter", "lockup"]
                .iter()
                .any(|word| line.contains(word))
    });
    faults.map(str::to_owned).collect()
}

/// Removes the bridge, whether the test passes or not.
struct Bridge;

impl Drop for Bridge {
    fn drop(&mut self) {
        run(&["ip", "link", "del", "hostilebr"]);
    }
}

/// Attacks a network whose other end is a bridge, which answers those who ask for its address, and asserts that it
/// learns no address but the machine's own.
#[track_caller]
fn on_a_bridge(name: &str, attack: impl Fn(&dyn Fn(&Bundle))) {
    let netns = Netns::new(name);
    netns.nic("eth0", "hostile0", 1500);
    let bridge = Bridge;
    ok(&[
        "sh",
        "-ec",
        "ip link add hostilebr type bridge; ip link set hostile0 master hostilebr; ip link set hostilebr up; \
         ip address add 192.0.2.1/24 dev hostilebr",
    ]);
    let own = netns.sh("cat /sys/class/net/eth0/address");
    attack(&|bundle| {
        bundle.edit(|spec| {
            let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
            all.retain(|namespace| namespace["type"] != "network");
            all.push(serde_json::json!({"type": "network", "path": netns.path()}));
        });
    });
    let learned = ok(&["bridge", "fdb", "show", "br", "hostilebr"]);
    netns.assert_clean();
    drop(bridge);
    drop(netns);
    assert!(learned.contains(own.trim()), "no frame came at all: {learned}");
    assert!(!learned.contains("02:ba:ad"), "{learned}");
}
