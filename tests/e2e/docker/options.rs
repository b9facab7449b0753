//! Options of `docker run`: what a container sees with them is what one of runc's sees.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{BUSYBOX, begin, docker, foreground, runtime_name};
use crate::case::Runtime;

/// Runs a container under each runtime, the same in all else; their outputs must be one. Gives it.
#[track_caller]
fn as_under_runc(options: &[&str], command: &[&str]) -> String {
    let mut expected: Option<String> = None;
    for runtime in Runtime::all() {
        let head = ["run", "--rm", "--runtime", runtime_name(runtime)];
        let done = docker(&[&head, options, &[BUSYBOX], command].concat()).expect_code(0);
        match &expected {
            None => expected = Some(done.out()),
            Some(expected) => assert_eq!(&done.out(), expected, "stderr: {}", done.err()),
        }
    }
    expected.unwrap()
}

#[test]
fn who_it_is_and_what_it_may() {
    let census = begin();
    let script = "id; pwd; env | grep -v HOSTNAME | sort; hostname; cat /proc/1/comm; ulimit -n; ulimit -Hn; \
        grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; umask; \
        cd /sys/fs/cgroup; cat cpu.max memory.max memory.swap.max pids.max; \
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/core/somaxconn; \
        cat /etc/resolv.conf | grep -v ^#; grep -v $(hostname) /etc/hosts; ls -l /dev | grep -v kcore | awk '{print $1,$5,$6,$NF}'; \
        touch /made 2>&1; mount -t tmpfs x /home 2>&1; chown 0 /tmp 2>&1; \
        for f in /proc/keys /sys/firmware; do ls -ld $f | cut -c1-10; done; true";
    let mut options = vec!["--user", "1000:900", "--group-add", "5", "--workdir", "/var/work"];
    options.extend(["--env", "A=1 2", "--env", "B=", "--hostname", "named", "--init"]);
    options.extend([
        "--ulimit",
        "nofile=100:200",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_RAW",
    ]);
    options.extend(["--security-opt", "no-new-privileges", "--oom-score-adj", "300"]);
    options.extend(["--cpus", "0.5", "--memory", "48m", "--memory-swap", "96m"]);
    options.extend([
        "--pids-limit",
        "77",
        "--sysctl",
        "net.core.somaxconn=99",
        "--read-only",
    ]);
    options.extend([
        "--dns",
        "192.0.2.53",
        "--dns-search",
        "lan.test",
        "--add-host",
        "there:192.0.2.1",
    ]);
    let seen = as_under_runc(&options, &["sh", "-c", script]);
    for part in [
        "uid=1000",
        "docker-init",
        "NoNewPrivs:\t1",
        "50000 100000",
        "Read-only file system",
        "192.0.2.53",
    ] {
        assert!(seen.contains(part), "no {part:?} in {seen}");
    }
    census.assert_unchanged();
}

#[test]
fn what_is_mounted() {
    let census = begin();
    let directory = tempfile::Builder::new().prefix("husk-e2e-").tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for name in ["rw", "ro"] {
        fs::create_dir(path(name)).unwrap();
        fs::set_permissions(path(name), PermissionsExt::from_mode(0o777)).unwrap();
    }
    fs::write(path("rw/seen"), "from the host\n").unwrap();
    fs::write(path("file"), "a file\n").unwrap();
    let script = "cat /rw/seen /one; echo written >/rw/made; (echo x >/ro/made) 2>&1; (echo x >/one) 2>&1; \
        ls -la /anon | awk '{print $1,$3,$4,$NF}'; echo kept >/named/kept; \
        awk '{print $2}' /proc/mounts | grep -v '^/dev/pts\\|^/proc\\|^/$' | sort; \
        df -k /dev/shm /t /m | awk '{print $2,$6}'; stat -c '%a %n' /t /m /dev/shm /tmp; \
        grep -E '^[^ ]+ /(t|m) ' /proc/mounts | tr ' ,' '\\n\\n' | grep -E '^(no|r[ow]$)' | sort; \
        grep -E ' /(ro|rw) ' /proc/mounts | cut -d' ' -f2,4 | cut -d, -f1 | sort";
    let (rw, ro) = (format!("{}:/rw", path("rw")), format!("{}:/ro:ro", path("ro")));
    let one = format!("type=bind,src={},dst=/one,readonly", path("file"));
    let mut options = vec!["-v", &rw, "-v", &ro, "--mount", &one, "-v", "/anon"];
    options.extend([
        "--mount",
        "type=volume,src=husk-named,dst=/named",
        "--tmpfs",
        "/t:size=1m,mode=750",
    ]);
    options.extend([
        "--mount",
        "type=tmpfs,dst=/m,tmpfs-size=2097152",
        "--shm-size",
        "8m",
    ]);
    let seen = as_under_runc(&options, &["sh", "-c", script]);
    for part in [
        "from the host\na file\n",
        "/ro/made: Read-only file system",
        "/one: Read-only file system",
        "8192 /dev/shm",
    ] {
        assert!(seen.contains(part), "no {part:?} in {seen}");
    }
    assert_eq!(fs::read_to_string(path("rw/made")).unwrap(), "written\n");
    super::docker_ok(&["volume", "rm", "husk-named"]);
    census.assert_unchanged();
}

#[test]
fn a_seccomp_profile_and_none() {
    let census = begin();
    let profile = tempfile::NamedTempFile::new().unwrap();
    let rules = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
    fs::write(profile.path(), rules).unwrap();
    let script = "mkdir /d 2>&1; mount -t tmpfs x /home 2>&1; grep Seccomp: /proc/self/status; true";
    let option = format!("seccomp={}", profile.path().display());
    let seen = as_under_runc(
        &["--security-opt", &option, "--cap-add", "SYS_ADMIN"],
        &["sh", "-c", script],
    );
    assert_eq!(
        seen,
        "mkdir: can't create directory '/d': Operation not supported\nSeccomp:\t2\n"
    );
    let options = ["--security-opt", "seccomp=unconfined", "--cap-add", "SYS_ADMIN"];
    let done = foreground(
        &options,
        BUSYBOX,
        &[
            "sh",
            "-ec",
            "mkdir /d; mount -t tmpfs x /home; grep Seccomp: /proc/self/status",
        ],
    );
    assert_eq!(done.expect_code(0).out(), "Seccomp:\t0\n");
    census.assert_unchanged();
}

/// A device of the host's cannot be had in a machine: it is refused, not left out.
#[test]
fn a_device() {
    let census = begin();
    let done = foreground(&["--device", "/dev/loop0"], BUSYBOX, &["true"]).expect_code(125);
    for word in ["linux.devices", "/dev/loop0"] {
        assert!(done.err().contains(word), "{}", done.err());
    }
    census.assert_unchanged();
}
