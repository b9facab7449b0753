//! The host's side of a network, in namespaces of the tests' own.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    time::Duration,
};

use super::*;
use crate::{
    host::{namespaces::Kind, netns},
    test_help::eventually,
};

const SIZE: Size = Size {
    spare: None,
    most: 8,
    queues: 1,
    vhost: false,
};

/// Runs iproute2's programs in a namespace.
fn sh(namespace: &Namespace, script: &str) -> String {
    let script = script.to_owned();
    within(namespace, move || {
        let output = Command::new("sh").args(["-ec", &script]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {error}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .unwrap()
}

/// A namespace with NIC eth0 (10.9.0.2) whose other end, p0 (10.9.0.1), is in another.
fn pair() -> (Namespace, Namespace) {
    let (inside, outside) = (netns::make().unwrap(), netns::make().unwrap());
    let path = format!("/proc/{}/fd/{}", std::process::id(), outside.fd.as_raw_fd());
    sh(
        &inside,
        &format!(
            "ip link add eth0 type veth peer name p0
             ip link set p0 netns {path}
             ip link set eth0 address 02:42:0a:09:00:02 up
             ip addr add 10.9.0.2/24 dev eth0
             ip route add default via 10.9.0.1"
        ),
    );
    sh(&outside, "ip addr add 10.9.0.1/24 dev p0; ip link set p0 up");
    settled(&inside, "eth0");
    settled(&outside, "p0");
    (inside, outside)
}

/// Waits for what the kernel does a moment after a NIC and its other end are up: it tells of the carrier and, where there is
/// IPv6, adds an address and a route.
fn settled(namespace: &Namespace, nic: &str) {
    let script = format!(
        "cat /proc/sys/net/ipv6/conf/{nic}/disable_ipv6 2>/dev/null || echo 1
         ip -o link show {nic}
         ip -6 -o addr show dev {nic} || true
         ip -6 route show dev {nic} || true"
    );
    let mut before = String::new();
    eventually(|| {
        let now = sh(namespace, &script);
        let is_told = now.starts_with('1') || now.contains("inet6 fe80:") && now.contains("\nfe80::/64 ");
        let done = is_told && now.contains("state UP") && now == before;
        before.clone_from(&now);
        if done { Ok(()) } else { Err(now) }
    });
}

fn ours(namespace: &Namespace) -> String {
    sh(
        namespace,
        "tc qdisc show | grep ingress || true; ip -o link show | grep husk || true",
    )
}

#[test]
fn nics_are_wired_and_nothing_is_left() {
    let (inside, _outside) = pair();
    let (mut network, taps, view) = Network::open(&inside, SIZE).unwrap();
    assert_eq!((taps.len(), taps[0].queues.len()), (1, 1));
    assert_eq!(taps[0].mac, [2, 0x42, 10, 9, 0, 2]);
    assert_eq!(view.nics.len(), 1);
    assert_eq!((view.nics[0].name.as_str(), view.nics[0].mtu), ("eth0", 1500));
    assert_eq!(network.slot_of(view.nics[0].index), Some(0));
    // The address and, of IPv6, the link-local one.
    assert_eq!(view.addresses.len(), 2);
    assert_eq!(network.follow(8).unwrap().view, view);
    assert!(sh(&inside, "ip -o link show husk-tap0").contains("qlen 1000"));
    assert!(matches!(Network::open(&inside, SIZE), Err(NetworkError::Taken(name)) if name == "husk-tap0"));
    drop((network, taps));
    clear(&inside).unwrap();
    assert_eq!(ours(&inside), "");
}

#[test]
fn frames_pass_the_namespace_by() {
    let (inside, outside) = pair();
    let (_network, taps, _) = Network::open(&inside, SIZE).unwrap();
    let mut tap = std::fs::File::from(taps[0].queues[0].try_clone().unwrap());
    // Somebody asks for 10.9.0.2, whom the guest alone may answer.
    let asked = std::thread::spawn(move || {
        within(&outside, || {
            let address = "10.9.0.2:80".parse().unwrap();
            Ok(TcpStream::connect_timeout(&address, Duration::from_secs(3)).map(drop))
        })
        .map(|result| (result, outside))
    });
    let mut frame = [0; 2048];
    let request = loop {
        match tap.read(&mut frame) {
            Ok(length) if frame[12 + 12..12 + 14] == [8, 6] => break frame[..length].to_vec(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2))
            }
            Err(error) => panic!("{error}"),
        }
    };
    let mut answer = request.clone();
    let sender: [u8; 6] = request[12 + 6..12 + 12].try_into().unwrap();
    let own = [2, 0x42, 10, 9, 0, 2];
    answer[12..18].copy_from_slice(&sender);
    answer[18..24].copy_from_slice(&own);
    answer[12 + 21] = 2;
    answer[12 + 22..12 + 28].copy_from_slice(&own);
    answer[12 + 28..12 + 32].copy_from_slice(&[10, 9, 0, 2]);
    answer[12 + 32..12 + 38].copy_from_slice(&sender);
    answer[12 + 38..12 + 42].copy_from_slice(&[10, 9, 0, 1]);
    // Under another MAC it goes nowhere.
    let mut spoofed = answer.clone();
    spoofed[18..24].copy_from_slice(&[2, 2, 2, 2, 2, 2]);
    spoofed[12 + 22..12 + 28].copy_from_slice(&[2, 2, 2, 2, 2, 2]);
    tap.write_all(&spoofed).unwrap();
    tap.write_all(&answer).unwrap();
    // Now comes its SYN, which nobody answers: not the namespace's own stack by an RST either.
    let (result, outside) = asked.join().unwrap().unwrap();
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
    let known = sh(&outside, "ip neigh show");
    assert!(
        known.contains("02:42:0a:09:00:02") && !known.contains("02:02:02"),
        "{known}"
    );
    let mut syns = 0;
    while let Ok(length) = tap.read(&mut frame) {
        syns += usize::from(length > 12 + 34 && frame[12 + 12..12 + 14] == [8, 0] && frame[12 + 23] == 6);
    }
    assert!(syns >= 1);
}

#[test]
fn late_nics_take_the_spare_ones() {
    let inside = netns::make().unwrap();
    let (mut network, taps, view) = Network::open(&inside, SIZE).unwrap();
    assert_eq!((taps.len(), view.nics.len()), (2, 0));
    assert_ne!(taps[0].mac, taps[1].mac);
    let monitor = monitor(&inside).unwrap();
    sh(
        &inside,
        "ip link add eth0 type veth peer name eth1; ip link set eth0 up; ip link set eth1 mtu 9000 up; ip addr add 10.1.0.1/24 dev eth1",
    );
    let told = || {
        let mut poll = [nix::poll::PollFd::new(
            std::os::fd::AsFd::as_fd(&monitor),
            nix::poll::PollFlags::POLLIN,
        )];
        nix::poll::poll(&mut poll, 0_u8).unwrap()
    };
    assert_eq!(told(), 1);
    // Of a carrier and what comes with it the kernel tells a moment later.
    eventually(|| {
        monitor.drain().unwrap();
        match told() {
            0 => Ok(()),
            _ => Err("there is always more".into()),
        }
    });
    let view = network.follow(8).unwrap().view;
    let names: Vec<_> = view.nics.iter().map(|nic| nic.name.as_str()).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&"eth0") && names.contains(&"eth1"));
    assert!(
        sh(&inside, "ip -o link show")
            .lines()
            .any(|line| line.contains("husk-tap") && line.contains("9000"))
    );
    sh(&inside, "ip link add eth7 type veth peer name eth8");
    let followed = network.follow(8).unwrap();
    // A veth's carrier may come a moment later.
    let lasting = |view: &View| {
        let mut nics = view.nics.clone();
        nics.iter_mut()
            .for_each(|nic| nic.flags &= !((libc::IFF_RUNNING | libc::IFF_LOWER_UP) as u32));
        nics
    };
    assert_eq!(lasting(&followed.view), lasting(&view));
    let error = followed.left_out.unwrap().to_string();
    assert!(
        error.contains("NIC eth") && error.contains("network.spare_nics"),
        "{error}"
    );
    // One that goes makes room.
    sh(&inside, "ip link del eth0; ip link del eth7");
    assert_eq!(network.follow(8).unwrap().view.nics, []);
    sh(&inside, "ip link add eth0 type veth peer name eth9");
    assert_eq!(network.follow(8).unwrap().view.nics.len(), 2);
}

