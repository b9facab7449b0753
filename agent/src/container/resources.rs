//! `linux.resources` as files of cgroup v2, converted from v1's terms as runc does.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use crate::fault::Fault;

/// A value to write to a file of the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// For messages: `linux.resources.memory.limit`.
    pub field: String,
    pub file: String,
    pub value: String,
    /// Whether a kernel without this file holds to the setting anyway.
    pub optional: bool,
}

/// Default period of `cpu.max` in microseconds, the kernel's own.
const DEFAULT_PERIOD: u64 = 100_000;

/// Reads `resources`.
///
/// # Errors
///
/// A limit that cgroup v2 cannot hold to, or one that makes no sense.
pub fn plan(resources: &LinuxResources) -> Result<Vec<Setting>, Fault> {
    let mut plan = Plan(Vec::new());
    if let Some(memory) = resources.memory() {
        plan.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        plan.cpu(cpu)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 is "not set" to engines.
        if pids.limit() != 0 {
            plan.set("pids.limit", "pids.max", limit(pids.limit()));
        }
    }
    for (index, huge) in resources.hugepage_limits().iter().flatten().enumerate() {
        let size = huge.page_size();
        if !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return refuse(&format!("hugepageLimits[{index}].pageSize"), "is no page size");
        }
        plan.set(
            "hugepageLimits",
            &format!("hugetlb.{size}.max"),
            limit(huge.limit()),
        );
        // Pages of a size that the kernel does not have are not used either.
        plan.last_is_optional();
    }
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|id| id != 0) {
            return refuse("network.classID", "cgroup v2 has none");
        }
        if network.priorities().as_ref().is_some_and(|list| !list.is_empty()) {
            return refuse("network.priorities", "cgroup v2 has none");
        }
    }
    if resources.rdma().as_ref().is_some_and(|map| !map.is_empty()) {
        return refuse("rdma", "the guest has no RDMA");
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
        if !file.contains('.')
            || file.contains("..")
            || !file.bytes().all(is_name)
            || file.starts_with("cgroup.")
        {
            return refuse(&format!("unified ({file:?})"), "is no file of a controller");
        }
        plan.set(&format!("unified ({file:?})"), file, value.clone());
    }
    Ok(plan.0)
}

fn refuse<T>(field: &str, why: &str) -> Result<T, Fault> {
    Err(Fault::spec(format_args!("linux.resources.{field}"), why))
}

