//! Containers made by the real agent, without a VM (see `common`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt, time::Duration};

use common::{Host, PATIENCE, code, deadline, directories, process, script, spec};
use husk_agent_protocol::messages::{
    CreateContainerRequest, ExecProcessRequest, SetupRequest, StartContainerRequest, Stdio, event, failure,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use ttrpc::Code;

/// Reads until the text is `enough`.
async fn read_until(stream: &mut UnixStream, enough: impl Fn(&str) -> bool) -> String {
    let mut text = String::new();
    while !enough(&text) {
        let mut chunk = [0u8; 256];
        let read = timeout(PATIENCE, stream.read(&mut chunk)).await;
        let count = read.expect(&text).unwrap();
        assert_ne!(count, 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
    text
}

#[tokio::test]
async fn output_and_exit_code_arrive() {
    let host = Host::new().await;
    let output = host.output("c", &script("echo out; echo err >&2; exit 7")).await;
    assert_eq!(output, ("out\n".into(), "err\n".into(), 7));
}

#[tokio::test]
async fn a_created_container_waits_for_its_start() {
    let host = Host::new().await;
    let root = host.rootfs("c");
    let mut streams = host.try_create("c", &script("touch /started")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!root.join("started").exists() && host.no_event());
    host.try_start("c").await.unwrap();
    streams.read().await;
    assert_eq!(host.next_exit().await.2, 0);
    assert!(root.join("started").exists());
    let again = StartContainerRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let again = host.client.start_container(deadline(), &again).await;
    assert_eq!(code(again.unwrap_err()), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn bytes_go_through_unchanged_and_stdin_ends() {
    let host = Host::new().await;
    let mut streams = host.run("c", &spec(&["cat"])).await;
    let sent: Vec<u8> = (0..8_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut stdin = streams.stdin.take().unwrap();
    let mut stdout = streams.stdout.take().unwrap();
    let write = async {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
    };
    let read = async {
        let mut got = Vec::new();
        stdout.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), got) = timeout(PATIENCE, async { tokio::join!(write, read) })
        .await
        .unwrap();
    assert!(got == sent, "{} of {} bytes, or others", got.len(), sent.len());
    assert_eq!(host.next_exit().await.2, 0);
}

#[tokio::test]
async fn commands_that_cannot_run_fail_as_with_runc_and_leave_nothing() {
    let host = Host::new().await;
    let root = host.rootfs("c");
    fs::write(root.join("bin/data"), "\0\0not a program").unwrap();
    fs::set_permissions(root.join("bin/data"), PermissionsExt::from_mode(0o755)).unwrap();
    for (command, kind, message) in [
        (
            "nope",
            failure::Kind::COMMAND_NOT_FOUND,
            r#"exec: "nope": executable file not found in $PATH"#,
        ),
        (
            "./x",
            failure::Kind::COMMAND_NOT_FOUND,
            r#"exec: "./x": stat ./x: no such file or directory"#,
        ),
        (
            "/etc/passwd",
            failure::Kind::COMMAND_NOT_EXECUTABLE,
            r#"exec: "/etc/passwd": permission denied"#,
        ),
        (
            "/etc",
            failure::Kind::COMMAND_NOT_EXECUTABLE,
            r#"exec: "/etc": permission denied"#,
        ),
    ] {
        let failure = host.try_create("c", &spec(&[command])).await.err().unwrap();
        assert_eq!(
            (failure.kind.enum_value().unwrap(), failure.message.as_str()),
            (kind, message)
        );
        assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    }
    // Only the exec itself can tell these.
    host.try_create("c", &spec(&["data"])).await.unwrap();
    let failure = host.try_start("c").await.unwrap_err();
    assert_eq!(
        failure.kind.enum_value().unwrap(),
        failure::Kind::COMMAND_NOT_EXECUTABLE
    );
    assert_eq!(failure.message, "exec /bin/data: exec format error");
    assert_eq!(host.next_exit().await, ("c".into(), String::new(), 126));
    host.delete("c").await.unwrap();

    fs::write(root.join("bin/data"), "#!/nonexistent\n").unwrap();
    host.try_create("c", &spec(&["data"])).await.unwrap();
    let failure = host.try_start("c").await.unwrap_err();
    assert_eq!(
        failure.kind.enum_value().unwrap(),
        failure::Kind::COMMAND_NOT_FOUND
    );
    assert_eq!(host.next_exit().await.2, 127);
    host.delete("c").await.unwrap();
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn specs_that_cannot_be_applied_are_refused_by_name() {
    let host = Host::new().await;
    host.rootfs("c");
    for (field, pointer, value) in [
        (
            "linux.seccomp.listenerPath: ",
            "/linux",
            json!({"namespaces": [{"type": "mount"}],
                "seccomp": {"defaultAction": "SCMP_ACT_LOG", "listenerPath": "/run/x"}}),
        ),
        (
            "linux.seccomp.defaultAction: unknown variant `SCMP_ACT_X`",
            "/linux",
            json!({"namespaces": [{"type": "mount"}], "seccomp": {"defaultAction": "SCMP_ACT_X"}}),
        ),
        (
            "process.capabilities.bounding[0]: no variant for CAP_FLY",
            "/process/capabilities/bounding",
            json!(["CAP_FLY"]),
        ),
        (
            "mounts[0] (/x).source: ",
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/etc"}]),
        ),
        (
            "chdir to cwd (\"/etc/passwd",
            "/process/cwd",
            json!("/etc/passwd"),
        ),
        ("process: ", "/process", json!("x")),
    ] {
        let mut spec = spec(&["true"]);
        *spec.pointer_mut(pointer).unwrap() = value;
        let failure = host.try_create("c", &spec).await.err().unwrap();
        if pointer != "/process/cwd" {
            assert!(failure.message.starts_with(field), "{}", failure.message);
            assert_eq!(failure.kind.enum_value().unwrap(), failure::Kind::INVALID_SPEC);
        }
    }
    let failure = host.try_create("no-root", &spec(&["true"])).await.err().unwrap();
    assert!(
        failure.message.contains("no such file or directory"),
        "{}",
        failure.message
    );
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    assert!(host.no_event());
}

#[tokio::test]
async fn a_process_is_who_the_spec_says() {
    let host = Host::new().await;
    let mut spec = script(
        "id -u; id -g; id -G; pwd; umask; echo $HOME; echo $A; ulimit -n; ulimit -c; \
        cat /proc/self/status; cat /proc/self/oom_score_adj",
    );
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 63});
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["process"]["env"] = json!(["PATH=/bin", "A=1", "A=2"]);
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}]);
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "ambient": ["CAP_KILL"]
    });
    let (stdout, stderr, status) = host.output("c", &spec).await;
    assert_eq!((stderr.as_str(), status), ("", 0), "{stdout}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(
        lines[..9],
        [
            "1000",
            "1001",
            "1001 5 6",
            "/made/for/it",
            "0077",
            "/home/u",
            "2",
            "1024",
            "1"
        ]
    );
    assert_eq!(*lines.last().unwrap(), "500");
    let field = |name: &str| {
        let line = lines.iter().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim_start_matches(':').trim().to_owned()
    };
    let bits = |bits: u64| format!("{bits:016x}");
    // Of a user other than root, an exec leaves the ambient set only.
    assert_eq!(field("CapBnd"), bits(1 | (1 << 5) | (1 << 13)));
    assert_eq!(field("CapInh"), bits(1 << 5));
    assert_eq!(field("CapPrm"), bits(1 << 5));
    assert_eq!(field("CapEff"), bits(1 << 5));
    assert_eq!(field("CapAmb"), bits(1 << 5));
    assert_eq!(field("NoNewPrivs"), "1");
    let ignored = u64::from_str_radix(&field("SigIgn"), 16).unwrap();
    assert_eq!(ignored & (1 << (libc::SIGPIPE - 1)), 0);
    assert_eq!(field("SigBlk"), bits(0));
}

