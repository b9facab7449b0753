//! The pids that the task service tells are processes of the host: their ends and signals are the container's.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{each, each_with};
use crate::case::Runtime;
use crate::command::eventually;

const SOON: Duration = Duration::from_secs(60);

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

fn gone(pid: u32) {
    eventually("the end of the process", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_err().then_some(())
    });
}

#[test]
fn a_kill_on_the_host_ends_the_container() {
    each(&["sleep", "1000"], |shim| {
        let (_streams, created) = shim.create();
        let pid = created.unwrap().pid;
        shim.start_process("").unwrap();
        let waiting = shim.wait_aside("");
        send(pid, Signal::SIGKILL);
        assert_eq!(waiting.recv_timeout(SOON).unwrap().unwrap().exit_status, 137);
        gone(pid);
        assert_eq!(shim.state("").unwrap().pid, pid);
        assert_eq!(shim.delete("").unwrap().pid, pid);
    });
}

#[test]
fn a_signal_on_the_host_is_the_containers() {
    let script =
        "trap 'echo terminated; exit 5' TERM; trap 'echo user' USR1; echo ready; while :; do sleep 0.1; done";
    each(&["sh", "-c", script], |shim| {
        let (streams, created) = shim.create();
        let pid = created.unwrap().pid;
        shim.start_process("").unwrap();
        streams.wait_for("ready");
        let waiting = shim.wait_aside("");
        send(pid, Signal::SIGUSR1);
        streams.wait_for("user");
        send(pid, Signal::SIGTERM);
        assert_eq!(waiting.recv_timeout(SOON).unwrap().unwrap().exit_status, 5);
        streams.wait_for("terminated");
        gone(pid);
        shim.delete("").unwrap();
    });
}

#[test]
fn an_exec_has_a_pid_of_its_own() {
    each(&["sleep", "1000"], |shim| {
        let (_streams, created) = shim.create();
        let pid = created.unwrap().pid;
        shim.start_process("").unwrap();
        let (_exec_streams, added) = shim.exec("e", &["sleep", "1000"], json!({}));
        added.unwrap();
        let exec_pid = shim.start_process("e").unwrap().pid;
        assert_ne!(exec_pid, pid);
        let same = |kind: &str| {
            let link = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            link(pid) == link(exec_pid)
        };
        assert!(["net", "ipc", "uts"].iter().all(|kind| same(kind)));
        let waiting = shim.wait_aside("e");
        send(exec_pid, Signal::SIGKILL);
        assert_eq!(waiting.recv_timeout(SOON).unwrap().unwrap().exit_status, 137);
        gone(exec_pid);
        shim.kill("", libc::SIGKILL, true).unwrap();
        shim.wait("").unwrap();
        shim.delete("").unwrap();
    });
}

/// What engines look at: namespaces of its own that are not the host's, and a name that tells whose it is.
#[test]
fn it_is_where_the_spec_says() {
    let other = std::process::Command::new("unshare")
        .args(["--net", "sh", "-c", "echo; exec sleep 1000"])
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut other = other.unwrap();
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let path = format!("/proc/{}/ns/net", other.id());
    let network = fs::read_link(&path).unwrap();
    each_with(
        &["sleep", "1000"],
        |bundle| bundle.namespace(json!({"type": "network", "path": path})),
        |shim| {
            let (_streams, created) = shim.create();
            let pid = created.unwrap().pid;
            let link = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_eq!(link("net"), network);
            for kind in ["ipc", "uts"] {
                assert_ne!(
                    link(kind),
                    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap()
                );
            }
            if shim.runtime == Runtime::Husk {
                let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
                assert_eq!(line, format!("husk-standin\0{}\0", shim.id));
                let mounts = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
                assert_eq!(mounts.to_str(), Some("/"));
            }
            shim.delete("").unwrap();
            gone(pid);
        },
    );
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn the_hosts_namespaces_are_refused_by_name() {
    for (kind, path) in [
        ("ipc", "/proc/1/ns/ipc"),
        ("pid", "/proc/1/ns/pid"),
        ("network", "/proc/1/ns/net"),
    ] {
        crate::case::Case::of(json!({}))
            .prepared(move |_, bundle| bundle.namespace(json!({"type": kind, "path": path})))
            .sh("true")
            .refused(&["linux.namespaces", path, kind], &[]);
        crate::case::Case::of(json!({}))
            .prepared(move |_, bundle| {
                let all = bundle.spec["linux"]["namespaces"].as_array_mut().unwrap();
                all.retain(|namespace| namespace["type"] != kind);
            })
            .sh("true")
            .refused(&["linux.namespaces", kind], &[]);
    }
}
