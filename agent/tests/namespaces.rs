//! User and time namespaces, and namespaces of another container, made by the real agent without a VM (see `common`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown},
    path::Path,
};

use common::{Host, code, directories, process, script};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use ttrpc::Code;

/// What the tests' containers have as their id 0.
const ROOT: u32 = 200_000;

/// A container with a user namespace.
fn mapped(text: &str) -> Value {
    let mut spec = script(text);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": ROOT + 100_000, "size": 65536}]);
    spec
}

/// Makes the container's root belong to the mapped root, as an engine does.
fn give(path: &Path) {
    lchown(path, Some(ROOT), Some(ROOT + 100_000)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap() {
            give(&entry.unwrap().path());
        }
    }
}

async fn mapped_host(id: &str) -> Host {
    let host = Host::new().await;
    let root = host.rootfs(id);
    give(&root);
    // The tests' directory is for its owner only.
    for directory in [
        host.directory.path().to_owned(),
        host.directory.path().join("share"),
    ] {
        fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
    }
    host
}

async fn run(host: &Host, id: &str, spec: &Value, joined: &[(&str, &str)]) -> common::Streams {
    let created = host
        .try_create_joined(id, spec, HashMap::new(), joined)
        .await
        .unwrap();
    let streams = created.unwrap_or_else(|failure| panic!("create: {}", failure.message));
    host.try_start(id)
        .await
        .unwrap_or_else(|failure| panic!("start: {}", failure.message));
    streams
}

#[tokio::test]
async fn a_user_namespace_maps_the_ids_of_the_spec() {
    let host = mapped_host("c").await;
    let root = host.directory.path().join("share/c/rootfs");
    let mut spec = mapped(
        "id -u; id -g; id -G; cat /proc/self/uid_map /proc/self/gid_map; hostname; touch /made; stat -c %u:%g /made /dev/null; \
         echo a > /dev/null && cat /dev/zero | head -c 3 | wc -c; ls /sys | wc -l; cat /proc/1/comm; mount -t tmpfs x /tmp && echo mounted; \
         cat /proc/self/cgroup; cat /proc/self/oom_score_adj; ulimit -c; stat -c %t:%T /dev/full; cat /proc/sys/kernel/shmmni; \
         ls /dev; cat /proc/self/setgroups",
    );
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "additionalGids": [7]});
    spec["process"]["oomScoreAdj"] = json!(7);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}]);
    let all = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "1234"});
    let mut streams = run(&host, "c", &spec, &[]).await;
    let (stdout, stderr) = streams.read().await;
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(stderr, "", "{stdout}");
    let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(lines[..3], ["0", "0", "0 7"]);
    assert_eq!(squeezed(lines[3]), format!("0 {ROOT} 65536"));
    assert_eq!(squeezed(lines[4]), format!("0 {} 65536", ROOT + 100_000));
    assert_eq!(lines[5..9], ["container", "0:0", "0:0", "3"], "{stdout}");
    assert!(lines[9].parse::<u32>().unwrap() > 3, "{stdout}");
    assert_eq!(lines[10..12], ["sh", "mounted"]);
    assert!(stdout.contains("\n0::/\n"), "{stdout}");
    assert!(stdout.contains("\n7\n1\n1:7\n1234\n"), "{stdout}");
    assert!(stdout.ends_with("allow\n"), "{stdout}");
    let made = fs::metadata(root.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (ROOT, ROOT + 100_000));
    assert_eq!(host.next_exit().await.2, 0);
    host.delete("c").await.unwrap();
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    let pid = host.agent_pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children, "");
}

