//! The host's side of `linux.namespaces`: which namespaces a stand-in joins and makes, and whose the container's are.
//!
//! A container's namespaces are made in the guest. What the host has is the stand-in's: its network namespace is the
//! one that engines wire, its others tell them who shares what with whom. A path is understood when it leads to the
//! stand-in of a container of the same sandbox; with the rest of the host nothing can be shared but the network.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// `ioctl` that tells the kind of a namespace: `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Interfaces, addresses, routes.
    Network,
    /// Process ids.
    Pid,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// Mounts.
    Mount,
    /// The root of the cgroups that are seen.
    Cgroup,
    /// User and group ids.
    User,
    /// Offsets of clocks.
    Time,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Network,
        Self::Pid,
        Self::Ipc,
        Self::Uts,
        Self::Mount,
        Self::Cgroup,
        Self::User,
        Self::Time,
    ];

    /// As config.json has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Pid => "pid",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
            Self::User => "user",
            Self::Time => "time",
        }
    }

    /// From config.json.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Its file in `/proc/PID/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Network => "net",
            Self::Mount => "mnt",
            other => other.name(),
        }
    }

    /// Its `CLONE_NEW…`.
    pub fn flag(self) -> i32 {
        match self {
            Self::Network => libc::CLONE_NEWNET,
            Self::Pid => libc::CLONE_NEWPID,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Mount => libc::CLONE_NEWNS,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::User => libc::CLONE_NEWUSER,
            // Not in every version of the C library's headers.
            Self::Time => 0x80,
        }
    }

    /// What to do about one of the host's that is asked for, for the end of an error.
    fn advice(self) -> &'static str {
        match self {
            Self::Network => {
                "; give the container a network of its own (not Docker's --network host, ctr's --net-host or hostNetwork)"
            }
            _ => "",
        }
    }

    /// Whether a stand-in has one of its own. It needs no more: what it has no part in cannot be mistaken.
    pub fn is_stood_in(self) -> bool {
        matches!(self, Self::Network | Self::Ipc | Self::Uts)
    }
}

/// Which namespace it is, among those that exist at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id {
    device: u64,
    inode: u64,
}

/// An open namespace.
#[derive(Debug)]
pub struct Namespace {
    /// Keeps it.
    pub fd: OwnedFd,
    /// Which it is.
    pub id: Id,
}

impl Namespace {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// When it cannot be opened, or is not a namespace of this kind.
    pub fn open(path: &Path, kind: Kind) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        // SAFETY: this request takes no argument; any other kind of file refuses it.
        let found = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        if found != kind.flag() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("it is not a {} namespace", kind.name()),
            ));
        }
        let metadata = file.metadata()?;
        let id = Id {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        Ok(Self { fd: file.into(), id })
    }

    /// Opens one of a process's.
    ///
    /// # Errors
    /// As [`Namespace::open`].
    pub fn of(pid: u32, kind: Kind) -> io::Result<Self> {
        Self::open(&PathBuf::from(format!("/proc/{pid}/ns/{}", kind.file())), kind)
    }

    /// Opens it once more.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            id: self.id,
        })
    }
}

/// An entry of `linux.namespaces`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of what kind.
    pub kind: Kind,
    /// Which; `None`: a new one.
    pub path: Option<PathBuf>,
}

/// A container of the sandbox and the process that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The container.
    pub id: String,
    /// Its stand-in's pid.
    pub pid: u32,
}

/// What comes of `linux.namespaces`.
#[derive(Debug, Default)]
pub struct Plan {
    /// For the stand-in to join.
    pub join: Vec<OwnedFd>,
    /// For the stand-in to make: `CLONE_NEW…` flags.
    pub unshare: i32,
    /// Kind and container: whose namespaces the container joins in the guest.
    pub joined: Vec<(Kind, String)>,
}

