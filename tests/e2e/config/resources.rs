//! `linux.resources` and `linux.cgroupsPath`: what the container's cgroup says and does.

use serde_json::json;

use crate::case::{Case, Runtime};
use crate::command::{eventually, run};

#[test]
fn memory() {
    Case::of(json!({"linux": {"resources": {"memory": {
        "limit": 67_108_864, "swap": 100_663_296, "reservation": 33_554_432,
    }}}}))
    .sh("cd /sys/fs/cgroup; cat memory.max memory.swap.max memory.low")
    .prints("67108864\n33554432\n33554432\n");
}

#[test]
fn memory_without_bound() {
    Case::of(json!({"linux": {"resources": {"memory": {"limit": -1, "swap": -1}}}}))
        .sh("cd /sys/fs/cgroup; cat memory.max memory.swap.max")
        .prints("max\nmax\n");
}

#[test]
fn cpu() {
    Case::of(json!({"linux": {"resources": {"cpu": {
        "shares": 512, "quota": 50_000, "period": 200_000, "cpus": "0", "mems": "0",
    }}}}))
    .sh("cd /sys/fs/cgroup; cat cpu.weight cpu.max cpuset.cpus cpuset.mems; grep Cpus_allowed_list /proc/self/status")
    .each(|runtime, done, _| {
        // Since 1.3.2 runc turns shares into a weight by a curve on which the two defaults meet.
        let weights: &[u32] = if runtime == Runtime::Runc { &[20, 59] } else { &[59] };
        let rest = "50000 200000\n0\n0\nCpus_allowed_list:\t0\n";
        let expected = weights.iter().map(|weight| format!("{weight}\n{rest}"));
        assert!(expected.into_iter().any(|expected| expected == done.out()), "{runtime:?}: {}", done.out());
    });
}

#[test]
fn cpu_burst() {
    Case::of(json!({"linux": {"resources": {"cpu": {"quota": 50_000, "period": 100_000, "burst": 20_000}}}}))
        .sh("cd /sys/fs/cgroup; cat cpu.max cpu.max.burst")
        .runc_since(1, 2)
        .prints("50000 100000\n20000\n");
}

#[test]
fn cpu_idle() {
    Case::of(json!({"linux": {"resources": {"cpu": {"idle": 1}}}}))
        .sh("cat /sys/fs/cgroup/cpu.idle")
        .runc_since(1, 2)
        .prints("1\n");
}

#[test]
fn pids() {
    Case::of(json!({"linux": {"resources": {"pids": {"limit": 7}}}}))
        .sh("cat /sys/fs/cgroup/pids.max; for n in 1 2 3 4 5 6 7 8 9; do sleep 1 & done 2>&1 | head -n 1; true")
        .each(|runtime, done, _| {
            let text = done.out() + &done.err();
            assert!(text.starts_with("7\n"), "{runtime:?}: {text}");
            assert!(text.contains("can't fork"), "{runtime:?}: {text}");
        });
}

