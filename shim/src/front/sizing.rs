//! How large a sandbox's machine is.

use husk_vmm_protocol::config::MAX_VCPUS;

use crate::{config::Machine, front::bundle::Outline};

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

impl Size {
    /// A machine for a sandbox whose first container is `outline`: what its limits allow, and never more than the
    /// host has or the operator allows; the operator's defaults where it has none.
    pub fn for_container(outline: &Outline, host: Host, machine: &Machine) -> Self {
        let resources = outline.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let cpu = resources.and_then(|resources| resources.cpu.as_ref());
        let quota = cpu
            .and_then(|cpu| cpu.quota)
            .and_then(|quota| u64::try_from(quota).ok());
        let period = cpu.and_then(|cpu| cpu.period).unwrap_or(100_000);
        let vcpus = match (quota, period) {
            (None | Some(0), _) | (_, 0) => machine.default_vcpus(host.cpus),
            (Some(quota), period) => {
                let most = u64::from(machine.most_vcpus(host.cpus));
                u8::try_from(quota.div_ceil(period).clamp(1, most)).unwrap_or(MAX_VCPUS)
            }
        };
        let limit = resources
            .and_then(|resources| resources.memory.as_ref())
            .and_then(|memory| memory.limit)
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0);
        let most = machine.most_memory_mib(host.memory_mib);
        let memory_mib = match limit {
            None => machine.memory_mib,
            // On top of its limit, so that a container meets its own and not the machine's.
            Some(limit) => {
                let wanted = (limit >> 20).saturating_add(machine.memory_overhead_mib.into());
                u32::try_from(wanted)
                    .unwrap_or(u32::MAX)
                    .max(machine.memory_mib)
                    .min(most)
            }
        };
        Self { vcpus, memory_mib }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16 << 10,
    };

    fn size(resources: serde_json::Value) -> Size {
        let outline = serde_json::json!({ "linux": { "resources": resources } });
        Size::for_container(
            &serde_json::from_value(outline).unwrap(),
            HOST,
            &Machine::default(),
        )
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        let default = Size {
            vcpus: 2,
            memory_mib: 256,
        };
        assert_eq!(
            Size::for_container(&Outline::default(), HOST, &Machine::default()),
            default
        );
        assert_eq!(size(serde_json::json!({})), default);
        let unlimited = serde_json::json!({ "cpu": { "quota": -1, "period": 0 }, "memory": { "limit": -1 } });
        assert_eq!(size(unlimited), default);
    }

    #[test]
    fn limits_set_the_size_up_to_the_host_s() {
        let cpus =
            |quota: i64| size(serde_json::json!({ "cpu": { "quota": quota, "period": 100_000 } })).vcpus;
        assert_eq!(
            (cpus(1), cpus(100_000), cpus(150_000), cpus(i64::MAX)),
            (1, 1, 2, 8)
        );
        let mib = |limit: i64| size(serde_json::json!({ "memory": { "limit": limit } })).memory_mib;
        assert_eq!(mib(1 << 30), 1024 + 96);
        assert_eq!(mib(1), 256);
        assert_eq!(mib(i64::MAX), 16 << 10);
    }
}
