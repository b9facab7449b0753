//! What config.json may ask for and husk does not do: each is refused by its name, and nothing is left. Some runcs do
//! it or pass it over, so they are not asked.

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::Case;
use crate::census::Census;
use crate::command::run;

#[test]
fn selinux() {
    let label = "system_u:system_r:container_t:s0";
    Case::of(json!({"process": {"selinuxLabel": label}})).refused(&["process.selinuxLabel"], &[]);
    Case::of(json!({"linux": {"mountLabel": label}})).refused(&["linux.mountLabel"], &[]);
}

/// containerd's older clients know no such fields and pass them on to nobody; `husk run` reads config.json itself.
#[track_caller]
fn refused_by_husk_run(change: Value, field: &str) {
    let census = Census::take();
    let id = field.replace('.', "-").to_lowercase();
    let mut bundle = Bundle::new(&id);
    bundle.change(&change);
    bundle.write();
    let done = run(&["husk", "run", "--bundle", bundle.path().to_str().unwrap(), &id]).expect_code(125);
    assert!(done.err().contains(field), "{}", done.err());
    drop(bundle);
    census.assert_unchanged();
}

#[test]
fn net_devices() {
    refused_by_husk_run(
        json!({"linux": {"netDevices": {"eth7": {"name": "eth0"}}}}),
        "linux.netDevices",
    );
}

#[test]
fn intel_rdt() {
    Case::of(json!({"linux": {"intelRdt": {"closID": "a"}}})).refused(&["linux.intelRdt"], &[]);
}

#[test]
fn memory_policy() {
    refused_by_husk_run(
        json!({"linux": {"memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0"}}}),
        "linux.memoryPolicy",
    );
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