#[test]
fn nics_that_a_guest_cannot_have_are_named() {
    let names = |inside: &Namespace| {
        let links = within(inside, Socket::new).map(|mut socket| view::links(&mut socket).unwrap());
        let nics = links.unwrap().into_iter().filter(|link| link.is_nic);
        nics.map(|link| link.nic.name).collect::<Vec<_>>()
    };
    for (shape, word) in [
        ("ip link add eth1 link eth0 type macvlan", "lies on eth0"),
        (
            "ip tuntap add eth1 mode tun; ip link set eth1 up",
            "no Ethernet device",
        ),
    ] {
        let (inside, _outside) = pair();
        sh(&inside, shape);
        assert_eq!(names(&inside), ["eth0"], "{shape}");
        let error = Network::open(&inside, SIZE).unwrap_err().to_string();
        assert!(error.contains("NIC eth1 ") && error.contains(word), "{error}");
        clear(&inside).unwrap();
        assert_eq!(ours(&inside), "");
    }
    // One on a NIC that is elsewhere, and one that is down.
    let (inside, outside) = pair();
    let path = format!("/proc/{}/fd/{}", std::process::id(), inside.fd.as_raw_fd());
    sh(
        &outside,
        &format!("ip link add eth1 link p0 netns {path} type macvlan"),
    );
    assert_eq!(names(&inside), ["eth0", "eth1"]);
    sh(&inside, "ip tuntap add tun0 mode tun");
    assert_eq!(Network::open(&inside, SIZE).unwrap().2.nics.len(), 2);
}

