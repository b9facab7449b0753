//! A bundle to try a field of config.json with: a base that is like containerd's own default, and changes to it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::ok;

/// A bundle directory with config.json and a root file system of busybox and `probe` (tests/src/bin/probe.rs).
pub struct Bundle {
    directory: TempDir,
    pub spec: Value,
}

impl Bundle {
    /// One for the container `id`, which says itself in its cgroup's path.
    pub fn new(id: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("husk-e2e-").tempdir().unwrap();
        let root = directory.path().join("rootfs");
        fill_root(&root);
        // Others than root must reach the root file system.
        fs::set_permissions(
            directory.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let spec = base_spec(id, &root);
        Self { directory, spec }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path in the container, as the host sees it.
    pub fn in_root(&self, path: &str) -> PathBuf {
        self.path().join("rootfs").join(path.trim_start_matches('/'))
    }

    /// Lays `change` over the spec: objects are merged, everything else is replaced, null removes.
    pub fn change(&mut self, change: &Value) {
        merge(&mut self.spec, change);
    }

    pub fn mount(&mut self, mount: Value) {
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
    }

    /// Adds a namespace, or gives the one of that type its path.
    pub fn namespace(&mut self, namespace: Value) {
        let all = self.spec["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|old| old["type"] != namespace["type"]);
        all.push(namespace);
    }

    /// Writes config.json; gives its path.
    pub fn write(&self) -> PathBuf {
        let path = self.path().join("config.json");
        fs::write(&path, serde_json::to_vec_pretty(&self.spec).unwrap()).unwrap();
        path
    }
}

/// JSON merge patch (RFC 7396).
pub fn merge(target: &mut Value, change: &Value) {
    let Value::Object(change) = change else {
        *target = change.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in change {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut target[key.as_str()], value);
        }
    }
}

fn fill_root(root: &Path) {
    static APPLETS: OnceLock<Vec<String>> = OnceLock::new();
    let applets = APPLETS.get_or_init(|| {
        let list = ok(&["/bin/busybox", "--list"]);
        list.lines()
            .filter(|name| *name != "busybox")
            .map(str::to_owned)
            .collect()
    });
    for name in [
        "bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp", "var/tmp",
    ] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::set_permissions(
        root.join("tmp"),
        std::os::unix::fs::PermissionsExt::from_mode(0o1777),
    )
    .unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in applets {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let probe = std::env::current_exe().unwrap().with_file_name("probe");
    fs::copy(&probe, root.join("bin/probe"))
        .unwrap_or_else(|e| panic!("{}: {e}; `make e2e-programs` makes it", probe.display()));
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1234:4321:user:/home:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nuser:x:4321:\nextra:x:900:user\n",
    )
    .unwrap();
}

/// Like the default of containerd (`oci.WithDefaultSpec`) with busybox's shell.
fn base_spec(id: &str, root: &Path) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ]);
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": root, "readonly": false},
        "hostname": "husk-e2e",
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "cgroupsPath": format!("/husk-e2e/{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
