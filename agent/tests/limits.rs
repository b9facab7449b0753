//! Limits, statistics and pauses of containers made by the real agent, without a VM (see `common`). What needs
//! controllers that this machine's cgroup v2 does not have says so and is not tested.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{fs, time::Duration};

use common::{Host, PATIENCE, directories, process, script, spec};
use husk_agent_protocol::{
    limits::MAX_STATS_LEN,
    messages::{event, failure},
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::UnixStream, time::timeout};
use ttrpc::Code;

fn has(host: &Host, controllers: &[&str]) -> bool {
    let has = host.enable_controllers(controllers);
    if !has {
        eprintln!("cgroup v2 of this machine lacks one of {controllers:?}: not tested");
    }
    has
}

/// A container that writes a line now and then, and its first.
async fn ticking(host: &Host, id: &str) -> common::Streams {
    let mut streams = host
        .run(
            id,
            &script("trap 'echo term; exit 9' TERM; while :; do echo tick; sleep 0.02; done"),
        )
        .await;
    next_tick(&mut streams).await.unwrap();
    streams
}

async fn next_tick(streams: &mut common::Streams) -> Result<(), tokio::time::error::Elapsed> {
    let mut line = [0u8; 5];
    let stdout: &mut UnixStream = streams.stdout.as_mut().unwrap();
    timeout(PATIENCE, stdout.read_exact(&mut line)).await.map(|read| {
        read.unwrap();
    })
}

