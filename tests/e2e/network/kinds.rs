//! NICs of every kind that an engine puts into a network namespace: each is seen and carries traffic as under runc, or is
//! refused by name.

use super::{Container, Netns, assert_same, sh, view};
use crate::case::{Runtime, ctr_run_bundle};
use crate::census::Census;
use crate::command::{Input, Running, eventually, run};

/// The NIC that others share, `hk-lower`, and behind it 10.9.0.1 and 2001:db8:9::1 in a namespace.
struct Lower(Netns);

impl Drop for Lower {
    fn drop(&mut self) {
        // With the namespace it would go, too, but some time later, and the next test counts what there is.
        run(&["ip", "link", "del", "hk-lower"]);
    }
}

fn lower() -> Lower {
    let far = Netns::new("husk-far");
    sh("ip link del hk-lower 2> /dev/null || true
        ip link add hk-lower type veth peer name far0 netns husk-far
        ip link set hk-lower up");
    far.sh(
        "ip link set far0 up; ip addr add 10.9.0.1/24 dev far0; ip addr add 2001:db8:9::1/64 dev far0 nodad",
    );
    Lower(far)
}

/// A NIC on `hk-lower`, for which `kind` is what `ip link add` is told.
fn upper(kind: &str, namespace: &str) -> Netns {
    let netns = Netns::new(namespace);
    // Its name must be free on the host, too, where the kernel makes it first.
    sh(&format!(
        "ip link add hk-upper link hk-lower type {kind}; ip link set hk-upper netns {namespace} name eth0"
    ));
    netns
}

/// What two runtimes show, and whether frames pass; each time what `check` sees besides.
fn each(netns: &Netns, name: &str, check: impl Fn(&Container)) {
    let mut expected = None;
    for runtime in Runtime::all() {
        eprintln!("{name} under {runtime:?}");
        let id = format!("{name}-{runtime:?}").to_lowercase();
        let container = Container::start(runtime, Container::bundle(&id, Some(&netns.path())), &id);
        let seen = view(|command| container.sh(command));
        match &expected {
            None => expected = Some(seen),
            Some(expected) => assert_same(expected, &seen),
        }
        check(&container);
        drop(container);
        netns.assert_clean();
    }
}

#[test]
fn macvlan_and_ipvlan() {
    let census = Census::take();
    for (kind, name) in [("macvlan mode bridge", "macvlan"), ("ipvlan mode l2", "ipvlan")] {
        let far = lower();
        let netns = upper(kind, "husk-upper");
        netns.sh(
            "ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0; ip addr add 2001:db8:9::2/64 dev eth0 nodad; sleep 3",
        );
        // Another one on the same NIC, whose frames never leave the host.
        let beside = upper(kind, "husk-beside");
        beside.sh(
            "ip link set eth0 up; ip addr add 10.9.0.3/24 dev eth0; ip addr add 2001:db8:9::3/64 dev eth0 nodad",
        );
        each(&netns, name, |container| {
            for to in ["10.9.0.1", "2001:db8:9::1", "10.9.0.3", "2001:db8:9::3"] {
                container.sh(&format!("/usr/bin/ping -n -c 2 -i 0.3 -W 10 -s 4000 {to}"));
            }
            far.0.sh("ping -n -c 2 -i 0.3 -W 10 -s 4000 10.9.0.2");
            beside.sh("ping -n -c 2 -i 0.3 -W 10 -s 4000 2001:db8:9::2");
            stream(container, Some(&far.0), "10.9.0.1");
            stream(container, Some(&beside), "10.9.0.3");
        });
        drop((netns, beside, far));
    }
    census.assert_unchanged();
}

/// The host routes to and from it.
#[test]
fn ipvlan_of_the_third_layer() {
    let census = Census::take();
    let far = lower();
    sh("ip addr add 10.9.0.254/24 dev hk-lower");
    far.0.sh("ip route add 10.10.0.0/24 via 10.9.0.254");
    let netns = upper("ipvlan mode l3", "husk-upper");
    netns
        .sh("ip link set eth0 up; ip addr add 10.10.0.2/24 dev eth0; ip route add default dev eth0; sleep 3");
    each(&netns, "ipvlan-l3", |container| {
        container.sh("/usr/bin/ping -n -c 2 -i 0.3 -W 10 -s 4000 10.9.0.1");
        far.0.sh("ping -n -c 2 -i 0.3 -W 10 -s 4000 10.10.0.2");
        stream(container, Some(&far.0), "10.9.0.1");
    });
    drop((netns, far));
    census.assert_unchanged();
}

/// A tap of a program's, as user-mode networks have it; here the program is at the other end of a cable.
#[test]
fn tap() {
    let census = Census::take();
    let netns = Netns::new("husk-tap");
    let cable = "/tmp/husk-e2e-cable";
    let far = format!(
        "exec socat UNIX-LISTEN:{cable},type=5,unlink-close TUN:10.9.0.1/24,tun-type=tap,iff-no-pi,tun-name=hk-tap,iff-up"
    );
    let far = Running::start(&["sh", "-c", &far], Input::Nothing);
    eventually("the cable", || std::path::Path::new(cable).exists().then_some(()));
    let near =
        format!("exec socat UNIX-CONNECT:{cable},type=5 TUN,tun-type=tap,iff-no-pi,tun-name=eth0,iff-up");
    let argv = ["ip", "netns", "exec", &netns.0, "sh", "-c", &near];
    let near = Running::start(&argv, Input::Nothing);
    eventually("both taps", || {
        let there = "ip link show hk-tap && ip -n husk-tap link show eth0";
        (crate::command::run(&["sh", "-c", there]).code == 0).then_some(())
    });
    netns.sh("ip addr add 10.9.0.2/24 dev eth0; ip addr add 2001:db8:9::2/64 dev eth0 nodad; sleep 3");
    each(&netns, "tap", |container| {
        container.sh("/usr/bin/ping -n -c 2 -i 0.3 -W 10 -s 4000 10.9.0.1");
        sh("ping -n -c 2 -i 0.3 -W 10 -s 4000 10.9.0.2");
        stream(container, None, "10.9.0.1");
    });
    for end in [near, far] {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(end.id().try_into().unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        end.finish(std::time::Duration::from_secs(30));
    }
    drop(netns);
    census.assert_unchanged();
}

/// A megabyte from the container to a namespace, or to the host, whole.
fn stream(container: &Container, far: Option<&Netns>, address: &str) {
    let mut argv = far.map_or(vec![], |far| vec!["ip", "netns", "exec", &far.0]);
    argv.extend([
        "sh",
        "-c",
        "socat -u TCP4-LISTEN:5001,reuseaddr STDOUT | sha256sum",
    ]);
    let receiver = Running::start(&argv, Input::Nothing);
    let sent = container.sh(&format!(
        "head -c 1048576 /dev/urandom > /tmp/data; sha256sum < /tmp/data
         socat -u FILE:/tmp/data TCP4:{address}:5001,retry=60,interval=1"
    ));
    let received = receiver
        .finish(std::time::Duration::from_secs(120))
        .expect_code(0);
    assert_eq!(received.out(), sent);
}

/// Why is said, and what else to do; nothing is left of it.
#[test]
fn what_cannot_be_shown_is_refused() {
    for (name, shape, words) in [
        (
            "l3s",
            "ip link add net1 link hk-lower type ipvlan mode l3s; ip link set net1 netns husk-unfit",
            ["NIC net1 ", "mode l3s", "modes l2 or l3"],
        ),
        (
            "on-another",
            "ip -n husk-unfit link add net1 type veth peer name net2
             ip -n husk-unfit link add net3 link net1 type vlan id 5",
            ["NIC net3 ", "lies on net1", "in the container"],
        ),
        (
            "no-ethernet",
            "ip -n husk-unfit tuntap add net1 mode tun; ip -n husk-unfit link set net1 up",
            ["NIC net1 ", "no Ethernet device", "tun"],
        ),
    ] {
        let far = lower();
        let netns = Netns::new("husk-unfit");
        sh(shape);
        let census = Census::take();
        let bundle = Container::bundle(name, Some(&netns.path()));
        let done = ctr_run_bundle(Runtime::Husk, name, &bundle);
        assert_ne!(done.code, 0, "{name}");
        for word in words {
            assert!(done.err().contains(word), "{name}: {}", done.err());
        }
        drop(bundle);
        netns.assert_clean();
        census.assert_unchanged();
        drop((netns, far));
    }
}
