//! What happens between the agent and a container's init process if the init process must be *made* in namespaces that
//! are entered first: a user namespace, whose root it then is and which owns its other namespaces; a time namespace,
//! whose offsets can be set only while nobody is in it; those of another container.
//!
//! The process in between is the sandbox's root to begin with, and makes what only the sandbox's root can make.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use super::{plan::ContainerPlan, user::Mappings};
use crate::{fault::Fault, process::enter, sys};

/// A place that nothing looks at between the sandbox's root and the container's.
const SPARE: &str = "/sys";

/// The namespaces to enter.
#[derive(Debug)]
pub struct Stage {
    /// Namespaces (`CLONE_NEW…`) of the process that the pidfd names, of its container's init.
    pub joined: Vec<(i32, Arc<OwnedFd>)>,
    /// The user namespace and its mappings, unless it is the sandbox's.
    pub user: Option<(OwnedFd, Mappings)>,
}

/// Detached mounts that only the sandbox's root can make, by their index in the plan.
#[derive(Debug, Default)]
pub struct Handed {
    pub mounts: HashMap<usize, OwnedFd>,
    pub devices: HashMap<usize, OwnedFd>,
}

impl Stage {
    /// Becomes what the container's init process shall be made by.
    pub fn enter(&self, plan: &ContainerPlan) -> Result<Handed, Fault> {
        enter::prepare(&plan.process)?;
        let mut handed = Handed::default();
        if let Some((_, mappings)) = &self.user {
            for sysctl in plan.sysctls.iter().filter(|sysctl| sysctl.is_of_network()) {
                sysctl.apply()?;
            }
            handed = Handed::make(plan, mappings)?;
        }
        // A cgroup namespace is entered later: from within one, no process goes into a cgroup outside.
        let later = libc::CLONE_NEWUSER | libc::CLONE_NEWCGROUP;
        for (kinds, pidfd) in &self.joined {
            if kinds & !later != 0 {
                sys::enter_namespaces(pidfd.as_fd(), kinds & !later)
                    .map_err(|error| Fault::system("join namespaces of another container", error))?;
            }
        }
        if let Some((namespace, _)) = &self.user {
            super::user::enter(namespace)?;
        }
        if plan.namespaces.time.is_new() {
            unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
                .map_err(|error| Fault::system("time namespace", error))?;
            plan.time_offsets.apply()?;
        }
        Ok(handed)
    }

    /// Enters the joined cgroup namespace, if there is one, from the container's cgroup.
    pub fn join_cgroup(&self) -> Result<(), Fault> {
        let kind = libc::CLONE_NEWCGROUP;
        let joined = self.joined.iter().find(|(kinds, _)| kinds & kind != 0);
        joined.map_or(Ok(()), |(_, pidfd)| {
            sys::enter_namespaces(pidfd.as_fd(), kind)
                .map_err(|error| Fault::system("join the cgroup namespace of another container", error))
        })
    }
}

impl Handed {
    fn make(plan: &ContainerPlan, mappings: &Mappings) -> Result<Self, Fault> {
        let mut handed = Self::default();
        for (index, mount) in plan.mounts.iter().enumerate() {
            if mount.is_of_sandbox() {
                handed.mounts.insert(index, mount.make_new(None)?);
            }
        }
        // Nodes in a file system of the container's own user namespace could not be opened.
        let failed = |error: std::io::Error| Fault::system("make device nodes", error);
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| failed(error.into()))?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
            .map_err(|error| failed(error.into()))?;
        let nodes = sys::FileSystem::open(c"tmpfs")
            .and_then(|system| system.mount(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC))
            .map_err(failed)?;
        let place = std::fs::File::open(SPARE).map_err(failed)?;
        sys::attach_tree(nodes.as_fd(), place.as_fd()).map_err(failed)?;
        for (index, device) in plan.devices.iter().enumerate() {
            if let Some(node) = device.make_outside(nodes.as_fd(), index, mappings)? {
                handed.devices.insert(index, node);
            }
        }
        umount2(SPARE, MntFlags::MNT_DETACH).map_err(|error| failed(error.into()))?;
        Ok(handed)
    }
}
