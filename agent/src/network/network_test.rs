//! The guest's side of a network, in namespaces of the tests' own. Each test's thread is the agent's.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use husk_agent_protocol::messages::network::Setting;
use husk_netlink::message::u16_at;

use super::*;

/// Runs iproute2's programs in this thread's namespace.
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The bodies of all messages of a kind in this thread's namespace.
fn bodies(kind: u16, family: i32, length: usize) -> Vec<Vec<u8>> {
    let mut header = vec![0; length];
    header[0] = family as u8;
    let list = Socket::new()
        .unwrap()
        .dump(&Request::new(kind, 0, &header))
        .unwrap();
    // Without what only a kernel can say: ages.
    let age = match kind {
        libc::RTM_GETADDR => libc::IFA_CACHEINFO,
        libc::RTM_GETNEIGH => libc::NDA_CACHEINFO,
        _ => libc::RTA_CACHEINFO,
    };
    let rebuilt = list.iter().map(|message| {
        let kept = message.attributes(length).filter(|found| found.kind != age);
        let begin = Request::new(0, 0, &message.body[..length]);
        kept.fold(begin, |request, found| request.with(found.kind, found.data))
    });
    rebuilt.map(|request| request.body().to_vec()).collect()
}

/// Makes the thread that of an agent whose machine has two NICs: the two ends of a cable.
fn machine() -> Network {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    sh("ip link add nic0 type veth peer name nic1");
    Network::of_machine_with(|link| u16_at(&link.body, 2) == Some(1)).unwrap()
}

fn nic(slot: u32, name: &str) -> Nic {
    Nic {
        slot,
        index: 41 + slot,
        name: name.into(),
        mac: vec![2, 0x42, 10, 1, 0, slot as u8 + 1],
        mtu: 1400,
        queue_length: 500,
        flags: (libc::IFF_UP | libc::IFF_MULTICAST) as u32,
        settings: [
            ("ipv6/accept_dad", 1),
            ("ipv4/rp_filter", 2),
            ("ipv4/unheard_of", 2),
        ]
        .map(|(name, value)| Setting {
            name: name.into(),
            value,
            ..Setting::default()
        })
        .into(),
        ..Nic::default()
    }
}

/// What a host's namespace of the same shape has: made with iproute2 in a namespace of its own.
fn hosts(script: &str) -> wire::Network {
    let script = script.to_owned();
    let thread =
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            sh("ip link add eth0 index 41 address 02:42:0a:01:00:01 mtu 1400 type veth peer name eth1 index 42
            ip link set eth1 address 02:42:0a:01:00:02 mtu 1400
            ip link set lo up; ip link set eth0 up; ip link set eth1 up");
            wait_for_link_local(&["eth0", "eth1"]);
            sh(&script);
            let of = |kind, length| {
                let mut list = bodies(kind, libc::AF_INET, length);
                let mut six = bodies(kind, libc::AF_INET6, length);
                six.reverse();
                list.extend(six);
                list
            };
            let mut addresses = of(libc::RTM_GETADDR, kind::ADDRESS_HEADER);
            addresses.retain(|body| u32_of(body, 4) != 1);
            let mut routes = of(libc::RTM_GETROUTE, kind::ROUTE_HEADER);
            routes.retain(|body| body[4] != 255 && body[7] == 1);
            let mut neighbours = of(libc::RTM_GETNEIGH, kind::NEIGHBOUR_HEADER);
            neighbours.retain(|body| u16_at(body, 8) == Some(libc::NUD_PERMANENT));
            let mut rules = of(libc::RTM_GETRULE, kind::ROUTE_HEADER);
            rules.retain(|body| body[2] != 0);
            wire::Network {
                nics: vec![nic(0, "eth0"), nic(1, "eth1")],
                addresses,
                routes,
                neighbours,
                rules,
                ..wire::Network::default()
            }
        });
    thread.join().unwrap()
}

/// Waits for the addresses that the kernel gives NICs some time after they are up, and for their routes, which come
/// last: a view from before lacks some of them.
fn wait_for_link_local(nics: &[&str]) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let routes = sh("ip -6 route show");
        let has = |nic: &&str| routes.contains(&format!("fe80::/64 dev {nic} "));
        if nics.iter().all(has) {
            return;
        }
        assert!(Instant::now() < end, "{routes}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn u32_of(body: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(body[at..at + 4].try_into().unwrap())
}

