//! What one idle pod costs in memory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use crate::{Figure, pid_of};

/// Number of the guest memory's descriptor in the VMM (husk_vmm_protocol::fds::vmm::MEMORY).
const MEMORY_FD: i32 = 5;

/// A detached container that sleeps, looked at from outside.
pub fn measure() -> Vec<Figure> {
    let id = "bench-memory";
    let run = |argv: &[&str]| {
        let status = Command::new(argv[0]).args(&argv[1..]).status().unwrap();
        assert!(status.success(), "{argv:?}: {status}");
    };
    run(&[
        "ctr",
        "run",
        "-d",
        "--runtime",
        "io.containerd.husk.v2",
        "localhost/busybox:1",
        id,
        "sleep",
        "1000",
    ]);
    let mut figures = Vec::new();
    for name in ["containerd-shim-husk-v2", "husk-vmm", "husk-fsd", "husk-standin"] {
        let pid = pid_of(name);
        figures.push(kilobytes(
            format!("PSS of {name}, without guest memory"),
            own_pss(pid),
        ));
        if name == "husk-vmm" {
            let touched = fs::metadata(format!("/proc/{pid}/fd/{MEMORY_FD}"))
                .unwrap()
                .blocks()
                / 2;
            figures.push(kilobytes(
                "guest memory touched, container running".into(),
                touched,
            ));
        }
    }
    run(&["ctr", "task", "rm", "-f", id]);
    run(&["ctr", "container", "rm", id]);
    figures
}

fn kilobytes(name: String, value: u64) -> Figure {
    Figure {
        name,
        unit: "kB",
        values: vec![value as f64],
    }
}

/// Proportional set size in kB of all mappings but the guest's memory.
fn own_pss(pid: u32) -> u64 {
    let mut guest = false;
    let mut sum = 0;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") if !guest => sum += words.next().unwrap().parse::<u64>().unwrap(),
            Some(word) if !word.ends_with(':') => guest = line.contains("memfd:"),
            _ => {}
        }
    }
    sum
}
