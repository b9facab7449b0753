//! `linux.sysctl`: settings of the container's namespaces.

use std::{ffi::CString, fs::File, io::Write, os::fd::AsFd};

use super::namespaces::Namespaces;
use crate::{fault::Fault, sys};

/// One setting.
#[derive(Debug, PartialEq, Eq)]
pub struct Sysctl {
    key: String,
    /// Below `/proc/sys`.
    path: CString,
    value: String,
}

/// Settings of System V IPC, which is per namespace, as `fs.mqueue.*` is.
const IPC: &[&str] = &[
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

impl Sysctl {
    /// Checks that the setting belongs to a namespace of the container or to the sandbox's network.
    ///
    /// # Errors
    ///
    /// It belongs to the kernel, or to a namespace that the container shares.
    pub fn new(key: &str, value: &str, namespaces: &Namespaces) -> Result<Self, Fault> {
        let field = format!("linux.sysctl ({key})");
        // `net.ipv4.conf.eth0.forwarding`, or with slashes where a name holds a dot.
        let path = if key.contains('/') {
            key.to_owned()
        } else {
            key.replace('.', "/")
        };
        // `net/../kernel/core_pattern` is the kernel's.
        let winding = path.split('/').any(|part| matches!(part, "" | "." | ".."));
        let own = if winding {
            false
        } else if path.starts_with("net/") {
            true
        } else if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
            namespaces.ipc.is_separate()
        } else {
            path == "kernel/domainname" && namespaces.uts.is_separate()
        };
        if !own {
            return Err(Fault::spec(field, "is not in a separate kernel namespace"));
        }
        let path = CString::new(path).map_err(|_| Fault::spec(&field, "contains a NUL character"))?;
        Ok(Self {
            key: key.to_owned(),
            path,
            value: value.to_owned(),
        })
    }

    /// Whether it is of the sandbox's network, which only the sandbox's root may change.
    pub fn is_of_network(&self) -> bool {
        self.path.as_bytes().starts_with(b"net/")
    }

    /// Writes it, in the calling process's namespaces.
    pub fn apply(&self) -> Result<(), Fault> {
        let failed =
            |error: std::io::Error| Fault::system(format_args!("set linux.sysctl: {}", self.key), error);
        let base = File::open("/proc/sys").map_err(failed)?;
        let flags = libc::O_WRONLY;
        let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
        let file = sys::openat2(base.as_fd(), &self.path, flags, 0, resolve).map_err(failed)?;
        File::from(file).write_all(self.value.as_bytes()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::namespaces::Origin;

    #[test]
    fn only_settings_of_own_namespaces_are_taken() {
        let own = Namespaces {
            ipc: Origin::New,
            ..Default::default()
        };
        assert_eq!(
            Sysctl::new("net.ipv4.ip_forward", "1", &own)
                .unwrap()
                .path
                .as_c_str(),
            c"net/ipv4/ip_forward"
        );
        assert!(Sysctl::new("net/ipv4/conf/eth0.1/forwarding", "1", &own).is_ok());
        assert!(Sysctl::new("kernel.shmmax", "1", &own).is_ok());
        assert!(Sysctl::new("kernel.shmmax", "1", &Namespaces::default()).is_err());
        assert!(Sysctl::new("kernel.domainname", "x", &own).is_err());
        let fault = Sysctl::new("vm.swappiness", "1", &own).unwrap_err();
        assert_eq!(
            fault.message,
            "linux.sysctl (vm.swappiness): is not in a separate kernel namespace"
        );
    }

    #[test]
    fn a_key_names_a_setting_by_its_straight_path() {
        let own = Namespaces::default();
        for key in [
            "net/../../../tmp/x",
            "net/../kernel/core_pattern",
            "net/./ipv4/ip_forward",
            "net//ipv4/ip_forward",
            "net/",
        ] {
            let fault = Sysctl::new(key, "1", &own).unwrap_err();
            assert!(
                fault.message.ends_with("is not in a separate kernel namespace"),
                "{}",
                fault.message
            );
        }
    }
}
