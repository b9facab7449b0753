//! The sandbox's network: what a container sees of the NICs in its network namespace, and what passes through them.

mod kinds;
mod late;
mod load;
mod localhost;
mod looks;
mod nerdctl;
mod refusals;
mod traffic;

use std::fs;
use std::os::unix::fs::symlink;

use husk_tests::traffic::{Order, connect};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::command::{Finished, eventually, ok, run};
use crate::host;

/// A network namespace of a name; removed with this.
pub struct Netns(pub String);

impl Netns {
    pub fn new(name: &str) -> Self {
        run(&["ip", "netns", "del", name]);
        ok(&["ip", "netns", "add", name]);
        let this = Self(name.to_owned());
        this.sh("ip link set lo up");
        this
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// Runs a script of the host's programs in it.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        ok(&["ip", "netns", "exec", &self.0, "sh", "-ec", script])
    }

    /// Adds a NIC whose other end, `peer`, is on the host.
    #[track_caller]
    pub fn nic(&self, name: &str, peer: &str, mtu: u32) {
        run(&["ip", "link", "del", peer]);
        sh(&format!(
            "ip link add {peer} mtu {mtu} type veth peer name {name} mtu {mtu} netns {netns}
             ip link set {peer} up; ip -n {netns} link set {name} up",
            netns = self.0
        ));
    }

    /// Asserts that husk has left nothing in it. An engine may have its answer a moment before the last is gone.
    #[track_caller]
    pub fn assert_clean(&self) {
        eventually("a clean network namespace", || {
            let left = self.leftovers();
            eprint!("{left}");
            left.is_empty().then_some(())
        });
    }

    /// What husk would leave in it.
    pub fn leftovers(&self) -> String {
        self.sh("tc qdisc show | grep ingress || true; ip -o link show | grep husk || true")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run(&["ip", "netns", "del", &self.0]);
    }
}

/// Runs a script of the host's programs.
#[track_caller]
pub fn sh(script: &str) -> String {
    ok(&["sh", "-ec", script])
}

/// A container that has the host's programs (`ip`, `ping`, `socat`); removed with this.
pub struct Container {
    pub id: String,
    _bundle: Bundle,
}

impl Container {
    /// A bundle for it.
    pub fn bundle(id: &str, netns: Option<&str>) -> Bundle {
        let mut bundle = Bundle::new(id);
        for (link, to) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            symlink(to, bundle.in_root(link)).unwrap();
        }
        fs::create_dir(bundle.in_root("usr")).unwrap();
        bundle.mount(
            json!({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}),
        );
        let capabilities = json!([
            "CAP_NET_ADMIN",
            "CAP_NET_RAW",
            "CAP_NET_BIND_SERVICE",
            "CAP_SETUID",
            "CAP_SETGID"
        ]);
        for set in ["bounding", "effective", "permitted"] {
            bundle.spec["process"]["capabilities"][set] = capabilities.clone();
        }
        bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
        bundle.change(&json!({"process": {"env": ["PATH=/bin:/usr/sbin:/usr/bin"]}}));
        if let Some(path) = netns {
            bundle.namespace(json!({"type": "network", "path": path}));
        }
        bundle
    }

    #[track_caller]
    pub fn start(runtime: Runtime, bundle: Bundle, id: &str) -> Self {
        Self::start_with(runtime, bundle, id, &[])
    }

    /// With more options of `ctr run`.
    #[track_caller]
    pub fn start_with(runtime: Runtime, bundle: Bundle, id: &str, options: &[&str]) -> Self {
        let config = bundle.write();
        let mut argv = vec!["ctr", "run", "-d", "--runtime", runtime.name()];
        argv.extend(options);
        argv.extend(["--config", config.to_str().unwrap(), id]);
        // What is left of it is removed when its start fails, too.
        let this = Self {
            id: id.to_owned(),
            _bundle: bundle,
        };
        run(&argv).expect_code(0);
        this
    }

    pub fn exec(&self, script: &str) -> Finished {
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

    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.exec(script).expect_code(0).out()
    }

    /// The pid of its process on the host.
    #[track_caller]
    pub fn pid(&self) -> String {
        let list = ok(&["ctr", "task", "ls"]);
        let line = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id));
        line.and_then(|line| line.split_whitespace().nth(1))
            .unwrap_or_else(|| panic!("no {} in {list}", self.id))
            .to_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            host::print_logs();
        }
        run(&["ctr", "task", "rm", "-f", &self.id]);
        run(&["ctr", "container", "rm", &self.id]);
    }
}

