//! The limits of a cgroup of the host, as files of either version.

use super::Hierarchy;

/// Limits of a sandbox's processes on the host. `None`: as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory, in bytes.
    pub memory: Option<u64>,
    /// CPU time in each period, both in microseconds.
    pub cpu: Option<(u64, u64)>,
    /// The share of CPU time among others: 2 to 262144, by default 1024, as version 1 counts.
    pub cpu_shares: Option<u64>,
    /// The CPUs, as a list of the kernel's.
    pub cpus: Option<String>,
    /// The memory nodes, as a list of the kernel's.
    pub mems: Option<String>,
    /// Threads.
    pub pids: Option<u64>,
}

impl Limits {
    /// No limit, where one was.
    pub const UNLIMITED: u64 = u64::MAX;

    /// The limit of CPU time for a container's, which holds in the guest. The host leaves a quarter of a CPU more: for
    /// the guest's kernel, the VMM and the file server, without which a low limit would starve what serves the container.
    /// A quota that is not positive is no limit.
    pub fn cpu_with_room(quota: i64, period: Option<u64>) -> (u64, u64) {
        let period = period.filter(|period| *period > 0).unwrap_or(100_000);
        match u64::try_from(quota) {
            Ok(quota) if quota > 0 => (quota.saturating_add(period / 4), period),
            _ => (Self::UNLIMITED, period),
        }
    }

    /// The limit of threads for a container's, which holds in the guest. The host's are of another kind: husk's own
    /// (most are those of its pool, at most 512), and for each exec a process and what attends to it.
    pub fn pids_with_room(limit: i64) -> u64 {
        match u64::try_from(limit) {
            Ok(limit) if limit > 0 => limit.saturating_mul(4).saturating_add(1024),
            _ => Self::UNLIMITED,
        }
    }

    /// The same without the limit of CPU time, and that alone.
    pub fn split_cpu(&self) -> (Self, Self) {
        let rest = Self {
            cpu: None,
            ..self.clone()
        };
        let cpu = Self {
            cpu: self.cpu,
            ..Self::default()
        };
        (rest, cpu)
    }

    /// `cpu.weight` for the shares: runc's classic conversion.
    pub fn weight(&self) -> Option<u64> {
        let shares = self.cpu_shares?.clamp(2, 262_144);
        Some(1 + (shares - 2) * 9999 / 262_142)
    }

    /// What is to be written to which file of a cgroup in a hierarchy, in order.
    pub fn files(&self, hierarchy: &Hierarchy) -> Vec<(&'static str, String)> {
        let number = |number: u64| number.to_string();
        let or = |none: &'static str| {
            move |number: u64| {
                if number == Self::UNLIMITED {
                    none.to_owned()
                } else {
                    number.to_string()
                }
            }
        };
        let (cpus, mems) = (self.cpus.clone(), self.mems.clone());
        let mut files = Vec::new();
        let mut add = |controller, file, value: Option<String>| {
            let here = hierarchy.controllers.is_none() || hierarchy.has(controller);
            if let (true, Some(value)) = (here, value) {
                files.push((file, value));
            }
        };
        if hierarchy.controllers.is_none() {
            let max = self
                .cpu
                .map(|(quota, period)| format!("{} {period}", or("max")(quota)));
            add("cpuset", "cpuset.mems", mems);
            add("cpuset", "cpuset.cpus", cpus);
            add("memory", "memory.max", self.memory.map(or("max")));
            add("cpu", "cpu.weight", self.weight().map(number));
            add("cpu", "cpu.max", max);
            add("pids", "pids.max", self.pids.map(or("max")));
        } else {
            add("cpuset", "cpuset.mems", mems);
            add("cpuset", "cpuset.cpus", cpus);
            add("memory", "memory.limit_in_bytes", self.memory.map(or("-1")));
            add("cpu", "cpu.shares", self.cpu_shares.map(number));
            let (quota, period) = self.cpu.unzip();
            add("cpu", "cpu.cfs_period_us", period.map(number));
            add("cpu", "cpu.cfs_quota_us", quota.map(or("-1")));
            add("pids", "pids.max", self.pids.map(or("max")));
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Limits = Limits {
        memory: Some(1 << 30),
        cpu: Some((150_000, 100_000)),
        cpu_shares: Some(512),
        cpus: None,
        mems: None,
        pids: Some(7),
    };

    fn files(limits: &Limits, controllers: Option<&[&str]>) -> Vec<String> {
        let hierarchy = Hierarchy {
            mount: "/".into(),
            controllers: controllers.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            own: "/".into(),
        };
        let files = limits.files(&hierarchy);
        files
            .iter()
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    }

    #[test]
    fn each_version_has_its_files() {
        assert_eq!(
            files(&ALL, None),
            [
                "memory.max=1073741824",
                "cpu.weight=20",
                "cpu.max=150000 100000",
                "pids.max=7"
            ]
        );
        assert_eq!(
            files(&ALL, Some(&["cpu", "cpuacct"])),
            [
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=150000"
            ]
        );
        assert_eq!(
            files(&ALL, Some(&["memory"])),
            ["memory.limit_in_bytes=1073741824"]
        );
        assert_eq!(files(&ALL, Some(&["name=systemd"])), [] as [&str; 0]);
        let (rest, cpu) = ALL.split_cpu();
        assert_eq!(files(&cpu, None), ["cpu.max=150000 100000"]);
        assert!(!files(&rest, None).iter().any(|file| file.starts_with("cpu.max")));
        assert_eq!(files(&Limits::default(), None), [] as [&str; 0]);
        let none = Limits {
            cpu: Some(Limits::cpu_with_room(-1, Some(0))),
            pids: Some(Limits::pids_with_room(0)),
            ..Limits::default()
        };
        assert_eq!(files(&none, None), ["cpu.max=max 100000", "pids.max=max"]);
        assert_eq!(
            files(&none, Some(&["cpu"])),
            ["cpu.cfs_period_us=100000", "cpu.cfs_quota_us=-1"]
        );
        assert_eq!(Limits::cpu_with_room(1000, None), (26_000, 100_000));
    }
}
