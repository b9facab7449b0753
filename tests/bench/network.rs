//! How fast bytes and messages pass between the host and a container, and what that costs the VMM.

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;

use husk_tests::traffic::{self, Order};

use crate::{Figure, pid_of};

/// Sent each way in a round: enough for the connection to find its pace.
const BYTES: u64 = 16 << 20;

/// Messages of 64 bytes that go to and fro in a round.
const TRIPS: u32 = 200;

/// A container that serves at a veth of its own; removed with this.
struct Server {
    name: &'static str,
    to: SocketAddr,
    /// The VMM, where there is one.
    vmm: Option<u32>,
}

impl Server {
    fn start(name: &'static str, runtime: &str, subnet: u8) -> Self {
        let id = format!("bench-{name}");
        let here = std::env::current_exe().unwrap();
        let probe = here.with_file_name("probe");
        let script = format!(
            "ip netns add {id}; ip -n {id} link set lo up
             ip link add hk-{name} type veth peer name eth0 netns {id}
             ip link set hk-{name} up; ip addr add 10.9.{subnet}.1/24 dev hk-{name}
             ip -n {id} link set eth0 up; ip -n {id} addr add 10.9.{subnet}.2/24 dev eth0
             ctr run -d --runtime {runtime} --with-ns network:/run/netns/{id} \
               --mount type=bind,src={},dst=/probe,options=rbind:ro localhost/busybox:1 {id} /probe serve 7000",
            probe.display()
        );
        let mut this = Self {
            name,
            to: ([10, 9, subnet, 2], 7000).into(),
            vmm: None,
        };
        let status = Command::new("sh").args(["-ec", &script]).status().unwrap();
        assert!(status.success(), "a server with {runtime}: {status}");
        // It answers from here on.
        traffic::connect(this.to, Order::Give(0)).unwrap();
        this.vmm = (name == "husk").then(|| pid_of("husk-vmm"));
        this
    }

    /// Seconds of CPU that the VMM's threads have had: those of the NIC, and all.
    fn cpu(&self) -> [f64; 2] {
        let mut sums = [0.0, 0.0];
        let Some(vmm) = self.vmm else { return sums };
        let tasks = fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
        for task in tasks.map(|task| task.unwrap().path()) {
            let read = |file: &str| fs::read_to_string(task.join(file)).unwrap();
            let text = read("schedstat");
            let spent = text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9;
            sums[1] += spent;
            if read("comm").starts_with("net") {
                sums[0] += spent;
            }
        }
        sums
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let id = format!("bench-{}", self.name);
        for argv in [
            ["ctr", "task", "rm", "-f", &id].as_slice(),
            &["ctr", "container", "rm", &id],
            &["ip", "netns", "del", &id],
            &["ip", "link", "del", &format!("hk-{}", self.name)],
        ] {
            // The last has mostly gone with its other end.
            let _ = Command::new(argv[0])
                .args(&argv[1..])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// `rounds` of everything, each round all of it in turn; the first round is dropped.
pub fn measure(rounds: usize) -> Vec<Figure> {
    let servers = [
        Server::start("husk", "io.containerd.husk.v2", 1),
        Server::start("runc", "io.containerd.runc.v2", 2),
    ];
    let mut figures: Vec<Figure> = Vec::new();
    for round in 0..rounds {
        eprintln!("bench: network, round {} of {rounds}", round + 1);
        let mut add = |name: String, unit: &'static str, value: f64| {
            let place = figures.iter().position(|figure| figure.name == name);
            let place = place.unwrap_or_else(|| {
                figures.push(Figure {
                    name,
                    unit,
                    values: Vec::new(),
                });
                figures.len() - 1
            });
            if round > 0 {
                figures[place].values.push(value);
            }
        };
        for (way, pass) in [
            (
                "host to container",
                traffic::send_any as fn(SocketAddr, u64) -> std::io::Result<u64>,
            ),
            ("container to host", traffic::fetch_any),
        ] {
            for server in &servers {
                let (before, start) = (server.cpu(), Instant::now());
                assert_eq!(pass(server.to, BYTES).unwrap(), BYTES);
                let (after, took) = (server.cpu(), start.elapsed().as_secs_f64());
                add(
                    format!("{}: TCP, {way}", server.name),
                    "MB/s",
                    BYTES as f64 / 1e6 / took,
                );
                if server.vmm.is_some() {
                    for (what, which) in [("the NIC's thread", 0), ("vCPUs and all", 1)] {
                        add(
                            format!("husk-vmm: CPU, {way}, {what}"),
                            "ns/kB",
                            (after[which] - before[which]) * 1e12 / BYTES as f64,
                        );
                    }
                }
            }
        }
        for server in &servers {
            let mut connection = traffic::connect(server.to, Order::Echo).unwrap();
            let message = [7; 64];
            assert!(traffic::echo(&mut connection, &message).unwrap());
            let start = Instant::now();
            for _ in 0..TRIPS {
                traffic::echo(&mut connection, &message).unwrap();
            }
            let took = start.elapsed().as_secs_f64() * 1e6 / f64::from(TRIPS);
            add(format!("{}: TCP round trip", server.name), "us", took);
        }
    }
    figures
}
