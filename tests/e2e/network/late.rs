//! Engines that wire late: in a hook, or while the container runs.

use serde_json::json;

use super::{Container, assert_same, sh, view};
use crate::case::Runtime;
use crate::census::Census;
use crate::command::{eventually, run};

/// Moves a NIC into the namespace of the process that the state on stdin names, as an engine's hook does.
const HOOK: &str = "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); ip link set late0 netns $pid name eth0; \
    nsenter --net=/proc/$pid/ns/net sh -ec 'ip link set lo up; ip link set eth0 address 02:42:0a:0b:00:02 up; \
    ip addr add 10.11.0.2/24 dev eth0; ip route add default via 10.11.0.1'";

fn peers(names: &[(&str, &str)]) {
    for (peer, late) in names {
        run(&["ip", "link", "del", peer]);
        sh(&format!(
            "ip link add {peer} type veth peer name {late}; ip link set {peer} up"
        ));
    }
}

#[test]
fn in_a_hook_and_while_it_runs() {
    let census = Census::take();
    let mut expected: Option<Vec<Vec<String>>> = None;
    for runtime in Runtime::all() {
        for kind in ["prestart", "createRuntime"] {
            eprintln!("{kind} under {runtime:?}");
            peers(&[("hk-a", "late0")]);
            sh("ip addr add 10.11.0.1/24 dev hk-a");
            let id = format!("late-{kind}-{runtime:?}").to_lowercase();
            let mut bundle = Container::bundle(&id, None);
            bundle.spec["hooks"] = json!({kind: [{"path": "/bin/sh", "args": ["sh", "-ec", HOOK],
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
            let container = Container::start(runtime, bundle, &id);
            // It is there when the container's process begins.
            container.sh(
                "/usr/sbin/ip addr show eth0 | grep -q 10.11.0.2/24; /usr/bin/ping -n -c 2 -W 10 10.11.0.1",
            );
            sh("ping -n -c 2 -W 10 10.11.0.2");
            if kind == "prestart" {
                continue;
            }
            // A second network.
            peers(&[("hk-b", "late1")]);
            let pid = container.pid();
            let inside = |script: &str| {
                sh(&format!("nsenter --net=/proc/{pid}/ns/net sh -ec '{script}'"));
            };
            sh(&format!(
                "ip addr add 10.12.0.1/24 dev hk-b; ip link set late1 netns {pid} name eth1"
            ));
            inside("ip link set eth1 address 02:42:0a:0c:00:02 up; ip addr add 10.12.0.2/24 dev eth1");
            eventually("the second NIC", || {
                (container.exec("/usr/bin/ping -n -c 1 -W 2 10.12.0.1").code == 0).then_some(())
            });
            let mut seen = vec![filtered(&container)];
            // Its address changes.
            inside(
                "ip addr del 10.12.0.2/24 dev eth1; ip addr add 10.12.0.9/24 dev eth1; ip route add 10.13.0.0/16 via 10.12.0.1",
            );
            eventually("the other address", || {
                let shown = container.sh("ip addr show eth1; ip route");
                (shown.contains("10.12.0.9/24")
                    && !shown.contains("10.12.0.2/24")
                    && shown.contains("10.13.0.0/16"))
                .then_some(())
            });
            sh("ping -n -c 2 -W 10 10.12.0.9");
            seen.push(filtered(&container));
            // It goes, and another takes its place.
            sh("ip link del hk-b");
            eventually("the end of the second NIC", || {
                (container.exec("ip link show eth1").code != 0).then_some(())
            });
            peers(&[("hk-b", "late1")]);
            sh(&format!("ip link set late1 netns {pid} name eth5"));
            eventually("another NIC", || {
                (container.exec("ip link show eth5").code == 0).then_some(())
            });
            container.sh("/usr/bin/ping -n -c 2 -W 10 10.11.0.1");
            match &expected {
                None => expected = Some(seen),
                Some(expected) => {
                    for (expected, seen) in expected.iter().zip(&seen) {
                        assert_same(expected, seen);
                    }
                }
            }
        }
    }
    census.assert_unchanged();
}

/// Without what differs from one time to the next: numbers, and link-local addresses in use or not yet.
fn filtered(container: &Container) -> Vec<String> {
    let seen = view(|command| container.sh(command));
    seen.into_iter()
        // Newer versions of `ip route` list IPv6's, too, when asked for all tables.
        .filter(|line| !line.starts_with("link") && !line.contains("-6") && !line.contains("fe80:"))
        .collect()
}
