//! Localhost of the network namespace: connections made to it on the host reach the container, and the container's
//! queries to a DNS server there reach the host.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde_json::json;

use super::{Container, Netns, sh};
use crate::case::Runtime;
use crate::command::{eventually, run};

/// Servers that say what they hear, on loopback of each family and on all addresses; the last line waits for them. When
/// the client is done they would give `cat` half a second for its answer, which is too little where many start at once.
const SERVERS: &str = r"
    socat -t 100 TCP4-LISTEN:8080,bind=127.0.0.1,reuseaddr,fork,backlog=128 EXEC:cat &
    socat -t 100 TCP6-LISTEN:8081,bind=[::1],ipv6only,reuseaddr,fork EXEC:cat &
    socat -t 100 TCP6-LISTEN:8082,reuseaddr,fork,ipv6only=0 EXEC:cat &
    sleep 1000";
const READY: &str = "for port in 1F90 1F91 1F92; do \
    until cat /proc/net/tcp /proc/net/tcp6 | grep -q :$port.*:0000.0A; do sleep 0.2; done; done";

fn serving(runtime: Runtime, id: &str, netns: Option<&Netns>) -> Container {
    let id = format!("{id}-{runtime:?}").to_lowercase();
    let mut bundle = Container::bundle(&id, netns.map(Netns::path).as_deref());
    bundle.spec["process"]["args"] = json!(["sh", "-c", SERVERS]);
    let container = Container::start(runtime, bundle, &id);
    container.sh(READY);
    container
}

#[test]
fn ports_of_the_container_are_reached_from_its_network_namespace() {
    for runtime in Runtime::all() {
        let netns = Netns::new("husk-localhost");
        let container = serving(runtime, "localhost", Some(&netns));
        for to in [
            "TCP4:127.0.0.1:8080",
            "TCP6:[::1]:8081",
            "TCP4:127.0.0.1:8082",
            "TCP6:[::1]:8082",
        ] {
            let said = netns.sh(&format!("echo hello {to} | socat -t 60 - {to}"));
            assert_eq!(said, format!("hello {to}\n"), "{runtime:?}");
        }
        // Whole, both ways at the same time, to the end that one side says first.
        netns.sh("head -c 4194304 /dev/urandom > /tmp/husk-e2e-localhost
             socat -t 60 - TCP4:127.0.0.1:8080 < /tmp/husk-e2e-localhost | cmp - /tmp/husk-e2e-localhost
             rm /tmp/husk-e2e-localhost");
        // Many at once.
        let said = netns.sh(
            "for i in $(seq 30); do (echo line $i | socat -t 100 - TCP4:127.0.0.1:8080 2>&1) & done; wait",
        );
        assert_eq!(said.lines().count(), 30, "{runtime:?}: {said}");
        // Nobody there.
        let argv = [
            "ip",
            "netns",
            "exec",
            "husk-localhost",
            "socat",
            "-T",
            "60",
            "-",
            "TCP4:127.0.0.1:9",
        ];
        let refused = run(&argv);
        assert_ne!(refused.code, 0, "{runtime:?}");
        let why = refused.err();
        assert!(
            why.contains("reset") || why.contains("refused"),
            "{runtime:?}: {why}"
        );
        // What the host itself has there.
        let own = netns.sh(
            "socat -u EXEC:'echo own' TCP4-LISTEN:5000,bind=127.0.0.11,reuseaddr & \
             until ss -Htln | grep -q 127.0.0.11:5000; do sleep 0.1; done
             socat -u TCP4:127.0.0.11:5000 -; wait",
        );
        assert_eq!(own, "own\n", "{runtime:?}");
        drop(container);
        eventually("no more listeners", || {
            netns.sh("ss -Htln").is_empty().then_some(())
        });
    }
}

#[test]
fn ports_are_reached_in_a_network_namespace_of_the_sandboxs_own() {
    for runtime in Runtime::all() {
        let container = serving(runtime, "own-localhost", None);
        let pid = container.pid();
        let said = sh(&format!(
            "echo hello | nsenter -t {pid} -n socat -t 60 - TCP4:127.0.0.1:8080"
        ));
        assert_eq!(said, "hello\n", "{runtime:?}");
    }
}

/// Answers DNS queries at 127.0.0.11 in a network namespace: every name has the address 10.1.2.3.
fn dns_server(netns: &Netns) {
    let namespace = File::open(netns.path()).unwrap();
    let sockets = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        (
            UdpSocket::bind("127.0.0.11:53").unwrap(),
            TcpListener::bind("127.0.0.11:53").unwrap(),
        )
    });
    let (udp, tcp) = sockets.join().unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut query) {
            udp.send_to(&answer(&query[..length]), from).unwrap();
        }
    });
    thread::spawn(move || {
        for client in tcp.incoming() {
            let mut client = client.unwrap();
            let mut length = [0; 2];
            client.read_exact(&mut length).unwrap();
            let mut query = vec![0; u16::from_be_bytes(length).into()];
            client.read_exact(&mut query).unwrap();
            let answer = answer(&query);
            client
                .write_all(&u16::try_from(answer.len()).unwrap().to_be_bytes())
                .unwrap();
            client.write_all(&answer).unwrap();
        }
    });
}

