//! The ways of nerdctl and ctr: a CNI plugin called by hooks, with the output going to a logging program; and by the
//! client itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use super::{Container, Netns, sh};
use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::census::Census;
use crate::command::{eventually, ok, run};
use crate::containerd::BUSYBOX;

/// A bridge with the host at 10.14.0.1, the first container at .2 and the second at .3.
fn network(directory: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "husk-e2e",
        "plugins": [{
            "type": "bridge",
            "bridge": "hk-cni",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": directory.join("leases"),
                "ranges": [[{"subnet": "10.14.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
}

/// What nerdctl's hooks do with the state on their stdin: the annotation tells the namespace, or else the process does.
/// When the container has ended, no namespace is told.
const HOOK: &str = r#"
    state=$(cat)
    case $1 in
        ADD) CNI_NETNS=$(echo "$state" | jq -r '.annotations["nerdctl/network-namespace"] // "/proc/\(.pid)/ns/net"') ;;
        DEL) CNI_NETNS= ;;
    esac
    echo "$1 $CNI_NETNS" >>"$DIRECTORY/called"
    export CNI_COMMAND=$1 CNI_NETNS CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni
    export CNI_CONTAINERID=default-$(echo "$state" | jq -r .id)
    /usr/lib/cni/bridge <"$DIRECTORY/network" >>"$DIRECTORY/results"
"#;

/// A bundle as nerdctl makes it, and the program that takes its output to DIRECTORY/log.
fn bundle(id: &str, directory: &Path) -> (Bundle, String) {
    let network = network(directory);
    let mut one = network["plugins"][0].clone();
    for key in ["cniVersion", "name"] {
        one[key] = network[key].clone();
    }
    fs::write(directory.join("network"), one.to_string()).unwrap();
    let mut bundle = Container::bundle(id, None);
    let hook = |command: &str| {
        json!([{"path": "/bin/sh", "args": ["sh", "-ec", HOOK, "nerdctl", command], "env": [
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin", format!("DIRECTORY={}", directory.display()),
        ]}])
    };
    bundle.spec["hooks"] = json!({"createRuntime": hook("ADD"), "poststop": hook("DEL")});
    let script =
        "/usr/sbin/ip -4 -o addr show eth0 | grep -o '10.14.0.[0-9]*/24'; /usr/sbin/ip route | head -n 1
        /usr/bin/ping -n -c 1 -W 10 10.14.0.1 > /dev/null && echo reached; exec sleep 1000";
    bundle.spec["process"]["args"] = json!(["sh", "-c", script]);
    let logger = directory.join("logger");
    let script = "#!/bin/sh\nexec 5>&-\ncat <&4 >/dev/null 4<&- &\nexec cat <&3 >>\"$2\"\n";
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!(
        "binary://{}?log={}",
        logger.display(),
        directory.join("log").display()
    );
    (bundle, uri)
}

/// Runs the container, and gives what its hooks were told.
#[track_caller]
fn run_and_stop(runtime: Runtime, id: &str, bundle: Bundle, uri: &str, directory: &Path) -> String {
    let container = Container::start_with(runtime, bundle, id, &["--log-uri", uri]);
    let log = eventually("the log", || {
        let log = fs::read_to_string(directory.join("log")).ok()?;
        log.contains("reached").then_some(log)
    });
    assert_eq!(
        log, "10.14.0.2/24\ndefault via 10.14.0.1 dev eth0 \nreached\n",
        "{runtime:?}"
    );
    sh("ping -n -c 2 -i 0.3 -W 10 10.14.0.2");
    drop(container);
    // The lease was given back: the plugin keeps but a lock and the last address.
    let leases = sh(&format!("ls {}/leases/husk-e2e", directory.display()));
    assert_eq!(leases, "last_reserved_ip.0\nlock\n", "{runtime:?}");
    fs::remove_file(directory.join("log")).unwrap();
    fs::remove_dir_all(directory.join("leases")).unwrap();
    let called = fs::read_to_string(directory.join("called")).unwrap();
    fs::remove_file(directory.join("called")).unwrap();
    called
}

/// The bridge stays, as CNI leaves it.
fn without_bridge() {
    run(&["ip", "link", "del", "hk-cni"]);
}

#[test]
fn hooks_wire_it_and_a_program_logs_it() {
    without_bridge();
    let census = Census::take();
    let directory = tempfile::tempdir().unwrap();
    for runtime in Runtime::all() {
        let id = format!("nerdctl-{runtime:?}").to_lowercase();
        let (bundle, uri) = bundle(&id, directory.path());
        let called = run_and_stop(runtime, &id, bundle, &uri, directory.path());
        let lines: Vec<_> = called.lines().collect();
        assert!(
            lines[0].starts_with("ADD /proc/") && lines[0].ends_with("/ns/net") && lines[1..] == ["DEL "],
            "{runtime:?}: {called}"
        );
    }
    without_bridge();
    census.assert_unchanged();
}

/// With a namespace of a name that the annotation tells the hooks.
#[test]
fn hooks_are_told_the_namespace() {
    without_bridge();
    let directory = tempfile::tempdir().unwrap();
    for runtime in Runtime::all() {
        let netns = Netns::new("husk-nerdctl");
        let census = Census::take();
        let id = format!("nerdctl-netns-{runtime:?}").to_lowercase();
        let (mut bundle, uri) = bundle(&id, directory.path());
        bundle.namespace(json!({"type": "network", "path": netns.path()}));
        bundle.change(&json!({"annotations": {"nerdctl/network-namespace": netns.path()}}));
        let called = run_and_stop(runtime, &id, bundle, &uri, directory.path());
        assert_eq!(called, format!("ADD {}\nDEL \n", netns.path()), "{runtime:?}");
        // Whose namespace it is, whose NIC it is.
        netns.assert_clean();
        netns.sh("ip link show eth0 && ip link del eth0");
        without_bridge();
        census.assert_unchanged();
    }
}

/// A file that is there for the length of a test.
struct Removed(&'static str);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

/// The client wires it between Create and Start.
#[test]
fn ctr_wires_it() {
    const NETWORK: &str = "/etc/cni/net.d/00-husk-e2e.conflist";
    without_bridge();
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(Path::new(NETWORK).parent().unwrap()).unwrap();
    let file = Removed(NETWORK);
    fs::write(NETWORK, network(directory.path()).to_string()).unwrap();
    let census = Census::take();
    for runtime in Runtime::all() {
        let id = format!("cni-{runtime:?}").to_lowercase();
        let done = ok(&[
            "ctr",
            "run",
            "--rm",
            "--cni",
            "--runtime",
            runtime.name(),
            BUSYBOX,
            &id,
            "sh",
            "-c",
            "ip -4 -o addr show eth0 | grep -o '10.14.0.[0-9]*/24'; ip route | head -n 1; ping -c 1 -W 10 10.14.0.1 > /dev/null && echo reached",
        ]);
        assert_eq!(
            done, "10.14.0.2/24\ndefault via 10.14.0.1 dev eth0 \nreached\n",
            "{runtime:?}"
        );
        fs::remove_dir_all(directory.path().join("leases")).unwrap();
    }
    without_bridge();
    drop(file);
    census.assert_unchanged();
}
