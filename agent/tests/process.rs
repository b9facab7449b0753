//! The fields of `process` that are about its place in the machine, and `hooks.startContainer`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

use serde_json::{Value, json};

use crate::common::{Host, directories, process, script, spec};

/// The fields of a line of `/proc/PID/stat`, numbered as in proc(5).
fn stat(line: &str) -> Vec<String> {
    let (_, rest) = line.rsplit_once(") ").unwrap();
    ["", "", ""]
        .into_iter()
        .chain(rest.split(' '))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn a_process_is_scheduled_as_the_spec_says() {
    let host = Host::new().await;
    // The nice value of those that have none is that of who runs the test.
    for (scheduler, policy, nice, priority) in [
        (json!({"policy": "SCHED_OTHER", "nice": 7}), "0", "7", "0"),
        (json!({"policy": "SCHED_BATCH", "nice": -5}), "3", "-5", "0"),
        (json!({"policy": "SCHED_IDLE"}), "5", "", "0"),
        (json!({"policy": "SCHED_FIFO", "priority": 11}), "1", "", "11"),
        (
            json!({"policy": "SCHED_RR", "priority": 12, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
            "2",
            "",
            "12",
        ),
    ] {
        let mut spec = spec(&["cat", "/proc/self/stat"]);
        spec["process"]["scheduler"] = scheduler.clone();
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (stdout, stderr, status) = host.output("c", &spec).await;
        assert_eq!((stderr.as_str(), status), ("", 0), "{scheduler}");
        let stat = stat(stdout.trim_end());
        assert_eq!(
            (stat[41].as_str(), stat[40].as_str()),
            (policy, priority),
            "{scheduler}: {stdout}"
        );
        assert!(nice.is_empty() || stat[19] == nice, "{scheduler}: {stdout}");
    }
    let mut spec = spec(&["true"]);
    host.rootfs("c");
    spec["process"]["scheduler"] =
        json!({"policy": "SCHED_DEADLINE", "runtime": 5_000_000, "deadline": 1_000_000, "period": 9_000_000});
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert_eq!(failure.message, "set process.scheduler: invalid argument");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_RR", "priority": 1, "period": 1});
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert_eq!(
        failure.message,
        "process.scheduler.period: is for SCHED_DEADLINE only"
    );
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn what_joins_has_the_containers_settings_or_its_own() {
    let host = Host::new().await;
    let mut spec = spec(&["sleep", "1000"]);
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    spec["process"]["oomScoreAdj"] = json!(77);
    spec["process"]["user"]["umask"] = json!(0o27);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}]);
    spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let _streams = host.run("c", &spec).await;
    let text = "cat /proc/self/stat; ionice; cat /proc/self/oom_score_adj; umask; ulimit -c; uname -m; \
        sed -n 's/^Cpus_allowed_list:.//p;s/^CapEff:.//p' /proc/self/status";
    let run = async |changes: Value| {
        let mut process = process(&["sh", "-c", text]);
        process.as_object_mut().unwrap().remove("capabilities");
        for (key, value) in changes.as_object().unwrap() {
            process[key] = value.clone();
        }
        let mut streams = host
            .exec("c", "e", &process)
            .await
            .unwrap_or_else(|f| panic!("{}", f.message));
        streams.stdin = None;
        let (stdout, stderr) = streams.read().await;
        assert_eq!((host.next_exit().await.2, stderr.as_str()), (0, ""), "{stdout}");
        let mut lines: Vec<String> = stdout.lines().map(str::to_owned).collect();
        let stat = stat(&lines[0]);
        lines[0] = format!("{} {}", stat[41], stat[19]);
        lines
    };
    assert_eq!(
        run(json!({})).await,
        [
            "3 3",
            "idle: prio 7",
            "77",
            "0027",
            "1",
            "i686",
            "0000000000000021",
            "0"
        ]
        .map(|line| if line == "idle: prio 7" { "idle" } else { line })
    );
    let own = run(json!({
        "scheduler": {"policy": "SCHED_OTHER", "nice": 1},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
        "oomScoreAdj": 78,
        "user": {"uid": 0, "gid": 0, "umask": 0o77},
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 1024, "hard": 1024}],
        "capabilities": {"bounding": [], "effective": [], "permitted": []},
    }))
    .await;
    assert_eq!(
        own,
        [
            "0 1",
            "best-effort: prio 6",
            "78",
            "0077",
            "2",
            "i686",
            "0000000000000000",
            "0"
        ]
    );
    let mut process = process(&["true"]);
    process["execCPUAffinity"] = json!({"initial": "60000"});
    let failure = host.exec("c", "e", &process).await.err().unwrap();
    assert_eq!(
        failure.message,
        "set process.execCPUAffinity.initial: invalid argument"
    );
}

