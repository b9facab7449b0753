//! `husk spec`: a config.json to begin with.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::PathBuf,
};

use serde_json::{Value, json};

use super::cli::SpecArgs;

/// The version of the OCI runtime specification that is written.
pub const OCI_VERSION: &str = "1.2.0";

/// Why none was written.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// There is one.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// The host refuses.
    #[error("cannot write {}", path.display())]
    Unwritable {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes it. Never replaces one.
///
/// # Errors
/// Then there is no new one.
pub fn write(args: &SpecArgs) -> Result<(), SpecError> {
    let path = args.bundle.join("config.json");
    let text = format!("{:#}\n", config(&args.command, args.terminal));
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                SpecError::Exists(path)
            } else {
                SpecError::Unwritable { path, source }
            }
        })
}

/// What runc would write, with the root file system writable.
pub fn config(command: &[String], terminal: bool) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let environment = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM=xterm",
    ];
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": terminal,
            "user": { "uid": 0, "gid": 0 },
            "args": command,
            "env": environment,
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "husk",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]
            },
            {
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
            },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]
            },
            {
                "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]
            },
            {
                "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]
            },
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]
            }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" }
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_valid_oci_configuration() {
        let value = config(&["sh".into(), "-c".into(), "true".into()], true);
        let spec: oci_spec::runtime::Spec = serde_json::from_value(value).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.args().as_ref().unwrap().len(), 3);
        assert_eq!(
            spec.linux()
                .as_ref()
                .unwrap()
                .namespaces()
                .as_ref()
                .unwrap()
                .len(),
            6
        );
    }

    #[test]
    fn one_that_is_there_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let args = SpecArgs {
            bundle: dir.path().into(),
            terminal: false,
            command: vec!["true".into()],
        };
        write(&args).unwrap();
        let first = std::fs::read(dir.path().join("config.json")).unwrap();
        assert!(matches!(write(&args).unwrap_err(), SpecError::Exists(_)));
        assert_eq!(std::fs::read(dir.path().join("config.json")).unwrap(), first);
    }
}
