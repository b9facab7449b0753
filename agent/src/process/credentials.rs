//! Who a process is: user, groups, capabilities.

use nix::unistd::{Gid, Uid};

use super::plan::ProcessPlan;
use crate::{container::seccomp::Filter, fault::Fault, sys};

/// Highest capability number that a kernel may ever have.
const MAX_CAPABILITY: u64 = 63;

const SYS_ADMIN: u64 = 1 << 21;

/// Makes the calling process (root, with all capabilities) the user that `plan` says, with the capabilities that it
/// shall have in effect. [`settle`] does the rest; if that has to load a filter, `keep_admin` keeps what it takes.
///
/// The order matters: the bounding set needs CAP_SETPCAP, groups need CAP_SETGID, and both are gone once the
/// user is changed; the capabilities of the plan survive that change only because they are asked to be kept.
pub fn become_user(plan: &ProcessPlan, keep_admin: bool) -> Result<(), Fault> {
    let failed = |what: &str, error: std::io::Error| Fault::system(what, error);
    let sets = plan.capabilities();
    for capability in 0..=MAX_CAPABILITY {
        if sets.bounding & (1 << capability) == 0 {
            match sys::prctl(libc::PR_CAPBSET_DROP, capability, 0) {
                Ok(_) => {}
                // The kernel's last capability has been passed.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                Err(error) => return Err(failed("drop from the bounding set", error)),
            }
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).map_err(|error| failed("keep capabilities", error))?;
    let groups: Vec<Gid> = plan.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    nix::unistd::setgroups(&groups).map_err(|error| failed("set additional groups", error.into()))?;
    let gid = Gid::from_raw(plan.gid);
    nix::unistd::setresgid(gid, gid, gid).map_err(|error| failed("set group", error.into()))?;
    let uid = Uid::from_raw(plan.uid);
    nix::unistd::setresuid(uid, uid, uid).map_err(|error| failed("set user", error.into()))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).map_err(|error| failed("keep capabilities", error))?;
    let kept = if keep_admin { SYS_ADMIN } else { 0 };
    sys::set_capabilities(sets.effective, sets.permitted | kept, sets.inheritable)
        .map_err(|error| failed("set capabilities", error))
}

/// Loads `filter`, for which this process has kept CAP_SYS_ADMIN, and gives up all that `plan` does not give.
pub fn settle(plan: &ProcessPlan, filter: Option<&Filter>) -> Result<(), Fault> {
    let failed = |what: &str, error: std::io::Error| Fault::system(what, error);
    let sets = plan.capabilities();
    if let Some(filter) = filter {
        sys::set_capabilities(
            sets.effective | SYS_ADMIN,
            sets.permitted | SYS_ADMIN,
            sets.inheritable,
        )
        .map_err(|error| failed("set capabilities", error))?;
        filter.load()?;
        sys::set_capabilities(sets.effective, sets.permitted, sets.inheritable)
            .map_err(|error| failed("set capabilities", error))?;
    }
    let ambient = |command: i32, capability: u64| {
        sys::prctl(libc::PR_CAP_AMBIENT, command as u64, capability).map(drop)
    };
    ambient(libc::PR_CAP_AMBIENT_CLEAR_ALL, 0)
        .map_err(|error| failed("clear ambient capabilities", error))?;
    for capability in 0..=MAX_CAPABILITY {
        if sets.ambient & (1 << capability) != 0 {
            ambient(libc::PR_CAP_AMBIENT_RAISE, capability).map_err(|error| {
                // The kernel's only reason: it is not both permitted and inheritable.
                Fault::spec(
                    "process.capabilities.ambient",
                    format_args!("capability {capability}: {}", crate::fault::describe(&error)),
                )
            })?;
        }
    }
    Ok(())
}

/// The home directory of `uid` by the passwd file at `path`, if it has an entry there.
pub fn home_of(uid: u32, path: &str) -> Option<String> {
    use std::io::{BufRead, Read};
    // A container's file: it may be anything, so no more than a sane one's size is read.
    const MAX_SIZE: u64 = 1 << 20;
    let file = std::fs::File::open(path)
        .ok()
        .filter(|file| file.metadata().is_ok_and(|m| m.is_file()))?;
    for line in std::io::BufReader::new(file.take(MAX_SIZE)).split(b'\n') {
        let line = line.ok()?;
        let line = String::from_utf8_lossy(&line);
        let mut fields = line.split(':');
        if fields.nth(2).and_then(|field| field.parse::<u32>().ok()) == Some(uid) {
            return fields.nth(2).map(str::to_owned);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_are_found_by_uid() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            &file,
            "root:x:0:0:root:/root:/bin/sh\n\nbad\nu:x:1000:100::/home/u:\n",
        )
        .unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(home_of(0, path).as_deref(), Some("/root"));
        assert_eq!(home_of(1000, path).as_deref(), Some("/home/u"));
        assert_eq!(home_of(1, path), None);
        assert_eq!(home_of(0, "/nonexistent"), None);
    }
}
