//! `linux.resources.cpu`.

use oci_spec::runtime::LinuxCpu;

use super::{Plan, refuse};
use crate::fault::Fault;

/// Default period of `cpu.max` in microseconds, the kernel's own.
const DEFAULT_PERIOD: u64 = 100_000;

/// The processors and memory nodes that this machine has.
#[derive(Debug)]
pub struct Guest {
    cpus: Vec<(u32, u32)>,
    mems: Vec<(u32, u32)>,
}

impl Guest {
    /// As the kernel tells.
    pub fn read() -> Self {
        // A kernel without NUMA tells of no nodes, and has one.
        let list = |path: &str| std::fs::read_to_string(path).unwrap_or_else(|_| "0".to_owned());
        Self::of(
            &list("/sys/devices/system/cpu/online"),
            &list("/sys/devices/system/node/online"),
        )
    }

    pub(super) fn of(cpus: &str, mems: &str) -> Self {
        let list = |text| parse_list(text).unwrap_or_default();
        Self {
            cpus: list(cpus),
            mems: list(mems),
        }
    }
}

/// The ranges in a list like `0-3,8`, both ends included.
fn parse_list(text: &str) -> Option<Vec<(u32, u32)>> {
    let ranges = text.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first <= last).then_some((first, last))
    });
    ranges.collect()
}

fn write_list(ranges: &[(u32, u32)]) -> String {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(first, last)| format!("{first}-{last}"))
        .collect();
    ranges.join(",")
}

/// Whether all in `ranges` are in `present`, which is in the kernel's form: what is next to each other is one range.
fn all_present(ranges: &[(u32, u32)], present: &[(u32, u32)]) -> bool {
    ranges.iter().all(|(first, last)| {
        present
            .iter()
            .any(|(lowest, highest)| lowest <= first && last <= highest)
    })
}

impl Plan {
    pub(super) fn cpu(&mut self, cpu: &LinuxCpu, guest: &Guest) -> Result<(), Fault> {
        for (field, is_set) in [
            (
                "cpu.realtimeRuntime",
                cpu.realtime_runtime().is_some_and(|value| value != 0),
            ),
            (
                "cpu.realtimePeriod",
                cpu.realtime_period().is_some_and(|value| value != 0),
            ),
        ] {
            if is_set {
                return refuse(field, "cgroup v2 has no limits for real-time scheduling");
            }
        }
        let shares = cpu.shares().filter(|shares| *shares != 0);
        match cpu.idle() {
            None => {}
            Some(1) if shares.is_some() => {
                return refuse("cpu.shares", "what is idle by cpu.idle has no shares");
            }
            Some(idle @ (0 | 1)) => self.set("cpu.idle", "cpu.idle", idle.to_string()),
            Some(_) => return refuse("cpu.idle", "is neither 0 nor 1"),
        }
        if let Some(shares) = shares {
            self.set("cpu.shares", "cpu.weight", weight(shares).to_string());
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        // The kernel wants the burst never to be above the quota: it is lowered before, and raised after it.
        if let Some(burst) = cpu.burst() {
            self.set("cpu.burst", "cpu.max.burst", burst.to_string());
        }
        if quota.is_some() || period.is_some() {
            let standing = &mut self.standing;
            standing.quota = quota.unwrap_or(standing.quota);
            standing.period = period.unwrap_or(standing.period);
            let period = if standing.period == 0 {
                DEFAULT_PERIOD
            } else {
                standing.period
            };
            let value = if standing.quota > 0 {
                format!("{} {period}", standing.quota)
            } else {
                format!("max {period}")
            };
            let field = if quota.is_some() {
                "cpu.quota"
            } else {
                "cpu.period"
            };
            self.set(field, "cpu.max", value);
        }
        for (field, file, list, present) in [
            ("cpu.cpus", "cpuset.cpus", cpu.cpus(), &guest.cpus),
            ("cpu.mems", "cpuset.mems", cpu.mems(), &guest.mems),
        ] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                let Some(ranges) = parse_list(list) else {
                    return refuse(field, format_args!("{list:?} is no list of numbers"));
                };
                let value = if all_present(&ranges, present) {
                    list.to_owned()
                } else {
                    write_list(present)
                };
                self.set(field, file, value);
            }
        }
        Ok(())
    }
}