const SHAPE: &str = "
    ip addr add 10.1.0.5/24 dev eth0
    ip addr add 10.1.0.6/24 dev eth0
    ip addr add 2001:db8::5/64 dev eth0 nodad
    ip addr add 10.2.0.5/16 dev eth1
    ip route del 10.2.0.0/16 dev eth1
    ip route add 10.2.0.1 dev eth1 scope link
    ip route add default via 10.1.0.1 metric 7 mtu 1300
    ip route add 10.99.0.0/16 via 192.0.2.9 dev eth1 onlink
    ip route add 10.98.0.0/16 nexthop via 10.1.0.1 weight 3 nexthop via 10.2.0.1
    ip route add default via 10.1.0.254 table 77
    ip -6 route add default via 2001:db8::1
    ip -6 route add 2001:db8:7::/48 via fe80::1 dev eth1 metric 5
    ip rule add from 10.1.0.6 table 77 priority 500
    ip -6 rule add from 2001:db8::5 table 77 priority 501
    ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev eth0
    ip -6 neigh add 2001:db8::1 lladdr 02:00:00:00:00:01 dev eth0";

#[test]
fn a_guest_shows_what_its_host_has() {
    let mut network = machine();
    assert_eq!(
        sh("ip -o link show").lines().count(),
        1,
        "NICs that are not wired are not seen"
    );
    network.set(hosts(SHAPE)).unwrap();
    let link = sh("ip -o link show eth0");
    for word in ["41: eth0@", "mtu 1400", "UP", "qlen 500", "02:42:0a:01:00:01"] {
        assert!(link.contains(word), "{word}: {link}");
    }
    let addresses = sh("ip -o addr show");
    for word in [
        "10.1.0.5/24",
        "10.1.0.6/24",
        "secondary",
        "2001:db8::5/64",
        "10.2.0.5/16",
        "fe80::42:aff:fe01:1/64",
    ] {
        assert!(addresses.contains(word), "{word}: {addresses}");
    }
    assert!(!addresses.contains("tentative"), "{addresses}");
    assert_eq!(addresses.matches("fe80::").count(), 2, "{addresses}");
    let routes = sh("ip route show table all; ip -6 route show table all");
    for line in [
        "default via 10.1.0.1 dev eth0 metric 7 mtu 1300",
        "10.99.0.0/16 via 192.0.2.9 dev eth1 onlink",
        "10.2.0.1 dev eth1 scope link",
        "default via 10.1.0.254 dev eth0 table 77",
        "10.1.0.0/24 dev eth0 proto kernel scope link src 10.1.0.5",
        "default via 2001:db8::1 dev eth0 metric 1024 pref medium",
        "2001:db8:7::/48 via fe80::1 dev eth1 metric 5 pref medium",
        "nexthop via 10.1.0.1 dev eth0 weight 3",
    ] {
        assert!(routes.contains(line), "{line}: {routes}");
    }
    assert!(!routes.contains("10.2.0.0/16"), "{routes}");
    let rules = sh("ip rule show; ip -6 rule show");
    for line in [
        "500:\tfrom 10.1.0.6 lookup 77",
        "501:\tfrom 2001:db8::5 lookup 77",
    ] {
        assert!(rules.contains(line), "{rules}");
    }
    assert_eq!(sh("ip neigh show nud permanent").lines().count(), 2);
    assert_eq!(
        fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/rp_filter").unwrap(),
        "2\n"
    );
    assert_eq!(
        fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_dad").unwrap(),
        "1\n"
    );
}

#[test]
fn changes_are_followed_and_what_containers_made_is_kept() {
    let mut network = machine();
    let first = hosts(SHAPE);
    network.set(first.clone()).unwrap();
    sh("ip route add 10.50.0.0/16 via 10.1.0.1; ip route del 10.99.0.0/16");
    let later = hosts(&format!(
        "{SHAPE}
         ip route del default via 10.1.0.1
         ip route add default via 10.1.0.2
         ip addr del 2001:db8::5/64 dev eth0
         ip neigh del 10.1.0.1 dev eth0
         ip rule del priority 500"
    ));
    network.set(later).unwrap();
    let routes = sh("ip route show; ip -6 route show");
    assert!(
        routes.contains("default via 10.1.0.2 dev eth0") && !routes.contains("metric 7"),
        "{routes}"
    );
    assert!(
        routes.contains("10.50.0.0/16") && !routes.contains("10.99.0.0/16"),
        "{routes}"
    );
    assert!(!sh("ip addr show").contains("2001:db8::5"));
    assert_eq!(sh("ip neigh show nud permanent").lines().count(), 1);
    assert!(!sh("ip rule show").contains("500:"));
    // Down and up again: all is there once more.
    let mut down = first.clone();
    down.nics[0].flags = 0;
    // As the host's kernel does.
    down.routes.clear();
    network.set(down).unwrap();
    assert!(!sh("ip route show").contains("dev eth0"));
    network.set(first).unwrap();
    assert!(sh("ip route show").contains("default via 10.1.0.1 dev eth0 metric 7"));
}

