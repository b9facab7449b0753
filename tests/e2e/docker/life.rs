//! A container's life under Docker, from `run -d` to `rm`, by all that Docker can do to it meanwhile.

use std::fs;
use std::time::Duration;

use super::{BUSYBOX, Container, MEGABYTE, begin, docker, docker_ok, runtime_name};
use crate::case::Runtime;
use crate::command::{Input, Running, eventually, run_with};

const SCRIPT: &str = "trap 'echo stopping; exit 7' USR1; touch /made; echo ready >&2; n=0; \
    while :; do n=$((n+1)); echo tick $n; sleep 1; done";

fn status(container: &Container) -> String {
    container.inspect("{{.State.Status}}")
}

#[test]
fn a_long_life() {
    let census = begin();
    let since = docker_ok(&["info", "--format", "{{.SystemTime}}"]);
    let mut options = vec![
        "--stop-signal",
        "USR1",
        "--memory",
        "64m",
        "--memory-swap",
        "128m",
    ];
    options.extend(["--env", "GIVEN=1"]);
    let mut life = Container::start(Runtime::Husk, "life", &options, BUSYBOX, &["sh", "-c", SCRIPT]);
    let mut logs = Running::start(&["docker", "logs", "-f", "life"], Input::Nothing);
    logs.wait_for("tick 2\n");

    execs(&life);
    copies(&life);

    // Looking at it.
    let top = docker_ok(&["top", "life"]);
    assert!(top.contains("husk-standin"), "{top}");
    let format = "{{.PIDs}} {{.MemUsage}} {{.CPUPerc}}";
    let stats = docker_ok(&["stats", "--no-stream", "--format", format, "life"]);
    assert!(stats.contains("/ 64MiB") && !stats.starts_with('0'), "{stats}");
    let changes = docker_ok(&["diff", "life"]);
    for line in ["A /made", "A /copied", "A /tree/in", "A /etc/new"] {
        assert!(
            changes.lines().any(|change| change == line),
            "no {line:?} in {changes}"
        );
    }

    // Paused, nothing moves.
    docker_ok(&["pause", "life"]);
    assert_eq!(status(&life), "paused");
    let said = eventually("no more ticks", || {
        let before = docker(&["logs", "life"]).out();
        std::thread::sleep(Duration::from_secs(3));
        (docker(&["logs", "life"]).out() == before).then_some(before)
    });
    assert_ne!(life.exec(&[], &["true"]).code, 0);
    docker_ok(&["unpause", "life"]);
    assert_eq!(status(&life), "running");
    eventually("another tick", || {
        (docker(&["logs", "life"]).out() != said).then_some(())
    });

    // Other limits, another name.
    let mut update = vec![
        "update",
        "--memory",
        "80m",
        "--memory-swap",
        "160m",
        "--cpus",
        "0.5",
    ];
    update.extend(["--pids-limit", "33", "--restart", "no", "life"]);
    docker_ok(&update);
    let limits = life.sh("cd /sys/fs/cgroup; cat memory.max cpu.max pids.max");
    assert_eq!(limits, "83886080\n50000 100000\n33\n");
    docker_ok(&["rename", "life", "renamed"]);
    life.name = "renamed".into();

    // An image of it has what it has just written.
    life.sh("echo fresh >/fresh");
    docker_ok(&[
        "commit",
        "--change",
        "CMD [\"cat\", \"/fresh\"]",
        "renamed",
        "husk-committed",
    ]);
    let done = docker(&[
        "run",
        "--rm",
        "--runtime",
        runtime_name(Runtime::Runc),
        "husk-committed",
    ]);
    assert_eq!(done.expect_code(0).out(), "fresh\n");
    docker_ok(&["image", "rm", "husk-committed"]);

    // Its end, by the signal that it wants.
    let waiting = Running::start(&["docker", "wait", "renamed"], Input::Nothing);
    docker_ok(&["stop", "-t", "60", "renamed"]);
    assert_eq!(
        waiting.finish(Duration::from_secs(60)).expect_code(0).out(),
        "7\n"
    );
    let done = logs.finish(Duration::from_secs(60)).expect_code(0);
    assert!(done.out().ends_with("stopping\n"), "{}", done.out());
    assert_eq!(done.err(), "ready\n");
    assert_eq!(status(&life), "exited");

    // Copies go both ways still, and it finds them when it lives again.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    docker_ok(&["cp", "renamed:/fresh", &path]);
    assert_eq!(
        fs::read_to_string(directory.path().join("fresh")).unwrap(),
        "fresh\n"
    );
    docker_ok(&["cp", &format!("{path}/fresh"), "renamed:/later"]);
    docker_ok(&["start", "renamed"]);
    assert_eq!(
        life.sh("cat /later /fresh; cat /sys/fs/cgroup/pids.max"),
        "fresh\nfresh\n33\n"
    );
    docker_ok(&["restart", "-t", "60", "renamed"]);
    assert_eq!(life.sh("cat /later"), "fresh\n");
    docker_ok(&["kill", "renamed"]);
    eventually("its end", || (status(&life) == "exited").then_some(()));
    assert_eq!(
        life.inspect("{{.State.ExitCode}} {{.State.OOMKilled}}"),
        "137 false"
    );
    events(&life, &since);
    life.remove();
    census.assert_unchanged();
}

