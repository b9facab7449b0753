//! Which namespaces a container gets: its own, those of another container of the sandbox, or the sandbox's.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::fault::Fault;

/// Where a namespace comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// The sandbox's, which is the agent's.
    #[default]
    Sandbox,
    /// A new one.
    New,
    /// That of the container with this id.
    Joined(String),
}

impl Origin {
    /// Whether a new one is to be made.
    pub fn is_new(&self) -> bool {
        *self == Self::New
    }

    /// Whether it is another one than the sandbox's.
    pub fn is_separate(&self) -> bool {
        *self != Self::Sandbox
    }
}

/// A container's namespaces. Its mount namespace is always a new one, its network the sandbox's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub pid: Origin,
    pub ipc: Origin,
    pub uts: Origin,
    pub cgroup: Origin,
    pub user: Origin,
    pub time: Origin,
}

impl Namespaces {
    /// Reads `linux.namespaces`. `joined` tells, by the spec's name of a type, the container that each path there
    /// stands for.
    ///
    /// # Errors
    ///
    /// A kind that husk cannot make or join, or no mount namespace.
    pub fn new(namespaces: &[LinuxNamespace], joined: &HashMap<String, String>) -> Result<Self, Fault> {
        let mut made = Self::default();
        let mut mount = Origin::Sandbox;
        let mut named = Vec::with_capacity(namespaces.len());
        for (index, namespace) in namespaces.iter().enumerate() {
            let field = format!("linux.namespaces[{index}]");
            let kind = namespace.typ();
            let path = namespace
                .path()
                .as_deref()
                .filter(|path| !path.as_os_str().is_empty());
            let (name, wanted) = match kind {
                // The sandbox's network is the container's, by whichever path: the host has wired it.
                LinuxNamespaceType::Network => continue,
                LinuxNamespaceType::Mount => ("mount", &mut mount),
                LinuxNamespaceType::Pid => ("pid", &mut made.pid),
                LinuxNamespaceType::Ipc => ("ipc", &mut made.ipc),
                LinuxNamespaceType::Uts => ("uts", &mut made.uts),
                LinuxNamespaceType::Cgroup => ("cgroup", &mut made.cgroup),
                LinuxNamespaceType::User => ("user", &mut made.user),
                LinuxNamespaceType::Time => ("time", &mut made.time),
            };
            named.push(name);
            let origin = match (joined.get(name), path) {
                (Some(_), _) if name == "mount" => {
                    return Err(Fault::spec(
                        format_args!("{field}.path"),
                        "joining the mount namespace of another container is not supported",
                    ));
                }
                (Some(container), _) => Origin::Joined(container.clone()),
                (None, Some(_)) => {
                    return Err(Fault::spec(
                        format_args!("{field}.path"),
                        "joining a namespace of the host is not supported",
                    ));
                }
                (None, None) => Origin::New,
            };
            if std::mem::replace(wanted, origin).is_separate() {
                return Err(Fault::spec(field, format_args!("{kind} is given twice")));
            }
        }
        if !mount.is_new() {
            return Err(Fault::spec("linux.namespaces", "a mount namespace is required"));
        }
        if let Some(name) = joined
            .keys()
            .find(|name| *name != "network" && !named.contains(&name.as_str()))
        {
            return Err(Fault::spec(
                "linux.namespaces",
                format_args!("has no {name:?}, which is to be joined"),
            ));
        }
        Ok(made)
    }

    /// For clone3: all new ones but the cgroup namespace, whose root must be the cgroup that the child is in by then,
    /// and the user and time namespaces, in which the child must be made.
    pub fn clone_flags(&self) -> u64 {
        let flag = |origin: &Origin, flag: i32| if origin.is_new() { flag } else { 0 };
        let flags = libc::CLONE_NEWNS
            | flag(&self.pid, libc::CLONE_NEWPID)
            | flag(&self.ipc, libc::CLONE_NEWIPC)
            | flag(&self.uts, libc::CLONE_NEWUTS);
        flags as u64
    }

