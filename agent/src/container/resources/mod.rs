//! `linux.resources` as files of cgroup v2, converted from v1's terms as runc does.
//!
//! What cgroup v2 has no equivalent for is refused, even where runc passes over it. `cpu.cpus` and `cpu.mems` are numbers
//! of the *host's* processors and memory nodes. Where the guest has all that are named, the container is held to these; if
//! not, to all that the guest has: it is the host that holds the whole machine to its own processors.

mod cpu;
mod io;
mod memory;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxResources};

pub use self::cpu::Guest;
use super::device_rules::{Always, DeviceRules};
use crate::fault::Fault;

/// A value to write to a file of the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// For messages: `linux.resources.memory.limit`.
    pub field: String,
    pub file: String,
    /// Written line by line. Empty: an empty line.
    pub value: String,
    /// Whether a kernel without this file holds to the setting anyway.
    pub optional: bool,
}

/// What a container's limits are by the documents so far. An update may name one of two values that belong together.
/// 0: not named yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// `memory.limit` and `memory.swap` as the documents have them.
    memory: i64,
    swap: i64,
    quota: i64,
    period: u64,
    always: Always,
}

impl Standing {
    /// Of a container that has no limits yet; `nodes` are its `linux.devices`.
    pub fn new(nodes: &[LinuxDevice]) -> Self {
        Self {
            always: Always::new(nodes),
            ..Self::default()
        }
    }
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub settings: Vec<Setting>,
    /// `None`: as they are.
    pub devices: Option<DeviceRules>,
    /// What the limits are then.
    pub standing: Standing,
    /// Memory in bytes that must not be in use already (`memory.checkBeforeUpdate`), and the field that says so.
    pub least_memory: Option<(&'static str, u64)>,
}

/// Reads `resources`. Nothing is changed that they do not name.
///
/// # Errors
///
/// A limit that cgroup v2 cannot hold to, or one that makes no sense.
pub fn plan(resources: &LinuxResources, standing: &Standing, guest: &Guest) -> Result<Plan, Fault> {
    let devices = resources.devices().as_deref().filter(|rules| !rules.is_empty());
    let devices = devices.map(|rules| DeviceRules::new(rules, &standing.always));
    let mut plan = Plan {
        settings: Vec::new(),
        devices: devices.transpose()?,
        standing: standing.clone(),
        least_memory: None,
    };
    if let Some(pids) = resources.pids() {
        // 0 is "not set" to engines.
        if pids.limit() != 0 {
            let limit = if pids.limit() < 0 { -1 } else { pids.limit() };
            plan.set("pids.limit", "pids.max", number(limit));
        }
    }
    if let Some(memory) = resources.memory() {
        plan.memory(memory)?;
    }
    if let Some(io) = resources.block_io() {
        plan.block_io(io)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan.cpu(cpu, guest)?;
    }
    for (index, huge) in resources.hugepage_limits().iter().flatten().enumerate() {
        let size = huge.page_size();
        if !PAGE_SIZES.contains(&size.as_str()) {
            return refuse(
                &format!("hugepageLimits[{index}].pageSize"),
                format_args!("there are no pages of {size:?}"),
            );
        }
        if huge.limit() < 0 {
            return refuse(&format!("hugepageLimits[{index}].limit"), "is negative");
        }
        for file in [format!("hugetlb.{size}.max"), format!("hugetlb.{size}.rsvd.max")] {
            plan.set(
                &format!("hugepageLimits[{index}]"),
                &file,
                huge.limit().to_string(),
            );
            // Pages of a size that the guest does not have are not used either.
            plan.last_is_optional();
        }
    }
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|id| id != 0) {
            return refuse("network.classID", "cgroup v2 has none");
        }
        if network.priorities().as_ref().is_some_and(|list| !list.is_empty()) {
            return refuse("network.priorities", "cgroup v2 has none");
        }
    }
    plan.rdma(resources)?;
    plan.unified(resources)?;
    Ok(plan)
}

/// Reads the resources of a container to be.
///
/// # Errors
///
/// As [`plan`].
pub fn plan_new(linux: &Linux) -> Result<Plan, Fault> {
    let standing = Standing::new(linux.devices().as_deref().unwrap_or_default());
    let resources = linux.resources().clone().unwrap_or_default();
    let mut plan = plan(&resources, &standing, &Guest::read())?;
    if plan.devices.is_none() {
        // Without a rule a container has what every container has, not everything.
        plan.devices = Some(DeviceRules::new(&[], &standing.always)?);
    }
    Ok(plan)
}

fn refuse<T>(field: &str, why: impl std::fmt::Display) -> Result<T, Fault> {
    Err(Fault::spec(format_args!("linux.resources.{field}"), why))
}

