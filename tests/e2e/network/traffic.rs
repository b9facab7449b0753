//! What passes through the NICs: both ways, whole, at any MTU.

use husk_tests::traffic::{self, LARGEST_DATAGRAM, Noise};

use super::{connected, serving, sh};
use crate::case::Runtime;
use crate::command::{Input, Running};

#[test]
fn both_ways_at_any_mtu() {
    for mtu in [1500, 1280, 9000] {
        let (netns, container) = connected(Runtime::Husk, "traffic", mtu);
        for (size, host, guest) in [
            (56, "10.9.0.1", "10.9.0.2"),
            (8000, "2001:db8:9::1", "2001:db8:9::2"),
        ] {
            container.sh(&format!("/usr/bin/ping -n -c 3 -i 0.3 -W 10 -s {size} {host}"));
            sh(&format!("ping -n -c 3 -i 0.3 -W 10 -s {size} {guest}"));
        }
        // What is as large as the MTU goes unfragmented.
        sh(&format!(
            "ping -n -c 2 -i 0.3 -W 10 -M do -s {} 10.9.0.2",
            mtu - 28
        ));
        container.sh(&format!(
            "/usr/bin/ping -n -c 2 -i 0.3 -W 10 -M do -s {} 10.9.0.1",
            mtu - 28
        ));
        drop(container);
        netns.assert_clean();
    }
}

#[test]
fn datagrams_of_any_size() {
    let (_netns, _container) = serving("udp", 1500);
    for (to, most) in [
        ("10.9.0.2:7000", LARGEST_DATAGRAM),
        // An IPv6 header is 20 bytes longer, but not counted.
        ("[2001:db8:9::2]:7000", LARGEST_DATAGRAM),
    ] {
        for length in [0, 1, 1400, 1473, 9000, most] {
            let to = to.parse().unwrap();
            let (times, is_whole) = traffic::echo_datagram(to, &Noise::bytes(length)).unwrap();
            assert!(is_whole, "{length} bytes to {to}");
            // Nothing else is under way that could take its place.
            assert_eq!(times, 1, "{length} bytes to {to} were lost");
        }
    }
}

/// What arrives for the container is not answered by the host's own stack in the namespace, and a process there that
/// listens on the same port gets nothing.
#[test]
fn the_namespaces_own_stack_is_passed_by() {
    let (netns, container) = connected(Runtime::Husk, "bypass", 1500);
    let other = [
        "ip",
        "netns",
        "exec",
        &netns.0,
        "socat",
        "-u",
        "TCP4-LISTEN:5004,reuseaddr",
        "STDOUT",
    ];
    let mut other = Running::start(&other, Input::Nothing);
    let listen = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "l",
        &container.id,
        "sh",
        "-c",
        "echo ready; socat -u TCP4-LISTEN:5004,reuseaddr STDOUT",
    ];
    let mut listen = Running::start(&listen, Input::Nothing);
    listen.wait_for("ready");
    sh("echo for the guest | socat -u STDIN TCP4:10.9.0.2:5004,retry=30,interval=1");
    listen.wait_for("for the guest");
    assert_eq!(other.seen(), "");
    // A port on which nobody listens is refused by the guest at once.
    let refused = crate::command::run(&["socat", "-u", "STDIN", "TCP4:10.9.0.2:5999,connect-timeout=20"]);
    assert!(refused.err().contains("refused"), "{}", refused.err());
    let arps = sh("ip neigh show 10.9.0.2 dev hk-eth0");
    assert_eq!(arps.lines().count(), 1, "{arps}");
}
