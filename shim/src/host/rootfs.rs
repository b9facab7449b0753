//! A container's root file system: the mounts that the engine names, and the share that shows them to the guest.

use std::path::PathBuf;

/// A mount that the engine asks for, in the words of containerd's `types.Mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Type of the file system, or `bind`.
    pub kind: String,
    /// Device, directory or name.
    pub source: String,
    /// Where, beneath the root; empty: the root itself.
    pub target: String,
    /// Options as in fstab(5): flags by name, and data of the file system.
    pub options: Vec<String>,
}

impl Mount {
    /// The directory this mount needs, if it is a bind mount.
    pub fn bind_source(&self) -> Option<PathBuf> {
        (self.kind == "bind").then(|| PathBuf::from(&self.source))
    }
}
