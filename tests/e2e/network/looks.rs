//! What `ip` shows in a container is what it shows in one of runc's on the same network.

use serde_json::json;

use super::{Container, Netns, assert_same, view};
use crate::case::{Case, Runtime};
use crate::census::Census;

/// Addresses of both families, several NICs, and routes, rules and neighbours of every kind that the agent replays.
const SHAPE: &str = "
    ip link set eth0 address 02:42:0a:09:00:02
    ip addr add 10.9.0.2/24 brd + dev eth0
    ip addr add 10.9.0.3/24 dev eth0
    ip addr add 2001:db8:9::2/64 dev eth0 nodad
    ip addr add 2001:db8:9::3/64 dev eth0 nodad
    ip addr add 10.10.0.2/16 dev net1
    ip addr add 2001:db8:10::2/64 dev net1 nodad
    ip addr add 192.0.2.77/32 dev lo
    ip route del 10.10.0.0/16 dev net1
    ip route add 10.10.0.1 dev net1 scope link
    ip route add default via 10.9.0.1 metric 100 mtu 1400
    ip route add 10.20.0.0/16 via 10.10.0.1 src 10.10.0.2
    ip route add 10.21.0.0/16 via 192.0.2.1 dev net1 onlink
    ip route add 10.22.0.0/16 nexthop via 10.9.0.1 weight 2 nexthop via 10.10.0.1
    ip route add blackhole 10.23.0.0/16
    ip route add default via 10.10.0.1 table 100
    ip -6 route add default via 2001:db8:9::1 metric 512
    ip -6 route add 2001:db8:77::/48 via fe80::77 dev net1
    ip rule add from 10.10.0.2 table 100 priority 1000
    ip -6 rule add from 2001:db8:10::2 table 100 priority 1001
    ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev eth0
    ip -6 neigh add 2001:db8:9::1 lladdr 02:00:00:00:00:01 dev eth0
    # Until the link-local addresses are in use.
    sleep 3";

#[test]
fn as_under_runc() {
    let netns = Netns::new("husk-looks");
    netns.nic("eth0", "hk-eth0", 1500);
    netns.nic("net1", "hk-net1", 9000);
    netns.nic("small2", "hk-small2", 1280);
    netns.sh(SHAPE);
    let census = Census::take();
    let mut expected = None;
    for runtime in Runtime::all() {
        let id = format!("looks-{runtime:?}").to_lowercase();
        let container = Container::start(runtime, Container::bundle(&id, Some(&netns.path())), &id);
        let seen = view(|command| container.sh(command));
        assert!(seen.len() > 20, "{seen:#?}");
        match &expected {
            None => expected = Some(seen),
            Some(expected) => assert_same(expected, &seen),
        }
    }
    netns.assert_clean();
    census.assert_unchanged();
}

/// A container without NICs has loopback, up; the machine's spare NICs are not seen.
#[test]
fn loopback_alone() {
    Case::of(json!({}))
        .sh("ls /sys/class/net; cat /proc/net/dev | wc -l; ip addr show lo | grep -c '127.0.0.1/8\\|::1/128'; ping -c 1 -W 5 127.0.0.1 >/dev/null && echo up")
        // runc leaves loopback as the kernel makes it: down, without addresses. Engines bring it up.
        .runc_before(0, 0)
        .prints("lo\n3\n2\nup\n");
}

/// Settings of a NIC are those of the namespace, and `linux.sysctl` is laid over them.
#[test]
fn settings_of_a_nic() {
    let netns = Netns::new("husk-settings");
    netns.nic("eth0", "hk-eth0", 1500);
    netns.sh("cd /proc/sys/net; echo 1 > ipv6/conf/eth0/disable_ipv6; echo 2 > ipv4/conf/eth0/rp_filter; echo 1 > ipv4/conf/eth0/arp_ignore");
    let path = netns.path();
    Case::of(json!({"linux": {"sysctl": {"net.ipv4.conf.eth0.arp_announce": "2"}}}))
        .prepared(move |_, bundle| bundle.namespace(json!({"type": "network", "path": path})))
        .sh("cd /proc/sys/net; cat ipv6/conf/eth0/disable_ipv6 ipv4/conf/eth0/rp_filter ipv4/conf/eth0/arp_ignore ipv4/conf/eth0/arp_announce; ip addr show eth0 | grep -c inet6")
        .exits(1)
        .prints("1\n2\n1\n2\n0\n");
}
