//! How long `docker run` takes, with a network and without one. dockerd is started for it, if it does not run.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::Figure;

const RUNTIMES: [(&str, &str); 2] = [("husk", "io.containerd.husk.v2"), ("runc", "runc")];
const NETWORKS: [&str; 2] = ["bridge", "none"];

/// `rounds` of everything, each round all of it in turn; the first round is dropped.
pub fn measure(rounds: usize) -> Vec<Figure> {
    let _service = Service::start();
    let mut figures: Vec<Figure> = NETWORKS
        .iter()
        .flat_map(|network| RUNTIMES.map(|(name, _)| (network, name)))
        .map(|(network, name)| Figure {
            name: format!("{name}: docker run --rm --network {network} … true"),
            unit: "ms",
            values: Vec::new(),
        })
        .collect();
    for round in 0..rounds {
        eprintln!("bench: Docker, round {} of {rounds}", round + 1);
        let kinds = NETWORKS
            .iter()
            .flat_map(|network| RUNTIMES.map(|(_, runtime)| (network, runtime)));
        for (figure, (network, runtime)) in figures.iter_mut().zip(kinds) {
            let took = run_true(runtime, network);
            if round > 0 {
                figure.values.push(took);
            }
        }
    }
    figures
}

fn run_true(runtime: &str, network: &str) -> f64 {
    let start = Instant::now();
    let status = Command::new("docker")
        .args(["run", "--rm", "--runtime", runtime, "--network", network])
        .args(["localhost/busybox:1", "true"])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "docker run with {runtime}: {status}");
    start.elapsed().as_secs_f64() * 1e3
}

/// dockerd; stopped when this is dropped, if it was started for it.
struct Service(bool);

impl Service {
    fn start() -> Self {
        let runs = || {
            let asked = Command::new("docker").arg("version").output();
            asked.is_ok_and(|asked| asked.status.success())
        };
        if runs() {
            return Self(false);
        }
        service("start");
        assert!(runs(), "dockerd does not answer");
        Self(true)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.0 {
            service("stop");
        }
    }
}

fn service(verb: &str) {
    let program = if Path::new("/run/systemd/system").exists() {
        "systemctl"
    } else {
        "testhost-services"
    };
    let status = Command::new(program).args([verb, "docker"]).status().unwrap();
    assert!(status.success(), "{program} {verb} docker: {status}");
}
