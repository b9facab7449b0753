//! Much of everything: bytes, connections, frames that nobody takes, queues.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use husk_tests::traffic::{self, Noise, Order};
use serde_json::json;

use super::{Container, Netns, serving, sh};
use crate::case::{Runtime, ctr_run_bundle};
use crate::census::Census;
use crate::command::{Input, Running, ok};
use crate::host;
use crate::operator::{Config, DEFAULT};

/// What is sent each way; HUSK_TEST_FLOOD_MB says how much.
fn volume() -> u64 {
    std::env::var("HUSK_TEST_FLOOD_MB").map_or(32, |n| n.parse::<u64>().unwrap()) << 20
}

/// How long a volume may take.
fn patience() -> Duration {
    Duration::from_secs(60 + (volume() >> 20) * 10)
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn a_volume_each_way_is_whole() {
    let (netns, container) = serving("volume", 1500);
    let (four, six) = (address("10.9.0.2:7000"), address("[2001:db8:9::2]:7000"));
    assert_eq!(traffic::send(four, volume()).unwrap(), volume());
    assert_eq!(traffic::fetch(six, volume()).unwrap(), volume());
    // Both ways at once.
    let sent = thread::spawn(move || traffic::send(six, volume() / 2).unwrap());
    assert_eq!(traffic::fetch(four, volume() / 2).unwrap(), volume() / 2);
    assert_eq!(sent.join().unwrap(), volume() / 2);
    drop(container);
    netns.assert_clean();
}

/// On a bridge of 9,000 bytes' frames.
#[test]
fn a_volume_between_two_containers_is_whole() {
    sh("ip link del hk-bridge 2> /dev/null || true
        ip link add hk-bridge mtu 9000 type bridge; ip link set hk-bridge up");
    let bridge = Removed("hk-bridge");
    let containers = [1, 2].map(|number| {
        let netns = Netns::new(&format!("husk-between{number}"));
        netns.nic("eth0", &format!("hk-between{number}"), 9000);
        sh(&format!("ip link set hk-between{number} master hk-bridge"));
        netns.sh(&format!("ip addr add 10.9.1.{number}/24 dev eth0"));
        let id = format!("between{number}");
        let mut bundle = Container::bundle(&id, Some(&netns.path()));
        bundle.spec["process"]["args"] = json!(["probe", "serve", "7000"]);
        (Container::start(Runtime::Husk, bundle, &id), netns)
    });
    for ((asking, _), verb, other) in [(&containers[0], "send", 2), (&containers[1], "fetch", 1)] {
        let script = format!("probe {verb} 10.9.1.{other}:7000 {}", volume());
        let argv = [
            "ctr",
            "task",
            "exec",
            "--exec-id",
            verb,
            &asking.id,
            "sh",
            "-c",
            &script,
        ];
        let done = Running::start(&argv, Input::Nothing)
            .finish(patience())
            .expect_code(0);
        assert_eq!(done.out(), format!("{}\n", volume()), "{verb}");
    }
    for (container, netns) in containers {
        drop(container);
        netns.assert_clean();
    }
    drop(bridge);
}

/// A link of the host's that is removed with this.
struct Removed(&'static str);

impl Drop for Removed {
    fn drop(&mut self) {
        sh(&format!("ip link del {}", self.0));
    }
}

#[test]
fn two_hundred_connections_at_once() {
    const CONNECTIONS: usize = 200;
    let (_netns, _container) = serving("parallel", 1500);
    let to = [address("10.9.0.2:7000"), address("[2001:db8:9::2]:7000")];
    let connect = |number: usize| traffic::connect(to[number % 2], Order::Echo).unwrap();
    let mut connections: Vec<_> = (0..CONNECTIONS).map(connect).collect();
    // All of them live at the same time, and each gets its own.
    let bytes = Arc::new(Noise::bytes(CONNECTIONS + 16 * 1024));
    for _ in 0..2 {
        let talking = connections
            .into_iter()
            .enumerate()
            .map(|(number, mut connection)| {
                let bytes = Arc::clone(&bytes);
                thread::spawn(move || {
                    let own = &bytes[number..number + 16 * 1024];
                    traffic::echo(&mut connection, own).map(|is_whole| (is_whole, connection))
                })
            });
        let talking: Vec<_> = talking.collect();
        let done = talking.into_iter().map(|thread| thread.join().unwrap().unwrap());
        connections = done
            .map(|(is_whole, connection)| {
                assert!(is_whole);
                connection
            })
            .collect();
    }
}

/// A container that is paused reads nothing. What comes for it is dropped on the host, and does not pile up in the VMM;
/// when it goes on, so does its traffic.
#[test]
fn a_flood_into_a_container_that_does_not_read() {
    let (_netns, container) = serving("flood", 1500);
    let to = address("10.9.0.2:7000");
    assert_eq!(traffic::send(to, 1 << 20).unwrap(), 1 << 20);
    let vmm = host::pid_of("husk-vmm");
    let before = host::anonymous_kib(vmm);
    ok(&["ctr", "task", "pause", &container.id]);

    // A connection fills all buffers and waits; datagrams are too many for any.
    let connection = thread::spawn(move || traffic::send(to, 24 << 20));
    let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let sampler = thread::spawn({
        let (stop, most) = (Arc::clone(&stop), Arc::clone(&most));
        move || {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(host::anonymous_kib(vmm), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(100));
            }
        }
    });
    let socket = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
    let datagram = Noise::bytes(1400);
    let mut sent = 0;
    // More would outlast the patience of the connection.
    while sent < volume().min(64 << 20) {
        // What the host's own queue has no room for is a part of the flood all the same.
        let _ = socket.send_to(&datagram, to);
        sent += 1400;
    }
    stop.store(true, Ordering::Relaxed);
    sampler.join().unwrap();
    let most = most.load(Ordering::Relaxed);
    assert!(
        before > 0 && most < before + 1024,
        "husk-vmm grew from {before} to {most} KiB in a flood"
    );

    ok(&["ctr", "task", "resume", &container.id]);
    assert_eq!(connection.join().unwrap().unwrap(), 24 << 20);
    // The datagrams that waited are answered to somebody else's port.
    let (_, is_whole) = traffic::echo_datagram(to, &Noise::bytes(1400)).unwrap();
    assert!(is_whole);
    sh("ping -n -c 2 -W 10 10.9.0.2");
    container.sh("/usr/bin/ping -n -c 2 -W 10 10.9.0.1");
}

/// With several vCPUs each NIC has several queues, which all carry frames.
#[test]
fn several_pairs_of_queues() {
    let _config = Config::at(
        DEFAULT,
        "[machine]\nvcpus = 2\nmax_vcpus = 2\n[network]\nqueue_pairs = 2\n",
    );
    let (netns, container) = serving("queues", 1500);
    assert_eq!(
        container.sh("nproc; ls /sys/class/net/eth0/queues"),
        "2\nrx-0\nrx-1\ntx-0\ntx-1\n"
    );
    assert_eq!(netns.sh("ls /sys/class/net/husk-tap0/queues").lines().count(), 4);
    let to = [address("10.9.0.2:7000"), address("[2001:db8:9::2]:7000")];
    let before = worked();
    assert_eq!(before.len(), 2, "{before:?}");
    // Which queue a connection takes is chance: of so many, some take each.
    let transfers = (0..16).map(|number| {
        thread::spawn(move || match number % 2 {
            0 => traffic::send(to[number / 2 % 2], 1 << 20),
            _ => traffic::fetch(to[number / 2 % 2], 1 << 20),
        })
    });
    let transfers: Vec<_> = transfers.collect();
    for transfer in transfers {
        assert_eq!(transfer.join().unwrap().unwrap(), 1 << 20);
    }
    let after = worked();
    for (before, after) in before.iter().zip(&after) {
        assert!(after.1 > before.1, "{before:?} {after:?}: a queue was not used");
    }
    drop(container);
    netns.assert_clean();
}

/// The host's kernel moves the frames, and the VMM's thread only its interrupts.
#[test]
fn frames_moved_by_vhost_net() {
    let _config = Config::at(DEFAULT, "[network]\nvhost = true\n");
    for mtu in [1500, 9000] {
        let (netns, container) = serving("vhost", mtu);
        let vmm = host::pid_of("husk-vmm");
        let open = sh(&format!("ls -l /proc/{vmm}/fd"));
        assert_eq!(open.matches("/dev/vhost-net").count(), 1, "{open}");
        let (four, six) = (address("10.9.0.2:7000"), address("[2001:db8:9::2]:7000"));
        let most = volume().min(64 << 20);
        assert_eq!(traffic::send(four, most).unwrap(), most);
        assert_eq!(traffic::fetch(six, most).unwrap(), most);
        for length in [1400, traffic::LARGEST_DATAGRAM] {
            let done = traffic::echo_datagram(four, &Noise::bytes(length)).unwrap();
            assert_eq!(done, (1, true), "{length}");
        }
        container.sh("/usr/bin/ping -n -c 2 -W 10 10.9.0.1");
        drop(container);
        netns.assert_clean();
    }
}

/// What is asked for and is not there is an error that says so.
#[test]
fn a_host_without_vhost_net() {
    struct Away;
    impl Drop for Away {
        fn drop(&mut self) {
            fs::rename("/dev/vhost-net.away", "/dev/vhost-net").unwrap();
        }
    }
    fs::rename("/dev/vhost-net", "/dev/vhost-net.away").unwrap();
    let _away = Away;
    no_vhost(&["/dev/vhost-net", "module vhost_net"]);
}

/// There a guest could end the host, see `hostile::guest`.
#[test]
fn a_host_that_panics_at_a_warning_serves_nothing_by_vhost_net() {
    const SETTING: &str = "/proc/sys/kernel/panic_on_warn";
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            fs::write(SETTING, "0").unwrap();
        }
    }
    fs::write(SETTING, "1").unwrap();
    let _panics = Panics;
    no_vhost(&["kernel.panic_on_warn"]);
}