#[tokio::test]
async fn a_container_sees_its_own_world() {
    let host = Host::new().await;
    let root = host.rootfs("c");
    // A volume, mounted read-only, through a link that would lead out.
    let volume = host.directory.path().join("share/.volumes/3");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("file"), "volume").unwrap();
    std::os::unix::fs::symlink("/../../../../../../srv", root.join("link")).unwrap();
    let mut spec = script(
        "hostname; cat /proc/1/comm; cat /link/data/file; echo; touch /link/data/x; touch /x; echo 1 > /proc/sys/kernel/shmmni; \
         cat /proc/keys; echo keys; for i in null zero full random urandom tty ptmx fd stdin; do test -e /dev/$i || echo no $i; done; \
         echo a > /dev/null; ls /dev/pts; stat -c %a /dev/shm; sed -n s/^0::/v2:/p /proc/self/cgroup; ls /proc/self/fd | wc -l; \
         cat /proc/self/mountinfo | wc -l; ls -d /husk* /newroot 2>&1; cat /proc/sys/kernel/shmmni",
    );
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/link/data", "type": "bind", "source": "/host", "options": ["rbind", "ro"]}),
    );
    spec["root"]["readonly"] = json!(true);
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "1234"});
    let index = spec["mounts"].as_array().unwrap().len() as u32 - 1;
    let mut streams = host
        .try_create_with("c", &spec, HashMap::from([(index, 3)]))
        .await
        .unwrap_or_else(|f| panic!("{}", f.message));
    host.try_start("c").await.unwrap();
    let (stdout, stderr) = streams.read().await;
    let lines: Vec<&str> = stdout.lines().collect();
    // 0, 1, 2 and the one that ls itself opens.
    assert_eq!(
        lines,
        [
            "container",
            "sh",
            "volume",
            "keys",
            "ptmx",
            "1777",
            "v2:/",
            "4",
            lines[8],
            lines[9],
            lines[10],
            "1234"
        ],
        "{stderr}"
    );
    assert!(lines[8].parse::<usize>().unwrap() <= 16, "{} mounts", lines[8]);
    let errors: Vec<&str> = stderr.lines().collect();
    assert_eq!(errors.len(), 3, "{stderr}");
    assert!(
        errors[0].contains("/link/data/x: Read-only file system"),
        "{stderr}"
    );
    assert!(errors[1].contains("/x: Read-only file system"), "{stderr}");
    assert!(
        errors[2].contains("/proc/sys/kernel/shmmni: Read-only file system"),
        "{stderr}"
    );
    assert_eq!(host.next_exit().await.2, 0);
    assert!(root.join("srv/data").is_dir());
}