fn add_hook(spec: &mut Value, hook: Value) {
    let hooks = &mut spec["hooks"]["startContainer"];
    match hooks {
        Value::Array(hooks) => hooks.push(hook),
        _ => *hooks = json!([hook]),
    }
}

/// A hook that runs a script.
fn hook(text: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", text, "hook"]})
}

#[tokio::test]
async fn hooks_run_in_the_container_between_start_and_command() {
    let host = Host::new().await;
    let mut spec = script("cat /tmp/hook; echo command");
    spec["annotations"] = json!({"a": "b"});
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["cwd"] = json!("/tmp");
    spec["process"]["env"] = json!(["PATH=/bin", "A=container"]);
    add_hook(
        &mut spec,
        hook("cat > hook; echo; echo noise; echo noise >&2; (echo; id -u; hostname; echo $0 $A) >> hook"),
    );
    let mut second = hook("echo $A $$ >> /tmp/hook; sed -n /^Seccomp:/p /proc/self/status >> /tmp/hook");
    second["env"] = json!(["PATH=/bin", "A=own"]);
    second["timeout"] = json!(30);
    add_hook(&mut spec, second);
    for no_new_privileges in [false, true] {
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["sync"], "action": "SCMP_ACT_ERRNO"}]});
        let root = host.rootfs("c");
        let mut streams = host.create("c", &spec).await;
        assert!(!root.join("tmp/hook").exists());
        host.try_start("c")
            .await
            .unwrap_or_else(|failure| panic!("{}", failure.message));
        streams.stdin = None;
        let (stdout, stderr) = streams.read().await;
        assert_eq!((host.next_exit().await.2, stderr.as_str()), (0, ""));
        host.delete("c").await.unwrap();
        let lines: Vec<&str> = stdout.lines().collect();
        let state: Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(
            state,
            json!({"ociVersion": "1.1.0", "id": "c", "status": "created", "pid": 1, "bundle": "/bundle/c",
                "annotations": {"a": "b"}})
        );
        assert_eq!(lines[1..4], ["1000", "container", "hook container"], "{stdout}");
        assert!(
            lines[4].starts_with("own ") && lines[5] == "Seccomp:\t2",
            "{stdout}"
        );
        assert_eq!(*lines.last().unwrap(), "command");
        fs::remove_file(root.join("tmp/hook")).unwrap();
    }
}

#[tokio::test]
async fn a_hook_that_fails_ends_the_container_with_its_words() {
    let host = Host::new().await;
    let root = host.rootfs("c");
    fs::write(root.join("bin/data"), "no program").unwrap();
    fs::set_permissions(root.join("bin/data"), PermissionsExt::from_mode(0o755)).unwrap();
    let mut slow = hook("sleep 1000");
    slow["timeout"] = json!(1);
    for (hook, message) in [
        (
            hook("echo out; echo it broke >&2; exit 3"),
            "hooks.startContainer[1]: exit status 3, stdout: out, stderr: it broke",
        ),
        (
            hook("kill -9 $$"),
            "hooks.startContainer[1]: signal: killed, stdout: , stderr: ",
        ),
        (
            json!({"path": "/bin/nope"}),
            "hooks.startContainer[1]: exit status 127, stdout: , stderr: exec /bin/nope: no such file or directory",
        ),
        (
            json!({"path": "/bin/data"}),
            "hooks.startContainer[1]: exit status 127, stdout: , stderr: exec /bin/data: exec format error",
        ),
        (
            slow,
            "hooks.startContainer[1]: hook ran past specified timeout of 1.0s",
        ),
    ] {
        let mut spec = script("echo never");
        add_hook(&mut spec, json!({"path": "/bin/true", "args": ["true"]}));
        add_hook(&mut spec, hook);
        let mut streams = host.create("c", &spec).await;
        let begin = Instant::now();
        let failure = host.try_start("c").await.unwrap_err();
        assert_eq!(failure.message, message);
        assert!(begin.elapsed().as_secs() < 30);
        let (stdout, stderr) = streams.read().await;
        assert_eq!((stdout.as_str(), stderr.as_str()), ("", ""));
        assert_eq!(host.next_exit().await.2, 125);
        host.delete("c").await.unwrap();
        assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    }
    let mut spec = spec(&["true"]);
    add_hook(&mut spec, json!({"path": "relative"}));
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert_eq!(
        failure.message,
        "hooks.startContainer[0].path: must be an absolute path"
    );
}
