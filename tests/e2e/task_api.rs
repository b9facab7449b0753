//! What clients of containerd do with a task besides running it: pausing, measuring, logging, listening to events.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::census::Census;
use crate::command::{eventually, ok, run};
use crate::containerd::{BUSYBOX, Detached, RUNTIME, events};

/// A line of `ctr task metrics`.
#[track_caller]
fn metric(id: &str, name: &str) -> u64 {
    let table = ok(&["ctr", "task", "metrics", id]);
    let line = table
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in: {table}"))
}

/// A detached container of `ctr run` with more flags; removed at the end of the test.
#[track_caller]
fn detached(id: &str, flags: &[&str], command: &[&str]) -> Detached {
    let mut argv = vec!["ctr", "run", "-d", "--runtime", RUNTIME];
    argv.extend(flags);
    argv.extend([BUSYBOX, id]);
    argv.extend(command);
    let this = Detached { id: id.to_owned() };
    run(&argv).expect_code(0);
    this
}

#[track_caller]
fn stopped(container: &Detached) {
    eventually("the task to stop", || {
        (container.status()? == "STOPPED").then_some(())
    });
}

#[test]
fn a_paused_task_stands_still() {
    let census = Census::take();
    let container = Detached::start("paused", &["sh", "-c", "while :; do :; done"]);
    let mut events = events();
    let before = metric("paused", "cpu.usage_usec");
    eventually("the task to use time", || {
        (metric("paused", "cpu.usage_usec") > before).then_some(())
    });
    ok(&["ctr", "task", "pause", "paused"]);
    events.wait_for("/tasks/paused");
    container.wait_for_status("PAUSED");
    let still = metric("paused", "cpu.usage_usec");
    thread::sleep(Duration::from_secs(2));
    assert_eq!(metric("paused", "cpu.usage_usec"), still);
    let again = run(&["ctr", "task", "pause", "paused"]);
    assert_ne!(again.code, 0);
    assert!(again.err().contains("is paused"), "{}", again.err());
    let exec = container.exec("e", &["true"]);
    assert_ne!(exec.code, 0);
    assert!(exec.err().contains("is paused"), "{}", exec.err());
    ok(&["ctr", "task", "resume", "paused"]);
    events.wait_for("/tasks/resumed");
    container.wait_for_status("RUNNING");
    eventually("the task to use time again", || {
        (metric("paused", "cpu.usage_usec") > still).then_some(())
    });
    container.exec("f", &["true"]).expect_code(0);
    // One that is paused can be killed.
    ok(&["ctr", "task", "pause", "paused"]);
    ok(&["ctr", "task", "kill", "-s", "SIGKILL", "paused"]);
    stopped(&container);
    drop(events);
    container.remove();
    census.assert_unchanged();
}

#[test]
fn metrics_tell_what_a_task_uses() {
    let container = detached(
        "measured",
        &["--memory-limit", "67108864"],
        &[
            "sh",
            "-c",
            "head -c 4000000 /dev/zero >/dev/shm/held; sleep 1000 & exec sleep 1000",
        ],
    );
    eventually("the memory to be taken", || {
        (metric("measured", "memory.usage") > 4_000_000 && metric("measured", "pids.current") == 2)
            .then_some(())
    });
    assert!(metric("measured", "memory.usage") < 67_108_864);
    assert_eq!(metric("measured", "memory.usage_limit"), 67_108_864);
    assert!(metric("measured", "cpu.usage_usec") > 0);
    container.remove();
}

#[test]
fn out_of_memory_is_told_before_the_exit() {
    let mut events = events();
    let container = detached(
        "oom",
        &["--memory-limit", "16777216"],
        &["sh", "-c", "exec head -c 30000000 /dev/zero >/dev/shm/x"],
    );
    events.wait_for("exit_status");
    let heard = events.seen();
    let at = |topic: &str| {
        heard
            .find(topic)
            .unwrap_or_else(|| panic!("no {topic} in: {heard}"))
    };
    assert!(
        at("/tasks/start") < at("/tasks/oom") && at("/tasks/oom") < at("/tasks/exit"),
        "{heard}"
    );
    assert!(heard.contains("\"exit_status\":137"), "{heard}");
    container.remove();
}

#[test]
fn output_is_appended_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made/here.log");
    let uri = format!("file://{}", log.display());
    let mut before = String::new();
    for _ in 0..2 {
        let container = detached(
            "file-log",
            &["--log-uri", &uri],
            &["sh", "-c", "echo out; echo err >&2"],
        );
        stopped(&container);
        container.remove();
        let now = fs::read_to_string(&log).unwrap();
        // Of two streams either may come first.
        let mut added: Vec<&str> = now.strip_prefix(&before).unwrap().lines().collect();
        added.sort_unstable();
        assert_eq!(added, ["err", "out"], "{now}");
        before = now;
    }
}

fn logger(dir: &Path, script: &str) -> String {
    let path = dir.join("logger");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("binary://{}", path.display())
}

#[test]
fn output_goes_to_a_logging_program() {
    let census = Census::take();
    let dir = tempfile::tempdir().unwrap();
    let script = "cd \"$2\"; echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $WORD\" >whose; exec 5>&-
        cat <&3 >out & cat <&4 >err & exec 3<&- 4<&-; wait; echo all >complete";
    let uri = format!(
        "{}?dir={}&env.WORD=a+word",
        logger(dir.path(), script),
        dir.path().display()
    );
    let container = detached(
        "binary-log",
        &["--log-uri", &uri],
        &["sh", "-c", "seq 1 5000; echo err >&2; exit 3"],
    );
    stopped(&container);
    container.remove();
    // With the task's deletion the log is complete, and nobody writes to it.
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(read("complete"), "all\n");
    assert_eq!(read("whose"), "default binary-log a word\n");
    assert_eq!(
        read("out"),
        (1..=5000).map(|n| format!("{n}\n")).collect::<String>()
    );
    assert_eq!(read("err"), "err\n");
    census.assert_unchanged();
}

#[test]
fn a_logging_program_that_fails_is_told() {
    let census = Census::take();
    let dir = tempfile::tempdir().unwrap();
    let uri = logger(dir.path(), "exit 3");
    for (uri, what) in [
        (uri.as_str(), "exited with code 3 before it was ready"),
        ("binary:///no/such/logger", "No such file or directory"),
    ] {
        let refused = run(&[
            "ctr",
            "run",
            "-d",
            "--runtime",
            RUNTIME,
            "--log-uri",
            uri,
            BUSYBOX,
            "bad-log",
            "true",
        ]);
        assert_ne!(refused.code, 0);
        assert!(
            refused.err().contains("cannot start the logging program") && refused.err().contains(what),
            "{}",
            refused.err()
        );
        run(&["ctr", "container", "rm", "bad-log"]);
    }
    census.assert_unchanged();
}

#[test]
fn nothing_is_done_with_a_task_that_has_ended() {
    let container = Detached::start("over", &["true"]);
    stopped(&container);
    for (argv, what) in [
        (
            ["ctr", "task", "exec", "--exec-id", "e", "over", "true"].as_slice(),
            "not running",
        ),
        (&["ctr", "task", "pause", "over"], "not running"),
        (&["ctr", "task", "resume", "over"], "not paused"),
        (&["ctr", "task", "kill", "over"], "does not exist"),
    ] {
        let refused = run(argv);
        assert_ne!(refused.code, 0, "{argv:?}");
        assert!(refused.err().contains(what), "{argv:?}: {}", refused.err());
    }
    container.remove();
}
