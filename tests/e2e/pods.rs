//! Several containers of one sandbox, which name each other's namespaces by path, as Kubernetes has them.

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::census::Census;
use crate::command::{Finished, ok, run};
use crate::host;

/// A container of the pod `pod`, detached; removed with this.
struct Member {
    id: String,
    _bundle: Bundle,
}

impl Member {
    fn start(
        runtime: Runtime,
        pod: &str,
        name: &str,
        kind: &str,
        namespaces: &[Value],
        script: &str,
    ) -> Self {
        let id = format!("{pod}-{name}");
        let mut bundle = Bundle::new(&id);
        bundle.spec["process"]["args"] = json!(["sh", "-c", script]);
        bundle.change(&json!({"annotations": {
            "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": format!("{pod}-first"),
        }}));
        for namespace in namespaces {
            bundle.namespace(namespace.clone());
        }
        let config = bundle.write();
        run(&[
            "ctr",
            "run",
            "-d",
            "--runtime",
            runtime.name(),
            "--config",
            config.to_str().unwrap(),
            &id,
        ])
        .expect_code(0);
        Self { id, _bundle: bundle }
    }

    /// The task's process on the host.
    #[track_caller]
    fn pid(&self) -> String {
        let list = ok(&["ctr", "task", "ls"]);
        let line = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id));
        line.and_then(|line| line.split_whitespace().nth(1))
            .unwrap_or_else(|| panic!("no {} in {list}", self.id))
            .to_owned()
    }

    /// The namespaces of this one, for another to join.
    fn shared(&self, kinds: &[&str]) -> Vec<Value> {
        let pid = self.pid();
        let file = |kind: &str| match kind {
            "network" => "net".to_owned(),
            other => other.to_owned(),
        };
        kinds
            .iter()
            .map(|kind| json!({"type": kind, "path": format!("/proc/{pid}/ns/{}", file(kind))}))
            .collect()
    }

    fn exec(&self, script: &str) -> Finished {
        run(&[
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "e",
            &self.id,
            "sh",
            "-c",
            script,
        ])
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        run(&["ctr", "task", "rm", "-f", &self.id]);
        run(&["ctr", "container", "rm", &self.id]);
    }
}

const SLEEP: &str = "exec sleep 1000";

#[test]
fn namespaces_shared_by_path() {
    let census = Census::take();
    for runtime in Runtime::all() {
        eprintln!("under {runtime:?}");
        let pod = format!("pod-{runtime:?}").to_lowercase();
        let first = Member::start(runtime, &pod, "first", "sandbox", &[], SLEEP);
        let shared = first.shared(&["ipc", "uts", "network"]);
        let second = Member::start(runtime, &pod, "second", "container", &shared, SLEEP);
        let mut joined = shared.clone();
        joined.extend(second.shared(&["pid"]));
        let third = Member::start(runtime, &pod, "third", "container", &joined, SLEEP);
        if runtime == Runtime::Husk {
            assert_eq!(host::pids_of("husk-vmm").len(), 1, "a pod is one virtual machine");
            assert_eq!(host::pids_of("containerd-shim-husk-v2").len(), 1);
        }
        let show = "for n in ipc uts net pid mnt cgroup; do readlink /proc/self/ns/$n; done";
        let (two, three) = (
            second.exec(show).expect_code(0).out(),
            third.exec(show).expect_code(0).out(),
        );
        let same: Vec<bool> = two.lines().zip(three.lines()).map(|(a, b)| a == b).collect();
        assert_eq!(
            same,
            [true, true, true, true, false, false],
            "{runtime:?}: {two}{three}"
        );
        // What is shared has an effect.
        assert_eq!(second.exec("hostname").out(), "husk-e2e\n");
        let seen = third
            .exec("cat /proc/1/cmdline | tr '\\0' ' '; ps | grep -c 'sleep 1000'")
            .out();
        assert!(seen.starts_with("sleep 1000 "), "{runtime:?}: {seen}");
        assert!(
            second.exec("ps | grep '[s]leep 1000' | wc -l").out().trim() >= "2",
            "{runtime:?}"
        );
        // The third is a process of the second's namespace only; its end is not the second's.
        drop(third);
        second.exec("true").expect_code(0);
        // The network is one: what listens in one is reached from the other.
        second
            .exec("(nc -l -p 7777 -e echo reached < /dev/null > /dev/null 2>&1 &)")
            .expect_code(0);
        let fourth = Member::start(
            runtime,
            &pod,
            "fourth",
            "container",
            &first.shared(&["network"]),
            SLEEP,
        );
        let reached = fourth.exec("ip link set lo up 2>/dev/null; for n in 1 2 3 4 5; do nc 127.0.0.1 7777 < /dev/null && break; sleep 1; done").out();
        assert_eq!(reached, "reached\n", "{runtime:?}");
        drop((fourth, second, first));
    }
    census.assert_unchanged();
}

/// A namespace that is not the sandbox's own cannot be entered from inside a virtual machine.
#[test]
fn a_namespace_of_somebody_else() {
    let census = Census::take();
    crate::case::Case::of(json!({}))
        .prepared(|_, bundle| bundle.namespace(json!({"type": "ipc", "path": "/proc/1/ns/ipc"})))
        .refused(&["linux.namespaces", "ipc", "/proc/1/ns/ipc"], &[]);
    crate::case::Case::of(json!({}))
        .prepared(|_, bundle| bundle.namespace(json!({"type": "uts", "path": "/no/such/namespace"})))
        .refused(
            &["linux.namespaces", "/no/such/namespace"],
            &["/no/such/namespace"],
        );
    census.assert_unchanged();
}