fn execs(life: &Container) {
    let options = ["-u", "1000:900", "-w", "/tmp", "-e", "ALSO=2"];
    let done = life.exec(
        &options,
        &[
            "sh",
            "-c",
            "id -u; id -g; pwd; echo $GIVEN$ALSO; echo err >&2; exit 3",
        ],
    );
    let done = done.expect_code(3);
    assert_eq!(
        (done.out().as_str(), done.err().as_str()),
        ("1000\n900\n/tmp\n12\n", "err\n")
    );
    let piped = ["docker", "exec", "-i", "life", "sha256sum"];
    let megabyte = vec![b'x'; 1 << 20];
    let done = run_with(&piped, Input::Bytes(megabyte), Duration::from_secs(120)).expect_code(0);
    assert_eq!(done.out(), format!("{MEGABYTE}  -\n"));
    let done = life.exec(&["-d"], &["sh", "-c", "echo detached >/detached"]);
    done.expect_code(0);
    eventually("the detached exec", || {
        (life.exec(&[], &["cat", "/detached"]).out() == "detached\n").then_some(())
    });
    // Docker 26 makes it 126 with runc, too.
    let done = life.exec(&[], &["no-such-command"]);
    assert!([126, 127].contains(&done.code), "{}", done.code);
    assert!(
        (done.out() + &done.err()).contains("executable file not found"),
        "no word of it"
    );
    let done = life.exec(&[], &["/etc/passwd"]).expect_code(126);
    assert!(
        (done.out() + &done.err()).contains("permission denied"),
        "no word of it"
    );
}

/// Both ways, while it runs.
fn copies(life: &Container) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let bytes: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(path("copied"), &bytes).unwrap();
    fs::create_dir(path("tree")).unwrap();
    fs::write(path("tree/in"), "in a tree\n").unwrap();
    docker_ok(&["cp", &path("copied"), "life:/copied"]);
    docker_ok(&["cp", &path("tree"), "life:/"]);
    assert_eq!(
        life.sh("wc -c </copied; cat /tree/in; echo changed >/tree/in; mkdir -p /etc/new"),
        "1200000\nin a tree\n"
    );
    docker_ok(&["cp", "life:/copied", &path("back")]);
    assert_eq!(fs::read(path("back")).unwrap(), bytes);
    docker_ok(&["cp", "life:/tree", &path("tree-back")]);
    assert_eq!(fs::read_to_string(path("tree-back/in")).unwrap(), "changed\n");
    // Over one that the container has open and has read.
    fs::write(path("copied"), "short\n").unwrap();
    docker_ok(&["cp", &path("copied"), "life:/copied"]);
    eventually("the other contents", || {
        (life.sh("cat /copied") == "short\n").then_some(())
    });
}

/// Docker has told of all of it, and of its starts and ends once each.
fn events(life: &Container, since: &str) {
    let until = docker_ok(&["info", "--format", "{{.SystemTime}}"]);
    let mut events = vec!["events", "--since", since, "--until", &until];
    let filter = format!("container={}", life.inspect("{{.Id}}"));
    events.extend(["--filter", &filter, "--format", "{{.Action}}"]);
    let told = docker_ok(&events);
    let actions: Vec<&str> = told
        .lines()
        .map(|action| action.split(':').next().unwrap_or(action))
        .collect();
    let count = |wanted: &str| actions.iter().filter(|action| **action == wanted).count();
    for wanted in [
        "exec_create",
        "exec_start",
        "exec_die",
        "top",
        "commit",
        "archive-path",
    ] {
        assert!(count(wanted) > 0, "no {wanted}: {told}");
    }
    // Docker pauses a container while it makes an image of it.
    let counted = [
        "create", "start", "die", "stop", "kill", "restart", "rename", "update", "pause", "unpause",
    ];
    let counted = counted.map(count);
    assert_eq!(counted, [1, 3, 3, 2, 3, 1, 1, 1, 2, 2], "{told}");
}

#[test]
fn started_again_and_healthy() {
    let census = begin();
    // The first time it fails; the second time it becomes healthy after a while.
    let script = "test -e /second || { touch /second; exit 3; }; sleep 3; touch /well; exec sleep 1000";
    let mut options = vec![
        "--restart",
        "on-failure:3",
        "--health-cmd",
        "test -e /well || { echo unwell; exit 1; }",
    ];
    options.extend([
        "--health-interval",
        "2s",
        "--health-timeout",
        "60s",
        "--health-retries",
        "100",
    ]);
    let container = Container::start(Runtime::Husk, "again", &options, BUSYBOX, &["sh", "-c", script]);
    eventually("its second start, and health", || {
        (container.inspect("{{.RestartCount}} {{.State.Health.Status}}") == "1 healthy").then_some(())
    });
    container.remove();
    // Out of memory.
    let hungry = ["--memory", "32m", "--memory-swap", "32m"];
    let container = Container::start(Runtime::Husk, "hungry", &hungry, BUSYBOX, &["tail", "/dev/zero"]);
    assert_eq!(docker_ok(&["wait", "hungry"]), "137");
    assert_eq!(container.inspect("{{.State.OOMKilled}}"), "true");
    container.remove();
    census.assert_unchanged();
}
