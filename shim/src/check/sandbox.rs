//! The live facts of a sandbox's processes on the host, beside what has to be true of them.

use std::{fmt, io, path::Path};

use super::{
    expected,
    process::{Proc, Process},
};
use crate::{
    engine::{Role, Seen},
    host::ringlog,
};

/// What a process has logged about Landlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlock {
    /// It denies all that this ABI can deny.
    Abi(u32),
    /// The kernel has none, or too old a one.
    Missing,
    /// The log is not kept.
    Unknown,
}

impl fmt::Display for Landlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abi(abi) => write!(
                f,
                "denies all that ABI {abi} can deny (as it logged; the kernel does not show it)"
            ),
            Self::Missing => f.write_str("none: this kernel has none for it (as it logged)"),
            Self::Unknown => f.write_str(
                "unknown: the kernel does not show it, and what it logged is not kept (log.level in husk.toml)",
            ),
        }
    }
}

/// A process of a sandbox.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it is to the sandbox.
    pub role: Role,
    /// Its pid on the host.
    pub pid: u32,
    /// What is true of it; `None` if it cannot be looked at.
    pub facts: Option<Process>,
    /// What Landlock denies it, as it has logged: the kernel shows it nowhere. `None`: it does not use it.
    pub landlock: Option<Landlock>,
    /// Facts that are missing, a sentence each.
    pub faults: Vec<String>,
}

impl Member {
    /// Its name for people.
    pub fn name(&self) -> &'static str {
        match self.role {
            Role::Engine => "engine",
            Role::Vmm => "husk-vmm",
            Role::Fsd => "husk-fsd",
            Role::StandIn => "husk-standin",
            Role::Helper => "helper",
        }
    }

    /// Whether something is expected of it. The engine is root on the host and opens what the others need.
    pub fn is_judged(&self) -> bool {
        matches!(self.role, Role::Vmm | Role::Fsd | Role::StandIn)
    }
}

/// Looks at all processes of a sandbox. `abi`: of the kernel's Landlock, if it is known.
pub fn look(sandbox: &Seen, proc: &Proc, abi: Option<u32>) -> Vec<Member> {
    let share = sandbox.share();
    let mut members: Vec<Member> = sandbox
        .processes
        .iter()
        .map(|(role, identity)| member(*role, identity.pid, proc, &share))
        .collect();
    let engine = members.iter().find(|member| member.role == Role::Engine);
    let engine = engine.and_then(|engine| engine.facts.clone());
    // The stand-ins of execs are in no record, and neither is what should not be there.
    let known: Vec<u32> = members.iter().map(|member| member.pid).collect();
    let children = engine
        .iter()
        .flat_map(|engine| proc.children(engine.pid).unwrap_or_default());
    for (pid, name) in children.filter(|(pid, _)| !known.contains(pid)) {
        let role = match name.as_str() {
            "husk-standin" => Role::StandIn,
            _ => Role::Helper,
        };
        let found = member(role, pid, proc, &share);
        // It may have ended: nobody has said that it runs.
        if found.facts.is_some() {
            members.push(found);
        }
    }
    for member in &mut members {
        let Some(facts) = &member.facts else { continue };
        let engine = engine.as_ref();
        match member.role {
            Role::Vmm => {
                member.faults = expected::of_vmm(facts, engine, &neighbours(facts, proc));
                member.landlock = Some(landlock(sandbox, "husk-vmm"));
            }
            Role::Fsd => {
                member.faults = expected::of_fsd(facts, engine);
                member.landlock = Some(landlock(sandbox, "husk-fsd"));
            }
            Role::StandIn => member.faults = expected::of_standin(facts),
            Role::Engine | Role::Helper => {}
        }
        let known = member.landlock.zip(abi);
        member
            .faults
            .extend(known.and_then(|(has, kernel)| expected::of_landlock(has, kernel)));
    }
    members
}

fn member(role: Role, pid: u32, proc: &Proc, share: &Path) -> Member {
    let (facts, faults) = match proc.look(pid, share) {
        Ok(facts) => (Some(facts), vec![]),
        Err(error) => (None, vec![format!("it cannot be looked at: {error}")]),
    };
    Member {
        role,
        pid,
        facts,
        landlock: None,
        faults,
    }
}

/// Other processes that have the process's user, if that is not root's.
fn neighbours(process: &Process, proc: &Proc) -> Vec<u32> {
    let uid = process.threads.first().and_then(|thread| thread.uids.first());
    let Some(uid) = uid.filter(|uid| **uid != 0) else {
        return Vec::new();
    };
    let mut pids = proc.of_user(*uid).unwrap_or_default();
    pids.retain(|pid| *pid != process.pid);
    pids
}

/// What a program has logged about it when it locked itself in.
fn landlock(sandbox: &Seen, program: &str) -> Landlock {
    let log = ringlog::read(&sandbox.log())
        .map(|(kept, _)| kept)
        .unwrap_or_default();
    landlock_in(&String::from_utf8_lossy(&log), program)
}

/// The program is named at a line's end, by the engine: what stands before is the program's own.
fn landlock_in(log: &str, program: &str) -> Landlock {
    let suffix = format!(" program={program}");
    // Its first word on it: what a guest that took the program over has it say comes later.
    for line in log.lines().filter(|line| line.ends_with(&suffix)) {
        if let Some((_, rest)) = line.split_once("locked in by Landlock, ABI ") {
            let abi: String = rest.chars().take_while(char::is_ascii_digit).collect();
            return abi.parse().map_or(Landlock::Unknown, Landlock::Abi);
        }
        if line.contains("kernel has no Landlock to lock the") {
            return Landlock::Missing;
        }
    }
    Landlock::Unknown
}

/// What this kernel could deny: an ABI, 0 without Landlock. `None` where it may not be asked.
pub fn landlock_of_kernel() -> Option<u32> {
    const CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag there are no attributes.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    match (u32::try_from(abi), io::Error::last_os_error().raw_os_error()) {
        (Ok(abi), _) => Some(abi),
        (_, Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Some(0),
        _ => None,
    }
}

#[cfg(test)]
#[path = "sandbox_test.rs"]
mod tests;