/// Of one question without options.
fn answer(query: &[u8]) -> Vec<u8> {
    let name = query[12..].iter().position(|byte| *byte == 0).unwrap() + 13;
    let is_ipv4 = query[name..name + 2] == [0, 1];
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, is_ipv4.into(), 0, 0, 0, 0]);
    answer.extend(&query[12..name + 4]);
    if is_ipv4 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
    }
    answer
}

#[test]
fn the_dns_server_on_loopback_of_the_network_namespace_is_the_containers() {
    for runtime in Runtime::all() {
        let netns = Netns::new("husk-dns");
        dns_server(&netns);
        let id = format!("dns-{runtime:?}").to_lowercase();
        let mut bundle = Container::bundle(&id, Some(&netns.path()));
        let resolv_conf = bundle.path().join("resolv.conf");
        fs::write(&resolv_conf, "nameserver 127.0.0.11\noptions ndots:0\n").unwrap();
        bundle.mount(json!({
            "destination": "/etc/resolv.conf", "type": "bind", "source": resolv_conf, "options": ["rbind", "rw"],
        }));
        let container = Container::start(runtime, bundle, &id);
        for _ in 0..3 {
            let said = container.sh("busybox nslookup db.example");
            assert!(said.contains("10.1.2.3"), "{runtime:?}: {said}");
        }
        // Number 0x6162, one question: db IN A.
        let said = container.sh(
            r"printf '\0\024ab\001\000\000\001\000\000\000\000\000\000\002db\000\000\001\000\001' |
              socat -t 60 - TCP4:127.0.0.11:53 | od -An -tu1",
        );
        let said: Vec<_> = said.split_whitespace().collect();
        assert_eq!(said[2..4], ["97", "98"], "{runtime:?}");
        assert_eq!(said[said.len() - 4..], ["10", "1", "2", "3"], "{runtime:?}");
    }
}

/// As Docker's does when it connects a network. A DNS server of the container's own, on all addresses, does not stand in
/// the way.
#[test]
fn a_resolv_conf_that_a_hook_writes_counts() {
    let netns = Netns::new("husk-dns-late");
    dns_server(&netns);
    let id = "dns-late";
    let mut bundle = Container::bundle(id, Some(&netns.path()));
    let resolv_conf = bundle.path().join("resolv.conf");
    fs::write(&resolv_conf, "nameserver 10.0.0.1\n").unwrap();
    bundle.mount(json!({
        "destination": "/etc/resolv.conf", "type": "bind", "source": resolv_conf, "options": ["rbind", "rw"],
    }));
    bundle.spec["process"]["args"] = json!(["sh", "-c", "socat UDP4-RECVFROM:53,fork EXEC:cat & sleep 1000"]);
    let write = format!("echo nameserver 127.0.0.11 > {}", resolv_conf.display());
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", write]}]);
    bundle.change(&json!({"hooks": {"createRuntime": hook}}));
    let container = Container::start(Runtime::Husk, bundle, id);
    container.sh("until grep -q :0035 /proc/net/udp; do sleep 0.2; done");
    let said = container.sh("busybox nslookup db.example");
    assert!(said.contains("10.1.2.3"), "{said}");
}
