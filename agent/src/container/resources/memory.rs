//! `linux.resources.memory`.

use oci_spec::runtime::LinuxMemory;

use super::{Plan, number, refuse};
use crate::fault::Fault;

impl Plan {
    pub(super) fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Fault> {
        refuse_what_v2_has_not(memory)?;
        let some = |field: &str, value: Option<i64>| match value {
            None | Some(0) => Ok(None),
            Some(value) if value < -1 => refuse(field, "is negative"),
            value => Ok(value),
        };
        let limit = some("memory.limit", memory.limit())?;
        let swap = some("memory.swap", memory.swap())?;
        let reservation = some("memory.reservation", memory.reservation())?;

        if let Some(limit) = limit {
            self.standing.memory = limit;
        }
        match swap {
            Some(swap) => self.standing.swap = swap,
            // No limit of memory is none of both, as version 1 had it.
            None if limit == Some(-1) => self.standing.swap = 0,
            None => {}
        }
        if limit.is_some() || swap.is_some() {
            let convert = convert_swap(self.standing.swap, self.standing.memory);
            if let Some(value) = convert.or_else(|why| refuse("memory.swap", why))? {
                self.set("memory.swap", "memory.swap.max", number(value));
                if matches!(value, -1 | 0) {
                    // Without swap there is nothing to limit.
                    self.last_is_optional();
                }
            }
        }
        if let Some(limit) = limit {
            self.set("memory.limit", "memory.max", number(limit));
        }
        if let Some(reservation) = reservation {
            self.set("memory.reservation", "memory.low", number(reservation));
        }
        if memory.check_before_update() == Some(true) {
            let bytes = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
            let limits = [
                bytes(self.standing.swap).map(|bytes| ("linux.resources.memory.swap", bytes)),
                bytes(self.standing.memory).map(|bytes| ("linux.resources.memory.limit", bytes)),
            ];
            self.least_memory = limits.into_iter().flatten().min_by_key(|(_, bytes)| *bytes);
        }
        Ok(())
    }
}

fn refuse_what_v2_has_not(memory: &LinuxMemory) -> Result<(), Fault> {
    let some = |value: Option<i64>| value.is_some_and(|value| !matches!(value, 0 | -1));
    // The field is deprecated, and refused for what it is.
    #[allow(deprecated)]
    let kernel = memory.kernel();
    if some(kernel) {
        return refuse(
            "memory.kernel",
            "cgroup v2 has no limit of its own for kernel memory",
        );
    }
    if some(memory.kernel_tcp()) {
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
    Ok(())
}

/// The limit of swap alone for version 1's limit of memory and swap together; -1 is none. `None`: as it is.
fn convert_swap(swap: i64, memory: i64) -> Result<Option<i64>, &'static str> {
    match (swap, memory) {
        (0, -1) | (-1, _) => Ok(Some(-1)),
        (0, _) => Ok(None),
        (swap, -1) => Ok(Some(swap)),
        (_, 0) => Err("unable to set swap limit without memory limit"),
        (swap, memory) => match swap.checked_sub(memory) {
            Some(rest @ 0..) => Ok(Some(rest)),
            _ => Err("memory+swap limit should be >= memory limit"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Standing,
        tests::{assert_refused, pairs, settings, settings_on},
    };

    #[test]
    fn swap_is_what_runc_makes_of_it() {
        for (json, expected) in [
            (r#"{"limit":1000}"#, &[("memory.max", "1000")][..]),
            (
                r#"{"limit":1000,"swap":1000}"#,
                &[("memory.swap.max", "0"), ("memory.max", "1000")],
            ),
            (
                r#"{"limit":1000,"swap":3000}"#,
                &[("memory.swap.max", "2000"), ("memory.max", "1000")],
            ),
            (
                r#"{"limit":1000,"swap":-1}"#,
                &[("memory.swap.max", "max"), ("memory.max", "1000")],
            ),
            (r#"{"limit":1000,"swap":0}"#, &[("memory.max", "1000")]),
            (
                r#"{"limit":-1}"#,
                &[("memory.swap.max", "max"), ("memory.max", "max")],
            ),
            (
                r#"{"limit":-1,"swap":500}"#,
                &[("memory.swap.max", "500"), ("memory.max", "max")],
            ),
            (r#"{"swap":-1}"#, &[("memory.swap.max", "max")]),
            (r#"{"reservation":-1}"#, &[("memory.low", "max")]),
            (r#"{"kernel":-1,"kernelTCP":0}"#, &[]),
        ] {
            assert_eq!(
                settings(&format!(r#"{{"memory":{json}}}"#)).unwrap(),
                pairs(expected),
                "{json}"
            );
        }
    }

    #[test]
    fn an_update_builds_on_what_stands() {
        let (_, standing) =
            settings_on(&Standing::default(), r#"{"memory":{"limit":1000,"swap":3000}}"#).unwrap();
        let update = |json: &str| {
            settings_on(&standing, &format!(r#"{{"memory":{json}}}"#)).map(|(settings, _)| settings)
        };
        // Both together stay what they were.
        assert_eq!(
            update(r#"{"limit":2000}"#).unwrap(),
            pairs(&[("memory.swap.max", "1000"), ("memory.max", "2000")])
        );
        assert_eq!(
            update(r#"{"swap":1500}"#).unwrap(),
            pairs(&[("memory.swap.max", "500")])
        );
        assert_eq!(
            update(r#"{"limit":-1}"#).unwrap(),
            pairs(&[("memory.swap.max", "max"), ("memory.max", "max")])
        );
        assert_eq!(
            update(r#"{"reservation":10}"#).unwrap(),
            pairs(&[("memory.low", "10")])
        );
        let fault = update(r#"{"limit":4000}"#).unwrap_err();
        assert_eq!(
            fault.message,
            "linux.resources.memory.swap: memory+swap limit should be >= memory limit"
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_refused(&[
            ("memory.swap", r#"{"memory":{"limit":1000,"swap":500}}"#),
            ("memory.swap", r#"{"memory":{"swap":500}}"#),
            ("memory.limit", r#"{"memory":{"limit":-2}}"#),
            ("memory.reservation", r#"{"memory":{"reservation":-5}}"#),
            ("memory.kernel", r#"{"memory":{"kernel":500}}"#),
            ("memory.kernelTCP", r#"{"memory":{"kernelTCP":500}}"#),
            ("memory.swappiness", r#"{"memory":{"swappiness":5}}"#),
            (
                "memory.disableOOMKiller",
                r#"{"memory":{"disableOOMKiller":true}}"#,
            ),
            ("memory.useHierarchy", r#"{"memory":{"useHierarchy":false}}"#),
        ]);
    }
}
