//! How long a start takes.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::Figure;

const RUNTIMES: [(&str, &str); 2] = [
    ("husk", "io.containerd.husk.v2"),
    ("runc", "io.containerd.runc.v2"),
];

/// `rounds` of everything, each round all of it in turn; the first round is dropped.
pub fn measure(rounds: usize) -> Vec<Figure> {
    let mut hello = Vec::new();
    let mut whole = [Vec::new(), Vec::new()];
    let mut first = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let counts = round > 0;
        eprintln!(
            "bench: round {} of {rounds}{}",
            round + 1,
            if counts { "" } else { " (dropped)" }
        );
        let took = boot_to_hello();
        if counts {
            hello.push(took);
        }
        for (which, (name, runtime)) in RUNTIMES.iter().enumerate() {
            let took = run_true(runtime, &format!("true-{name}-{round}"));
            let output = first_output(runtime, &format!("echo-{name}-{round}"));
            if counts {
                whole[which].push(took);
                first[which].push(output);
            }
        }
    }
    let figure = |name: String, values: Vec<f64>| Figure {
        name,
        unit: "ms",
        values,
    };
    let mut figures = vec![figure("husk: fork of the VMM to the agent's hello".into(), hello)];
    for (which, (name, _)) in RUNTIMES.iter().enumerate() {
        figures.push(figure(
            format!("{name}: ctr run --rm … true"),
            std::mem::take(&mut whole[which]),
        ));
    }
    for (which, (name, _)) in RUNTIMES.iter().enumerate() {
        figures.push(figure(
            format!("{name}: ctr run to the first output"),
            std::mem::take(&mut first[which]),
        ));
    }
    figures
}

/// Fork of `husk-vmm` to the agent's hello, as the engine itself measured it.
fn boot_to_hello() -> f64 {
    let output = Command::new("husk").args(["check", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!(
            "husk check --json: {e}: {}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    report["boot_ms"]
        .as_f64()
        .unwrap_or_else(|| panic!("husk check booted no guest: {report}"))
}

fn ctr_run(runtime: &str, id: &str, command: &[&str]) -> Command {
    let mut ctr = Command::new("ctr");
    ctr.args(["run", "--rm", "--runtime", runtime, "localhost/busybox:1", id])
        .args(command)
        .stdin(Stdio::null());
    ctr
}

fn run_true(runtime: &str, id: &str) -> f64 {
    let start = Instant::now();
    let status = ctr_run(runtime, id, &["true"]).status().unwrap();
    assert!(status.success(), "ctr run with {runtime}: {status}");
    start.elapsed().as_secs_f64() * 1e3
}

fn first_output(runtime: &str, id: &str) -> f64 {
    let start = Instant::now();
    let mut child = ctr_run(runtime, id, &["echo", "x"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    let read = child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
    let took = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!((read, byte), (1, *b"x"));
    assert!(child.wait().unwrap().success());
    took
}
