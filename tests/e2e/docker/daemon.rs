//! dockerd, with the configuration that husk ships: started by the first test that needs it, stopped when the suite ends.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Once;

use serde_json::{Value, json};

use super::docker;
use crate::command::{eventually, ok};
use crate::host;

const CONFIG: &str = "/etc/docker/daemon.json";
const SHIPPED: &str = include_str!("../../../configs/docker-daemon.json");

/// A runtime whose machine cannot start: its configuration names a kernel that is not there.
pub const BROKEN: &str = "husk-broken";
const BROKEN_CONFIG: &str = "/run/husk-e2e-broken.toml";

/// The configuration, with `more` laid over it.
fn config(more: &Value) -> String {
    let mut config: Value = serde_json::from_str(SHIPPED).unwrap();
    config["runtimes"][BROKEN] =
        json!({"runtimeType": "io.containerd.husk.v2", "options": {"ConfigPath": BROKEN_CONFIG}});
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string()
}

fn service(verb: &str) -> Vec<&str> {
    if Path::new("/run/systemd/system").exists() {
        vec!["systemctl", verb, "docker"]
    } else {
        vec!["testhost-services", verb, "docker"]
    }
}

/// Returns when dockerd answers.
#[track_caller]
pub fn ready() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let config = config(&json!({}));
        if let Ok(found) = fs::read_to_string(CONFIG) {
            assert_eq!(
                found, config,
                "{CONFIG} is somebody's: Docker's tests would change it"
            );
        }
        assert!(
            host::pids_of("dockerd").is_empty(),
            "dockerd runs: Docker's tests would stop it"
        );
        fs::create_dir_all("/etc/docker").unwrap();
        fs::write(CONFIG, config).unwrap();
        fs::write(BROKEN_CONFIG, "[guest]\nkernel = \"/no/such/kernel\"\n").unwrap();
        // They stay from the first container on.
        for directory in [
            "/sys/fs/cgroup/docker",
            "/run/containerd/io.containerd.runtime.v2.task/moby",
        ] {
            fs::create_dir_all(directory).unwrap();
        }
        ok(&service("start"));
        // SAFETY: the function is there to the end of the process.
        unsafe { libc::atexit(stop) };
    });
}

extern "C" fn stop() {
    let verb = service("stop");
    let _ = Command::new(verb[0]).args(&verb[1..]).status();
    let _ = fs::remove_file(CONFIG);
    let _ = fs::remove_file(BROKEN_CONFIG);
}

/// dockerd with husk as the default runtime; with its own again when this is dropped.
pub struct HuskByDefault;

impl HuskByDefault {
    pub fn set() -> Self {
        ready();
        let this = Self;
        reload(&json!({"default-runtime": "husk"}), "husk");
        this
    }
}

impl Drop for HuskByDefault {
    fn drop(&mut self) {
        reload(&json!({"default-runtime": "runc"}), "runc");
        fs::write(CONFIG, config(&json!({}))).unwrap();
    }
}

fn reload(more: &Value, runtime: &str) {
    fs::write(CONFIG, config(more)).unwrap();
    let pid = nix::unistd::Pid::from_raw(host::pid_of("dockerd"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    eventually("the other default runtime", || {
        let shown = docker(&["info", "--format", "{{.DefaultRuntime}}"]);
        (shown.out().trim() == runtime).then_some(())
    });
}