/// A container at 10.9.0.2 and 2001:db8:9::2, with the host at .1.
#[track_caller]
pub fn connected(runtime: Runtime, name: &str, mtu: u32) -> (Netns, Container) {
    connected_with(runtime, name, mtu, json!(["sleep", "1000"]))
}

/// As [`connected`] under husk, with `probe serve` at port 7000.
#[track_caller]
pub fn serving(name: &str, mtu: u32) -> (Netns, Container) {
    let both = connected_with(Runtime::Husk, name, mtu, json!(["probe", "serve", "7000"]));
    // It answers from here on.
    connect(([10, 9, 0, 2], 7000).into(), Order::Give(0)).unwrap();
    both
}

#[track_caller]
fn connected_with(runtime: Runtime, name: &str, mtu: u32, args: Value) -> (Netns, Container) {
    let netns = Netns::new(&format!("husk-{name}"));
    netns.nic("eth0", "hk-eth0", mtu);
    sh("ip addr add 10.9.0.1/24 dev hk-eth0; ip addr add 2001:db8:9::1/64 dev hk-eth0 nodad");
    netns.sh("ip addr add 10.9.0.2/24 dev eth0; ip addr add 2001:db8:9::2/64 dev eth0 nodad; ip route add default via 10.9.0.1");
    let id = format!("{name}-{runtime:?}").to_lowercase();
    let mut bundle = Container::bundle(&id, Some(&netns.path()));
    bundle.spec["process"]["args"] = args;
    let container = Container::start(runtime, bundle, &id);
    (netns, container)
}

/// What iproute2 shows, as far as it is to be the same under each runtime.
pub fn view(show: impl Fn(&str) -> String) -> Vec<String> {
    let list = |command: &str| -> Vec<Value> {
        let text = show(command);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command}: {error}: {text}"))
    };
    let mut seen = Vec::new();
    for mut link in list("/usr/sbin/ip -j addr show") {
        let kept = [
            "ifname",
            "ifindex",
            "mtu",
            "address",
            "broadcast",
            "txqlen",
            "link_type",
            "addr_info",
        ];
        let flags = link["flags"].as_array().unwrap().clone();
        link.as_object_mut()
            .unwrap()
            .retain(|key, _| kept.contains(&key.as_str()));
        seen.push(format!("link {link} {flags:?}"));
    }
    for command in [
        "/usr/sbin/ip -j route show table all",
        "/usr/sbin/ip -j -6 route show table all",
    ] {
        // The order of routes to different places says nothing.
        let mut routes: Vec<String> = list(command)
            .iter()
            .map(|route| format!("{command}: {route}"))
            .collect();
        routes.sort();
        seen.extend(routes);
    }
    for command in [
        "/usr/sbin/ip -j rule show",
        "/usr/sbin/ip -j -6 rule show",
        "/usr/sbin/ip -j neigh show nud permanent",
    ] {
        seen.extend(list(command).iter().map(|entry| format!("{command}: {entry}")));
    }
    seen
}

/// Asserts that two views are one, and tells where they differ.
#[track_caller]
pub fn assert_same(expected: &[String], found: &[String]) {
    let missing: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
    let surplus: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "missing: {missing:#?}\nsurplus: {surplus:#?}"
    );
    assert_eq!(expected, found);
}
