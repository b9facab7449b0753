//! The places of the host that the engine uses.

use std::path::PathBuf;

use crate::host::{cgroup::Hierarchies, statedir::RUN};

/// Where things are. Tests put theirs elsewhere, and make chosen steps fail.
#[derive(Clone, Debug)]
pub struct Places {
    /// The sandboxes' directories.
    pub run: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// The cgroup hierarchies; `None`: this host's.
    pub cgroups: Option<Hierarchies>,
    /// The step that fails.
    #[cfg(test)]
    pub fault: Option<&'static str>,
    /// Who plays the machine.
    #[cfg(test)]
    pub player: Option<super::sandbox_test::Player>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            run: RUN.into(),
            kvm: "/dev/kvm".into(),
            cgroups: None,
            #[cfg(test)]
            fault: None,
            #[cfg(test)]
            player: None,
        }
    }
}

impl Places {
    /// A step of a recipe begins. In tests a chosen one fails here.
    ///
    /// # Errors
    /// In tests only.
    #[cfg_attr(not(test), allow(clippy::unused_self))]
    pub fn step(&self, _name: &'static str) -> std::io::Result<()> {
        #[cfg(test)]
        if self.fault == Some(_name) {
            return Err(std::io::Error::other(format!("injected at {_name}")));
        }
        Ok(())
    }
}
