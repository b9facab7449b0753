//! A container's limits, once it is there, and what it has used.

use std::collections::HashMap;

use oci_spec::runtime::LinuxResources;

use super::{Error, Sandbox};
use crate::{
    container::{
        cgroup::Cgroup,
        device_rules::DeviceRules,
        resources::{self, Guest},
    },
    device_filter::DeviceFilter,
    document,
    fault::Fault,
};

const DEVICES: &str = "linux.resources.devices";

/// Has the kernel hold the cgroup to `rules` in place of what `old` says. Answers the filter to keep.
pub(super) fn attach_filter(
    cgroup: &Cgroup,
    rules: &DeviceRules,
    old: Option<&DeviceFilter>,
) -> Result<DeviceFilter, Fault> {
    let attached = DeviceFilter::load(&rules.program()).and_then(|filter| {
        filter.attach(cgroup.directory(), old)?;
        Ok(filter)
    });
    attached.map_err(|error| Fault::system(DEVICES, error))
}

impl Sandbox {
    /// Changes what `json`, a `linux.resources`, names. A failure changes nothing.
    ///
    /// A limit of memory below what is used can take a while: the kernel reclaims, and kills, before it answers.
    pub fn update(&self, id: &str, json: &[u8]) -> Result<(), Error> {
        let resources: LinuxResources = document::read(json, "linux.resources")?;
        let mut state = self.state();
        let container = state.container(id)?;
        if !container.init.phase.can_be_limited() || container.deleting {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            )));
        }
        let plan = resources::plan(&resources, &container.standing, &Guest::read())?;
        if let (Some((field, limit)), Some(usage)) = (plan.least_memory, container.cgroup.memory()) {
            if limit <= usage {
                let problem = format_args!("rejecting memory limit {limit} <= usage {usage}");
                return Err(Fault::spec(field, problem).into());
            }
        }
        let undo = container.cgroup.set(&plan.settings)?;
        if let Some(rules) = &plan.devices {
            match attach_filter(&container.cgroup, rules, container.filter.as_ref()) {
                Ok(filter) => container.filter = Some(filter),
                Err(fault) => {
                    container.cgroup.undo(undo);
                    return Err(fault.into());
                }
            }
        }
        container.standing = plan.standing;
        Ok(())
    }

    /// What the kernel counts for a container: names and texts of its cgroup's files.
    pub fn statistics(&self, id: &str) -> Result<HashMap<String, String>, Error> {
        Ok(self.state().container(id)?.cgroup.statistics())
    }
}