#[tokio::test]
async fn a_paused_container_stands_still_until_it_is_resumed() {
    let host = Host::new().await;
    assert_eq!(host.pause("c").await, Err(Code::NOT_FOUND));
    assert_eq!(host.resume("c").await, Err(Code::NOT_FOUND));
    let mut streams = ticking(&host, "c").await;
    assert_eq!(host.resume("c").await, Err(Code::FAILED_PRECONDITION));

    host.pause("c").await.unwrap();
    assert_eq!(host.cgroup_file("c", "cgroup.freeze"), "1");
    assert!(host.cgroup_file("c", "cgroup.events").contains("frozen 1"));
    assert_eq!(host.pause("c").await, Err(Code::FAILED_PRECONDITION));
    // What it wrote before is still to be had, and then nothing.
    let mut rest = vec![0u8; 1 << 16];
    let stdout = streams.stdout.as_mut().unwrap();
    while timeout(Duration::from_millis(300), stdout.read(&mut rest))
        .await
        .is_ok()
    {}

    // Nothing is started in it, and it is not deleted.
    let refused = host.try_exec("c", "e", &process(&["true"])).await.err();
    assert_eq!(refused, Some(Err(Code::FAILED_PRECONDITION)));
    assert_eq!(host.delete("c").await, Err(Code::FAILED_PRECONDITION));
    // The shell, and its sleep if there is one in that moment: all that the kernel has there.
    let there = host.cgroup_file("c", "cgroup.procs").lines().count();
    assert!((1..=2).contains(&there), "{there}");
    assert_eq!(host.processes("c").await.len(), there);
    assert!(host.stats("c").await.unwrap()["cgroup.events"].contains("frozen 1"));
    // A signal waits.
    host.signal("c", "", libc::SIGTERM, false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(host.no_event());

    host.resume("c").await.unwrap();
    assert_eq!(host.cgroup_file("c", "cgroup.freeze"), "0");
    assert_eq!(host.resume("c").await, Err(Code::FAILED_PRECONDITION));
    assert_eq!(host.next_exit().await, ("c".into(), String::new(), 9));
    assert!(streams.read().await.0.ends_with("term\n"));
    assert_eq!(host.pause("c").await, Err(Code::FAILED_PRECONDITION));
    host.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_paused_container_can_be_killed_and_execs_with_it() {
    let host = Host::new().await;
    for all in [false, true] {
        let _streams = ticking(&host, "c").await;
        let _exec = host.exec("c", "e", &process(&["sleep", "1000"])).await.unwrap();
        host.pause("c").await.unwrap();
        host.signal("c", "", libc::SIGKILL, all).await.unwrap();
        let mut exits = [host.next_exit().await, host.next_exit().await];
        exits.sort();
        assert_eq!(
            exits.map(|(_, exec, status)| (exec, status)),
            [(String::new(), 137), ("e".into(), 137)]
        );
        host.delete("c").await.unwrap();
    }
    assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn only_what_runs_is_paused() {
    let host = Host::new().await;
    let _streams = host.create("c", &spec(&["sleep", "1000"])).await;
    assert_eq!(host.pause("c").await, Err(Code::FAILED_PRECONDITION));
    host.try_start("c").await.unwrap();
    // Many at once: one of them does it.
    let paused = futures::future::join_all((0..5).map(|_| host.pause("c"))).await;
    assert_eq!(paused.iter().filter(|paused| paused.is_ok()).count(), 1);
    // Execs and pauses in turn: an exec is refused or starts, and none is lost on the way.
    host.resume("c").await.unwrap();
    for round in 0..20 {
        let exec = format!("e{round}");
        let process = process(&["true"]);
        let (started, paused) = tokio::join!(host.try_exec("c", &exec, &process), host.pause("c"));
        paused.unwrap();
        match started {
            Ok(_) => {
                host.resume("c").await.unwrap();
                assert_eq!(host.next_exit().await, ("c".into(), exec, 0));
            }
            Err(refused) => {
                assert_eq!(refused, Err(Code::FAILED_PRECONDITION));
                host.resume("c").await.unwrap();
            }
        }
    }
    assert_eq!(host.processes("c").await.len(), 1);
}

#[tokio::test]
async fn statistics_are_the_cgroups_files() {
    let host = Host::new().await;
    let all = has(&host, &["memory", "pids", "cpu", "io"]);
    assert_eq!(host.stats("c").await, Err(Code::NOT_FOUND));
    let _streams = host.run("c", &spec(&["sleep", "1000"])).await;
    let files = host.stats("c").await.unwrap();
    assert!(files["cpu.stat"].contains("usage_usec "));
    assert!(files["cgroup.events"].contains("populated 1"));
    if all {
        assert_eq!(files["pids.current"], "1\n");
        assert_eq!(files["memory.max"], "max\n");
        assert!(files["memory.stat"].contains("anon "));
        assert!(files["memory.events"].contains("oom_kill 0"));
    }
    assert!(
        files
            .iter()
            .map(|(name, text)| name.len() + text.len())
            .sum::<usize>()
            <= MAX_STATS_LEN
    );
    // Also after the end.
    host.signal("c", "", libc::SIGKILL, false).await.unwrap();
    host.next_exit().await;
    assert!(host.stats("c").await.unwrap()["cgroup.events"].contains("populated 0"));
    host.delete("c").await.unwrap();
    assert_eq!(host.stats("c").await, Err(Code::NOT_FOUND));
}

/// A container with a node of /dev/fuse, which no container may use by default.
fn with_fuse(text: &str, rules: Value) -> Value {
    let mut spec = script(text);
    spec["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    spec["linux"]["resources"] = json!({ "devices": rules });
    spec
}

const DENY_ALL: &str = r#"{"allow": false, "access": "rwm"}"#;

#[tokio::test]
async fn devices_are_those_that_the_rules_allow() {
    let host = Host::new().await;
    let deny: Value = serde_json::from_str(DENY_ALL).unwrap();
    let allow =
        |access: &str| json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": access});
    let text = "for mode in r:'<' w:'>' rw:'<>'; do
            (eval \": ${mode#*:}/dev/fuse\") 2>/dev/null && echo -n ${mode%%:*}' '
        done
        for device in null zero full random urandom; do head -c 1 /dev/$device >/dev/null || echo no $device; done
        echo x >/dev/null; : </dev/ptmx && echo .";
    for (rules, expected) in [
        (json!([]), "."),
        (json!([deny]), "."),
        (json!([deny, allow("rwm")]), "r w rw ."),
        (json!([deny, allow("r")]), "r ."),
        (json!([deny, allow("w")]), "w ."),
        (json!([deny, allow("r"), allow("w")]), "r w rw ."),
        (json!([deny, allow("rw"), deny]), "."),
        (json!([{"allow": true, "access": "rwm"}]), "r w rw ."),
        (
            json!([{"allow": true, "access": "rwm"}, {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"}]),
            "r .",
        ),
    ] {
        let output = host.output("c", &with_fuse(text, rules.clone())).await;
        assert_eq!(
            (output.0.as_str(), output.1.as_str()),
            (format!("{expected}\n").as_str(), ""),
            "{rules}"
        );
    }
    // The same holds for a process that joins, with every capability.
    let _streams = host.run("c", &with_fuse("sleep 1000", json!([deny]))).await;
    let mut exec = process(&["sh", "-c", ": <>/dev/fuse"]);
    exec["capabilities"] = json!({"bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]});
    let mut streams = host.exec("c", "e", &exec).await.unwrap();
    assert!(streams.read().await.1.contains("Operation not permitted"));
    host.next_exit().await;

    // And rules can be changed while it runs.
    let opens = async |exec: &str| {
        host.exec("c", exec, &process(&["sh", "-c", ": <>/dev/fuse"]))
            .await
            .unwrap();
        host.next_exit().await.2 == 0
    };
    host.update("c", &json!({"devices": [deny, allow("rw")]}))
        .await
        .unwrap();
    assert!(opens("e1").await);
    // Those of the document before are gone.
    host.update("c", &json!({"devices": [deny]})).await.unwrap();
    assert!(!opens("e2").await);
    host.update("c", &json!({"devices": [{"allow": true, "access": "rwm"}]}))
        .await
        .unwrap();
    assert!(opens("e3").await);
    // What does not name them leaves them.
    host.update("c", &json!({})).await.unwrap();
    assert!(opens("e4").await);
    let failure = host
        .update("c", &json!({"devices": [allow("x")]}))
        .await
        .unwrap_err()
        .unwrap();
    assert!(
        failure.message.starts_with("linux.resources.devices[0]: "),
        "{}",
        failure.message
    );
    assert!(opens("e5").await);
}

#[tokio::test]
async fn an_update_changes_what_it_names_or_nothing() {
    let host = Host::new().await;
    if !has(&host, &["hugetlb"]) {
        return;
    }
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["resources"]["hugepageLimits"] = json!([
        {"pageSize": "2MB", "limit": 4_194_304},
        // A machine without these holds to the limit.
        {"pageSize": "1GB", "limit": 0},
    ]);
    let _streams = host.create("c", &spec).await;
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "4194304");
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.rsvd.max"), "4194304");
    let huge = |limit: u64| json!([{"pageSize": "2MB", "limit": limit}]);
    host.update("c", &json!({"hugepageLimits": huge(2_097_152)}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "2097152");
    host.try_start("c").await.unwrap();
    host.update("c", &json!({})).await.unwrap();
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "2097152");
    host.update("c", &json!({"unified": {"hugetlb.2MB.max": "0"}}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "0");

    // A later one fails: what was written is taken back.
    for (unified, message) in [
        (
            json!({"hugetlb.2MB.maxx": "1"}),
            "linux.resources.unified (\"hugetlb.2MB.maxx\"): the guest's kernel has no hugetlb.2MB.maxx",
        ),
        (
            json!({"nonesuch.max": "1"}),
            "linux.resources.unified (\"nonesuch.max\"): nonesuch.max: controller \"nonesuch\" not available",
        ),
        (
            json!({"hugetlb.2MB.rsvd.max": "many"}),
            "linux.resources.unified (\"hugetlb.2MB.rsvd.max\"): write \"many\" to hugetlb.2MB.rsvd.max: invalid argument",
        ),
        (
            json!({"cgroup.procs": "1"}),
            "linux.resources.unified (\"cgroup.procs\"): is not a controller's",
        ),
    ] {
        let resources = json!({"hugepageLimits": huge(4_194_304), "unified": unified});
        let failure = host.update("c", &resources).await.unwrap_err().unwrap();
        assert_eq!(failure.message, message);
        assert_eq!(failure.kind.enum_value().unwrap(), failure::Kind::INVALID_SPEC);
        assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "0");
    }
    for (field, wrong) in [
        ("linux.resources", json!(5)),
        ("linux.resources.pids.limit", json!({"pids": {"limit": "x"}})),
    ] {
        let failure = host.update("c", &wrong).await.unwrap_err().unwrap();
        assert!(
            failure.message.starts_with(&format!("{field}: ")),
            "{}",
            failure.message
        );
    }
    // A paused container can be updated, one that has ended cannot.
    host.pause("c").await.unwrap();
    host.update("c", &json!({"hugepageLimits": huge(2_097_152)}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "hugetlb.2MB.max"), "2097152");
    host.signal("c", "", libc::SIGKILL, false).await.unwrap();
    host.next_exit().await;
    assert_eq!(
        host.update("c", &json!({})).await.unwrap_err(),
        Err(Code::FAILED_PRECONDITION)
    );
    assert_eq!(
        host.update("d", &json!({})).await.unwrap_err(),
        Err(Code::NOT_FOUND)
    );
}

#[tokio::test]
async fn limits_that_cannot_be_set_are_refused_by_name_and_leave_nothing() {
    let host = Host::new().await;
    let mut spec = spec(&["true"]);
    host.rootfs("c");
    for (resources, message) in [
        (
            json!({"unified": {"nonesuch.max": "1"}}),
            "linux.resources.unified (\"nonesuch.max\"): nonesuch.max: controller \"nonesuch\" not available",
        ),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 4000, "minor": 0, "rate": 1}]}}),
            "linux.resources.blockIO.throttleReadBpsDevice[0]: the guest has no block device 4000:0",
        ),
        (
            json!({"devices": [{"allow": true, "type": "c", "access": "q"}]}),
            "linux.resources.devices[0]: access \"q\" is not of r, w and m",
        ),
    ] {
        spec["linux"]["resources"] = resources;
        let failure = host.try_create("c", &spec).await.err().unwrap();
        assert_eq!(failure.message, message);
        assert_eq!(failure.kind.enum_value().unwrap(), failure::Kind::INVALID_SPEC);
        assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
    }
}

#[tokio::test]
async fn limits_are_seen_inside_and_can_be_changed() {
    let host = Host::new().await;
    if !has(&host, &["memory", "pids", "cpu", "cpuset", "io"]) {
        return;
    }
    let mut spec = script(
        "cd /sys/fs/cgroup; cat memory.max memory.low memory.swap.max pids.max cpu.max cpu.max.burst cpu.weight memory.oom.group cpuset.cpus io.weight; cat",
    );
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 33_554_432, "swap": 50_331_648, "reservation": 16_777_216},
        "pids": {"limit": 20},
        "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024, "burst": 10_000, "cpus": "0"},
        "unified": {"memory.oom.group": "1"},
        "blockIO": {"weight": 500}
    });
    let output = host.output("c", &spec).await;
    assert_eq!(
        output.0, "33554432\n16777216\n16777216\n20\n50000 100000\n10000\n100\n1\n0\ndefault 4950\n",
        "{}",
        output.1
    );

    let mut streams = host.run("c", &spec).await;
    let update = async |resources: Value| host.update("c", &resources).await;
    update(json!({"memory": {"limit": 41_943_040}, "cpu": {"quota": 20_000}, "pids": {"limit": -1}}))
        .await
        .unwrap();
    for (file, value) in [
        ("memory.max", "41943040"),
        ("memory.swap.max", "8388608"),
        ("memory.low", "16777216"),
        ("cpu.max", "20000 100000"),
        ("cpu.max.burst", "10000"),
        ("cpu.weight", "100"),
        ("pids.max", "max"),
    ] {
        assert_eq!(host.cgroup_file("c", file), value, "{file}");
    }
    // Above the quota as it was, not as it will be; and the other way round.
    update(json!({"cpu": {"quota": 80_000, "burst": 70_000}}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "cpu.max.burst"), "70000");
    update(json!({"cpu": {"quota": 30_000, "burst": 20_000, "idle": 0, "cpus": "4000-4001"}}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "cpu.max"), "30000 100000");
    // Not this machine's: all that it has.
    let all = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    assert_eq!(host.cgroup_file("c", "cpuset.cpus"), all.trim());

    // What fails in the end leaves all as it was.
    let failure = update(json!({
        "memory": {"limit": 50_331_648}, "cpu": {"quota": 90_000, "cpus": "0", "shares": 2},
        "unified": {"pids.max": "-5"}
    }))
    .await
    .unwrap_err()
    .unwrap();
    assert!(
        failure
            .message
            .starts_with("linux.resources.unified (\"pids.max\"): "),
        "{}",
        failure.message
    );
    for (file, value) in [
        ("memory.max", "41943040"),
        ("memory.swap.max", "8388608"),
        ("cpu.max", "30000 100000"),
        ("cpu.weight", "100"),
        ("cpuset.cpus", all.trim()),
        ("pids.max", "max"),
    ] {
        assert_eq!(host.cgroup_file("c", file), value, "{file}");
    }
    update(json!({"cpu": {"idle": 1}})).await.unwrap();
    assert_eq!(host.cgroup_file("c", "cpu.idle"), "1");
    // Both limits as they stand: swap would be below memory.
    let failure = update(json!({"memory": {"limit": 50_331_649}}))
        .await
        .unwrap_err()
        .unwrap();
    assert_eq!(
        failure.message,
        "linux.resources.memory.swap: memory+swap limit should be >= memory limit"
    );
    let failure = update(json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}))
        .await
        .unwrap_err()
        .unwrap();
    assert!(
        failure
            .message
            .starts_with("linux.resources.memory.limit: rejecting memory limit 4096 <= usage "),
        "{}",
        failure.message
    );
    streams.stdin = None;
    assert_eq!(host.next_exit().await.2, 0);
}

