//! The host's cgroups: where husk's processes are, what limits hold for them, and that nothing of it stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::Case;
use crate::census::Census;
use crate::command::{Input, Running, eventually, run};
use crate::containerd::{RUNTIME, events};
use crate::host;

/// A container of a test's, in the foreground.
struct Container {
    id: String,
    bundle: Bundle,
    running: Running,
}

impl Container {
    fn start(id: &str, script: &str, change: &Value) -> Self {
        let mut bundle = Bundle::new(id);
        bundle.change(change);
        bundle.spec["process"]["args"] = json!(["sh", "-c", script]);
        let config = bundle.write();
        let argv = [
            "ctr",
            "run",
            "--runtime",
            RUNTIME,
            "--config",
            config.to_str().unwrap(),
            id,
        ];
        let mut running = Running::start(&argv, Input::Nothing);
        running.wait_for("ready");
        Self {
            id: id.to_owned(),
            bundle,
            running,
        }
    }

    /// Its end, and that of all there was of it.
    fn end(self, code: i32) {
        self.running.finish(Duration::from_secs(60)).expect_code(code);
        run(&["ctr", "task", "rm", "-f", &self.id]);
        run(&["ctr", "container", "rm", &self.id]).expect_code(0);
    }

    fn kill(self) {
        run(&["ctr", "task", "kill", "-s", "KILL", &self.id]).expect_code(0);
        self.end(137);
    }
}

/// The cgroup of a process, as a directory.
fn cgroup_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    Path::new("/sys/fs/cgroup").join(line.trim_start_matches('/'))
}

fn read(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap().trim().to_owned()
}

#[test]
fn all_processes_of_a_sandbox_are_in_the_cgroup_that_the_spec_names() {
    let census = Census::take();
    let containerd = cgroup_of(host::pid_of("containerd"));
    let change = json!({"linux": {"cgroupsPath": "/husk-e2e-parent/deep/placed"}});
    let container = Container::start("placed", "echo ready; exec sleep 1000", &change);
    let expected = Path::new("/sys/fs/cgroup/husk-e2e-parent/deep/placed");
    for name in ["containerd-shim-husk-v2", "husk-vmm", "husk-fsd", "husk-standin"] {
        assert_eq!(cgroup_of(host::pid_of(name)), expected, "{name}");
    }
    assert_eq!(cgroup_of(host::pid_of("containerd")), containerd);
    container.kill();
    census.assert_unchanged();
}

#[test]
fn without_a_path_they_are_beside_the_engine() {
    let census = Census::take();
    let change = json!({"linux": {"cgroupsPath": null}});
    let container = Container::start("beside", "echo ready; exec sleep 1000", &change);
    let engine = cgroup_of(host::pid_of("containerd"));
    let root = Path::new("/sys/fs/cgroup");
    let parent = if engine == root {
        root
    } else {
        engine.parent().unwrap()
    };
    assert_eq!(cgroup_of(host::pid_of("husk-vmm")), parent.join("beside"));
    container.kill();
    census.assert_unchanged();
}

#[test]
fn limits_hold_on_the_host_with_room_for_the_machine() {
    let census = Census::take();
    let change = json!({"linux": {"resources": {
        "memory": {"limit": 268_435_456},
        "cpu": {"quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0"},
        "pids": {"limit": 50},
    }}});
    let container = Container::start("limited", "echo ready; exec sleep 1000", &change);
    let dir = cgroup_of(host::pid_of("husk-vmm"));
    let memory: u64 = read(&dir, "memory.max").parse().unwrap();
    assert!(memory > 268_435_456 + (128 << 20), "{memory}");
    assert!(memory < 268_435_456 + (512 << 20), "{memory}");
    assert_eq!(read(&dir, "cpu.weight"), "20");
    assert_eq!(read(&dir, "cpuset.cpus"), "0");
    assert_eq!(read(&dir, "pids.max"), "1224");
    eventually("the limit of CPU time", || {
        (read(&dir, "cpu.max") == "75000 100000").then_some(())
    });
    run(&["ctr", "task", "kill", "-s", "KILL", "limited"]).expect_code(0);
    container.end(137);
    census.assert_unchanged();
}

