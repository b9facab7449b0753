//! Which namespaces a container gets.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::fault::Fault;

/// The namespaces to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub pid: bool,
    pub ipc: bool,
    pub uts: bool,
    pub cgroup: bool,
}

impl Namespaces {
    /// Reads `linux.namespaces`.
    ///
    /// # Errors
    ///
    /// A kind that husk cannot make or join, or no mount namespace.
    pub fn new(namespaces: &[LinuxNamespace]) -> Result<Self, Fault> {
        let mut made = Self::default();
        let mut mount = false;
        for (index, namespace) in namespaces.iter().enumerate() {
            let field = format!("linux.namespaces[{index}]");
            let kind = namespace.typ();
            let path = namespace
                .path()
                .as_deref()
                .filter(|path| !path.as_os_str().is_empty());
            let wanted = match kind {
                // The sandbox's network is the container's, by whichever path: the host has wired it.
                LinuxNamespaceType::Network => continue,
                LinuxNamespaceType::User | LinuxNamespaceType::Time => {
                    return Err(Fault::spec(
                        field,
                        format_args!("{kind} namespaces are not supported yet"),
                    ));
                }
                LinuxNamespaceType::Mount => &mut mount,
                LinuxNamespaceType::Pid => &mut made.pid,
                LinuxNamespaceType::Ipc => &mut made.ipc,
                LinuxNamespaceType::Uts => &mut made.uts,
                LinuxNamespaceType::Cgroup => &mut made.cgroup,
            };
            if path.is_some() {
                return Err(Fault::spec(
                    format_args!("{field}.path"),
                    "joining a namespace of the host is not supported",
                ));
            }
            if std::mem::replace(wanted, true) {
                return Err(Fault::spec(field, format_args!("{kind} is given twice")));
            }
        }
        if !mount {
            return Err(Fault::spec("linux.namespaces", "a mount namespace is required"));
        }
        Ok(made)
    }

    /// For clone3: all but the cgroup namespace, whose root must be the cgroup that the child is in by then.
    pub fn clone_flags(self) -> u64 {
        let flag = |wanted: bool, flag: i32| if wanted { flag } else { 0 };
        let flags = libc::CLONE_NEWNS
            | flag(self.pid, libc::CLONE_NEWPID)
            | flag(self.ipc, libc::CLONE_NEWIPC)
            | flag(self.uts, libc::CLONE_NEWUTS);
        flags as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(json: &str) -> Result<Namespaces, Fault> {
        Namespaces::new(&serde_json::from_str::<Vec<LinuxNamespace>>(json).unwrap())
    }

    #[test]
    fn those_of_the_list_are_made_and_the_network_is_the_sandboxs() {
        let made = namespaces(
            r#"[{"type":"pid"},{"type":"mount"},{"type":"uts","path":""},{"type":"network","path":"/proc/1/ns/net"}]"#,
        )
        .unwrap();
        assert_eq!(
            made,
            Namespaces {
                pid: true,
                uts: true,
                ..Default::default()
            }
        );
        assert_eq!(
            made.clone_flags(),
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS) as u64
        );
    }

    #[test]
    fn others_are_refused_by_name() {
        for (field, json) in [
            ("linux.namespaces", r#"[{"type":"pid"}]"#),
            ("linux.namespaces[1]", r#"[{"type":"mount"},{"type":"user"}]"#),
            ("linux.namespaces[1]", r#"[{"type":"mount"},{"type":"mount"}]"#),
            (
                "linux.namespaces[1].path",
                r#"[{"type":"mount"},{"type":"ipc","path":"/proc/1/ns/ipc"}]"#,
            ),
        ] {
            let fault = namespaces(json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }
}