#[test]
fn what_somebody_else_filters_stays() {
    let (inside, _outside) = pair();
    sh(
        &inside,
        "tc qdisc add dev eth0 clsact; tc filter add dev eth0 ingress prio 7 protocol all u32 match u32 0 0 classid 1:1",
    );
    let (network, taps, _) = Network::open(&inside, SIZE).unwrap();
    assert!(sh(&inside, "tc filter show dev eth0 ingress").contains("husk"));
    drop((network, taps));
    clear(&inside).unwrap();
    let left = sh(&inside, "tc filter show dev eth0 ingress");
    assert!(left.contains("u32") && !left.contains("husk"), "{left}");
}

#[test]
fn a_killed_sandbox_is_cleared_by_the_next() {
    let (inside, _outside) = pair();
    drop(Network::open(&inside, SIZE).unwrap());
    assert!(ours(&inside).contains("ingress"));
    let (_network, taps, view) = Network::open(
        &inside,
        Size {
            spare: Some(3),
            queues: 2,
            ..SIZE
        },
    )
    .unwrap();
    assert_eq!((taps.len(), view.nics.len()), (4, 1));
    assert!(taps.iter().all(|tap| tap.queues.len() == 2));
}

#[test]
fn what_the_guest_is_told_is_what_an_administrator_would_say() {
    let (inside, _outside) = pair();
    sh(
        &inside,
        "ip neigh add 10.9.0.7 lladdr 02:00:00:00:00:07 dev eth0
         ip neigh add 10.9.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud stale
         ip rule add from 10.9.0.2 table 77 prio 100
         ip route add 10.8.0.0/16 via 10.9.0.1 table 77 metric 5 mtu 1400
         ip route add blackhole 10.7.0.0/16
         ip route add 10.6.0.0/16 nexthop via 10.9.0.1 weight 2 nexthop via 10.9.0.9
         ip addr add 192.0.2.1/32 dev lo; ip addr add 10.9.0.20/24 dev eth0",
    );
    let (mut network, _taps, view) = Network::open(&inside, SIZE).unwrap();
    assert_eq!((view.neighbours.len(), view.rules.len()), (1, 1));
    // The prefix, default, 77, blackhole, multipath, and fe80::/64.
    assert_eq!(view.routes.len(), 6);
    assert_eq!(view.addresses.len(), 4);
    sh(
        &inside,
        "ip route del blackhole 10.7.0.0/16; ip link set eth0 mtu 1400",
    );
    let later = network.follow(8).unwrap().view;
    assert_eq!(later.routes.len(), 5);
    assert_eq!(later.nics[0].mtu, 1400);
    assert_eq!(later.addresses, view.addresses);
}

#[test]
fn bridged_nics_and_the_hosts_own_are_told_apart() {
    let inside = netns::make().unwrap();
    sh(
        &inside,
        "ip link add br0 type bridge; ip link add eth0 type veth peer name p0; ip link set eth0 master br0; ip link set p0 master br0",
    );
    let (_network, taps, view) = Network::open(&inside, SIZE).unwrap();
    let names: Vec<_> = view.nics.iter().map(|nic| nic.name.as_str()).collect();
    assert_eq!(names, ["br0"]);
    assert_eq!(taps.len(), 1);
    assert!(Namespace::of(std::process::id(), Kind::Network).is_ok_and(|own| netns::is_hosts(own.id)));
    let _ = TcpListener::bind("127.0.0.1:0").unwrap();
}
