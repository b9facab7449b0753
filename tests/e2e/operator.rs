//! husk.toml: where it is read from, what is refused, what it changes; and what an operator can look at.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::census::Census;
use crate::command::{Finished, Input, Running, eventually, ok, run};
use crate::containerd::{BUSYBOX, Detached, RUNTIME};
use crate::foreground::Bundle;

pub const DEFAULT: &str = "/etc/husk/husk.toml";

/// A configuration file that is there for the length of a test.
pub struct Config(PathBuf);

impl Config {
    pub fn at(path: &str, text: &str) -> Self {
        let path = PathBuf::from(path);
        assert!(!path.exists(), "{} is somebody's", path.display());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        let _ = fs::remove_dir(self.0.parent().unwrap());
    }
}

/// `ctr run` of busybox with more options.
#[track_caller]
fn ctr_run(id: &str, options: &[&str], command: &[&str]) -> Finished {
    let mut argv = vec!["ctr", "run", "--rm", "--runtime", RUNTIME];
    argv.extend(options);
    argv.extend([BUSYBOX, id]);
    argv.extend(command);
    run(&argv)
}

/// The memory that a guest has, in MiB.
#[track_caller]
fn memory_mib(done: &Finished) -> u64 {
    let out = done.out();
    let kib = out
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("no MemTotal in {out:?}")) / 1024
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not said in {text:?}");
    }
}

#[test]
fn an_unknown_option_is_refused_by_name_and_line() {
    let census = Census::take();
    let config = Config::at(
        "/run/husk-test-config/wrong.toml",
        "[machine]\nvcpus = 1\nmemory = 64\n",
    );
    let words = ["wrong.toml:3: machine.memory: there is no such option"];
    let done = ctr_run("cfg-bad", &["--runtime-config-path", config.path()], &["true"]);
    assert_ne!(done.code, 0);
    assert_says(&done.err(), &words);
    let done = run(&["husk", "check", "--timeout", "0", "--config", config.path()]).expect_code(1);
    assert_says(&done.out(), &words);
    assert_says(&done.out(), &["FAIL  configuration"]);
    let bundle = Bundle::busybox(&["true"]);
    let done = run(&[
        "husk",
        "--config",
        config.path(),
        "run",
        "--bundle",
        bundle.path(),
        "cfg-bad",
    ])
    .expect_code(125);
    assert_says(&done.err(), &words);
    drop(config);
    let missing = "/run/husk-test-config/none.toml";
    let done = ctr_run("cfg-none", &["--runtime-config-path", missing], &["true"]);
    assert_ne!(done.code, 0);
    assert_says(&done.err(), &[missing, "o such file"]);
    census.assert_unchanged();
}

#[test]
fn the_shipped_configuration_is_right() {
    let shipped = Path::new("/usr/local/share/husk/husk.toml");
    let done = run(&[
        "husk",
        "check",
        "--timeout",
        "0",
        "--config",
        shipped.to_str().unwrap(),
    ])
    .expect_code(0);
    assert_says(
        &done.out(),
        &["ok    configuration", "/usr/local/share/husk/husk.toml"],
    );
}