#[tokio::test]
async fn an_exec_enters_the_user_namespace_and_a_terminal_works_in_it() {
    let host = mapped_host("c").await;
    let mut init = run(&host, "c", &mapped("echo up; cat; true"), &[]).await;
    let mut up = [0u8; 3];
    init.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
    let mut who = process(&[
        "sh",
        "-c",
        "id -u; id -g; readlink /proc/self/ns/user; readlink /proc/1/ns/user || echo no; ulimit -c; echo x > /proc/self/fd/1; touch /tmp/by",
    ]);
    who["user"] = json!({"uid": 5, "gid": 6});
    who["rlimits"] = json!([{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}]);
    let mut streams = host.exec("c", "e", &who).await.unwrap();
    let (stdout, stderr) = streams.read().await;
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[..2], ["5", "6"], "{stdout}{stderr}");
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    assert!(lines[2].starts_with("user:[") && lines[2] != own.to_str().unwrap());
    assert_eq!(lines[3..], ["no", "1", "x"], "{stdout}{stderr}");
    host.next_exit().await;
    let by = fs::metadata(host.directory.path().join("share/c/rootfs/tmp/by")).unwrap();
    assert_eq!((by.uid(), by.gid()), (ROOT + 5, ROOT + 100_006));

    let mut with_terminal = process(&["sh", "-c", "tty; id -u; stat -c %u /dev/pts/0 /dev/console"]);
    with_terminal["terminal"] = json!(true);
    let mut streams = host.exec("c", "t", &with_terminal).await.unwrap();
    assert!(streams.read().await.0.starts_with("/dev/pts/0\r\n0\r\n0\r\n"));
    host.next_exit().await;

    // Ids that are not there are refused, and nothing is left.
    let mut nobody = process(&["true"]);
    nobody["user"] = json!({"uid": 70_000, "gid": 0});
    let failure = host.exec("c", "n", &nobody).await.err().unwrap();
    assert!(
        failure.message.starts_with("process.user.uid: "),
        "{}",
        failure.message
    );
    init.stdin = None;
    assert_eq!(host.next_exit().await, ("c".into(), String::new(), 0));
}

#[tokio::test]
async fn a_terminal_and_devices_of_the_spec_in_a_user_namespace() {
    let host = mapped_host("c").await;
    let mut spec = mapped("tty; stat -c %a:%u:%g:%F:%t:%T /dev/my /dev/pipe; echo > /dev/my; exit 4");
    spec["process"]["terminal"] = json!(true);
    spec["linux"]["devices"] = json!([
        {"path": "/dev/my", "type": "c", "major": 1, "minor": 3, "fileMode": 0o646, "uid": 11, "gid": 12},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o600}
    ]);
    let mut streams = run(&host, "c", &spec, &[]).await;
    assert_eq!(
        streams.read().await.0,
        "/dev/pts/0\r\n646:11:12:character special file:1:3\r\n600:0:0:fifo:0:0\r\n"
    );
    assert_eq!(host.next_exit().await.2, 4);
}

#[tokio::test]
async fn wrong_mappings_leave_nothing() {
    let host = mapped_host("c").await;
    let mut spec = mapped("true");
    spec["linux"]["devices"] =
        json!([{"path": "/dev/my", "type": "c", "major": 1, "minor": 3, "uid": 70_000}]);
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert!(
        failure.message.starts_with("linux.devices (/dev/my).uid: "),
        "{}",
        failure.message
    );
    let mut spec = mapped("true");
    spec["linux"]["uidMappings"] = json!([]);
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert!(
        failure.message.starts_with("linux.uidMappings: "),
        "{}",
        failure.message
    );
    let mut spec = script("true");
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": ROOT, "size": 1}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": ROOT, "size": 1}]);
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert!(
        failure.message.contains("user namespace isn't enabled"),
        "{}",
        failure.message
    );
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    assert!(host.no_event());
}

#[tokio::test]
async fn clocks_of_a_time_namespace_are_offset() {
    let host = Host::new().await;
    host.rootfs("c");
    let mut spec = script("cat /proc/self/timens_offsets; cat /proc/uptime; cat");
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] =
        json!({"monotonic": {"secs": 7, "nanosecs": 5}, "boottime": {"secs": 1_000_000_000}});
    let mut init = run(&host, "c", &spec, &[]).await;
    let mut offsets = [0u8; 150];
    let count = init.stdout.as_mut().unwrap().read(&mut offsets).await.unwrap();
    let text = String::from_utf8_lossy(&offsets[..count]).into_owned();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words[..6], ["monotonic", "7", "5", "boottime", "1000000000", "0"]);
    let mut streams = host
        .exec(
            "c",
            "e",
            &process(&[
                "sh",
                "-c",
                "cat /proc/uptime; readlink /proc/self/ns/time; readlink /proc/1/ns/time",
            ]),
        )
        .await
        .unwrap();
    let (stdout, stderr) = streams.read().await;
    let uptime: f64 = stdout.split(' ').next().unwrap().parse().unwrap_or_default();
    assert!(uptime >= 1e9, "{stdout}{stderr}");
    let links: Vec<&str> = stdout.lines().skip(1).collect();
    assert!(links.len() == 2 && links[0] == links[1], "{stdout}{stderr}");
    // The agent's own clock is as it was.
    let own = format!("/proc/{}/ns/time", host.agent_pid());
    assert_eq!(
        fs::read_link(own).unwrap(),
        fs::read_link("/proc/self/ns/time").unwrap()
    );
    init.stdin = None;
    host.next_exit().await;
    assert_eq!(host.next_exit().await.2, 0);
}

