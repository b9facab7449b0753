//! An OCI `process`, checked and turned into what the system calls take.

use std::{collections::HashSet, ffi::CString, sync::Arc};

use oci_spec::runtime::{Capabilities, IOPriorityClass, LinuxCapabilities, PosixRlimitType, Process};

use super::{affinity::Affinity, scheduler::SchedulerPlan};
use crate::{container::seccomp::Filter, fault::Fault};

/// A process to be.
#[derive(Debug)]
pub struct ProcessPlan {
    /// The command and its arguments; never empty.
    pub args: Vec<CString>,
    /// `KEY=value`, each key once.
    pub env: Vec<CString>,
    /// Absolute.
    pub cwd: CString,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub no_new_privileges: bool,
    /// Set if the process has a terminal.
    pub terminal: Option<TerminalSize>,
    pub shared: Shared,
}

/// What a process that joins a container has as the container's init has it, unless its own document says otherwise.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    pub umask: Option<u32>,
    pub capabilities: Option<CapabilitySets>,
    /// (resource, soft, hard)
    pub rlimits: Vec<(u32, u64, u64)>,
    pub oom_score_adj: Option<i32>,
    pub scheduler: Option<SchedulerPlan>,
    /// (class 1..=3, level 0..=7)
    pub io_priority: Option<(u32, u32)>,
    /// Not of the init process itself.
    pub exec_affinity: Option<Affinity>,
    /// Argument of personality(2); only a container's document has it.
    pub personality: Option<u64>,
    /// As [`Shared::personality`].
    pub seccomp: Option<Arc<Filter>>,
}

impl Shared {
    /// Takes from the container's init what is not given here. (runc lets the container's umask win, which leaves an
    /// exec's own without effect.)
    pub fn inherit(&mut self, init: &Self) {
        let init = init.clone();
        self.umask = self.umask.or(init.umask);
        self.capabilities = self.capabilities.or(init.capabilities);
        if self.rlimits.is_empty() {
            self.rlimits = init.rlimits;
        }
        self.oom_score_adj = self.oom_score_adj.or(init.oom_score_adj);
        self.scheduler = self.scheduler.or(init.scheduler);
        self.io_priority = self.io_priority.or(init.io_priority);
        self.exec_affinity = self.exec_affinity.take().or(init.exec_affinity);
        self.personality = init.personality;
        self.seccomp = init.seccomp;
    }
}

/// Size of a terminal in characters; zero if unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

/// The five sets, one bit a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

impl ProcessPlan {
    /// Reads `process`; `field` is its name in messages (`process`).
    ///
    /// # Errors
    ///
    /// A field is wrong, or is one that husk does not apply.
    pub fn new(process: &Process, field: &str) -> Result<Self, Fault> {
        refuse_unsupported(process, field)?;
        let text = |name: &str, value: &str| {
            CString::new(value)
                .map_err(|_| Fault::spec(format_args!("{field}.{name}"), "contains a NUL character"))
        };
        let args = process.args().as_deref().unwrap_or_default();
        let args = args
            .iter()
            .map(|arg| text("args", arg))
            .collect::<Result<Vec<_>, _>>()?;
        if args.is_empty() {
            return Err(Fault::spec(format_args!("{field}.args"), "must not be empty"));
        }
        let env = process.env().as_deref().unwrap_or_default();
        let env = last_of_each(env, field)?
            .into_iter()
            .map(|entry| text("env", entry));
        let cwd = process.cwd().to_str().unwrap_or_default();
        if !cwd.starts_with('/') {
            return Err(Fault::spec(
                format_args!("{field}.cwd"),
                "must be an absolute path",
            ));
        }
        let user = process.user();
        if user.umask().is_some_and(|umask| umask > 0o777) {
            return Err(Fault::spec(format_args!("{field}.user.umask"), "is above 0777"));
        }
        let oom_score_adj = process.oom_score_adj();
        if oom_score_adj.is_some_and(|score| !(-1000..=1000).contains(&score)) {
            return Err(Fault::spec(
                format_args!("{field}.oomScoreAdj"),
                "is not within -1000 to 1000",
            ));
        }
        Ok(Self {
            args,
            env: env.collect::<Result<_, _>>()?,
            cwd: text("cwd", cwd)?,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            shared: Shared {
                umask: user.umask(),
                capabilities: process.capabilities().as_ref().map(capability_sets),
                rlimits: rlimits(process, field)?,
                oom_score_adj,
                scheduler: match process.scheduler() {
                    Some(scheduler) => Some(SchedulerPlan::new(scheduler, &format!("{field}.scheduler"))?),
                    None => None,
                },
                io_priority: io_priority(process, field)?,
                exec_affinity: match process.exec_cpu_affinity() {
                    Some(affinity) => Some(Affinity::new(affinity, &format!("{field}.execCPUAffinity"))?),
                    None => None,
                },
                personality: None,
                seccomp: None,
            },
            terminal: process.terminal().unwrap_or(false).then(|| {
                let size = process.console_size().unwrap_or_default();
                TerminalSize {
                    columns: u16::try_from(size.width()).unwrap_or(u16::MAX),
                    rows: u16::try_from(size.height()).unwrap_or(u16::MAX),
                }
            }),
        })
    }