#[test]
fn defaults_are_seen_in_the_guest() {
    let census = Census::take();
    let script = "grep MemTotal /proc/meminfo; nproc; cat /proc/cmdline";
    let config = Config::at(
        DEFAULT,
        "[machine]\nvcpus = 1\nmemory_mib = 160\n[guest]\nkernel_params = \"husk.test=1\"\nlog_level = \"info\"\n",
    );
    let done = ctr_run("cfg-default", &[], &["sh", "-c", script]).expect_code(0);
    assert!((110..160).contains(&memory_mib(&done)), "{}", done.out());
    assert_eq!(done.out().lines().nth(1), Some("1"));
    assert_says(&done.out(), &["loglevel=7 husk.test=1\n"]);
    // Another file takes its place; options that it does not have are the built-in defaults.
    let other = Config::at("/run/husk-test-config/husk.toml", "[machine]\nmemory_mib = 320\n");
    let done = ctr_run(
        "cfg-other",
        &["--runtime-config-path", other.path()],
        &["sh", "-c", script],
    )
    .expect_code(0);
    assert!((260..320).contains(&memory_mib(&done)), "{}", done.out());
    assert!(!done.out().contains("husk.test"));
    // A container with a limit gets the overhead on top.
    fs::write(
        &config.0,
        "[machine]\nmemory_mib = 64\nmemory_overhead_mib = 200\nmax_memory_mib = 300\n",
    )
    .unwrap();
    let limited = |id, limit: &str| {
        memory_mib(&ctr_run(id, &["--memory-limit", limit], &["sh", "-c", script]).expect_code(0))
    };
    assert!((210..264).contains(&limited("cfg-limit", "67108864")));
    assert!((240..300).contains(&limited("cfg-most", "1073741824")));
    drop((config, other));
    census.assert_unchanged();
}

#[test]
fn annotations_have_effect_where_they_are_allowed() {
    let census = Census::take();
    let annotation = ["--annotation", "io.husk.memory_mib=192"];
    let show = ["grep", "MemTotal", "/proc/meminfo"];
    let done = ctr_run("ann-no", &annotation, &show);
    assert_ne!(done.code, 0);
    assert_says(
        &done.err(),
        &[
            "annotation io.husk.memory_mib: not allowed",
            "`allowed`",
            "husk.toml",
        ],
    );
    let config = Config::at(DEFAULT, "[annotations]\nallowed = [\"io.husk.memory_mib\"]\n");
    let done = ctr_run("ann-yes", &annotation, &show).expect_code(0);
    assert!((140..192).contains(&memory_mib(&done)), "{}", done.out());
    for (refused, words) in [
        ("io.husk.vcpus=1", "annotation io.husk.vcpus: not allowed"),
        ("io.husk.kernel=/etc/shadow", "husk has no such annotation"),
        ("io.husk.memory_mib=all", "must be a whole number"),
    ] {
        let done = ctr_run("ann-bad", &["--annotation", refused], &show);
        assert_ne!(done.code, 0);
        assert_says(&done.err(), &[words]);
    }
    ctr_run("ann-other", &["--annotation", "org.example.x=1"], &["true"]).expect_code(0);
    drop(config);
    census.assert_unchanged();
}

#[test]
fn what_runs_can_be_looked_at() {
    let census = Census::take();
    let config = Config::at(
        DEFAULT,
        "[guest]\nlog_level = \"info\"\n[log]\nlevel = \"debug\"\n",
    );
    let container = Detached::start("looked-at", &["sleep", "1000"]);
    drop(config);
    let row = |id: &str| -> Option<serde_json::Value> {
        let list: serde_json::Value = serde_json::from_str(&ok(&["husk", "ps", "--json"])).unwrap();
        list.as_array()
            .unwrap()
            .iter()
            .find(|row| row["id"] == id)
            .cloned()
    };
    let shown = eventually("the container to be shown as running", || {
        row("looked-at").filter(|row| row["status"] == "running")
    });
    assert_eq!(
        (&shown["namespace"], &shown["memory_mib"]),
        (&"default".into(), &256.into())
    );
    let task = ok(&["ctr", "task", "ls"]);
    let pid = shown["pid"].to_string();
    assert!(
        task.lines()
            .any(|line| line.split_whitespace().take(2).eq(["looked-at", pid.as_str()])),
        "{pid} is not in {task}"
    );
    let table = ok(&["husk", "ps"]);
    assert!(
        table.starts_with("NAMESPACE ") && table.contains("looked-at"),
        "{table}"
    );
    assert_eq!(ok(&["husk", "ps", "-q", "-n", "default"]), "looked-at\n");
    assert_eq!(ok(&["husk", "ps", "-q", "-n", "other"]), "");

    assert_says(&ok(&["husk", "console", "looked-at"]), &["Linux version 6.12."]);
    let logs = ok(&["husk", "logs", "looked-at"]);
    assert_says(&logs, &["level=", "sandbox=looked-at", "namespace=default"]);
    let done = run(&["husk", "console", "no-such"]).expect_code(1);
    assert_says(&done.err(), &["no-such does not exist"]);

    // What the guest writes from now on is followed, without what a terminal would obey, until the sandbox is gone.
    let mut follower = Running::start(
        &["husk", "console", "-f", "--tail", "1", "looked-at"],
        Input::Nothing,
    );
    follower.wait_for("\n");
    container.remove();
    follower.finish(Duration::from_secs(30)).expect_code(0);
    assert_eq!(ok(&["husk", "ps", "-q"]), "");
    census.assert_unchanged();
}

