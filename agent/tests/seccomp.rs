//! `linux.seccomp`, seen from inside containers.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use serde_json::{Value, json};

use crate::common::{Host, PATIENCE, directories, process, script, spec};

/// The default profile of containerd (written from its `contrib/seccomp`, Apache-2.0) for a container with
/// CAP_SYS_CHROOT.
fn default_profile() -> Value {
    serde_json::from_str(include_str!("fixtures/containerd-seccomp.json")).unwrap()
}

/// `profile` on top of `spec`, with `no_new_privileges`.
fn under(mut spec: Value, profile: Value, no_new_privileges: bool) -> Value {
    spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
    spec["linux"]["seccomp"] = profile;
    spec
}

#[tokio::test]
async fn a_container_and_what_joins_it_are_under_the_default_profile() {
    let host = Host::new().await;
    for (no_new_privileges, uid) in [(true, 0), (false, 0), (false, 1000), (true, 1000)] {
        let text = "sed -n '/^Seccomp:\\|^NoNewPrivs:\\|^CapEff:\\|^CapPrm:/p' /proc/self/status; unshare -U true; \
            linux32 echo 32; echo done";
        let mut spec = under(script(text), default_profile(), no_new_privileges);
        spec["process"]["user"] = json!({"uid": uid, "gid": uid});
        let (stdout, stderr, status) = host.output("c", &spec).await;
        let caps = if uid == 0 {
            "0000000000000021"
        } else {
            "0000000000000000"
        };
        assert_eq!(
            stdout,
            format!(
                "CapPrm:\t{caps}\nCapEff:\t{caps}\nNoNewPrivs:\t{}\nSeccomp:\t2\n32\ndone\n",
                u8::from(no_new_privileges)
            ),
            "{stderr}"
        );
        assert!(
            stderr.contains("unshare") && stderr.contains("Operation not permitted"),
            "{stderr}"
        );
        assert_eq!(status, 0);
    }
    let _streams = host
        .run("d", &under(spec(&["sleep", "1000"]), default_profile(), false))
        .await;
    for terminal in [false, true] {
        for no_new_privileges in [false, true] {
            let mut process = process(&[
                "sh",
                "-c",
                "sed -n /^Seccomp:/p /proc/self/status; unshare -U true; echo $?",
            ]);
            process["noNewPrivileges"] = json!(no_new_privileges);
            process["terminal"] = json!(terminal);
            let mut streams = host
                .exec("d", "e", &process)
                .await
                .unwrap_or_else(|f| panic!("{}", f.message));
            streams.stdin = None;
            let (stdout, _) = streams.read().await;
            let lines: Vec<&str> = stdout.lines().collect();
            assert_eq!(
                (lines[0], *lines.last().unwrap()),
                ("Seccomp:\t2", "1"),
                "{stdout}"
            );
            assert_eq!(host.next_exit().await.1, "e");
        }
    }
}

#[tokio::test]
async fn a_call_gets_the_errno_and_the_conditions_of_the_profile() {
    let host = Host::new().await;
    let rule = |errno: u32, args: Value| json!({"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args});
    // chmod(2) has the mode as its argument 1; fchmodat(2), which newer C libraries call, as its argument 2.
    let mode = |op: &str, value: u32, second: u32| {
        json!([
            {"names": ["chmod"], "index": 1, "op": op, "value": value, "valueTwo": second},
            {"names": ["fchmodat"], "index": 2, "op": op, "value": value, "valueTwo": second},
        ])
    };
    let mut syscalls = Vec::new();
    for (errno, op, value, second) in [
        (5, "SCMP_CMP_EQ", 0o600, 0),
        (28, "SCMP_CMP_MASKED_EQ", 0o7000, 0o4000),
        (16, "SCMP_CMP_GT", 0o2000, 0),
        (22, "SCMP_CMP_LT", 0o100, 0),
    ] {
        for condition in mode(op, value, second).as_array().unwrap() {
            let mut rule = rule(errno, json!([condition]));
            rule["names"] = condition["names"].clone();
            syscalls.push(rule);
        }
    }
    syscalls.push(json!({"names": ["sync"], "action": "SCMP_ACT_KILL_PROCESS"}));
    syscalls.push(json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}));
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls, "flags": ["SECCOMP_FILTER_FLAG_LOG"]});
    let text = "cd /tmp; echo > f; for mode in 600 4755 2755 77 700; do chmod $mode f; done; stat -c %a f; \
        mkdir d; sync; echo $?";
    let (stdout, stderr, _) = host.output("c", &under(script(text), profile, false)).await;
    // 128 and the signal, SIGSYS.
    assert_eq!(stdout, "700\n159\n");
    let errors: Vec<&str> = stderr
        .lines()
        .filter_map(|line| line.rsplit_once(": ").map(|(_, error)| error))
        .collect();
    assert_eq!(
        errors[..5],
        [
            "Input/output error",
            "No space left on device",
            "Device or resource busy",
            "Invalid argument",
            "Operation not permitted"
        ],
        "{stderr}"
    );
}