async fn next_oom(host: &Host) -> String {
    match host.next_event().await {
        event::Kind::Oom(oom) => oom.container_id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lack_of_memory_is_told_before_the_exit() {
    let host = Host::new().await;
    if !has(&host, &["memory"]) {
        return;
    }
    let hog = "dd if=/dev/zero of=/dev/null bs=100M count=1";
    let mut spec = script(&format!("exec {hog}"));
    spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
    let _streams = host.run("c", &spec).await;
    assert_eq!(next_oom(&host).await, "c");
    assert_eq!(host.next_exit().await, ("c".into(), String::new(), 137));
    host.delete("c").await.unwrap();

    // Of a child of init, at once: the container lives on.
    spec["process"] = process(&["sh", "-c", &format!("{hog}; cat")]);
    let mut streams = host.run("c", &spec).await;
    assert_eq!(next_oom(&host).await, "c");
    // Of an exec.
    let _exec = host
        .exec("c", "e", &process(&["sh", "-c", &format!("exec {hog}")]))
        .await
        .unwrap();
    assert_eq!(next_oom(&host).await, "c");
    assert_eq!(host.next_exit().await, ("c".into(), "e".into(), 137));
    // In a cgroup below the container's.
    let below = host.cgroups.join("c/below");
    fs::create_dir(&below).unwrap();
    let _exec = host
        .exec("c", "f", &process(&["sh", "-c", &format!("read x; exec {hog}")]))
        .await
        .unwrap();
    let (pid, _) = host
        .processes("c")
        .await
        .into_iter()
        .find(|(_, exec)| exec == "f")
        .unwrap();
    let pid = host.pid_here("c", pid);
    fs::write(below.join("cgroup.procs"), pid.to_string()).unwrap();
    drop(_exec);
    assert_eq!(next_oom(&host).await, "c");
    assert_eq!(host.next_exit().await, ("c".into(), "f".into(), 137));
    streams.stdin = None;
    assert_eq!(host.next_exit().await.2, 0);
}

#[tokio::test]
async fn a_limit_set_below_what_is_used_ends_the_container_and_not_the_agent() {
    let host = Host::new().await;
    if !has(&host, &["memory"]) {
        return;
    }
    let mut spec = script("head -c 20000000 /dev/zero >/dev/shm/held; echo ready; sleep 1000");
    spec["linux"]["resources"] = json!({"memory": {"limit": 67_108_864, "swap": 67_108_864}});
    let mut streams = host.run("c", &spec).await;
    let mut ready = [0u8; 6];
    streams
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .await
        .unwrap();
    let checked = json!({"memory": {"limit": 8_388_608, "swap": 8_388_608, "checkBeforeUpdate": true}});
    let failure = host.update("c", &checked).await.unwrap_err().unwrap();
    assert!(
        failure
            .message
            .contains("rejecting memory limit 8388608 <= usage 2"),
        "{}",
        failure.message
    );
    assert_eq!(host.cgroup_file("c", "memory.max"), "67108864");
    host.update("c", &json!({"memory": {"limit": 8_388_608, "swap": 8_388_608}}))
        .await
        .unwrap();
    assert_eq!(host.cgroup_file("c", "memory.max"), "8388608");
    assert_eq!(next_oom(&host).await, "c");
    // By this event and not by its empty cgroup, which comes before the agent has reaped the init.
    let exit = loop {
        match host.next_event().await {
            event::Kind::Oom(_) => {}
            event::Kind::Exit(exit) => break exit,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((exit.exec_id.as_str(), exit.status), ("", 137));
    host.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_limit_too_low_for_the_init_is_named() {
    let host = Host::new().await;
    if !has(&host, &["memory"]) {
        return;
    }
    host.rootfs("c");
    for score in [Value::Null, json!(-1000), json!(500)] {
        if score == json!(-1000) && !may_lower_scores() {
            continue;
        }
        for limit in [1, 4096, 65536] {
            let mut spec = spec(&["true"]);
            spec["process"]["oomScoreAdj"] = score.clone();
            spec["linux"]["resources"] = json!({"memory": {"limit": limit, "swap": limit}});
            let failure = timeout(Duration::from_secs(20), host.try_create("c", &spec))
                .await
                .unwrap();
            let failure = failure.err().unwrap();
            assert!(
                failure
                    .message
                    .starts_with("linux.resources.memory.limit: container init was OOM-killed"),
                "{limit}: {}",
                failure.message
            );
            assert_eq!(directories(&host.cgroups), Vec::<std::path::PathBuf>::new());
        }
    }
}

#[tokio::test]
async fn scores_for_a_lack_of_memory_are_the_specs() {
    let host = Host::new().await;
    let own = fs::read_to_string(format!("/proc/{}/oom_score_adj", host.agent_pid())).unwrap();
    for score in [0, 500, -1000] {
        let mut spec = spec(&["cat", "/proc/self/oom_score_adj"]);
        spec["process"]["oomScoreAdj"] = if score == 0 { Value::Null } else { json!(score) };
        if score < 0 && !may_lower_scores() {
            host.rootfs("c");
            let failure = host.try_create("c", &spec).await.err().unwrap();
            assert_eq!(failure.message, "set process.oomScoreAdj: permission denied");
            continue;
        }
        assert_eq!(host.output("c", &spec).await.0, format!("{score}\n"));
    }
    let _streams = host.run("c", &spec(&["sleep", "1000"])).await;
    let mut exec = process(&["cat", "/proc/self/oom_score_adj"]);
    exec["oomScoreAdj"] = json!(7);
    assert_eq!(host.exec("c", "e", &exec).await.unwrap().read().await.0, "7\n");
    // The agent has its own as before.
    assert_eq!(
        fs::read_to_string(format!("/proc/{}/oom_score_adj", host.agent_pid())).unwrap(),
        own
    );
}

/// Whether this process has CAP_SYS_RESOURCE.
fn may_lower_scores() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    u64::from_str_radix(bits.unwrap().trim(), 16).unwrap() & (1 << 24) != 0
}