/// `cpu.weight` (1 to 10000, by default 100) for v1's shares (2 to 262144, by default 1024).
fn weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    // The parabola through the lowest, the highest and the default.
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{
            Standing,
            tests::{assert_refused, pairs, settings, settings_on},
        },
        *,
    };

    #[test]
    fn shares_become_weights_as_runc_converts_them() {
        for (shares, expected) in [
            (1, 1),
            (2, 1),
            (3, 2),
            (10, 4),
            (100, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (10_240, 639),
            (262_143, 10_000),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn quota_and_period_belong_together() {
        let (_, standing) =
            settings_on(&Standing::default(), r#"{"cpu":{"quota":50000,"period":200000}}"#).unwrap();
        for (json, expected) in [
            (r#"{"quota":1000}"#, "1000 200000"),
            (r#"{"period":50000}"#, "50000 50000"),
            (r#"{"quota":-1}"#, "max 200000"),
        ] {
            let (settings, _) = settings_on(&standing, &format!(r#"{{"cpu":{json}}}"#)).unwrap();
            assert_eq!(settings, pairs(&[("cpu.max", expected)]));
        }
        assert_eq!(
            settings(r#"{"cpu":{"quota":50000}}"#).unwrap(),
            pairs(&[("cpu.max", "50000 100000")])
        );
        assert_eq!(
            settings(r#"{"cpu":{"period":50000}}"#).unwrap(),
            pairs(&[("cpu.max", "max 50000")])
        );
        assert_eq!(settings_on(&standing, r#"{"cpu":{}}"#).unwrap().0, []);
    }

    #[test]
    fn idle_and_burst() {
        assert_eq!(
            settings(r#"{"cpu":{"idle":1,"shares":0,"burst":0,"quota":2000}}"#).unwrap(),
            pairs(&[
                ("cpu.idle", "1"),
                ("cpu.max.burst", "0"),
                ("cpu.max", "2000 100000")
            ])
        );
    }

    #[test]
    fn processors_are_the_guests_only_if_it_has_them() {
        for (cpus, expected) in [
            ("0", "0"),
            ("0-1", "0-1"),
            ("1,0", "1,0"),
            ("2-3", "0-1"),
            ("0,2", "0-1"),
            ("0-4294967295", "0-1"),
        ] {
            assert_eq!(
                settings(&format!(r#"{{"cpu":{{"cpus":"{cpus}"}}}}"#)).unwrap(),
                pairs(&[("cpuset.cpus", expected)])
            );
        }
        assert_eq!(
            settings(r#"{"cpu":{"cpus":"","mems":"1"}}"#).unwrap(),
            pairs(&[("cpuset.mems", "0-0")])
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_refused(&[
            ("cpu.realtimeRuntime", r#"{"cpu":{"realtimeRuntime":5}}"#),
            ("cpu.realtimePeriod", r#"{"cpu":{"realtimePeriod":5}}"#),
            ("cpu.idle", r#"{"cpu":{"idle":2}}"#),
            ("cpu.shares", r#"{"cpu":{"idle":1,"shares":5}}"#),
            ("cpu.cpus", r#"{"cpu":{"cpus":"all"}}"#),
            ("cpu.cpus", r#"{"cpu":{"cpus":"3-1"}}"#),
            ("cpu.mems", r#"{"cpu":{"mems":"0,"}}"#),
        ]);
    }

    proptest! {
        #[test]
        fn weights_stay_in_range(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight(shares)));
        }

        #[test]
        fn more_shares_are_no_less_weight(shares in 0u64..262_144) {
            prop_assert!(weight(shares) <= weight(shares + 1));
        }
    }
}
