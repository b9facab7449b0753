//! Stats, Update, and the end by lack of memory.

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::Message;
use serde_json::json;

use super::each_with;
use crate::case::Runtime;

#[test]
fn stats() {
    each_with(
        // Some work, some memory, some processes.
        &[
            "sh",
            "-c",
            "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done; head -c 20000000 /dev/zero > /dev/shm/held; sleep 1000 & echo ready; wait",
        ],
        |bundle| {
            bundle.change(&json!({"linux": {"resources": {
            "memory": {"limit": 134_217_728}, "pids": {"limit": 99}, "cpu": {"quota": 90_000, "period": 100_000},
        }}}))
        },
        |shim| {
            let streams = shim.run();
            streams.wait_for("ready");
            let stats = shim.stats().unwrap().stats.unwrap();
            assert!(
                stats.type_url.ends_with("io.containerd.cgroups.v2.Metrics"),
                "{}",
                stats.type_url
            );
            let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
            assert_eq!(
                (metrics.pids.current, metrics.pids.limit),
                (2, 99),
                "{:?}",
                shim.runtime
            );
            assert!(metrics.cpu.usage_usec > 1000, "{:?}", metrics.cpu);
            assert!(
                metrics.cpu.usage_usec >= metrics.cpu.user_usec,
                "{:?}",
                metrics.cpu
            );
            assert_eq!(metrics.memory.usage_limit, 134_217_728);
            assert!(
                (20_000_000..134_217_728).contains(&metrics.memory.usage),
                "{:?}",
                metrics.memory
            );
            assert!(metrics.memory.shmem >= 20_000_000, "{:?}", metrics.memory);
            assert!(metrics.memory.file >= 20_000_000, "{:?}", metrics.memory);
            assert_eq!(metrics.memory_events.oom_kill, 0);
            let (out, _) = shim.exec_to_end(
                "e",
                &[
                    "sh",
                    "-c",
                    "cd /sys/fs/cgroup; cat pids.max memory.max; sed -n 's/^shmem //p' memory.stat",
                ],
                json!({}),
            );
            assert_eq!(
                out,
                format!("99\n134217728\n{}\n", metrics.memory.shmem),
                "{:?}",
                shim.runtime
            );
            shim.kill("", 9, false).unwrap();
            shim.wait("").unwrap();
            // Of what is no more there is nothing to count, but the call does not hang.
            let _ = shim.stats();
        },
    );
}

#[test]
fn update() {
    each_with(
        &["sleep", "1000"],
        |bundle| {
            bundle.change(
                &json!({"linux": {"resources": {"memory": {"limit": 134_217_728}, "pids": {"limit": 99}}}}),
            )
        },
        |shim| {
            let _streams = shim.run();
            let show = || {
                let files = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";
                shim.exec_to_end("show", &["sh", "-c", files], json!({})).0
            };
            assert_eq!(show(), "134217728\n99\nmax 100000\n100\n");
            shim.update(&json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 50}, "cpu": {"quota": 50_000, "period": 100_000}, "unified": {"cpu.weight": "77"}})).unwrap();
            assert_eq!(show(), "67108864\n50\n50000 100000\n77\n", "{:?}", shim.runtime);
            // What is not said stays.
            shim.update(&json!({"pids": {"limit": 40}})).unwrap();
            assert_eq!(show(), "67108864\n40\n50000 100000\n77\n", "{:?}", shim.runtime);
            // Refused as a whole, by name.
            let refused = shim
                .update(&json!({"unified": {"memory.magic": "1"}}))
                .unwrap_err();
            assert!(refused.1.contains("memory.magic"), "{refused:?}");
            assert_eq!(show(), "67108864\n40\n50000 100000\n77\n", "{:?}", shim.runtime);
            shim.kill("", 9, false).unwrap();
            shim.wait("").unwrap();
            shim.update(&json!({"pids": {"limit": 30}})).unwrap_err();
        },
    );
}

/// An end by lack of memory is told as such, before the exit.
#[test]
fn out_of_memory() {
    each_with(
        &["sh", "-c", "echo ready; read line; tail /dev/zero; echo survived"],
        |bundle| {
            bundle.change(&json!({
                "linux": {"resources": {"memory": {"limit": 50_000_000, "swap": 50_000_000}}},
                // So that the first process itself is killed.
                "process": {"args": ["sh", "-c", "echo ready; read line; exec tail /dev/zero"]},
            }))
        },
        |shim| {
            let mut events = crate::containerd::events();
            let (mut streams, created) = shim.create();
            created.unwrap();
            streams.open_stdin();
            shim.start_process("").unwrap();
            streams.wait_for("ready");
            streams.write(b"go\n");
            assert_eq!(shim.wait("").unwrap().exit_status, 137, "{:?}", shim.runtime);
            // runc's shim reads it from the cgroup, which goes with the task.
            events.wait_for("/tasks/oom");
            shim.delete("").unwrap();
            events.wait_for("/tasks/delete");
            if shim.runtime == Runtime::Runc {
                // Whose shim may tell it after the deletion.
                events.wait_for("/tasks/exit");
            }
            let seen = events.seen();
            let at = |topic: &str| {
                let line = seen
                    .lines()
                    .position(|line| line.contains(topic) && line.contains(&shim.id));
                line.unwrap_or_else(|| panic!("no {topic} under {:?}: {seen}", shim.runtime))
            };
            let (oom, exit) = (at("/tasks/oom"), at("/tasks/exit"));
            // runc's shim reads them from two sources and may tell them the other way round.
            assert!(oom < exit || shim.runtime == Runtime::Runc, "{seen}");
        },
    );
}