    /// Without `capabilities` a process has none, as with runc.
    pub fn capabilities(&self) -> CapabilitySets {
        self.shared.capabilities.unwrap_or_default()
    }

    /// The value of an environment variable.
    pub fn env_value(&self, key: &str) -> Option<&str> {
        self.env
            .iter()
            .find_map(|entry| entry.to_str().ok()?.strip_prefix(key)?.strip_prefix('='))
    }
}

fn refuse_unsupported(process: &Process, field: &str) -> Result<(), Fault> {
    let refuse = |name: &str, why: &str| Err(Fault::spec(format_args!("{field}.{name}"), why));
    let given = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if given(process.command_line()) {
        return refuse("commandLine", "is for Windows only");
    }
    if given(process.user().username()) {
        return refuse("user.username", "is for Windows only");
    }
    // This kernel has no AppArmor. Which profiles may be without effect is for the host's operator to say, and the host
    // has asked: `apparmorProfile` is not looked at here.
    if given(process.selinux_label()) {
        return refuse("selinuxLabel", "the guest's kernel has no SELinux");
    }
    Ok(())
}

/// The entries of `env`, of each key the last.
fn last_of_each<'a>(env: &'a [String], field: &str) -> Result<Vec<&'a str>, Fault> {
    let mut seen = HashSet::new();
    let mut entries = Vec::with_capacity(env.len());
    for entry in env.iter().rev() {
        match entry.split_once('=') {
            Some((key, _)) if !key.is_empty() => {
                if seen.insert(key) {
                    entries.push(entry.as_str());
                }
            }
            _ => {
                return Err(Fault::spec(
                    format_args!("{field}.env"),
                    format_args!("{entry:?} is not of the form KEY=value"),
                ));
            }
        }
    }
    entries.reverse();
    Ok(entries)
}

fn capability_sets(sets: &LinuxCapabilities) -> CapabilitySets {
    let bits = |set: &Option<Capabilities>| {
        set.iter()
            .flatten()
            .filter_map(capability_number)
            .fold(0u64, |bits, number| bits | (1 << number))
    };
    let (permitted, inheritable) = (bits(sets.permitted()), bits(sets.inheritable()));
    let wanted = bits(sets.ambient());
    // The kernel raises no others, and `runc spec` writes such: other runtimes warn and go on.
    let ambient = wanted & permitted & inheritable;
    if ambient != wanted {
        crate::log::warning!(
            "process.capabilities.ambient: {:#x} cannot be raised: not both permitted and inheritable",
            wanted & !ambient
        );
    }
    CapabilitySets {
        bounding: bits(sets.bounding()),
        effective: bits(sets.effective()),
        inheritable,
        permitted,
        ambient,
    }
}

/// The kernel's number of a capability, below 64.
fn capability_number(capability: &oci_spec::runtime::Capability) -> Option<u8> {
    // Both crates know the kernel's names; only one of them the numbers.
    let name = format!("CAP_{capability}");
    name.parse::<caps::Capability>()
        .ok()
        .map(|capability| capability.index())
        .filter(|index| *index < 64)
}

fn rlimits(process: &Process, field: &str) -> Result<Vec<(u32, u64, u64)>, Fault> {
    use PosixRlimitType::*;
    let mut seen = HashSet::new();
    let mut limits = Vec::new();
    for limit in process.rlimits().as_deref().unwrap_or_default() {
        let resource = match limit.typ() {
            RlimitCpu => libc::RLIMIT_CPU,
            RlimitFsize => libc::RLIMIT_FSIZE,
            RlimitData => libc::RLIMIT_DATA,
            RlimitStack => libc::RLIMIT_STACK,
            RlimitCore => libc::RLIMIT_CORE,
            RlimitRss => libc::RLIMIT_RSS,
            RlimitNproc => libc::RLIMIT_NPROC,
            RlimitNofile => libc::RLIMIT_NOFILE,
            RlimitMemlock => libc::RLIMIT_MEMLOCK,
            RlimitAs => libc::RLIMIT_AS,
            RlimitLocks => libc::RLIMIT_LOCKS,
            RlimitSigpending => libc::RLIMIT_SIGPENDING,
            RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
            RlimitNice => libc::RLIMIT_NICE,
            RlimitRtprio => libc::RLIMIT_RTPRIO,
            RlimitRttime => libc::RLIMIT_RTTIME,
        };
        if !seen.insert(resource) {
            return Err(Fault::spec(
                format_args!("{field}.rlimits"),
                format_args!("{} is given twice", limit.typ()),
            ));
        }
        limits.push((resource, limit.soft(), limit.hard()));
    }
    Ok(limits)
}