/// A host may be looked at while somebody wires it.
#[test]
fn a_route_that_comes_before_its_address() {
    let mut network = machine();
    let whole = hosts("ip addr add 10.1.0.5/24 dev eth0; ip route add default via 10.1.0.1");
    let mut early = whole.clone();
    early.addresses.clear();
    early.routes.retain(|body| body[1] == 0);
    assert_eq!(early.routes.len(), 1);
    let fault = network.set(early).unwrap_err().to_string();
    assert!(fault.contains("add the route to default"), "{fault}");
    network.set(whole.clone()).unwrap();
    assert_eq!(
        sh("ip route show default").trim(),
        "default via 10.1.0.1 dev eth0"
    );
    // What a container has removed since stays removed.
    sh("ip route del default");
    network.set(whole).unwrap();
    assert_eq!(sh("ip route show default"), "");
}

#[test]
fn nics_come_and_go() {
    let mut network = machine();
    let all = hosts(SHAPE);
    let mut one = all.clone();
    one.nics.truncate(1);
    one.addresses.retain(|body| u32_of(body, 4) == 41);
    one.routes.retain(|_| false);
    for _ in 0..2 {
        network.set(one.clone()).unwrap();
        assert_eq!(sh("ip -o link show").lines().count(), 2);
        network.set(wire::Network::default()).unwrap();
        assert_eq!(sh("ip -o link show").lines().count(), 1);
        network.set(all.clone()).unwrap();
        assert_eq!(sh("ip -o link show").lines().count(), 3);
    }
    // By another name and number, and of another slot.
    let mut other = one.clone();
    other.nics[0] = Nic {
        slot: 1,
        index: 7,
        name: "net.1".into(),
        ..other.nics[0].clone()
    };
    (other.addresses, other.neighbours) = (vec![], vec![]);
    network.set(other).unwrap();
    assert!(sh("ip -o link show").contains("7: net.1"));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut network = machine();
    let with = |change: &dyn Fn(&mut Nic)| {
        let mut nic = nic(0, "eth0");
        change(&mut nic);
        wire::Network {
            nics: vec![nic],
            ..wire::Network::default()
        }
    };
    let setting = |name: &str| Setting {
        name: name.into(),
        ..Setting::default()
    };
    for (word, wanted) in [
        ("no name", with(&|nic| nic.name = "a/b".into())),
        ("no name", with(&|nic| nic.name = "..".into())),
        ("no name", with(&|nic| nic.name = "sixteen-letters-".into())),
        ("six bytes", with(&|nic| nic.mac = vec![1])),
        ("the number 1", with(&|nic| nic.index = 1)),
        (
            "no setting",
            with(&|nic| nic.settings = vec![setting("../../kernel/x")]),
        ),
        ("no NIC 2", with(&|nic| nic.slot = 2)),
        (
            "more than",
            wire::Network {
                addresses: vec![vec![0; 3 << 20]],
                ..wire::Network::default()
            },
        ),
        (
            "more than",
            wire::Network {
                nics: vec![nic(0, "e"); 9],
                ..wire::Network::default()
            },
        ),
    ] {
        let fault = network.set(wanted).unwrap_err();
        assert!(
            fault.message.starts_with("network: ") || fault.message.starts_with("network "),
            "{fault}"
        );
        assert!(fault.message.contains(word), "{word}: {fault}");
    }
    // Nonsense is the kernel's to refuse; the rest is done.
    let mut wanted = hosts(SHAPE);
    wanted.routes.insert(0, vec![7; 40]);
    wanted.addresses.insert(0, vec![1]);
    assert!(network.set(wanted).is_err());
    assert!(sh("ip route show").contains("default via 10.1.0.1 dev eth0"));
    assert!(Network::outside().unwrap().set(with(&|_| {})).is_err());
}