#[test]
fn how_a_sandbox_is_locked_in_can_be_looked_at() {
    let census = Census::take();
    let container = Detached::start("locked-in", &["sleep", "1000"]);
    let exec = Running::start(
        &[
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "e",
            "locked-in",
            "sleep",
            "1000",
        ],
        Input::Nothing,
    );
    let looked = |format: &str| run(&["husk", "check", "--sandbox", "locked-in", "--format", format]);
    let of = |found: &serde_json::Value, name: &str| -> Vec<serde_json::Value> {
        let all = found["processes"].as_array().unwrap().iter();
        all.filter(|process| process["name"] == name).cloned().collect()
    };
    // It has its name before it has locked itself in.
    let found = eventually("the exec's stand-in to be shown, and all to be in order", || {
        let found: serde_json::Value = serde_json::from_str(&looked("json").out()).unwrap();
        for process in found["processes"].as_array().unwrap() {
            eprintln!("{}: {}", process["name"], process["faults"]);
        }
        (of(&found, "husk-standin").len() == 2 && found["ok"] == true).then_some(found)
    });
    // The kernel says the same to whoever asks it directly.
    for name in ["husk-vmm", "husk-fsd"] {
        let [process] = of(&found, name).try_into().unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", process["pid"])).unwrap();
        let field = |field: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(field))
                .unwrap()
                .trim()
        };
        let thread = &process["facts"]["threads"][0];
        assert_eq!(field("Name:"), thread["name"]);
        assert_eq!(field("Seccomp:"), thread["seccomp"].to_string());
        let uid = field("Uid:").split_whitespace().next().unwrap();
        assert_eq!(uid, thread["uids"][0].to_string());
        let net = fs::read_link(format!("/proc/{}/ns/net", process["pid"])).unwrap();
        let shown = process["facts"]["namespaces"]["net"]["id"].as_str().unwrap();
        assert_eq!(net.to_str(), Some(format!("net:[{shown}]").as_str()));
    }
    assert_eq!(of(&found, "engine").len(), 1);
    let table = looked("table").expect_code(0).out();
    assert_says(
        &table,
        &[
            "husk-vmm (pid ",
            "descriptor",
            "anon_inode:kvm-vm",
            "denies all that ABI ",
            "The sandbox is locked in as it has to be.",
        ],
    );
    let done = run(&["husk", "check", "--sandbox", "no-such"]).expect_code(1);
    assert_says(&done.err(), &["no-such does not exist"]);
    container.remove();
    drop(exec);
    census.assert_unchanged();
}