/// -1 is no limit.
fn number(limit: i64) -> String {
    if limit == -1 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

/// Sizes of huge pages that processors of this architecture can have. A certain one, as the guest's, may lack some.
const PAGE_SIZES: &[&str] = &["2MB", "1GB"];

impl Plan {
    fn set(&mut self, field: &str, file: &str, value: String) {
        let field = format!("linux.resources.{field}");
        self.settings.push(Setting {
            field,
            file: file.to_owned(),
            value,
            optional: false,
        });
    }

    fn last_is_optional(&mut self) {
        if let Some(setting) = self.settings.last_mut() {
            setting.optional = true;
        }
    }

    fn rdma(&mut self, resources: &LinuxResources) -> Result<(), Fault> {
        let mut devices: Vec<_> = resources.rdma().iter().flatten().collect();
        devices.sort_by_key(|(name, _)| name.as_str());
        for (name, limits) in devices {
            let field = format!("rdma ({name:?})");
            if name.is_empty() || name.bytes().any(|byte| byte <= b' ') {
                return refuse(&field, "is no name of a device");
            }
            let mut value = name.clone();
            for (key, limit) in [
                ("hca_handle", limits.hca_handles()),
                ("hca_object", limits.hca_objects()),
            ] {
                if let Some(limit) = limit {
                    value.push_str(&format!(" {key}={limit}"));
                }
            }
            self.set(&field, "rdma.max", value);
        }
        Ok(())
    }

    fn unified(&mut self, resources: &LinuxResources) -> Result<(), Fault> {
        let mut files: Vec<_> = resources.unified().iter().flatten().collect();
        files.sort();
        for (file, value) in files {
            let field = format!("unified ({file:?})");
            if file.contains('/') {
                return refuse(&field, "must be a file name (no slashes)");
            }
            if !file.contains('.') || file.contains("..") || file.starts_with('.') || file.contains('\0') {
                return refuse(&field, "must be in the form CONTROLLER.PARAMETER");
            }
            if file.starts_with("cgroup.") {
                return refuse(&field, "is not a controller's");
            }
            self.set(&field, file, value.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The files that `json` sets on top of `standing`, in a guest of two processors.
    pub(super) fn settings_on(
        standing: &Standing,
        json: &str,
    ) -> Result<(Vec<(String, String)>, Standing), Fault> {
        let plan = plan(
            &serde_json::from_str(json).unwrap(),
            standing,
            &Guest::of("0-1", "0"),
        )?;
        let files = plan
            .settings
            .into_iter()
            .map(|setting| (setting.file, setting.value));
        Ok((files.collect(), plan.standing))
    }

    pub(super) fn settings(json: &str) -> Result<Vec<(String, String)>, Fault> {
        settings_on(&Standing::default(), json).map(|(settings, _)| settings)
    }

    pub(super) fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    pub(super) fn assert_refused(cases: &[(&str, &str)]) {
        for (field, json) in cases {
            let fault = settings(json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("linux.resources.{field}: ")),
                "{field}: {}",
                fault.message
            );
        }
    }

    #[test]
    fn limits_of_v1_become_files_of_v2() {
        let json = r#"{
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500, "disableOOMKiller": false},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"},
            "pids": {"limit": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "rdma": {"mlx5_1": {"hcaHandles": 3}},
            "unified": {"memory.high": "900"},
            "devices": [{"allow": false, "access": "rwm"}]
        }"#;
        assert_eq!(
            settings(json).unwrap(),
            pairs(&[
                ("pids.max", "100"),
                ("memory.swap.max", "500"),
                ("memory.max", "1000"),
                ("memory.low", "500"),
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("hugetlb.2MB.max", "0"),
                ("hugetlb.2MB.rsvd.max", "0"),
                ("rdma.max", "mlx5_1 hca_handle=3"),
                ("memory.high", "900"),
            ])
        );
    }

    #[test]
    fn none_and_unlimited() {
        assert_eq!(settings("{}").unwrap(), []);
        assert_eq!(
            settings(
                r#"{"memory":{"limit":0},"cpu":{"shares":0},"pids":{"limit":0},"blockIO":{"weight":0}}"#
            )
            .unwrap(),
            []
        );
        assert_eq!(
            settings(r#"{"memory":{"limit":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#).unwrap(),
            pairs(&[
                ("pids.max", "max"),
                ("memory.swap.max", "max"),
                ("memory.max", "max"),
                ("cpu.max", "max 100000"),
            ])
        );
    }

    #[test]
    fn what_v2_cannot_hold_to_is_refused_by_name() {
        assert_refused(&[
            (
                "hugepageLimits[0].pageSize",
                r#"{"hugepageLimits":[{"pageSize":"../x","limit":1}]}"#,
            ),
            (
                "hugepageLimits[0].pageSize",
                r#"{"hugepageLimits":[{"pageSize":"3MB","limit":1}]}"#,
            ),
            (
                "hugepageLimits[1].limit",
                r#"{"hugepageLimits":[{"pageSize":"2MB","limit":1},{"pageSize":"1GB","limit":-2}]}"#,
            ),
            ("network.classID", r#"{"network":{"classID":5}}"#),
            (
                "network.priorities",
                r#"{"network":{"priorities":[{"name":"eth0","priority":1}]}}"#,
            ),
            (r#"rdma ("a b")"#, r#"{"rdma":{"a b":{"hcaHandles":1}}}"#),
            (r#"unified ("../x.y")"#, r#"{"unified":{"../x.y":"1"}}"#),
            (r#"unified ("..")"#, r#"{"unified":{"..":"1"}}"#),
            (r#"unified ("memory")"#, r#"{"unified":{"memory":"1"}}"#),
            (
                r#"unified ("cgroup.procs")"#,
                r#"{"unified":{"cgroup.procs":"1"}}"#,
            ),
            (
                "devices[0]",
                r#"{"devices":[{"allow":true,"type":"c","major":1,"minor":1}]}"#,
            ),
        ]);
    }

    #[test]
    fn devices_are_those_of_the_document_or_as_they_were() {
        let of = |json: &str| {
            plan(
                &serde_json::from_str(json).unwrap(),
                &Standing::default(),
                &Guest::of("0", "0"),
            )
            .unwrap()
            .devices
        };
        assert_eq!(of("{}"), None);
        assert_eq!(of(r#"{"devices":[]}"#), None);
        assert!(of(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#).is_some());
    }

    proptest! {
        #[test]
        fn any_limits_are_a_plan_or_a_fault(limit: i64, swap: i64, quota: i64, period: u64, weight: u16) {
            let _ = settings(&format!(
                r#"{{"memory":{{"limit":{limit},"swap":{swap}}},"cpu":{{"quota":{quota},"period":{period}}},"blockIO":{{"weight":{weight}}}}}"#
            ));
        }
    }
}
