//! Where husk's programs and the guest image are.

use std::path::{Path, PathBuf};

use super::LocateError;
use crate::config::Config;

/// What a sandbox is run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// `husk-vmm`.
    pub vmm: PathBuf,
    /// `husk-fsd`.
    pub fsd: PathBuf,
    /// `husk-standin`.
    pub standin: PathBuf,
    /// The guest kernel: an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

impl Programs {
    /// Finds those that `config` names where it says, and the others from where this program is installed: PREFIX/bin.
    ///
    /// # Errors
    /// When one is missing, or when one has to be found and this program is not in an installation.
    pub fn locate(config: &Config) -> Result<Self, LocateError> {
        let named = |what, option, path: &Option<PathBuf>| match path {
            Some(path) if !path.is_file() => Err(LocateError::Named {
                what,
                option,
                path: path.clone(),
            }),
            path => Ok(path.clone()),
        };
        let vmm = named(VMM, "programs.vmm", &config.programs.vmm)?;
        let fsd = named(FSD, "programs.fsd", &config.programs.fsd)?;
        let standin = named(STANDIN, "programs.standin", &config.programs.standin)?;
        let kernel = named(KERNEL, "guest.kernel", &config.guest.kernel)?;
        let initramfs = named(INITRAMFS, "guest.initramfs", &config.guest.initramfs)?;
        match (vmm, fsd, standin, kernel, initramfs) {
            (Some(vmm), Some(fsd), Some(standin), Some(kernel), Some(initramfs)) => Ok(Self {
                vmm,
                fsd,
                standin,
                kernel,
                initramfs,
            }),
            (vmm, fsd, standin, kernel, initramfs) => {
                let prefix = Self::prefix()?;
                let file = |given: Option<PathBuf>, what, below: &str| match given {
                    Some(given) => Ok(given),
                    None => installed(&prefix, what, below),
                };
                Ok(Self {
                    vmm: file(vmm, VMM, "libexec/husk/husk-vmm")?,
                    fsd: file(fsd, FSD, "libexec/husk/husk-fsd")?,
                    standin: file(standin, STANDIN, "libexec/husk/husk-standin")?,
                    kernel: file(kernel, KERNEL, "lib/husk/vmlinux")?,
                    initramfs: file(initramfs, INITRAMFS, "lib/husk/initramfs.cpio")?,
                })
            }
        }
    }

    /// Where this program is installed.
    fn prefix() -> Result<PathBuf, LocateError> {
        let own = std::fs::read_link("/proc/self/exe").map_err(LocateError::OwnPath)?;
        own.parent()
            .filter(|bin| bin.file_name().is_some_and(|name| name == "bin"))
            .and_then(Path::parent)
            .map(Path::to_owned)
            .ok_or(LocateError::NotInstalled(own))
    }
}

const VMM: &str = "the machine's program";
const FSD: &str = "the file server";
const STANDIN: &str = "the stand-in";
const KERNEL: &str = "the guest kernel";
const INITRAMFS: &str = "the guest's initramfs";

fn installed(prefix: &Path, what: &'static str, below: &str) -> Result<PathBuf, LocateError> {
    let path = prefix.join(below);
    if path.is_file() {
        Ok(path)
    } else {
        Err(LocateError::Missing { what, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_configuration_names_is_taken_from_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            Some(path)
        };
        let mut config = Config::default();
        config.programs.vmm = file("v");
        config.programs.fsd = file("f");
        config.programs.standin = file("s");
        config.guest.kernel = file("k");
        // A test's program is in no installation.
        let error = Programs::locate(&config).unwrap_err();
        assert!(matches!(error, LocateError::NotInstalled(_)), "{error}");
        config.guest.initramfs = file("i");
        let programs = Programs::locate(&config).unwrap();
        assert_eq!(Some(programs.kernel), config.guest.kernel);
        config.guest.kernel = Some("/no/such/kernel".into());
        let error = Programs::locate(&config).unwrap_err().to_string();
        assert!(
            error.contains("guest.kernel") && error.contains("/no/such/kernel"),
            "{error}"
        );
    }
}
