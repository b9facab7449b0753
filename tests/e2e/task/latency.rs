//! What a call costs, and that nothing is done while there is nothing to do: seen by strace from outside.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::command::{Input, Running, eventually, ok};
use crate::host;
use crate::shim::Shim;

/// strace on a process and its threads, writing to a file.
struct Trace {
    running: Running,
    file: PathBuf,
}

impl Trace {
    fn of(pid: i32, calls: &str) -> Self {
        let file = std::env::temp_dir().join(format!("husk-e2e-strace-{pid}"));
        let _ = fs::remove_file(&file);
        let (pid, path) = (pid.to_string(), file.to_str().unwrap());
        let running = Running::start(
            &["strace", "-f", "-s", "4096", "-e", calls, "-o", path, "-p", &pid],
            Input::Nothing,
        );
        eventually("strace to attach", || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status
                .lines()
                .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
                .then_some(())
        });
        // All threads: they are attached one after the other.
        eventually("strace to attach to all threads", || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
            let untraced = tasks.flatten().filter(|task| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status.contains("TracerPid:\t0\n")
            });
            (untraced.count() == 0).then_some(())
        });
        Self { running, file }
    }

    /// The calls that ended while it was traced, one a line.
    fn end(self) -> Vec<String> {
        ok(&["kill", "-INT", &self.running.id().to_string()]);
        self.running.finish(Duration::from_secs(30));
        let text = fs::read_to_string(&self.file).unwrap();
        let _ = fs::remove_file(&self.file);
        text.lines()
            .filter(|line| line.contains(") = ") || line.contains("resumed>"))
            .map(str::to_owned)
            .collect()
    }
}

fn sleeping(id: &str) -> Shim {
    let mut bundle = Bundle::new(id);
    bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
    Shim::start(Runtime::Husk, id, bundle)
}

#[test]
fn an_exec_costs_one_round_trip_to_the_agent() {
    let shim = sleeping("round-trip");
    let _streams = shim.run();
    // Whatever is done once only.
    shim.exec_to_end("first", &["true"], json!({}));
    let server = shim.connect(&shim.id).unwrap().shim_pid as i32;
    let trace = Trace::of(server, "trace=write,writev,sendto,sendmsg");
    let (out, code) = shim.exec_to_end("e", &["echo", "words"], json!({}));
    let lines = trace.end();
    assert_eq!((out.as_str(), code), ("words\n", 0));
    let calls: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains("husk.agent.v1.Agent"))
        .collect();
    assert_eq!(calls.len(), 1, "calls of the agent: {calls:#?}");
    shim.end();
}

#[test]
fn nothing_is_done_while_nothing_happens() {
    let shim = sleeping("idle");
    let _streams = shim.run();
    shim.exec_to_end("first", &["true"], json!({}));
    let context_switches = || {
        let (out, _) = shim.exec_to_end("stat", &["grep", "ctxt", "/proc/stat"], json!({}));
        out.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    // The cost of asking, and then five seconds more than that.
    let before = context_switches();
    let asked = context_switches() - before;
    let start = context_switches();
    // A thread of the shim's that has had nothing to do for ten seconds ends.
    std::thread::sleep(Duration::from_secs(11));
    for name in ["containerd-shim-husk-v2", "husk-vmm", "husk-fsd"] {
        let pid = host::pid_of(name);
        std::thread::sleep(Duration::from_secs(1));
        let trace = Trace::of(pid, "trace=all");
        std::thread::sleep(Duration::from_secs(5));
        let mut calls = trace.end();
        // The guest's kernel draws new entropy each second at first and once a minute at last; a thread of its own
        // answers.
        let rng: Vec<String> = calls
            .iter()
            .filter(|line| line.contains("getrandom("))
            .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
            .collect();
        calls.retain(|line| !rng.iter().any(|thread| line.starts_with(thread)));
        assert!(
            calls.len() <= 3,
            "{name} made {} calls in five idle seconds: {calls:#?}",
            calls.len()
        );
    }
    let idle = (context_switches() - start).saturating_sub(asked);
    // The kernel's own threads look after themselves a few times a second; somebody who polls wakes up more often.
    assert!(
        idle < 900,
        "{idle} context switches in the guest in some thirty idle seconds"
    );
    shim.end();
}
