//! How large a sandbox's machine is, and what it may use of the host.

use std::collections::HashMap;

use husk_vmm_protocol::config::MAX_VCPUS;

use crate::{
    config::Machine,
    front::bundle::Outline,
    host::cgroup::{CpuList, Limits},
};

/// What of memory is needed on the host besides the machine's own, at least, in MiB: for the VMM, the file server and
/// what both have the kernel keep, the shim and the stand-ins. See [`Asked::limits`].
const HOST_OVERHEAD_MIB: u64 = 128;

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Number of CPUs.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// This host.
    pub fn this() -> Self {
        let memory = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: memory >> 20,
        }
    }
}

/// The limits that are asked for: those of the first container, or of the whole pod where the engine tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// CPU time and its period, in microseconds.
    quota: Option<(i64, u64)>,
    shares: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
    /// In bytes.
    memory: Option<u64>,
    pids: Option<i64>,
    /// They are for all containers that the sandbox will have.
    pub whole: bool,
}

impl Asked {
    /// By config.json of the first container.
    pub fn of(outline: &Outline) -> Self {
        if let Some(pod) = outline.annotations.as_ref().and_then(Self::of_pod) {
            return pod;
        }
        let resources = outline.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let Some(resources) = resources else {
            return Self::default();
        };
        let given = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        let cpu = resources.cpu.as_ref();
        let period = cpu.and_then(|cpu| cpu.period);
        let memory = resources.memory.as_ref().and_then(|memory| memory.limit);
        Self {
            quota: quota(cpu.and_then(|cpu| cpu.quota), period),
            shares: cpu.and_then(|cpu| cpu.shares).filter(|shares| *shares > 0),
            cpus: cpu.and_then(|cpu| given(&cpu.cpus)),
            mems: cpu.and_then(|cpu| given(&cpu.mems)),
            memory: positive(memory),
            pids: resources
                .pids
                .as_ref()
                .and_then(|pids| pids.limit)
                .filter(|limit| *limit > 0),
            whole: false,
        }
    }

    /// By what Kubernetes' engines note on a pod's first container: the sums over those to come, 0 for none.
    fn of_pod(annotations: &HashMap<String, String>) -> Option<Self> {
        let number = |name: &str| {
            let text = annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
            text.parse::<i64>().ok()
        };
        let (period, time) = (number("cpu-period"), number("cpu-quota"));
        let (shares, memory) = (number("cpu-shares"), number("memory"));
        let told = [period, time, shares, memory].iter().any(Option::is_some);
        told.then(|| Self {
            quota: quota(time, positive(period)),
            shares: positive(shares),
            memory: positive(memory),
            whole: true,
            ..Self::default()
        })
    }

    /// vCPUs that can be of use; `None`: as many as there are.
    fn vcpus(&self) -> Option<u64> {
        let by_quota = self
            .quota
            .and_then(|(quota, period)| Some(u64::try_from(quota).ok()?.div_ceil(period)));
        let by_set = self.cpus.as_deref().and_then(|list| {
            let count = list.parse::<CpuList>().ok()?.numbers().count();
            u64::try_from(count).ok()
        });
        by_quota.into_iter().chain(by_set).min()
    }

    /// What the sandbox's processes may use of the host, with a machine of `memory_mib`.
    ///
    /// The containers meet their limits in the guest. Those here hold for what might have taken the guest over, and
    /// leave room for what serves it, so that nothing else ever meets them. A machine cannot use more memory than it has;
    /// what serves it (measured: `memory.peak` of the sandbox's cgroup, less the guest's memory, after
    /// `find / -type f -exec cat {} +` in the container) is small, but has page tables for all of the guest's memory (1/512
    /// each in the VMM and in KVM) and what is cached of the files that it reads, which the kernel can take back.
    pub fn limits(&self, memory_mib: u32) -> Limits {
        let memory = u64::from(memory_mib);
        let memory = (memory + memory / 64 + HOST_OVERHEAD_MIB) << 20;
        Limits {
            memory: self.memory.map(|_| memory),
            cpu: self
                .quota
                .map(|(quota, period)| Limits::cpu_with_room(quota, Some(period))),
            cpu_shares: self.shares,
            cpus: self.cpus.clone(),
            mems: self.mems.clone(),
            pids: self.pids.map(Limits::pids_with_room),
        }
    }
}

fn positive(number: Option<i64>) -> Option<u64> {
    number
        .and_then(|number| u64::try_from(number).ok())
        .filter(|number| *number > 0)
}

/// A quota with its period, if it limits anything.
fn quota(quota: Option<i64>, period: Option<u64>) -> Option<(i64, u64)> {
    let quota = quota.filter(|quota| *quota > 0)?;
    Some((quota, period.filter(|period| *period > 0).unwrap_or(100_000)))
}