#[tokio::test]
async fn exec_joins_the_container() {
    let host = Host::new().await;
    let mut init = host.run("c", &script("cat; true")).await;
    // That comes back from a shell which has forked its cat.
    init.stdin.as_mut().unwrap().write_all(b"up\n").await.unwrap();
    read_until(init.stdout.as_mut().unwrap(), |text| text == "up\n").await;

    let mut streams = host
        .exec(
            "c",
            "e1",
            &process(&[
                "sh",
                "-c",
                "hostname; cat /proc/1/comm; sed -n s/^0::/v2:/p /proc/self/cgroup; echo $HOME; exit 3",
            ]),
        )
        .await
        .unwrap();
    assert_eq!(streams.read().await.0, "container\nsh\nv2:/\n/root\n");
    assert_eq!(host.next_exit().await, ("c".into(), "e1".into(), 3));

    // The id is free again; and a listing tells who is who.
    let mut streams = host.exec("c", "e1", &process(&["cat"])).await.unwrap();
    let processes = host.processes("c").await;
    assert_eq!(
        processes.iter().filter(|(_, exec)| exec == "e1").count(),
        1,
        "{processes:?}"
    );
    assert_eq!(
        processes.iter().filter(|(_, exec)| exec.is_empty()).count(),
        2,
        "{processes:?}"
    );
    let twice = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "e1".into(),
        process_json: serde_json::to_vec(&process(&["cat"])).unwrap(),
        ..Default::default()
    };
    let twice = host.client.exec_process(deadline(), &twice).await;
    assert_eq!(code(twice.unwrap_err()), Code::ALREADY_EXISTS);
    streams.stdin = None;
    streams.read().await;
    assert_eq!(host.next_exit().await, ("c".into(), "e1".into(), 0));

    for (command, kind) in [
        ("nope", failure::Kind::COMMAND_NOT_FOUND),
        ("/etc/passwd", failure::Kind::COMMAND_NOT_EXECUTABLE),
    ] {
        let failure = host.exec("c", "e2", &process(&[command])).await.err().unwrap();
        assert_eq!(failure.kind.enum_value().unwrap(), kind);
    }
    assert!(host.no_event());

    // An exec that runs on ends with the container, and before it.
    let _streams = host.exec("c", "e3", &process(&["sleep", "1000"])).await.unwrap();
    init.stdin = None;
    assert_eq!(host.next_exit().await, ("c".into(), "e3".into(), 137));
    assert_eq!(host.next_exit().await, ("c".into(), String::new(), 0));
    let late = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "e4".into(),
        process_json: serde_json::to_vec(&process(&["true"])).unwrap(),
        ..Default::default()
    };
    let late = host.client.exec_process(deadline(), &late).await;
    assert_eq!(code(late.unwrap_err()), Code::FAILED_PRECONDITION);
    host.delete("c").await.unwrap();
}

