//! Docker's networks: each container is on them as one of runc's would be.

use serde_json::Value;

use super::{BUSYBOX, Container, HOSTS_PROGRAMS, Network, begin, docker, docker_ok, foreground, on_host};
use crate::case::Runtime;
use crate::command::eventually;
use crate::network::{assert_same, view};

/// What iproute2 shows in a container, without what differs: Docker takes a new number for each NIC that it makes, and
/// its own have no queue, which the guest's must have.
fn shown(container: &Container) -> Vec<String> {
    // Until the link-local address is in use.
    container.sh("while /usr/sbin/ip -6 addr show | grep -q tentative; do sleep 0.5; done");
    view(|command| {
        let mut shown: Value = serde_json::from_str(&container.sh(command)).unwrap();
        for entry in shown.as_array_mut().unwrap() {
            let entry = entry.as_object_mut().unwrap();
            entry.remove("ifindex");
            entry.remove("txqlen");
        }
        shown.to_string()
    })
}

#[test]
fn a_network_of_ones_own() {
    let census = begin();
    let network = Network::create(
        "husk-own",
        &["--ipv6", "--subnet", "10.77.0.0/24", "--subnet", "fd00:77::/64"],
    );
    let mut options = vec![
        "--hostname",
        "first",
        "--network",
        "husk-own",
        "--ip",
        "10.77.0.20",
        "--ip6",
        "fd00:77::20",
    ];
    options.extend(["--mac-address", "02:42:0a:4d:00:14"]);
    options.extend(HOSTS_PROGRAMS);
    let start = |runtime| Container::start(runtime, "first", &options, BUSYBOX, &["sleep", "1000"]);
    let expected = start(Runtime::Runc);
    let expected_view = shown(&expected);
    let expected_files = expected.sh("cat /etc/resolv.conf; grep -v first /etc/hosts");
    expected.remove();

    let first = start(Runtime::Husk);
    assert_same(&expected_view, &shown(&first));
    assert!(
        expected_view[1].contains("02:42:0a:4d:00:14"),
        "{expected_view:#?}"
    );
    assert_eq!(
        first.sh("cat /etc/resolv.conf; grep -v first /etc/hosts"),
        expected_files
    );

    // Another one, by name, by another name and by address, both ways.
    let second = Container::start(
        Runtime::Husk,
        "second",
        &["--network", "husk-own", "--network-alias", "other"],
        BUSYBOX,
        &["nc", "-ll", "-p", "7000", "-e", "echo", "this is the second"],
    );
    let reach = "until nc -w 20 second 7000 </dev/null; do sleep 0.5; done; nc -w 20 other 7000 </dev/null";
    assert_eq!(first.sh(reach), "this is the second\nthis is the second\n");
    first.sh("/bin/ping -4 -c 2 -W 20 second; /bin/ping -6 -c 2 -W 20 second");
    second.sh("ping -4 -c 2 -W 20 first; ping -6 -c 2 -W 20 first; ping -c 2 -W 20 10.77.0.20");
    let name = second.sh("nslookup 10.77.0.20 127.0.0.11");
    assert!(name.contains("first.husk-own"), "{name}");
    assert_eq!(second.exec(&[], &["ping", "-c", "1", "no-such-name"]).code, 1);
    // The host reaches both.
    let address = second.inspect("{{(index .NetworkSettings.Networks \"husk-own\").IPAddress}}");
    assert_eq!(
        on_host(&format!("nc -w 20 {address} 7000 </dev/null")),
        "this is the second\n"
    );
    on_host("ping -n -c 2 -W 20 10.77.0.20; ping -n -c 2 -W 20 fd00:77::20");
    // And Docker has counted.
    let counted = docker_ok(&["stats", "--no-stream", "--format", "{{.NetIO}}", "first"]);
    assert!(counted.contains("kB"), "{counted}");
    first.remove();
    second.remove();
    drop(network);
    census.assert_unchanged();
}