/// A limit of v1: -1 is none.
fn limit(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

struct Plan(Vec<Setting>);

impl Plan {
    fn set(&mut self, field: &str, file: &str, value: String) {
        let field = format!("linux.resources.{field}");
        self.0.push(Setting {
            field,
            file: file.to_owned(),
            value,
            optional: false,
        });
    }

    fn last_is_optional(&mut self) {
        if let Some(setting) = self.0.last_mut() {
            setting.optional = true;
        }
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Fault> {
        let some = |value: Option<i64>| value.filter(|value| *value != 0);
        if some(memory.kernel()).is_some() {
            return refuse(
                "memory.kernel",
                "cgroup v2 has no limit of its own for kernel memory",
            );
        }
        if some(memory.kernel_tcp()).is_some() {
            return refuse(
                "memory.kernelTCP",
                "cgroup v2 has no limit of its own for TCP buffers",
            );
        }
        if memory.swappiness().is_some() {
            return refuse("memory.swappiness", "cgroup v2 has none");
        }
        if memory.disable_oom_killer() == Some(true) {
            return refuse("memory.disableOOMKiller", "cgroup v2 cannot do this");
        }
        if memory.use_hierarchy() == Some(false) {
            return refuse("memory.useHierarchy", "cgroup v2 is always hierarchical");
        }
        if let Some(value) = some(memory.limit()) {
            self.set("memory.limit", "memory.max", limit(value));
        }
        if let Some(value) = some(memory.reservation()) {
            self.set("memory.reservation", "memory.low", limit(value));
        }
        // v1's limit is of memory and swap together.
        match (some(memory.swap()), some(memory.limit())) {
            (None, Some(-1)) => self.set("memory.swap", "memory.swap.max", limit(-1)),
            (None, _) => {}
            (Some(swap), _) if swap < 0 => self.set("memory.swap", "memory.swap.max", limit(-1)),
            (Some(swap), Some(memory)) if memory > 0 => match swap.checked_sub(memory) {
                Some(rest) if rest >= 0 => self.set("memory.swap", "memory.swap.max", limit(rest)),
                _ => return refuse("memory.swap", "is below memory.limit, which it includes"),
            },
            (Some(_), _) => return refuse("memory.swap", "needs a memory.limit, too"),
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Fault> {
        if cpu.realtime_runtime().is_some_and(|value| value != 0)
            || cpu.realtime_period().is_some_and(|value| value != 0)
        {
            return refuse(
                "cpu.realtimeRuntime",
                "cgroup v2 has no limits for real-time scheduling",
            );
        }
        if let Some(idle) = cpu.idle() {
            self.set("cpu.idle", "cpu.idle", idle.to_string());
        }
        // An idle cgroup has no weight.
        if let Some(shares) = cpu
            .shares()
            .filter(|shares| *shares != 0 && cpu.idle() != Some(1))
        {
            self.set("cpu.shares", "cpu.weight", weight(shares).to_string());
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let quota = limit(quota.unwrap_or(-1));
            let period = period.unwrap_or(DEFAULT_PERIOD);
            self.set("cpu.quota", "cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst() {
            self.set("cpu.burst", "cpu.max.burst", burst.to_string());
        }
        Ok(())
    }
}

/// `cpu.weight` (1 to 10000) for v1's shares (2 to 262144).
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings(json: &str) -> Result<Vec<(String, String)>, Fault> {
        let plan = plan(&serde_json::from_str(json).unwrap())?;
        Ok(plan
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    #[test]
    fn limits_of_v1_become_files_of_v2() {
        let json = r#"{
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500, "disableOOMKiller": false},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"},
            "pids": {"limit": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.high": "900"},
            "devices": [{"allow": false, "access": "rwm"}]
        }"#;
        assert_eq!(
            settings(json).unwrap(),
            pairs(&[
                ("memory.max", "1000"),
                ("memory.low", "500"),
                ("memory.swap.max", "500"),
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("pids.max", "100"),
                ("hugetlb.2MB.max", "0"),
                ("memory.high", "900"),
            ])
        );
    }

    #[test]
    fn none_and_unlimited() {
        assert_eq!(settings("{}").unwrap(), []);
        assert_eq!(
            settings(r#"{"memory":{"limit":0},"cpu":{"shares":0},"pids":{"limit":0}}"#).unwrap(),
            []
        );
        assert_eq!(
            settings(r#"{"memory":{"limit":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#).unwrap(),
            pairs(&[
                ("memory.max", "max"),
                ("memory.swap.max", "max"),
                ("cpu.max", "max 100000"),
                ("pids.max", "max")
            ])
        );
    }

    #[test]
    fn what_v2_cannot_hold_to_is_refused_by_name() {
        for (field, json) in [
            ("memory.swap", r#"{"memory":{"limit":1000,"swap":500}}"#),
            ("memory.swap", r#"{"memory":{"swap":500}}"#),
            ("memory.kernel", r#"{"memory":{"kernel":500}}"#),
            ("memory.swappiness", r#"{"memory":{"swappiness":5}}"#),
            (
                "memory.disableOOMKiller",
                r#"{"memory":{"disableOOMKiller":true}}"#,
            ),
            ("cpu.realtimeRuntime", r#"{"cpu":{"realtimeRuntime":5}}"#),
            ("network.classID", r#"{"network":{"classID":5}}"#),
            (r#"unified ("../x.y")"#, r#"{"unified":{"../x.y":"1"}}"#),
            (
                r#"unified ("cgroup.procs")"#,
                r#"{"unified":{"cgroup.procs":"1"}}"#,
            ),
        ] {
            let fault = settings(json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("linux.resources.{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    proptest! {
        #[test]
        fn weights_stay_in_range(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight(shares)));
        }

        #[test]
        fn any_memory_limits_are_a_plan_or_a_fault(limit: i64, swap: i64) {
            let _ = settings(&format!(r#"{{"memory":{{"limit":{limit},"swap":{swap}}}}}"#));
        }
    }
}