#[test]
fn a_container_of_a_dead_shim_is_shown_as_dead() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let census = Census::take();
    // Without containerd nobody cleans up, and what is left can be seen.
    let bundle = Bundle::busybox(&["sh", "-c", "echo ready; exec sleep 1000"]);
    let mut running = Running::start(
        &["husk", "run", "--bundle", bundle.path(), "ps-dead"],
        Input::Nothing,
    );
    running.wait_for("ready");
    assert_eq!(ok(&["husk", "ps", "-q"]), "ps-dead\n");
    kill(Pid::from_raw(running.id() as i32), Signal::SIGKILL).unwrap();
    running.finish(Duration::from_secs(10)).expect_code(137);
    let table = ok(&["husk", "ps"]);
    assert!(
        table
            .lines()
            .any(|line| line.contains("ps-dead") && line.contains("dead ")),
        "{table}"
    );
    ok(&["husk", "console", "ps-dead"]);
    ok(&["husk", "logs", "ps-dead"]);
    // The next of that id removes the remains.
    let next = Bundle::busybox(&["true"]);
    run(&["husk", "run", "--bundle", next.path(), "ps-dead"]).expect_code(0);
    assert_eq!(ok(&["husk", "ps", "-q"]), "");
    drop((bundle, next));
    census.assert_unchanged();
}

#[test]
fn the_journal_is_told() {
    const SOCKET: &str = "/run/systemd/journal/socket";
    if Path::new("/run/systemd/system").exists() {
        // A real journal listens; it is asked.
        crate::containerd::ctr_run("cfg-journal", BUSYBOX, &["true"]).expect_code(0);
        let told = ok(&["journalctl", "--no-pager", "HUSK_SANDBOX=cfg-journal"]);
        assert_says(&told, &["the sandbox has ended"]);
        return;
    }
    fs::create_dir_all("/run/systemd/journal").unwrap();
    let socket = UnixDatagram::bind(SOCKET).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    // Its queue is short, and nobody waits until there is room in it.
    let reader = std::thread::spawn(move || {
        let mut told = String::new();
        let mut datagram = vec![0; 64 << 10];
        while let Ok(n) = socket.recv(&mut datagram) {
            told += &String::from_utf8_lossy(&datagram[..n]);
            if told.contains("MESSAGE=the sandbox has ended") {
                break;
            }
        }
        told
    });
    let done = crate::containerd::ctr_run("cfg-journal", BUSYBOX, &["true"]);
    let told = reader.join().unwrap();
    fs::remove_dir_all("/run/systemd/journal").unwrap();
    done.expect_code(0);
    assert_says(
        &told,
        &[
            "MESSAGE=the sandbox has ended\nPRIORITY=6\nSYSLOG_IDENTIFIER=containerd-shim-husk-v2\n",
            "HUSK_NAMESPACE=default\nHUSK_SANDBOX=cfg-journal\n",
        ],
    );
}

#[test]
fn a_guest_that_fails_to_start_tells_its_last_words() {
    let census = Census::take();
    let config = Config::at(
        "/run/husk-test-config/panic.toml",
        "[guest]\nkernel_params = \"rdinit=/no/such/init init=/no/such/init\"\n",
    );
    let done = ctr_run("cfg-panic", &["--runtime-config-path", config.path()], &["true"]);
    assert_ne!(done.code, 0);
    assert_says(
        &done.err(),
        &[
            "the guest's kernel panicked",
            "the guest's console ends with:",
            "Kernel panic",
        ],
    );
    fs::write(&config.0, "[guest]\nkernel = \"/no/such/kernel\"\n").unwrap();
    let done = ctr_run("cfg-panic", &["--runtime-config-path", config.path()], &["true"]);
    assert_says(&done.err(), &["guest.kernel", "/no/such/kernel"]);
    // A kernel that hangs says nothing more, but what it said.
    fs::write(
        &config.0,
        "[guest]\nkernel_params = \"panic=0 rdinit=/no/such/init\"\n[timeouts]\nboot_seconds = 20\n",
    )
    .unwrap();
    let done = ctr_run("cfg-panic", &["--runtime-config-path", config.path()], &["true"]);
    assert_ne!(done.code, 0);
    assert_says(
        &done.err(),
        &[
            "silent for 20 s",
            "the guest's console ends with:",
            "Kernel panic",
        ],
    );
    drop(config);
    census.assert_unchanged();
}
