//! How long a start takes.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
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
    let lockdown = Lockdown::new();
    let (mut locked, mut free) = (Vec::new(), Vec::new());
    let (mut run_locked, mut run_free) = (Vec::new(), Vec::new());
    let mut whole = [Vec::new(), Vec::new()];
    let mut first = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let counts = round > 0;
        eprintln!(
            "bench: round {} of {rounds}{}",
            round + 1,
            if counts { "" } else { " (dropped)" }
        );
        let took = boot_to_hello(&[]);
        let with = boot_to_hello(&["--config", &lockdown.locked]);
        let without = boot_to_hello(&["--config", &lockdown.free]);
        let run_with = run_true(
            RUNTIMES[0].1,
            &lockdown.locked_option(),
            &format!("locked-{round}"),
        );
        let run_without = run_true(RUNTIMES[0].1, &lockdown.free_option(), &format!("free-{round}"));
        if counts {
            hello.push(took);
            locked.push(with);
            free.push(without);
            run_locked.push(run_with);
            run_free.push(run_without);
        }
        for (which, (name, runtime)) in RUNTIMES.iter().enumerate() {
            let took = run_true(runtime, &[], &format!("true-{name}-{round}"));
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
    // Rounds drift together: what the lock-down adds is told of each round's own two.
    let added = |with: &[f64], without: &[f64]| -> Vec<f64> {
        with.iter()
            .zip(without)
            .map(|(with, without)| 100.0 * (with / without - 1.0))
            .collect()
    };
    let boot_added = Figure {
        name: "husk: what the lock-down adds to that".into(),
        unit: "%",
        values: added(&locked, &free),
    };
    let run_added = Figure {
        name: "husk: what the lock-down adds to that".into(),
        unit: "%",
        values: added(&run_locked, &run_free),
    };
    let mut figures = vec![
        figure("husk: fork of the VMM to the agent's hello".into(), hello),
        figure("husk: the same, of a build that can be free".into(), locked),
        figure("husk: the same, not locked in".into(), free),
        boot_added,
        figure(
            "husk: ctr run --rm … true, of a build that can be free".into(),
            run_locked,
        ),
        figure("husk: the same, not locked in".into(), run_free),
        run_added,
    ];
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

/// Configurations with builds of VMM and file server whose lock-down can be left out, and once is.
struct Lockdown {
    dir: PathBuf,
    locked: String,
    free: String,
}

impl Lockdown {
    fn new() -> Self {
        let dir = PathBuf::from("/run/husk-bench");
        fs::create_dir_all(&dir).unwrap();
        let config = |name: &str, option: &str| {
            let copy = |program: &str| {
                let path = dir.join(format!("{name}-{program}"));
                let build = std::env::current_exe().unwrap();
                fs::copy(build.with_file_name(format!("{program}-bench")), &path).unwrap();
                fs::write(dir.join(format!("{name}-{program}.captured")), option).unwrap();
                path
            };
            let (vmm, fsd) = (copy("husk-vmm"), copy("husk-fsd"));
            let path = dir.join(format!("{name}.toml"));
            let text = format!(
                "[programs]\nvmm = \"{}\"\nfsd = \"{}\"\n",
                vmm.display(),
                fsd.display()
            );
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        Self {
            locked: config("locked", ""),
            free: config("free", "--free"),
            dir,
        }
    }

    fn locked_option(&self) -> [&str; 2] {
        ["--runtime-config-path", &self.locked]
    }

    fn free_option(&self) -> [&str; 2] {
        ["--runtime-config-path", &self.free]
    }
}

impl Drop for Lockdown {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Fork of `husk-vmm` to the agent's hello, as the engine itself measured it.
fn boot_to_hello(options: &[&str]) -> f64 {
    let output = Command::new("husk")
        .args(["check", "--json"])
        .args(options)
        .output()
        .unwrap();
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

fn ctr_run(runtime: &str, options: &[&str], id: &str, command: &[&str]) -> Command {
    let mut ctr = Command::new("ctr");
    ctr.args(["run", "--rm", "--runtime", runtime])
        .args(options)
        .args(["localhost/busybox:1", id])
        .args(command)
        .stdin(Stdio::null());
    ctr
}

fn run_true(runtime: &str, options: &[&str], id: &str) -> f64 {
    let start = Instant::now();
    let status = ctr_run(runtime, options, id, &["true"]).status().unwrap();
    assert!(status.success(), "ctr run with {runtime}: {status}");
    start.elapsed().as_secs_f64() * 1e3
}

fn first_output(runtime: &str, id: &str) -> f64 {
    let start = Instant::now();
    let mut child = ctr_run(runtime, &[], id, &["echo", "x"])
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