/// Why a namespace cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The host's own would be shared, since the spec asks for none.
    #[error(
        "linux.namespaces: there is no {} namespace; the host's {} namespace cannot be shared with a microVM{}",
        kind.name(), kind.name(), kind.advice()
    )]
    HostsByAbsence {
        /// Of this kind.
        kind: Kind,
    },
    /// The host's own, by its path.
    #[error(
        "linux.namespaces[{index}].path: {}: the host's {} namespace cannot be shared with a microVM{}",
        path.display(), kind.name(), kind.advice()
    )]
    Hosts {
        /// Where in the list.
        index: usize,
        /// The path.
        path: PathBuf,
        /// Of this kind.
        kind: Kind,
    },
    /// It belongs to something else.
    #[error(
        "linux.namespaces[{index}].path: {}: it is the {} namespace of no container of this sandbox; no other can be \
         shared with a microVM",
        path.display(), kind.name()
    )]
    Foreign {
        /// Where in the list.
        index: usize,
        /// The path.
        path: PathBuf,
        /// Of this kind.
        kind: Kind,
    },
    /// The sandbox has one already.
    #[error(
        "linux.namespaces[{index}].path: {}: it is another network namespace than that of the sandbox's first container",
        path.display()
    )]
    SecondNetwork {
        /// Where in the list.
        index: usize,
        /// The path.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("linux.namespaces[{index}].path: cannot use {} as a {} namespace", path.display(), kind.name())]
    Open {
        /// Where in the list.
        index: usize,
        /// The path.
        path: PathBuf,
        /// Of this kind.
        kind: Kind,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Finds out what `wanted` means for a container of a sandbox with the containers `neighbours` and, once it has one,
/// the network namespace `network`.
///
/// # Errors
/// When it cannot be had.
pub fn plan(
    wanted: &[Wanted],
    neighbours: &[Neighbour],
    network: Option<&Namespace>,
) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    // No list at all is for the agent to refuse: a mount namespace is required.
    for kind in [Kind::Network, Kind::Pid, Kind::Ipc, Kind::Uts] {
        if !wanted.is_empty() && wanted.iter().all(|wanted| wanted.kind != kind) {
            return Err(PlanError::HostsByAbsence { kind });
        }
    }
    for (index, Wanted { kind, path }) in wanted.iter().enumerate() {
        let kind = *kind;
        let open = |path: &Path| {
            Namespace::open(path, kind).map_err(|source| PlanError::Open {
                index,
                path: path.to_owned(),
                kind,
                source,
            })
        };
        match (kind, path) {
            (Kind::Network, None) => match network {
                // The machine has one network, which all of its containers share.
                Some(network) => plan.join.push(duplicate(network, index, kind)?),
                None => plan.unshare |= kind.flag(),
            },
            (Kind::Network, Some(path)) => {
                let namespace = open(path)?;
                if Namespace::of(std::process::id(), kind).is_ok_and(|own| own.id == namespace.id) {
                    let path = path.clone();
                    return Err(PlanError::Hosts { index, path, kind });
                }
                if network.is_some_and(|network| network.id != namespace.id) {
                    let path = path.clone();
                    return Err(PlanError::SecondNetwork { index, path });
                }
                plan.join.push(namespace.fd);
            }
            (kind, None) if kind.is_stood_in() => plan.unshare |= kind.flag(),
            (_, None) => {}
            (kind, Some(path)) => {
                let (neighbour, namespace) = match pid_in(path, kind)
                    .and_then(|pid| neighbours.iter().find(|neighbour| neighbour.pid == pid))
                {
                    // Of a kind that the stand-in does not have, the path names whose it is.
                    Some(named) if !kind.is_stood_in() => (named, None),
                    _ => {
                        let namespace = open(path)?;
                        let neighbour = find(neighbours, kind, namespace.id);
                        let neighbour = neighbour.ok_or_else(|| not_ours(index, path, kind, namespace.id))?;
                        (neighbour, Some(namespace))
                    }
                };
                plan.join.extend(namespace.map(|namespace| namespace.fd));
                plan.joined.push((kind, neighbour.id.clone()));
            }
        }
    }
    Ok(plan)
}

fn duplicate(namespace: &Namespace, index: usize, kind: Kind) -> Result<OwnedFd, PlanError> {
    namespace
        .try_clone()
        .map(|namespace| namespace.fd)
        .map_err(|source| PlanError::Open {
            index,
            path: PathBuf::new(),
            kind,
            source,
        })
}

/// The container whose stand-in has this namespace.
fn find(neighbours: &[Neighbour], kind: Kind, id: Id) -> Option<&Neighbour> {
    if !kind.is_stood_in() {
        return None;
    }
    neighbours
        .iter()
        .find(|neighbour| Namespace::of(neighbour.pid, kind).is_ok_and(|theirs| theirs.id == id))
}

fn not_ours(index: usize, path: &Path, kind: Kind, id: Id) -> PlanError {
    let path = path.to_owned();
    match Namespace::of(std::process::id(), kind) {
        Ok(own) if own.id == id => PlanError::Hosts { index, path, kind },
        _ => PlanError::Foreign { index, path, kind },
    }
}

/// The pid in `/proc/PID/ns/KIND`.
fn pid_in(path: &Path, kind: Kind) -> Option<u32> {
    let text = path.to_str()?.strip_prefix("/proc/")?;
    text.strip_suffix(kind.file())?.strip_suffix("/ns/")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A process with namespaces of its own.
    struct Other(Child);

    impl Other {
        fn start() -> Self {
            let mut child = Command::new("unshare")
                .args(["--net", "--ipc", "--uts", "sh", "-c", "echo; exec sleep 100"])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            // Its word means that it is where it should be.
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            Self(child)
        }

        fn path(&self, kind: Kind) -> PathBuf {
            format!("/proc/{}/ns/{}", self.0.id(), kind.file()).into()
        }

        fn neighbour(&self) -> Neighbour {
            Neighbour {
                id: "n".into(),
                pid: self.0.id(),
            }
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn wanted(with: &[(Kind, Option<PathBuf>)]) -> Vec<Wanted> {
        let usual = [Kind::Network, Kind::Pid, Kind::Ipc, Kind::Uts, Kind::Mount];
        let with = with.iter().cloned().map(|(kind, path)| Wanted { kind, path });
        let mut all: Vec<Wanted> = with.collect();
        for kind in usual {
            if all.iter().all(|wanted| wanted.kind != kind) {
                all.push(Wanted { kind, path: None });
            }
        }
        all
    }

    fn refusal(with: &[(Kind, Option<PathBuf>)], neighbours: &[Neighbour]) -> String {
        plan(&wanted(with), neighbours, None).unwrap_err().to_string()
    }

    #[test]
    fn without_paths_the_stand_in_has_its_own() {
        let plan = plan(&wanted(&[]), &[], None).unwrap();
        assert_eq!(
            plan.unshare,
            libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS
        );
        assert!(plan.join.is_empty() && plan.joined.is_empty());
    }

    #[test]
    fn a_path_leads_to_the_container_that_has_the_namespace() {
        let other = Other::start();
        let pod = [other.neighbour()];
        let paths = [Kind::Ipc, Kind::Uts, Kind::Pid, Kind::Mount].map(|kind| (kind, Some(other.path(kind))));
        let found = plan(&wanted(&paths), &pod, None).unwrap();
        let joined = |kind| (kind, "n".to_owned());
        assert_eq!(
            found.joined,
            [
                joined(Kind::Ipc),
                joined(Kind::Uts),
                joined(Kind::Pid),
                joined(Kind::Mount)
            ]
        );
        assert_eq!((found.join.len(), found.unshare), (2, libc::CLONE_NEWNET));
        // Another way to the same namespace.
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(other.path(Kind::Ipc), &link).unwrap();
        let found = plan(&wanted(&[(Kind::Ipc, Some(link))]), &pod, None).unwrap();
        assert_eq!(found.joined, [joined(Kind::Ipc)]);
    }

    #[test]
    fn the_sandbox_has_one_network() {
        let other = Other::start();
        let third = Other::start();
        let path = || Some(other.path(Kind::Network));
        let first = plan(&wanted(&[(Kind::Network, path())]), &[], None).unwrap();
        assert_eq!(first.join.len(), 1);
        let network = Namespace::of(other.0.id(), Kind::Network).unwrap();
        for path in [path(), None] {
            let next = plan(&wanted(&[(Kind::Network, path)]), &[], Some(&network)).unwrap();
            assert_eq!((next.join.len(), next.unshare & libc::CLONE_NEWNET), (1, 0));
        }
        let error = plan(
            &wanted(&[(Kind::Network, Some(third.path(Kind::Network)))]),
            &[],
            Some(&network),
        );
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("linux.namespaces[0].path: /proc/"), "{error}");
    }

    #[test]
    fn the_hosts_are_refused_by_name() {
        let other = Other::start();
        for kind in [Kind::Network, Kind::Pid, Kind::Ipc, Kind::Uts] {
            let own = PathBuf::from(format!("/proc/self/ns/{}", kind.file()));
            let error = refusal(&[(kind, Some(own))], &[other.neighbour()]);
            let expected = format!("the host's {} namespace cannot be shared", kind.name());
            assert!(
                error.contains("linux.namespaces[0].path") && error.contains(&expected),
                "{error}"
            );
            let mut without = wanted(&[]);
            without.retain(|wanted| wanted.kind != kind);
            let error = plan(&without, &[], None).unwrap_err().to_string();
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[test]
    fn what_is_not_of_the_sandbox_is_refused_by_name() {
        let other = Other::start();
        let error = refusal(&[(Kind::Ipc, Some(other.path(Kind::Ipc)))], &[]);
        assert!(error.contains("ipc namespace of no container"), "{error}");
        let error = refusal(&[(Kind::Uts, Some(other.path(Kind::Ipc)))], &[other.neighbour()]);
        assert!(error.contains("as a uts namespace"), "{error}");
        for path in ["/nonexistent", "/dev/null", "/"] {
            let error = refusal(&[(Kind::Network, Some(path.into()))], &[]);
            assert!(
                error.contains("linux.namespaces[0].path: cannot use /"),
                "{error}"
            );
        }
    }
}