/// The addresses of a container in the networks of `a_container_on_several_networks`.
fn subnets(container: &Container) -> Vec<String> {
    let shown =
        container.sh("ip -4 -o addr show | sed -n 's/.* inet 10\\.78\\.\\([0-9]*\\)\\..*/\\1/p' | sort");
    shown.lines().map(str::to_owned).collect()
}

#[test]
fn a_container_on_several_networks() {
    let census = begin();
    let networks = [("husk-one", "1"), ("husk-two", "2"), ("husk-three", "3")].map(|(name, number)| {
        let subnet = format!("10.78.{number}.0/24");
        Network::create(name, &["--subnet", &subnet])
    });
    docker_ok(&[
        "create",
        "--name",
        "several",
        "--runtime",
        "husk",
        "--network",
        "husk-one",
        BUSYBOX,
        "sleep",
        "1000",
    ]);
    let several = Container {
        name: "several".into(),
    };
    docker_ok(&["network", "connect", "--ip", "10.78.2.22", "husk-two", "several"]);
    docker_ok(&["start", "several"]);
    assert_eq!(subnets(&several), ["1", "2"]);
    several.sh("ping -c 2 -W 20 10.78.1.1; ping -c 2 -W 20 10.78.2.1");
    on_host("ping -n -c 2 -W 20 10.78.2.22");

    // Others while it runs: the place of one that goes is taken by the next.
    docker_ok(&["network", "disconnect", "husk-two", "several"]);
    eventually("the end of the second network", || {
        (subnets(&several) == ["1"]).then_some(())
    });
    docker_ok(&["network", "connect", "husk-three", "several"]);
    eventually("the third network", || {
        (subnets(&several) == ["1", "3"]).then_some(())
    });
    several.sh("ping -c 2 -W 20 10.78.3.1; ping -c 2 -W 20 10.78.1.1");

    // For more the machine has no NIC: the log says what to do.
    docker_ok(&["network", "connect", "husk-two", "several"]);
    let id = several.inspect("{{.Id}}");
    eventually("a word on what to do", || {
        let log = on_host(&format!("husk logs {id}"));
        log.contains("network.spare_nics").then_some(())
    });
    assert_eq!(subnets(&several), ["1", "3"]);

    // Two machines cannot share a network.
    let done = foreground(&["--network", "container:several"], BUSYBOX, &["true"]).expect_code(125);
    assert!(
        done.err().contains("belongs to another sandbox"),
        "{}",
        done.err()
    );
    several.sh("ping -c 2 -W 20 10.78.1.1");
    // With all three from the beginning it does not start, and says the same.
    docker_ok(&["kill", "several"]);
    let done = docker(&["start", "several"]).expect_code(1);
    assert!(done.err().contains("network.spare_nics"), "{}", done.err());
    several.remove();
    drop(networks);
    census.assert_unchanged();
}

#[test]
fn no_network_and_namespaces_of_the_host() {
    let census = begin();
    let done = foreground(
        &["--network", "none"],
        BUSYBOX,
        &[
            "sh",
            "-c",
            "ls /sys/class/net; ping -c 1 -W 10 127.0.0.1 >/dev/null && echo up",
        ],
    );
    assert_eq!(done.expect_code(0).out(), "lo\nup\n");
    let done = foreground(&["--network", "host"], BUSYBOX, &["true"]).expect_code(125);
    for word in ["network", "--network host"] {
        assert!(done.err().contains(word), "{}", done.err());
    }
    for kind in ["pid", "ipc", "uts"] {
        let option = format!("--{kind}=host");
        let done = foreground(&[&option], BUSYBOX, &["true"]).expect_code(125);
        for word in ["linux.namespaces", kind, "host"] {
            assert!(done.err().contains(word), "{}", done.err());
        }
    }
    assert_eq!(docker(&["ps", "-aq"]).out(), "");
    census.assert_unchanged();
}
