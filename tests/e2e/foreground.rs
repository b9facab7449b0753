//! `husk run`: a container in the foreground without any daemon.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::census::Census;
use crate::command::{Input, Running, ok, run, run_with};

/// A bundle with busybox in its root file system.
pub struct Bundle {
    directory: TempDir,
}

impl Bundle {
    pub fn busybox(command: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        let bin = root.join("bin");
        // Links beside it, one for each applet.
        ok(&[
            bin.join("busybox").to_str().unwrap(),
            "--install",
            bin.to_str().unwrap(),
        ]);
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        let bundle = Self { directory };
        ok(&["husk", "spec", "--bundle", bundle.path()]);
        let command: Vec<Value> = command.iter().map(|word| (*word).into()).collect();
        bundle.edit(|spec| {
            spec["process"]["args"] = command.into();
            spec["process"]["terminal"] = false.into();
            spec["root"]["readonly"] = false.into();
        });
        bundle
    }

    pub fn path(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    pub fn join(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Changes config.json.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let path = self.join("config.json");
        let mut spec = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut spec);
        fs::write(&path, serde_json::to_vec_pretty(&spec).unwrap()).unwrap();
    }
}

#[test]
fn run_carries_streams_and_exit_code() {
    let census = Census::take();
    let bundle = Bundle::busybox(&["sh", "-c", "uname -r; cat; echo err >&2; exit 7"]);
    let argv = ["husk", "run", "--bundle", bundle.path(), "streams"];
    let done = run_with(&argv, Input::Bytes(b"typed\n".to_vec()), Duration::from_secs(120)).expect_code(7);
    assert!(done.out().ends_with("-husk\ntyped\n"), "{:?}", done.out());
    assert_eq!(done.err(), "err\n");
    drop(bundle);
    census.assert_unchanged();
}

#[test]
fn a_signal_is_forwarded() {
    let census = Census::take();
    let bundle = Bundle::busybox(&[
        "sh",
        "-c",
        "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    let mut running = Running::start(
        &["husk", "run", "--bundle", bundle.path(), "signals"],
        Input::Nothing,
    );
    running.wait_for("ready");
    ok(&["kill", "-TERM", &running.id().to_string()]);
    running.finish(Duration::from_secs(60)).expect_code(5);
    drop(bundle);
    census.assert_unchanged();
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    let bundle = Bundle::busybox(&["sh", "-c", "kill -9 $$"]);
    // As pid 1 of its namespace the shell cannot kill itself; a child can.
    bundle.edit(|spec| {
        spec["process"]["args"] = serde_json::json!(["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])
    });
    run(&["husk", "run", "--bundle", bundle.path(), "by-signal"]).expect_code(137);
}

#[test]
fn user_environment_and_directory_are_those_of_the_spec() {
    let bundle = Bundle::busybox(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; pwd; echo $COLOUR; umask; ulimit -n",
    ]);
    bundle.edit(|spec| {
        let process = &mut spec["process"];
        process["user"] =
            serde_json::json!({"uid": 1234, "gid": 4321, "additionalGids": [4321, 77], "umask": 0o27});
        process["cwd"] = "/tmp".into();
        process["env"] = serde_json::json!(["PATH=/bin", "COLOUR=green"]);
        process["rlimits"] = serde_json::json!([{"type": "RLIMIT_NOFILE", "soft": 321, "hard": 654}]);
    });
    let done = run(&["husk", "run", "--bundle", bundle.path(), "user"]).expect_code(0);
    assert_eq!(done.out(), "1234\n4321\n4321 77\n/tmp\ngreen\n0027\n321\n");
}

#[test]
fn files_go_both_ways_with_owner_and_mode() {
    let bundle = Bundle::busybox(&[
        "sh",
        "-c",
        "cat /from-host; echo changed > /from-guest; chmod 640 /from-guest; chown 12:34 /from-guest; \
         ln /from-guest /linked; mkfifo /pipe; ln -s /nowhere /dangling",
    ]);
    bundle.edit(|spec| {
        let all = serde_json::json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD"]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = all.clone();
        }
    });
    fs::write(bundle.join("rootfs/from-host"), "hello\n").unwrap();
    let done = run(&["husk", "run", "--bundle", bundle.path(), "files"]).expect_code(0);
    assert_eq!(done.out(), "hello\n");
    let shown = ok(&[
        "stat",
        "-c",
        "%a %u %g %h",
        bundle.join("rootfs/from-guest").to_str().unwrap(),
    ]);
    assert_eq!(shown, "640 12 34 2\n");
    let kinds = ok(&[
        "stat",
        "-c",
        "%F",
        bundle.join("rootfs/pipe").to_str().unwrap(),
        bundle.join("rootfs/dangling").to_str().unwrap(),
    ]);
    assert_eq!(kinds, "fifo\nsymbolic link\n");
}

#[test]
fn a_link_to_the_host_stays_inside() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), "secret of the host").unwrap();
    let bundle = Bundle::busybox(&[
        "sh",
        "-c",
        "cat /link; cat /../../../../etc/shadow; ls /link 2>&1; true",
    ]);
    std::os::unix::fs::symlink(secret.path(), bundle.join("rootfs/link")).unwrap();
    let done = run(&["husk", "run", "--bundle", bundle.path(), "link"]).expect_code(0);
    assert!(!done.out().contains("secret of the host"), "{:?}", done.out());
    assert!(!done.out().contains("root:"), "{:?}", done.out());
}

#[test]
fn a_bind_mount_is_shared_both_ways_and_read_only_when_asked() {
    let shared = tempfile::tempdir().unwrap();
    fs::write(shared.path().join("host"), "from host\n").unwrap();
    let bundle = Bundle::busybox(&[
        "sh",
        "-c",
        "cat /data/host; echo from guest > /data/guest; echo no > /read-only/x 2>/dev/null || echo refused",
    ]);
    bundle.edit(|spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let source = shared.path().to_str().unwrap();
        mounts.push(serde_json::json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "rw"]}));
        mounts.push(
            serde_json::json!({"destination": "/read-only", "type": "bind", "source": source, "options": ["bind", "ro"]}),
        );
    });
    let done = run(&["husk", "run", "--bundle", bundle.path(), "volumes"]).expect_code(0);
    assert_eq!(done.out(), "from host\nrefused\n");
    assert_eq!(
        fs::read_to_string(shared.path().join("guest")).unwrap(),
        "from guest\n"
    );
    assert!(!Path::new(&shared.path().join("x")).exists());
}

#[test]
fn check_says_that_this_host_is_fit() {
    let done = run(&["husk", "check"]).expect_code(0);
    assert!(done.out().contains("kvm"), "{}", done.out());
    let version = ok(&["husk", "--version"]);
    assert!(version.starts_with("husk "), "{version}");
}