#[tokio::test]
async fn an_exit_is_told_while_a_child_holds_the_output() {
    let host = Host::new().await;
    let init = host.run("c", &spec(&["cat"])).await;
    let mut streams = host
        .exec("c", "e", &process(&["sh", "-c", "(sleep 1; echo late) & exit 5"]))
        .await
        .unwrap();
    assert_eq!(host.next_exit().await, ("c".into(), "e".into(), 5));
    // Nothing has been cut off: the rest still comes.
    assert_eq!(streams.read().await.0, "late\n");
    drop(init);
    assert_eq!(host.next_exit().await.2, 0);
}

#[tokio::test]
async fn terminals_have_a_size_and_a_name_and_control() {
    let host = Host::new().await;
    let mut spec =
        script("tty; stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 100, "height": 30});
    let mut streams = host.run("c", &spec).await;
    let stdout = streams.stdout.as_mut().unwrap();
    // The end of a line comes by itself.
    let text = read_until(stdout, |text| text.ends_with("ready\r\n")).await;
    assert_eq!(text, "/dev/pts/0\r\n30 100\r\nready\r\n");
    host.resize("c", "", 132, 43).await.unwrap();
    assert_eq!(streams.read().await.0, "43 132\r\n");
    assert_eq!(host.next_exit().await.2, 4);
    assert_eq!(host.resize("c", "", 1, 1).await, Err(Code::NOT_FOUND));
    host.delete("c").await.unwrap();

    let mut init = host.run("d", &common::spec(&["cat"])).await;
    assert_eq!(host.resize("d", "", 1, 1).await, Err(Code::FAILED_PRECONDITION));
    let mut process = process(&["sh"]);
    process["terminal"] = json!(true);
    let mut streams = host.exec("d", "e", &process).await.unwrap();
    // Typed: an echo, a command, and an interrupt from the keyboard.
    let stdin = streams.stdin.as_mut().unwrap();
    // Said by the job itself, which has the terminal by then: before, an interrupt would miss it.
    stdin
        .write_all(b"test -t 0 && test -t 2 && sh -c 'echo is-a-$((1+1))ty; exec sleep 1000'\n")
        .await
        .unwrap();
    let stdout = streams.stdout.as_mut().unwrap();
    read_until(stdout, |text| text.contains("is-a-2ty")).await;
    stdin.write_all(b"\x03exit 9\n").await.unwrap();
    streams.read().await;
    assert_eq!(host.next_exit().await, ("d".into(), "e".into(), 9));
    init.stdin = None;
    assert_eq!(host.next_exit().await.2, 0);
}

#[tokio::test]
async fn signals_reach_whom_they_name() {
    let host = Host::new().await;
    let mut streams = host
        .run(
            "c",
            &script("trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.1; done"),
        )
        .await;
    let mut ready = [0u8; 6];
    streams
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .await
        .unwrap();
    assert_eq!(
        host.signal("c", "x", libc::SIGTERM, false).await,
        Err(Code::NOT_FOUND)
    );
    assert_eq!(host.signal("c", "", 65, false).await, Err(Code::INVALID_ARGUMENT));
    assert_eq!(
        host.signal("d", "", libc::SIGTERM, false).await,
        Err(Code::NOT_FOUND)
    );
    host.signal("c", "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(streams.read().await.0, "term\n");
    assert_eq!(host.next_exit().await.2, 9);
    assert_eq!(
        host.signal("c", "", libc::SIGTERM, false).await,
        Err(Code::NOT_FOUND)
    );

    let _streams = host.run("d", &spec(&["sleep", "1000"])).await;
    let _exec = host.exec("d", "e", &process(&["sleep", "1000"])).await.unwrap();
    host.signal("d", "e", libc::SIGTERM, false).await.unwrap();
    assert_eq!(host.next_exit().await, ("d".into(), "e".into(), 143));
    let _exec = host.exec("d", "e", &process(&["sleep", "1000"])).await.unwrap();
    // The init of a pid namespace ignores what it does not handle; the exec does not.
    host.signal("d", "", libc::SIGUSR1, true).await.unwrap();
    assert_eq!(host.next_exit().await, ("d".into(), "e".into(), 138));
    host.signal("d", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(host.next_exit().await, ("d".into(), String::new(), 137));
}

#[tokio::test]
async fn only_what_does_not_run_is_deleted() {
    let host = Host::new().await;
    let _streams = host.run("c", &spec(&["sleep", "1000"])).await;
    assert_eq!(host.delete("c").await, Err(Code::FAILED_PRECONDITION));
    let request = CreateContainerRequest {
        container_id: "c".into(),
        spec_json: serde_json::to_vec(&spec(&["true"])).unwrap(),
        ..Default::default()
    };
    let twice = host.client.create_container(deadline(), &request).await;
    assert_eq!(code(twice.unwrap_err()), Code::ALREADY_EXISTS);
    host.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(host.next_exit().await.2, 137);
    host.delete("c").await.unwrap();
    assert_eq!(host.delete("c").await, Err(Code::NOT_FOUND));

    // One that was never started is killed.
    let mut streams = host.create("d", &spec(&["true"])).await;
    host.delete("d").await.unwrap();
    assert_eq!(host.next_exit().await, ("d".into(), String::new(), 137));
    assert_eq!(streams.read().await, (String::new(), String::new()));
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn without_a_pid_namespace_the_rest_dies_with_init() {
    let host = Host::new().await;
    let mut spec = script("sleep 1000 & echo $!");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}, {"type": "cgroup"}]);
    let mut streams = host.run("c", &spec).await;
    assert_eq!(host.next_exit().await.2, 0);
    // The sleeper held it.
    streams.read().await;
    host.delete("c").await.unwrap();
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_writer_is_stopped_by_a_slow_reader_and_killed_by_one_that_leaves() {
    let host = Host::new().await;
    let mut streams = host.run("c", &script("yes; exit $?")).await;
    let memory = || {
        // Counted page by page; what the status says is some way off.
        let maps = fs::read_to_string(format!("/proc/{}/smaps_rollup", host.agent_pid())).unwrap();
        let line = maps
            .lines()
            .find_map(|line| line.strip_prefix("Rss:"))
            .unwrap()
            .trim()
            .to_owned();
        line.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let stdout = streams.stdout.as_mut().unwrap();
    let mut chunk = vec![0u8; 1 << 20];
    // Its buffers are as large then as they get.
    stdout.read_exact(&mut chunk).await.unwrap();
    let before = memory();
    // Nobody reads: whoever kept what is written would grow.
    tokio::time::sleep(Duration::from_millis(500)).await;
    for _ in 0..64 {
        stdout.read_exact(&mut chunk).await.unwrap();
    }
    assert!(chunk.chunks(2).all(|line| line == b"y\n"));
    assert!(memory() < before + 1024, "{before} KiB, then {} KiB", memory());
    assert!(host.no_event());
    streams.stdout = None;
    assert_eq!(host.next_exit().await.2, 128 + 13);
}

#[tokio::test]
async fn many_at_once_leave_nothing() {
    let host = Host::new().await;
    host.output("warm-up", &spec(&["true"])).await;
    // Streams are closed as their copies notice.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let pid = host.agent_pid();
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let mounts = || {
        fs::read_to_string(format!("/proc/{pid}/mountinfo"))
            .unwrap()
            .lines()
            .count()
    };
    let (descriptors_before, mounts_before) = (descriptors(), mounts());
    let ids: Vec<String> = (0..20).map(|n| format!("c{n}")).collect();
    let runs = ids.iter().map(|id| {
        let host = &host;
        async move {
            let mut streams = host.run(id, &script(&format!("echo {id}; exit 3"))).await;
            streams.stdin = None;
            assert_eq!(streams.read().await.0, format!("{id}\n"));
        }
    });
    futures::future::join_all(runs).await;
    let mut exited: Vec<String> = Vec::new();
    for _ in &ids {
        let (id, _, status) = host.next_exit().await;
        assert_eq!(status, 3);
        exited.push(id);
    }
    exited.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(exited, expected);
    for id in &ids {
        host.delete(id).await.unwrap();
    }
    for _ in 0..100 {
        if descriptors() <= descriptors_before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        descriptors() <= descriptors_before,
        "{descriptors_before}, then {}",
        descriptors()
    );
    assert_eq!(mounts(), mounts_before);
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children, "");
}

#[tokio::test]
async fn a_lost_connection_is_dialled_again_and_no_event_is_lost() {
    let mut host = Host::new().await;
    let mut streams = host.run("c", &script("cat; exit 6")).await;
    host.reconnect().await;
    assert!(!host.processes("c").await.is_empty());
    streams.stdin = None;
    streams.read().await;
    assert_eq!(host.next_exit().await.2, 6);
    let again = SetupRequest::default();
    assert_eq!(
        code(host.client.setup(deadline(), &again).await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
}

#[tokio::test]
async fn a_create_right_behind_the_setup_is_served() {
    let host = Host::without_setup().await;
    host.rootfs("c");
    let spec = script("hostname");
    let (created, ()) = tokio::join!(host.try_create("c", &spec), host.setup());
    let mut streams = created.unwrap();
    host.try_start("c").await.unwrap();
    assert_eq!(streams.read().await.0, "container\n");
}

#[tokio::test]
async fn what_the_wire_brings_does_not_end_the_agent() {
    let host = Host::new().await;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |max: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % max
    };
    host.rootfs("ok");
    for round in 0..300 {
        let bytes: Vec<u8> = (0..random(200)).map(|_| random(256) as u8).collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // A document with one byte changed gets deeper than noise.
        let mut document = serde_json::to_vec(&spec(&["true"])).unwrap();
        let at = random(document.len());
        document[at] = random(256) as u8;
        let request = CreateContainerRequest {
            container_id: if round % 3 == 0 { text.clone() } else { "ok".into() },
            spec_json: if round % 3 == 1 { bytes.clone() } else { document },
            stdio: Some(Stdio {
                stdin_port: random(3) as u32,
                stdout_port: random(3) as u32 * 70_000,
                ..Default::default()
            })
            .into(),
            volumes: HashMap::from([(random(20) as u32, random(20) as u32)]),
            ..Default::default()
        };
        if let Ok(response) = host.client.create_container(deadline(), &request).await {
            if response.failure.is_none() {
                host.delete(&request.container_id).await.unwrap();
            }
        }
        let _ = host.signal(&text, &text, round, false).await;
        let _ = host.resize(&text, "", random(1 << 20) as u32, 0).await;
        let _ = host.delete(&text).await;
    }
    for document in ["", "{}", "[]", "null", "{\"process\":{}}"] {
        let request = CreateContainerRequest {
            container_id: "ok".into(),
            spec_json: document.into(),
            ..Default::default()
        };
        let response = host.client.create_container(deadline(), &request).await.unwrap();
        assert_eq!(
            response.failure.unwrap().kind.enum_value().unwrap(),
            failure::Kind::INVALID_SPEC
        );
    }
    let large = CreateContainerRequest {
        container_id: "ok".into(),
        spec_json: vec![b' '; (3 << 20) + 1],
        ..Default::default()
    };
    let refused = host.client.create_container(deadline(), &large).await;
    assert_eq!(code(refused.unwrap_err()), Code::INVALID_ARGUMENT);
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    // And it still works.
    let mut streams = host.run("last", &script("echo fine")).await;
    assert_eq!(streams.read().await.0, "fine\n");
    loop {
        match host.next_event().await {
            event::Kind::Exit(exit) if exit.container_id == "last" => break,
            _ => {}
        }
    }
}

#[tokio::test]
async fn an_exec_as_its_container_ends_is_told_that_it_does_not_run() {
    let host = Host::new().await;
    for round in 0..60 {
        let _streams = host.run("c", &spec(&["sleep", "1000"])).await;
        let process = process(&["true"]);
        let kill = async {
            // Over the whole length of an exec.
            tokio::time::sleep(Duration::from_micros(round * 150)).await;
            host.signal("c", "", libc::SIGKILL, false).await.unwrap();
        };
        let (started, ()) = tokio::join!(host.try_exec("c", "e", &process), kill);
        match started {
            Ok(_) => {
                let mut exits = [host.next_exit().await, host.next_exit().await];
                exits.sort();
                assert_eq!(exits[0], ("c".into(), String::new(), 137));
                assert_eq!(exits[1].1, "e");
            }
            Err(refused) => {
                assert_eq!(refused, Err(Code::FAILED_PRECONDITION), "round {round}");
                assert_eq!(host.next_exit().await, ("c".into(), String::new(), 137));
            }
        }
        host.delete("c").await.unwrap();
    }
}
