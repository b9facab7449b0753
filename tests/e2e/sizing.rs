//! The size of the machine, as it is seen from inside.

use serde_json::json;

use crate::case::{Case, Runtime};

/// CPUs that a container sees under husk: those of its machine.
#[track_caller]
fn cpus(cpu: serde_json::Value, expected: u32) {
    Case::of(json!({"linux": {"resources": {"cpu": cpu}}}))
        .sh("nproc; grep -c ^processor /proc/cpuinfo")
        .each(|runtime, done, _| {
            if runtime == Runtime::Husk {
                assert_eq!(done.out(), format!("{expected}\n{expected}\n"));
            }
        });
}

fn host_cpus() -> u32 {
    u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap()
}

#[test]
fn a_quota_of_less_than_a_cpu_is_one_vcpu() {
    cpus(json!({"quota": 50_000, "period": 100_000}), 1);
}

#[test]
fn a_quota_is_rounded_up_to_vcpus_of_the_host() {
    cpus(json!({"quota": 150_000, "period": 100_000}), host_cpus().min(2));
}

#[test]
fn a_cpuset_is_as_many_vcpus() {
    let last = host_cpus() - 1;
    cpus(json!({"cpus": last.to_string()}), 1);
}

#[test]
fn a_memory_limit_leaves_the_container_all_of_it() {
    Case::of(json!({"linux": {"resources": {"memory": {"limit": 402_653_184, "swap": 402_653_184}}}}))
        .sh("awk '/MemAvailable/ { print ($2 >= 402653184 / 1024) }' /proc/meminfo; cat /sys/fs/cgroup/memory.max")
        .each(|runtime, done, _| {
            if runtime == Runtime::Husk {
                assert_eq!(done.out(), "1\n402653184\n");
            }
        });
}

#[test]
fn without_limits_the_machine_is_the_operator_s() {
    Case::of(json!({}))
        .sh("nproc; awk '/MemTotal/ { print ($2 < 256 * 1024 && $2 > 200 * 1024) }' /proc/meminfo")
        .each(|runtime, done, _| {
            if runtime == Runtime::Husk {
                assert_eq!(done.out(), format!("{}\n1\n", host_cpus().min(2)));
            }
        });
}
