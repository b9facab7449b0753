//! What config.json may ask for and husk does not do: each is refused by its name, and nothing is left. Some runcs do
//! it or pass it over, so they are not asked.

use serde_json::json;

use crate::case::Case;

#[test]
fn selinux() {
    let label = "system_u:system_r:container_t:s0";
    Case::of(json!({"process": {"selinuxLabel": label}})).refused(&["process.selinuxLabel"], &[]);
    Case::of(json!({"linux": {"mountLabel": label}})).refused(&["linux.mountLabel"], &[]);
}

#[test]
fn net_devices() {
    Case::of(json!({"linux": {"netDevices": {"eth7": {"name": "eth0"}}}}))
        .refused(&["linux.netDevices"], &[]);
}

#[test]
fn intel_rdt() {
    Case::of(json!({"linux": {"intelRdt": {"closID": "a"}}})).refused(&["linux.intelRdt"], &[]);
}

#[test]
fn memory_policy() {
    Case::of(json!({"linux": {"memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0"}}}))
        .refused(&["linux.memoryPolicy"], &[]);
}

#[test]
fn kernel_memory() {
    Case::of(json!({"linux": {"resources": {"memory": {"kernel": 1_048_576}}}}))
        .refused(&["linux.resources.memory.kernel"], &[]);
}

#[test]
fn real_time_budgets() {
    Case::of(json!({"linux": {"resources": {"cpu": {"realtimeRuntime": 1000, "realtimePeriod": 10_000}}}}))
        .refused(&["linux.resources.cpu.realtime"], &[]);
}

/// The guest has none of the host's block devices.
#[test]
fn throttling_of_a_device() {
    let limit = json!([{"major": 254, "minor": 0, "rate": 1_048_576}]);
    Case::of(json!({"linux": {"resources": {"blockIO": {"throttleReadBpsDevice": limit}}}}))
        .refused(&["linux.resources.blockIO.throttleReadBpsDevice[0]"], &[]);
}

#[test]
fn network_classes() {
    Case::of(json!({"linux": {"resources": {"network": {"classID": 1_048_577}}}}))
        .refused(&["linux.resources.network"], &[]);
}
