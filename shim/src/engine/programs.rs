//! Where husk's programs and the guest image are.

use std::path::{Path, PathBuf};

use super::LocateError;

/// What a sandbox is run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// `husk-vmm`.
    pub vmm: PathBuf,
    /// `husk-fsd`.
    pub fsd: PathBuf,
    /// The guest kernel: an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

impl Programs {
    /// Finds them from where this program is installed: PREFIX/bin.
    ///
    /// # Errors
    /// When this program is not in an installation, or the installation is not complete.
    pub fn locate() -> Result<Self, LocateError> {
        let own = std::fs::read_link("/proc/self/exe").map_err(LocateError::OwnPath)?;
        let prefix = own
            .parent()
            .filter(|bin| bin.file_name().is_some_and(|name| name == "bin"))
            .and_then(Path::parent)
            .ok_or_else(|| LocateError::NotInstalled(own.clone()))?;
        Self::under(prefix)
    }

    /// Finds them under `prefix`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn under(prefix: &Path) -> Result<Self, LocateError> {
        let file = |what, below: &str| {
            let path = prefix.join(below);
            if path.is_file() {
                Ok(path)
            } else {
                Err(LocateError::Missing { what, path })
            }
        };
        Ok(Self {
            vmm: file("the machine's program", "libexec/husk/husk-vmm")?,
            fsd: file("the file server", "libexec/husk/husk-fsd")?,
            kernel: file("the guest kernel", "lib/husk/vmlinux")?,
            initramfs: file("the guest's initramfs", "lib/husk/initramfs.cpio")?,
        })
    }
}