    /// The containers that are joined, each with all the namespaces (`CLONE_NEW…`) that are joined of it.
    pub fn joined(&self) -> HashMap<&str, i32> {
        let all = [
            (&self.pid, libc::CLONE_NEWPID),
            (&self.ipc, libc::CLONE_NEWIPC),
            (&self.uts, libc::CLONE_NEWUTS),
            (&self.cgroup, libc::CLONE_NEWCGROUP),
            (&self.user, libc::CLONE_NEWUSER),
            (&self.time, libc::CLONE_NEWTIME),
        ];
        let mut joined = HashMap::new();
        for (origin, flag) in all {
            if let Origin::Joined(id) = origin {
                *joined.entry(id.as_str()).or_default() |= flag;
            }
        }
        joined
    }

    /// What setns(2) is to be asked for (`CLONE_NEW…`) by a process that enters a container with these namespaces and
    /// has been forked into its pid namespace. To enter one's own user namespace is an error.
    pub fn enter_flags(&self) -> i32 {
        let flag = |origin: &Origin, flag: i32| if origin.is_separate() { flag } else { 0 };
        libc::CLONE_NEWNS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP
            | flag(&self.user, libc::CLONE_NEWUSER)
            | flag(&self.time, libc::CLONE_NEWTIME)
    }

    /// Whether a process in between has to enter namespaces before the container's init process is made in them.
    pub fn need_stage(&self) -> bool {
        self.user.is_new() || self.time.is_new() || !self.joined().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(json: &str, joined: &[(&str, &str)]) -> Result<Namespaces, Fault> {
        let joined = joined.iter().map(|(kind, id)| (kind.to_string(), id.to_string()));
        Namespaces::new(
            &serde_json::from_str::<Vec<LinuxNamespace>>(json).unwrap(),
            &joined.collect(),
        )
    }

    #[test]
    fn those_of_the_list_are_made_and_the_network_is_the_sandboxs() {
        let made = namespaces(
            r#"[{"type":"pid"},{"type":"mount"},{"type":"uts","path":""},{"type":"network","path":"/proc/1/ns/net"}]"#,
            &[],
        )
        .unwrap();
        assert_eq!(
            made,
            Namespaces {
                pid: Origin::New,
                uts: Origin::New,
                ..Default::default()
            }
        );
        assert_eq!(
            made.clone_flags(),
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS) as u64
        );
        assert!(!made.need_stage());
        assert_eq!(made.enter_flags() & libc::CLONE_NEWUSER, 0);
    }

    #[test]
    fn those_that_the_host_resolved_are_joined() {
        let made = namespaces(
            r#"[{"type":"mount"},{"type":"ipc","path":"/proc/7/ns/ipc"},{"type":"pid","path":"/proc/7/ns/pid"},
                {"type":"uts","path":"/proc/8/ns/uts"},{"type":"user"}]"#,
            &[("ipc", "a"), ("pid", "a"), ("uts", "b"), ("network", "a")],
        )
        .unwrap();
        assert_eq!(
            made.joined(),
            HashMap::from([
                ("a", libc::CLONE_NEWIPC | libc::CLONE_NEWPID),
                ("b", libc::CLONE_NEWUTS)
            ])
        );
        assert_eq!(made.clone_flags(), libc::CLONE_NEWNS as u64);
        assert!(made.need_stage());
        assert_ne!(made.enter_flags() & libc::CLONE_NEWUSER, 0);
    }

    #[test]
    fn others_are_refused_by_name() {
        let joined: &[(&str, &str)] = &[("mount", "a")];
        for (field, json, joined) in [
            ("linux.namespaces", r#"[{"type":"pid"}]"#, [].as_slice()),
            (
                "linux.namespaces[1]",
                r#"[{"type":"mount"},{"type":"mount"}]"#,
                &[],
            ),
            (
                "linux.namespaces[1].path",
                r#"[{"type":"mount"},{"type":"ipc","path":"/proc/1/ns/ipc"}]"#,
                &[("pid", "a")],
            ),
            (
                "linux.namespaces[0].path",
                r#"[{"type":"mount","path":"/proc/1/ns/mnt"}]"#,
                joined,
            ),
            ("linux.namespaces", r#"[{"type":"mount"}]"#, &[("ipc", "a")]),
        ] {
            let fault = namespaces(json, joined).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }
}