#[tokio::test]
async fn namespaces_of_another_container_are_joined() {
    let host = Host::new().await;
    let mut first = host.run("a", &script("echo up; cat; true")).await;
    let mut up = [0u8; 3];
    first.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
    host.rootfs("b");
    let mut spec = script(
        "hostname; cat /proc/1/comm; test $$ = 1 || echo other; for i in ipc uts pid mnt cgroup; do readlink /proc/self/ns/$i; done; \
         echo; for i in ipc uts pid; do readlink /proc/1/ns/$i; done; cat",
    );
    spec.as_object_mut().unwrap().remove("hostname");
    let all = json!(["CAP_SYS_PTRACE", "CAP_KILL", "CAP_CHOWN"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        let kind = namespace["type"].as_str().unwrap().to_owned();
        if ["ipc", "uts", "pid"].contains(&kind.as_str()) {
            namespace["path"] = json!(format!("/proc/4711/ns/{kind}"));
        }
    }
    let joined = [("ipc", "a"), ("uts", "a"), ("pid", "a")];
    let mut second = run(&host, "b", &spec, &joined).await;
    // An exec into the second is in the first one's, too.
    let mut streams = host
        .exec(
            "b",
            "e",
            &process(&[
                "sh",
                "-c",
                "cat /proc/1/comm; hostname; readlink /proc/self/ns/ipc",
            ]),
        )
        .await
        .unwrap();
    let exec = streams.read().await;
    host.next_exit().await;
    assert!(exec.0.starts_with("sh\ncontainer\nipc:["), "{exec:?}");
    second.stdin = None;
    let (stdout, stderr) = second.read().await;
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[..3], ["container", "sh", "other"], "{stdout}{stderr}");
    assert_eq!(lines[3..6], lines[9..12], "{stdout}{stderr}");
    assert_eq!(exec.0.lines().nth(2), Some(lines[3]));
    assert_eq!(host.next_exit().await, ("b".into(), String::new(), 0));
    host.delete("b").await.unwrap();

    // Whoever is not there cannot be joined.
    let refused = host.try_create_joined(
        "b",
        &spec,
        HashMap::new(),
        &[("ipc", "x"), ("uts", "a"), ("pid", "a")],
    );
    assert_eq!(code(refused.await.err().unwrap()), Code::NOT_FOUND);
    first.stdin = None;
    assert_eq!(host.next_exit().await, ("a".into(), String::new(), 0));
    let refused = host.try_create_joined("b", &spec, HashMap::new(), &joined);
    assert_eq!(code(refused.await.err().unwrap()), Code::FAILED_PRECONDITION);
    let failure = host.try_create("b", &spec).await.err().unwrap();
    assert!(
        failure
            .message
            .contains("joining a namespace of the host is not supported"),
        "{}",
        failure.message
    );
    assert!(host.no_event());
}

#[tokio::test]
async fn a_user_namespace_is_shared_by_containers() {
    let host = mapped_host("a").await;
    give(&host.rootfs("b"));
    let mut first = run(&host, "a", &mapped("echo up; cat; true"), &[]).await;
    let mut up = [0u8; 3];
    first.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
    let spec = mapped("id -u; hostname changed; hostname; touch /made; cat");
    let joined = [("user", "a"), ("ipc", "a"), ("uts", "a")];
    let mut second = run(&host, "b", &spec, &joined).await;
    second.stdin = None;
    let (stdout, stderr) = second.read().await;
    assert_eq!(stdout, "0\ncontainer\n", "{stderr}");
    let made = fs::metadata(host.directory.path().join("share/b/rootfs/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (ROOT, ROOT + 100_000));
    assert_eq!(host.next_exit().await.0, "b");
    host.delete("b").await.unwrap();

    // Other mappings than the namespace has cannot be.
    let mut other = spec.clone();
    other["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
    let refused = host
        .try_create_joined("b", &other, HashMap::new(), &joined)
        .await
        .unwrap();
    let message = refused.err().unwrap().message;
    assert!(
        message.starts_with("linux.uidMappings: are not those of"),
        "{message}"
    );
    // Nor one that is not there.
    let mut plain = host.run("p", &common::spec(&["cat"])).await;
    let refused = host
        .try_create_joined("b", &spec, HashMap::new(), &[("user", "p")])
        .await;
    assert_eq!(code(refused.err().unwrap()), Code::FAILED_PRECONDITION);
    plain.stdin = None;
    host.next_exit().await;
}