#[test]
fn the_oom_score_of_the_container_is_the_machine_s() {
    let census = Census::take();
    let change = json!({"process": {"oomScoreAdj": 321}});
    let container = Container::start("scored", "echo ready; exec sleep 1000", &change);
    let score = |name: &str| {
        let pid = host::pid_of(name);
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse::<i32>().unwrap()
    };
    assert_eq!(score("husk-vmm"), 321);
    assert!(score("containerd-shim-husk-v2") < 321);
    container.kill();
    census.assert_unchanged();
}

/// The container meets its own limit in the guest, and nothing else is hurt.
#[test]
fn a_container_above_its_limit_is_killed_in_the_guest() {
    let census = Census::take();
    let mut events = events();
    let change = json!({"linux": {"resources": {"memory": {"limit": 67_108_864, "swap": 67_108_864}}}});
    let container = Container::start(
        "greedy",
        "echo ready; exec dd if=/dev/zero of=/dev/null bs=200M count=1",
        &change,
    );
    events.wait_for("/tasks/oom");
    events.wait_for("\"exit_status\":137");
    drop(events);
    let dir = Path::new("/sys/fs/cgroup/husk-e2e/greedy");
    if let Ok(counts) = fs::read_to_string(dir.join("memory.events")) {
        assert!(counts.contains("oom_kill 0"), "{counts}");
    }
    container.end(137);
    census.assert_unchanged();
}

/// Somebody else's limit, above ours, that is too low for the machine.
#[test]
fn a_machine_that_the_host_kills_is_no_success() {
    let census = Census::take();
    let parent = Path::new("/sys/fs/cgroup/husk-e2e-tight");
    fs::create_dir(parent).unwrap();
    let mut events = events();
    let change = json!({"linux": {"cgroupsPath": "/husk-e2e-tight/squeezed"}});
    let script = "echo ready; until test -e /go; do sleep 0.2; done; head -c 150000000 /dev/zero > /dev/shm/held; echo alive; exec sleep 1000";
    let container = {
        let mut change = change;
        change["mounts"] = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=400m"]},
        ]);
        Container::start("squeezed", script, &change)
    };
    let now: u64 = read(&parent.join("squeezed"), "memory.current").parse().unwrap();
    fs::write(parent.join("memory.max"), (now + (20 << 20)).to_string()).unwrap();
    let _ = fs::write(parent.join("memory.swap.max"), "0");
    fs::write(container.bundle.in_root("/go"), "").unwrap();
    events.wait_for("/tasks/oom");
    events.wait_for("\"exit_status\":137");
    drop(events);
    container.end(137);
    fs::remove_dir(parent).unwrap();
    census.assert_unchanged();
}

/// What a shim leaves that was killed is removed with it.
#[test]
fn the_cgroup_of_a_killed_shim_is_removed() {
    let census = Census::take();
    let change = json!({"linux": {"cgroupsPath": "/husk-e2e-parent/orphan"}});
    let container = Container::start("orphan", "echo ready; exec sleep 1000", &change);
    let shim = nix::unistd::Pid::from_raw(host::pid_of("containerd-shim-husk-v2"));
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).unwrap();
    let Container { id, running, bundle } = container;
    running.finish(Duration::from_secs(60));
    run(&["ctr", "task", "rm", "-f", &id]);
    run(&["ctr", "container", "rm", &id]).expect_code(0);
    drop(bundle);
    census.assert_unchanged();
}

#[test]
fn a_unit_of_systemd_s_where_there_is_none() {
    if Path::new("/run/systemd/system").exists() {
        return;
    }
    Case::of(json!({"linux": {"cgroupsPath": "system.slice:husk:unit"}}))
        .refused(&["linux.cgroupsPath", "systemd"], &[]);
}

#[test]
fn a_cgroup_that_others_live_in() {
    Case::of(json!({"linux": {"cgroupsPath": "/init.scope"}}))
        .refused(&["linux.cgroupsPath", "not empty"], &[]);
}
