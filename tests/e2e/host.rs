//! The host that the suites run on: its processes, its containerd, its logs.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::command::{eventually, run};

pub struct Process {
    pub pid: i32,
    pub name: String,
}

pub fn processes() -> Vec<Process> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(command_line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        // A zombie has no command line; its name still counts.
        let program = command_line.split(|b| *b == 0).next().unwrap_or_default();
        let name = Path::new(&*String::from_utf8_lossy(program))
            .file_name()
            .map(|n| n.to_string_lossy().into_owned());
        let name = name.or_else(|| {
            fs::read_to_string(entry.path().join("comm"))
                .ok()
                .map(|n| n.trim().into())
        });
        let Some(name) = name else { continue };
        found.push(Process { pid, name });
    }
    found
}

/// Pids of the processes of that name.
pub fn pids_of(name: &str) -> Vec<i32> {
    processes()
        .into_iter()
        .filter(|p| p.name == name)
        .map(|p| p.pid)
        .collect()
}

/// The one process of that name.
#[track_caller]
pub fn pid_of(name: &str) -> i32 {
    let pids = pids_of(name);
    assert_eq!(pids.len(), 1, "processes named {name}: {pids:?}");
    pids[0]
}

/// Anonymous memory of a process in KiB: what it allocated itself, without files and the guest's memory.
pub fn anonymous_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

/// Stops containerd as its service manager would, and starts it again.
pub fn restart_containerd() {
    if Path::new("/run/systemd/system").exists() {
        run(&["systemctl", "restart", "containerd"]).expect_code(0);
    } else {
        let pid = pid_of("containerd");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
        eventually("containerd to end", || {
            pids_of("containerd").is_empty().then_some(())
        });
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(CONTAINERD_LOG)
            .unwrap();
        Command::new("setsid")
            .args(["--fork", "containerd"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .status()
            .unwrap();
    }
    eventually("containerd to answer", || {
        (run(&["ctr", "version"]).code == 0).then_some(())
    });
}

/// What containerd, and the shims through it, log from here on.
pub struct ContainerdLog {
    /// Length of the log's file, or seconds since 1970 for the journal.
    since: u64,
}

const CONTAINERD_LOG: &str = "/var/log/containerd.log";

impl ContainerdLog {
    pub fn from_now() -> Self {
        let since = match fs::metadata(CONTAINERD_LOG) {
            Ok(file) => file.len(),
            Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_secs(),
        };
        Self { since }
    }

    pub fn read(&self) -> String {
        let bytes = match fs::File::open(CONTAINERD_LOG) {
            Ok(mut file) => {
                let mut bytes = Vec::new();
                file.seek(SeekFrom::Start(self.since)).unwrap();
                file.read_to_end(&mut bytes).unwrap();
                bytes
            }
            Err(_) => {
                let since = format!("--since=@{}", self.since);
                run(&["journalctl", "-q", "-u", "containerd", "-o", "cat", &since])
                    .expect_code(0)
                    .stdout
            }
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Shows what the engine and the kernel said last: called when something failed.
pub fn print_logs() {
    for (title, argv) in [
        ("containerd", vec!["tail", "-n", "60", CONTAINERD_LOG]),
        ("kernel", vec!["sh", "-c", "dmesg | tail -n 15"]),
        (
            "processes",
            vec![
                "sh",
                "-c",
                "ps -eo pid,ppid,stat,wchan:20,args | grep -v '\\[' | tail -n 40",
            ],
        ),
        (
            "/run/husk",
            vec!["sh", "-c", "find /run/husk -xdev -maxdepth 3 | head -n 40"],
        ),
    ] {
        let output = Command::new(argv[0]).args(&argv[1..]).output();
        if let Ok(output) = output {
            eprintln!("--- {title}\n{}", String::from_utf8_lossy(&output.stdout));
        }
    }
}
