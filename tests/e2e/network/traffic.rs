//! What passes through the NICs: both ways, whole, at any MTU.

use super::{Container, Netns, sh};
use crate::case::Runtime;
use crate::command::{Input, Running};
use std::time::Duration;

/// A container at 10.9.0.2 and 2001:db8:9::2, with the host at .1.
fn connected(runtime: Runtime, name: &str, mtu: u32) -> (Netns, Container) {
    let netns = Netns::new(&format!("husk-{name}"));
    netns.nic("eth0", "hk-eth0", mtu);
    sh("ip addr add 10.9.0.1/24 dev hk-eth0; ip addr add 2001:db8:9::1/64 dev hk-eth0 nodad");
    netns.sh("ip addr add 10.9.0.2/24 dev eth0; ip addr add 2001:db8:9::2/64 dev eth0 nodad; ip route add default via 10.9.0.1");
    let id = format!("{name}-{runtime:?}").to_lowercase();
    let container = Container::start(runtime, Container::bundle(&id, Some(&netns.path())), &id);
    (netns, container)
}

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
        drop(container);
        assert_eq!(netns.leftovers(), "", "MTU {mtu}");
    }
}

/// Sends a megabyte-sized file through TCP and expects it whole at the other end.
#[test]
fn tcp_is_whole() {
    let (_netns, container) = connected(Runtime::Husk, "tcp", 1500);
    let patience = Duration::from_secs(170);
    sh("head -c 33554432 /dev/urandom > /tmp/husk-e2e-data");
    let expected = sh("sha256sum < /tmp/husk-e2e-data");
    // In.
    let argv = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "in",
        &container.id,
        "sh",
        "-c",
        "socat -u TCP4-LISTEN:5001,reuseaddr STDOUT | sha256sum",
    ];
    let receiver = Running::start(&argv, Input::Nothing);
    sh("socat -u FILE:/tmp/husk-e2e-data TCP4:10.9.0.2:5001,retry=60,interval=1");
    assert_eq!(receiver.finish(patience).expect_code(0).out(), expected);
    // Out, by IPv6.
    let receiver = Running::start(
        &[
            "sh",
            "-c",
            "socat -u TCP6-LISTEN:5002,reuseaddr STDOUT | sha256sum",
        ],
        Input::Nothing,
    );
    let argv = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "out",
        &container.id,
        "sh",
        "-c",
        "head -c 33554432 /dev/urandom > /tmp/data; sha256sum < /tmp/data; \
         socat -u FILE:/tmp/data TCP6:[2001:db8:9::1]:5002,retry=60,interval=1",
    ];
    let sent = Running::start(&argv, Input::Nothing)
        .finish(patience)
        .expect_code(0)
        .out();
    assert_eq!(receiver.finish(patience).expect_code(0).out(), sent);
    sh("rm /tmp/husk-e2e-data");
}

/// The largest datagrams, which are fragmented, both ways.
#[test]
fn large_datagrams() {
    let (_netns, container) = connected(Runtime::Husk, "udp", 1500);
    let echo = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "echo",
        &container.id,
        "sh",
        "-c",
        "echo ready; socat -b 65536 -T 100 UDP4-RECVFROM:5003 EXEC:'cat'",
    ];
    let mut echo = Running::start(&echo, Input::Nothing);
    echo.wait_for("ready");
    sh("sleep 2");
    let answer = sh("head -c 65507 /dev/urandom > /tmp/husk-e2e-datagram
        socat -b 65536 -t 30 -T 30 - UDP4:10.9.0.2:5003 < /tmp/husk-e2e-datagram > /tmp/husk-e2e-answer & sleep 8
        cmp -n 8192 /tmp/husk-e2e-datagram /tmp/husk-e2e-answer && wc -c < /tmp/husk-e2e-answer
        kill $! || true; rm /tmp/husk-e2e-datagram /tmp/husk-e2e-answer");
    assert!(answer.trim().parse::<usize>().unwrap() >= 8192, "{answer}");
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