fn io_priority(process: &Process, field: &str) -> Result<Option<(u32, u32)>, Fault> {
    let Some(priority) = process.io_priority() else {
        return Ok(None);
    };
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(priority.priority()) {
        Ok(level @ 0..=7) => Ok(Some((class, level))),
        _ => Err(Fault::spec(
            format_args!("{field}.ioPriority.priority"),
            "is not within 0 to 7",
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(json: &str) -> Result<ProcessPlan, Fault> {
        ProcessPlan::new(&serde_json::from_str(json).unwrap(), "process")
    }

    const LEAST: &str = r#""user":{"uid":0,"gid":0},"cwd":"/","args":["sh"]"#;

    #[test]
    fn every_capability_has_a_number() {
        let all: Vec<String> = caps::all()
            .iter()
            .map(|c| format!("{:?}", c.to_string()))
            .collect();
        let json = format!(r#"{{{LEAST},"capabilities":{{"bounding":[{}]}}}}"#, all.join(","));
        let bits = plan(&json).unwrap().capabilities().bounding;
        assert_eq!(bits, (1 << 41) - 1);
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        let json = format!(r#"{{{LEAST},"capabilities":{{"effective":["CAP_CHOWN","CAP_SYS_ADMIN"]}}}}"#);
        assert_eq!(plan(&json).unwrap().capabilities().effective, 1 | (1 << 21));
    }

    #[test]
    fn of_an_environment_variable_the_last_value_counts() {
        let plan = plan(&format!(r#"{{{LEAST},"env":["A=1","PATH=/x","A=2=3"]}}"#)).unwrap();
        assert_eq!(plan.env, [c"PATH=/x".to_owned(), c"A=2=3".to_owned()]);
        assert_eq!(plan.env_value("A"), Some("2=3"));
        assert_eq!(plan.env_value("PA"), None);
    }

    #[test]
    fn what_cannot_be_applied_is_refused_by_name() {
        for (field, json) in [
            ("process.selinuxLabel", r#""selinuxLabel":"x""#),
            ("process.commandLine", r#""commandLine":"x""#),
            (
                "process.scheduler.policy",
                r#""scheduler":{"policy":"SCHED_ISO"}"#,
            ),
            (
                "process.execCPUAffinity.final",
                r#""execCPUAffinity":{"final":"1-0"}"#,
            ),
            ("process.oomScoreAdj", r#""oomScoreAdj":1001"#),
            (
                "process.ioPriority.priority",
                r#""ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#,
            ),
            ("process.env", r#""env":["NOVALUE"]"#),
            (
                "process.rlimits",
                r#""rlimits":[{"type":"RLIMIT_CPU","soft":1,"hard":1},{"type":"RLIMIT_CPU","soft":1,"hard":1}]"#,
            ),
        ] {
            let fault = plan(&format!("{{{LEAST},{json}}}")).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
        assert!(plan(r#"{"user":{},"cwd":"x","args":["sh"]}"#).is_err());
        assert!(plan(r#"{"user":{},"cwd":"/"}"#).is_err());
        assert!(plan(r#"{"user":{},"cwd":"/","args":["a\u0000b"]}"#).is_err());
    }

    #[test]
    fn what_joins_a_container_has_what_it_does_not_say_from_the_containers_init() {
        let init = plan(&format!(
            r#"{{{LEAST},"capabilities":{{"bounding":["CAP_KILL"]}},"rlimits":[{{"type":"RLIMIT_CPU","soft":1,"hard":2}}],
                "oomScoreAdj":5,"scheduler":{{"policy":"SCHED_BATCH"}},"noNewPrivileges":true}}"#
        ))
        .unwrap();
        let mut plain = plan(&format!("{{{LEAST}}}")).unwrap();
        plain.shared.inherit(&init.shared);
        assert_eq!(plain.capabilities(), init.capabilities());
        assert_eq!(plain.shared.rlimits, [(libc::RLIMIT_CPU, 1, 2)]);
        assert_eq!(plain.shared.oom_score_adj, Some(5));
        assert_eq!(plain.shared.scheduler.unwrap().policy, 3);
        assert!(!plain.no_new_privileges);

        let mut own = plan(&format!(r#"{{{LEAST},"capabilities":{{}},"oomScoreAdj":6}}"#)).unwrap();
        own.shared.inherit(&init.shared);
        assert_eq!(own.capabilities(), CapabilitySets::default());
        assert_eq!(own.shared.oom_score_adj, Some(6));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_plan_or_a_fault(json in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(process) = serde_json::from_slice::<Process>(&json) {
                let _ = ProcessPlan::new(&process, "process");
            }
        }
    }
}
