//! User namespaces: mappings of ids, and a namespace made of them.

use std::{
    fmt::Write,
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};
use oci_spec::runtime::{Linux, LinuxIdMapping};

use crate::{fault::Fault, sys};

/// Most ranges that the kernel takes.
const MAX_RANGES: usize = 340;

/// `size` ids from `inside` on are those from `outside` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    size: u32,
}

/// Ids of a container and what they are in the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mappings {
    users: Vec<Range>,
    groups: Vec<Range>,
}

impl Mappings {
    /// Reads `linux.uidMappings` and `linux.gidMappings`; `None` if there are none.
    ///
    /// # Errors
    ///
    /// A mapping that the kernel would refuse, or one of the two only.
    pub fn new(linux: &Linux) -> Result<Option<Self>, Fault> {
        let users = ranges("linux.uidMappings", linux.uid_mappings())?;
        let groups = ranges("linux.gidMappings", linux.gid_mappings())?;
        match (users.is_empty(), groups.is_empty()) {
            (true, true) => Ok(None),
            (false, false) => Ok(Some(Self { users, groups })),
            (true, false) => Err(Fault::spec(
                "linux.uidMappings",
                "is missing, while linux.gidMappings is given",
            )),
            (false, true) => Err(Fault::spec(
                "linux.gidMappings",
                "is missing, while linux.uidMappings is given",
            )),
        }
    }

    /// The sandbox's id of the container's user `id`.
    pub fn user(&self, id: u32) -> Option<u32> {
        outside(&self.users, id)
    }

    /// The sandbox's id of the container's group `id`.
    pub fn group(&self, id: u32) -> Option<u32> {
        outside(&self.groups, id)
    }

    /// Makes a user namespace with these mappings. It lives as long as the descriptor.
    ///
    /// The mappings are written from outside, as only there all ids can be mapped; so a process is needed that is in
    /// it for a moment.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn make_namespace(&self) -> Result<OwnedFd, Fault> {
        let failed = |error: io::Error| Fault::system("make a user namespace", error);
        // SAFETY: the agent is single-threaded by construction, and the child only waits for its end.
        let forked = unsafe { sys::clone3(libc::CLONE_NEWUSER as u64, None) }.map_err(failed)?;
        let Some(pid) = forked else {
            loop {
                // SAFETY: no arguments; it returns for signals only.
                unsafe { libc::pause() };
            }
        };
        let write = |file: &str, ranges: &[Range]| {
            fs::write(format!("/proc/{pid}/{file}"), text(ranges))
                .map_err(|error| Fault::system(format_args!("write {file} of a user namespace"), error))
        };
        let namespace = write("uid_map", &self.users)
            .and_then(|()| write("gid_map", &self.groups))
            .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")).map_err(failed));
        // Not reaped, so the pid is its own still.
        let _ = sys::kill(pid, libc::SIGKILL);
        while waitpid(Pid::from_raw(pid), None::<WaitPidFlag>) == Err(Errno::EINTR) {}
        namespace.map(OwnedFd::from)
    }
}

/// Makes the calling process, which has just entered a user namespace, its root.
pub fn become_root() -> Result<(), Fault> {
    let failed = |error: Errno| Fault::system("become root of the user namespace", error);
    nix::unistd::setgroups(&[]).map_err(failed)?;
    nix::unistd::setresgid(0.into(), 0.into(), 0.into()).map_err(failed)?;
    nix::unistd::setresuid(0.into(), 0.into(), 0.into()).map_err(failed)
}

/// Enters the user namespace that `namespace` is.
pub fn enter(namespace: &OwnedFd) -> Result<(), Fault> {
    sys::enter_namespaces(namespace.as_fd(), libc::CLONE_NEWUSER)
        .map_err(|error| Fault::system("enter the user namespace", error))
}

fn ranges(field: &str, mappings: &Option<Vec<LinuxIdMapping>>) -> Result<Vec<Range>, Fault> {
    let mappings = mappings.as_deref().unwrap_or_default();
    if mappings.len() > MAX_RANGES {
        return Err(Fault::spec(
            field,
            format_args!("has more than {MAX_RANGES} ranges"),
        ));
    }
    let mut ranges: Vec<Range> = Vec::with_capacity(mappings.len());
    for (index, mapping) in mappings.iter().enumerate() {
        let range = Range {
            inside: mapping.container_id(),
            outside: mapping.host_id(),
            size: mapping.size(),
        };
        let refuse = |why: &str| Err(Fault::spec(format_args!("{field}[{index}]"), why));
        // The highest number is no id.
        let fits = |first: u32| first.checked_add(range.size).is_some();
        if range.size == 0 || !fits(range.inside) || !fits(range.outside) {
            return refuse("size must be at least 1, and the ids below 2^32-1");
        }
        let overlap = |one: u32, size: u32, other: u32| {
            one < other.saturating_add(range.size) && other < one.saturating_add(size)
        };
        if ranges.iter().any(|earlier| {
            overlap(earlier.inside, earlier.size, range.inside)
                || overlap(earlier.outside, earlier.size, range.outside)
        }) {
            return refuse("overlaps with an earlier one");
        }
        ranges.push(range);
    }
    if !ranges.is_empty() && outside(&ranges, 0).is_none() {
        return Err(Fault::spec(field, "must map the container's id 0"));
    }
    Ok(ranges)
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.inside)?;
        (offset < range.size).then(|| range.outside.wrapping_add(offset))
    })
}

/// As `/proc/PID/uid_map` takes it.
fn text(ranges: &[Range]) -> String {
    let mut text = String::new();
    for range in ranges {
        let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.size);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(json: &str) -> Result<Option<Mappings>, Fault> {
        Mappings::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn ids_are_mapped() {
        let mappings = mappings(
            r#"{"uidMappings":[{"containerID":0,"hostID":100000,"size":1000},{"containerID":1000,"hostID":5,"size":1}],
                "gidMappings":[{"containerID":0,"hostID":7,"size":1}]}"#,
        )
        .unwrap()
        .unwrap();
        assert_eq!(mappings.user(0), Some(100_000));
        assert_eq!(mappings.user(999), Some(100_999));
        assert_eq!(mappings.user(1000), Some(5));
        assert_eq!(mappings.user(1001), None);
        assert_eq!(mappings.group(0), Some(7));
        assert_eq!(text(&mappings.users), "0 100000 1000\n1000 5 1\n");
    }

    #[test]
    fn wrong_mappings_are_refused_by_name() {
        let one = r#"[{"containerID":0,"hostID":1,"size":1}]"#;
        for (field, users, groups) in [
            ("linux.gidMappings", one, "[]"),
            ("linux.uidMappings", "[]", one),
            (
                "linux.uidMappings",
                r#"[{"containerID":1,"hostID":1,"size":1}]"#,
                one,
            ),
            (
                "linux.uidMappings[0]",
                r#"[{"containerID":0,"hostID":1,"size":0}]"#,
                one,
            ),
            (
                "linux.uidMappings[0]",
                r#"[{"containerID":0,"hostID":1,"size":4294967295}]"#,
                one,
            ),
            (
                "linux.gidMappings[1]",
                one,
                r#"[{"containerID":0,"hostID":1,"size":9},{"containerID":9,"hostID":5,"size":1}]"#,
            ),
        ] {
            let fault =
                mappings(&format!(r#"{{"uidMappings":{users},"gidMappings":{groups}}}"#)).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
        assert_eq!(mappings("{}").unwrap(), None);
    }
}