#[test]
fn hugetlb() {
    Case::of(json!({"linux": {"resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]}}}))
        .sh("cat /sys/fs/cgroup/hugetlb.2MB.max")
        .prints("4194304\n");
}

#[test]
fn unified() {
    Case::of(json!({"linux": {"resources": {"unified": {
        "memory.high": "50000000", "pids.max": "55", "cpu.weight": "321", "memory.min": "4096",
    }}}}))
    .sh("cd /sys/fs/cgroup; cat memory.high pids.max cpu.weight memory.min")
    .prints("49999872\n55\n321\n4096\n");
}

#[test]
fn unified_files_that_are_not_there() {
    Case::of(json!({"linux": {"resources": {"unified": {"memory.magic": "1"}}}}))
        .refused(&["linux.resources.unified", "memory.magic"], &["memory.magic"]);
}

/// A file of another cgroup is none of this one's.
#[test]
fn unified_files_elsewhere() {
    Case::of(json!({"linux": {"resources": {"unified": {"../cgroup.procs": "1"}}}})).refused(
        &["linux.resources.unified", "../cgroup.procs"],
        &["../cgroup.procs"],
    );
}

/// Nobody drives these numbers: what may be opened is not there (ENXIO), what may not is refused first (EPERM). Nodes
/// may always be made, as runc has it.
const OPENED: &str = "exec 2>&1; cd /dev; probe mknod a 0x21a4 61441; probe mknod b 0x21a4 61701; probe mknod c 0x21a4 61702; \
     probe mknod d 0x61a4 61953; probe mknod e 0x21a4 61953; probe open a 2; probe open b 0; probe open b 1; probe open c 0; \
     probe open d 0; probe open e 0; probe open null 2; probe open ptmx 2; probe open told 1";

#[test]
fn devices() {
    Case::of(json!({"linux": {
        "devices": [{"path": "/dev/told", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}],
        "resources": {"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 240, "access": "rw"},
            {"allow": true, "type": "c", "major": 241, "minor": 5, "access": "r"},
            {"allow": true, "type": "b", "major": 242, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"},
        ]},
    }}))
    .sh(OPENED)
    .prints(
        "mknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nopen: ENXIO\nopen: ENXIO\nopen: EPERM\nopen: EPERM\n\
         open: ENXIO\nopen: EPERM\nopen = 3\nopen = 3\nopen = 3\n",
    );
}

#[test]
fn no_devices_but_the_default_ones() {
    Case::of(json!({"linux": {
        "devices": [{"path": "/dev/told", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}],
    }}))
    .sh(OPENED)
    .prints(
        "mknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nopen: EPERM\nopen: EPERM\nopen: EPERM\nopen: EPERM\n\
         open: EPERM\nopen: EPERM\nopen = 3\nopen = 3\nopen: EPERM\n",
    );
}

#[test]
fn all_devices() {
    Case::of(json!({"linux": {
        "devices": [{"path": "/dev/told", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}],
        "resources": {"devices": [{"allow": true, "access": "rwm"}]},
    }}))
    .sh(OPENED)
    .prints(
        "mknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nmknod = 0\nopen: ENXIO\nopen: ENXIO\nopen: ENXIO\nopen: ENXIO\n\
         open: ENXIO\nopen: ENXIO\nopen = 3\nopen = 3\nopen = 3\n",
    );
}

/// The cgroup that the spec names holds the task on the host, with what bounds it there.
#[test]
fn cgroups_path() {
    Case::of(json!({}))
        .sh("cat /proc/self/cgroup; grep -c . /proc/mounts > /dev/null && echo ok")
        .prints("0::/\nok\n");
    for runtime in Runtime::all() {
        let id = format!("cgroup-path-{runtime:?}").to_lowercase();
        let mut bundle = crate::bundle::Bundle::new(&id);
        bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
        let config = bundle.write();
        run(&[
            "ctr",
            "run",
            "-d",
            "--runtime",
            runtime.name(),
            "--config",
            config.to_str().unwrap(),
            &id,
        ])
        .expect_code(0);
        let list = crate::command::ok(&["ctr", "task", "ls"]);
        let pid = list
            .lines()
            .find_map(|line| {
                line.strip_prefix(id.as_str())?
                    .split_whitespace()
                    .next()
                    .map(str::to_owned)
            })
            .unwrap();
        let shown = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        run(&["ctr", "task", "rm", "-f", &id]);
        run(&["ctr", "container", "rm", &id]);
        assert!(
            shown.starts_with(&format!("0::/husk-e2e/{id}")),
            "{runtime:?}: {shown}"
        );
        let directory = format!("/sys/fs/cgroup/husk-e2e/{id}");
        eventually("the cgroup to go", || {
            (!std::path::Path::new(&directory).exists()).then_some(())
        });
    }
}

#[test]
fn a_limit_below_what_works() {
    // The kernel kills what does not fit, or there is no room for the runtime's own start.
    Case::of(json!({"linux": {"resources": {"memory": {"limit": 4096}}}}))
        .refused(&["linux.resources.memory.limit"], &[]);
}

#[test]
fn swap_below_the_limit() {
    Case::of(json!({"linux": {"resources": {"memory": {"limit": 67_108_864, "swap": 33_554_432}}}}))
        .refused(&["linux.resources.memory.swap"], &["memory+swap"]);
}

#[test]
fn a_cpu_that_is_not_there() {
    Case::of(json!({"linux": {"resources": {"cpu": {"cpus": "77"}}}}))
        .refused(&["linux.resources.cpu.cpus"], &["cpuset.cpus"]);
}

#[test]
fn a_memory_node_that_is_not_there() {
    Case::of(json!({"linux": {"resources": {"cpu": {"mems": "5"}}}}))
        .refused(&["linux.resources.cpu.mems"], &["cpuset.mems"]);
}

#[test]
fn a_quota_too_small() {
    Case::of(json!({"linux": {"resources": {"cpu": {"quota": 5, "period": 100_000}}}}))
        .refused(&["linux.resources.cpu"], &["cpu.max"]);
}

#[test]
fn a_huge_page_size_that_is_not_there() {
    Case::of(json!({"linux": {"resources": {"hugepageLimits": [{"pageSize": "3MB", "limit": 4_194_304}]}}}))
        .refused(&["linux.resources.hugepageLimits", "3MB"], &["3MB"]);
}

/// runc writes the weight to whichever of two schedulers the kernel has; husk's guest has `io.weight`.
#[test]
fn block_io_weight() {
    Case::of(json!({"linux": {"resources": {"blockIO": {"weight": 500}}}}))
        .sh("cd /sys/fs/cgroup; if [ -e io.bfq.weight ]; then cat io.bfq.weight; else cat io.weight; fi")
        .each(|runtime, done, _| match done.out().as_str() {
            "default 4950\n" => {}
            "default 500\n" | "500\n" if runtime == Runtime::Runc => {}
            other => panic!("{runtime:?}: {other:?} {}", done.err()),
        });
}