/// All that a static program needs, and little more: what runc itself would need is more than this.
#[tokio::test]
async fn the_agents_own_steps_need_little_of_a_profile() {
    let host = Host::new().await;
    let calls = [
        "execve",
        "exit_group",
        "exit",
        "read",
        "write",
        "brk",
        "mmap",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "mprotect",
        "uname",
        "prctl",
        "capset",
        "getuid",
        "poll",
        "ioctl",
        "fstat",
        "newfstatat",
        "getgid",
        "setuid",
        "setgid",
    ];
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": calls, "action": "SCMP_ACT_ALLOW"}]
    });
    for no_new_privileges in [false, true] {
        for terminal in [false, true] {
            let mut spec = under(spec(&["echo", "hello"]), profile.clone(), no_new_privileges);
            spec["process"]["terminal"] = json!(terminal);
            let (stdout, stderr, status) = host.output("c", &spec).await;
            assert_eq!((stdout.trim_end(), stderr.as_str(), status), ("hello", "", 0));
        }
    }
}

#[tokio::test]
async fn calls_that_the_profile_is_too_old_for_are_unknown() {
    let host = Host::new().await;
    // Up to faccessat, number 269; busybox's `unshare` (272) is beyond, its `chroot` (161) is not.
    let names = serde_json::from_str::<Value>(include_str!("fixtures/containerd-seccomp.json")).unwrap();
    let names = names["syscalls"][0]["names"].as_array().unwrap().clone();
    let old: Vec<Value> = names
        .into_iter()
        .filter(|name| !["chroot", "accept4", "cachestat"].contains(&name.as_str().unwrap()))
        .collect();
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13, "syscalls": [
        {"names": old, "action": "SCMP_ACT_ALLOW"}, {"names": ["clone"], "action": "SCMP_ACT_ALLOW"}]});
    let (stdout, stderr, _) = host
        .output("c", &under(script("chroot / true; echo $?"), profile, true))
        .await;
    assert!(stderr.contains("Permission denied"), "{stdout}{stderr}");

    let few: &[&str] = &[
        "execve",
        "exit_group",
        "read",
        "write",
        "brk",
        "mmap",
        "arch_prctl",
        "prctl",
        "capset",
        "rt_sigaction",
        "getpid",
        "getppid",
        "getuid",
        "getgid",
        "geteuid",
        "getegid",
        "ioctl",
        "uname",
        "getcwd",
        "fork",
        "vfork",
        "clone",
        "wait4",
        "open",
        "close",
        "stat",
        "lstat",
        "fstat",
        "rt_sigprocmask",
        "rt_sigreturn",
        "mprotect",
        "set_tid_address",
        "fcntl",
        "dup2",
        "access",
        "readlink",
        "exit",
        "setuid",
        "setgid",
        "getgroups",
        "openat",
        "newfstatat",
    ];
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "syscalls": [{"names": few, "action": "SCMP_ACT_ALLOW"}]});
    let (stdout, stderr, _) = host
        .output(
            "c",
            &under(script("unshare -U true; chroot / true"), profile, true),
        )
        .await;
    let errors: Vec<&str> = stderr.lines().collect();
    assert!(errors[0].contains("Function not implemented"), "{stdout}{stderr}");
    assert!(errors[1].contains("Permission denied"), "{stdout}{stderr}");
}

#[tokio::test]
async fn a_profile_that_kills_the_exec_is_reported_and_leaves_nothing() {
    let host = Host::new().await;
    host.rootfs("c");
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["execve"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    });
    for no_new_privileges in [false, true] {
        host.try_create("c", &under(spec(&["true"]), profile.clone(), no_new_privileges))
            .await
            .unwrap();
        let failure = host.try_start("c").await.unwrap_err();
        assert_eq!(failure.message, "exec /bin/true: operation not permitted");
        tokio::time::timeout(PATIENCE, host.next_exit()).await.unwrap();
        host.delete("c").await.unwrap();
    }
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}
