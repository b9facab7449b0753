//! The live facts of a sandbox's processes on the host, beside what has to be true of them.

use std::path::Path;

use super::{
    expected,
    process::{Proc, Process},
};
use crate::{
    engine::{Role, Seen},
    host::ringlog,
};

/// A process of a sandbox.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it is to the sandbox.
    pub role: Role,
    /// Its pid on the host.
    pub pid: u32,
    /// What is true of it; `None` if it cannot be looked at.
    pub facts: Option<Process>,
    /// What Landlock denies it, in words: the kernel shows it nowhere. `None`: it does not use it.
    pub landlock: Option<String>,
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

/// Looks at all processes of a sandbox.
pub fn look(sandbox: &Seen, proc: &Proc) -> Vec<Member> {
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
                member.landlock = Some(landlock(sandbox));
            }
            Role::Fsd => member.faults = expected::of_fsd(facts, engine),
            Role::StandIn => member.faults = expected::of_standin(facts),
            Role::Engine | Role::Helper => {}
        }
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

/// What the VMM has logged about it when it locked itself in.
fn landlock(sandbox: &Seen) -> String {
    let log = ringlog::read(&sandbox.log())
        .map(|(kept, _)| kept)
        .unwrap_or_default();
    landlock_in(&String::from_utf8_lossy(&log))
}

fn landlock_in(log: &str) -> String {
    // Its first word on it: what a guest that took the VMM over has it say comes later.
    for line in log.lines().filter(|line| line.contains("husk-vmm")) {
        if let Some((_, rest)) = line.split_once("locked in by Landlock, ABI ") {
            let abi: String = rest.chars().take_while(char::is_ascii_digit).collect();
            return format!(
                "denies all that ABI {abi} can deny (as husk-vmm logged; the kernel does not show it)"
            );
        }
        if line.contains("has no Landlock to lock the VMM in with") {
            return "none: this kernel has no Landlock (as husk-vmm logged)".into();
        }
    }
    "unknown: the kernel does not show it, and what husk-vmm logged is not kept (log.level in husk.toml)"
        .into()
}

#[cfg(test)]
#[path = "sandbox_test.rs"]
mod tests;