impl Size {
    /// A machine for what is asked: what the limits allow, and never more than the host has or the operator allows; the
    /// operator's defaults where there are none.
    pub fn of(asked: &Asked, host: Host, machine: &Machine) -> Self {
        let vcpus = match asked.vcpus() {
            None => machine.default_vcpus(host.cpus),
            Some(wanted) => {
                let most = u64::from(machine.most_vcpus(host.cpus));
                u8::try_from(wanted.clamp(1, most)).unwrap_or(MAX_VCPUS)
            }
        };
        let most = machine.most_memory_mib(host.memory_mib);
        let memory_mib = match asked.memory {
            None => machine.memory_mib,
            // On top of it, so that the containers meet their limits and not the machine's.
            Some(limit) => {
                let limit = limit.div_ceil(1 << 20);
                let wanted = limit.saturating_add(overhead_mib(limit, machine));
                u32::try_from(wanted)
                    .unwrap_or(u32::MAX)
                    .max(machine.memory_mib)
                    .min(most)
            }
        };
        Self { vcpus, memory_mib }
    }
}

/// What a guest needs of its memory besides what its containers may use, in MiB, where they may use `limit` MiB.
fn overhead_mib(limit: u64, machine: &Machine) -> u64 {
    u64::from(machine.memory_overhead_mib).saturating_add(limit / 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16 << 10,
    };

    fn asked(resources: serde_json::Value) -> Asked {
        let outline = serde_json::json!({ "linux": { "resources": resources } });
        Asked::of(&serde_json::from_value(outline).unwrap())
    }

    fn size(resources: serde_json::Value) -> Size {
        Size::of(&asked(resources), HOST, &Machine::default())
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        let default = Size {
            vcpus: 2,
            memory_mib: 256,
        };
        let nothing = Asked::of(&Outline::default());
        assert_eq!(Size::of(&nothing, HOST, &Machine::default()), default);
        assert_eq!(nothing.limits(256), Limits::default());
        assert_eq!(size(serde_json::json!({})), default);
        let unlimited = serde_json::json!({
            "cpu": { "quota": -1, "period": 0, "shares": 0, "cpus": "" },
            "memory": { "limit": -1 },
            "pids": { "limit": -1 },
        });
        assert_eq!(asked(unlimited), Asked::default());
    }

    #[test]
    fn limits_set_the_size_up_to_the_host_s() {
        let cpus =
            |quota: i64| size(serde_json::json!({ "cpu": { "quota": quota, "period": 100_000 } })).vcpus;
        assert_eq!(
            (cpus(1), cpus(100_000), cpus(150_000), cpus(i64::MAX)),
            (1, 1, 2, 8)
        );
        let set = |list: &str| size(serde_json::json!({ "cpu": { "cpus": list } })).vcpus;
        assert_eq!((set("2-3"), set("5"), set("0-63"), set("x")), (2, 1, 8, 2));
        let both = serde_json::json!({ "cpu": { "cpus": "0-3", "quota": 150_000 } });
        assert_eq!(size(both).vcpus, 2);
        let mib = |limit: i64| size(serde_json::json!({ "memory": { "limit": limit } })).memory_mib;
        assert_eq!(mib(1 << 30), 1024 + 96 + 32);
        assert_eq!(mib(1), 256);
        assert_eq!(mib(i64::MAX), 16 << 10);
    }

    #[test]
    fn a_pod_is_as_large_as_its_containers_to_come() {
        let pod = |annotations: serde_json::Value| {
            let outline = serde_json::json!({
                "annotations": annotations,
                "linux": { "resources": { "cpu": { "shares": 2 }, "memory": { "limit": 1_000_000 } } },
            });
            Asked::of(&serde_json::from_value(outline).unwrap())
        };
        let sums = pod(serde_json::json!({
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "250000",
            "io.kubernetes.cri.sandbox-cpu-shares": "2560",
            "io.kubernetes.cri.sandbox-memory": "1073741824",
        }));
        let expected = Size {
            vcpus: 3,
            memory_mib: 1152,
        };
        assert_eq!(Size::of(&sums, HOST, &Machine::default()), expected);
        let limits = sums.limits(1152);
        assert_eq!(limits.cpu, Some((275_000, 100_000)));
        assert_eq!(limits.cpu_shares, Some(2560));
        assert_eq!(limits.memory, Some((1152 + 18 + 128) << 20));
        assert!(sums.whole);
        let none = pod(serde_json::json!({
            "io.kubernetes.cri.sandbox-cpu-quota": "0",
            "io.kubernetes.cri.sandbox-memory": "0",
        }));
        assert_eq!(none.limits(256), Limits::default());
        assert!(none.whole && !pod(serde_json::json!({})).whole);
    }
}