/// A container is refused that vhost-net was to serve, with these words, and leaves nothing.
#[track_caller]
fn no_vhost(words: &[&str]) {
    let _config = Config::at(DEFAULT, "[network]\nvhost = true\n");
    let netns = Netns::new("husk-no-vhost");
    netns.nic("eth0", "hk-eth0", 1500);
    let census = Census::take();
    let bundle = Container::bundle("no-vhost", Some(&netns.path()));
    let done = ctr_run_bundle(Runtime::Husk, "no-vhost", &bundle);
    assert_ne!(done.code, 0);
    for word in ["network.vhost"].iter().chain(words) {
        assert!(done.err().contains(word), "{}", done.err());
    }
    drop(bundle);
    netns.assert_clean();
    census.assert_unchanged();
}

/// The VMM's threads of the first NIC, and how often each had to wait for something to do.
fn worked() -> Vec<(String, u64)> {
    let tasks = format!("/proc/{}/task", host::pid_of("husk-vmm"));
    let mut threads: Vec<_> = fs::read_dir(tasks)
        .unwrap()
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().trim().to_owned()
            };
            (field("Name:"), field("voluntary_ctxt_switches:").parse().unwrap())
        })
        .filter(|(name, _)| name.starts_with("net0."))
        .collect();
    threads.sort();
    threads
}
