//! `linux.seccomp`: the profile, as runc (with libseccomp) understands it, compiled to the kernel's BPF.
//!
//! Where they are not what one would guess, the rules are:
//! - A system call whose name is known to no ABI is ignored; so is an architecture that this machine is not.
//! - A rule whose action is the default one is ignored. Of a system call's rules, the first without conditions decides;
//!   if there is none, the first whose conditions hold.
//! - Conditions of one rule are an AND, unless two are about the same argument: then each is a rule of its own.
//! - The ABIs are x86_64 and those of `architectures`; a call by another kills the thread.
//! - If the default action refuses, calls with a number above all that the profile names get ENOSYS, so that the
//!   C library falls back to what it did before there was that call.

mod bpf;

use std::collections::BTreeMap;

use libc::sock_filter;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use husk_syscalls::{self as syscalls, Abi, X32_BIT};

use self::bpf::{Comparison, Condition, Ranges, Rule, Verdict};
use crate::{fault::Fault, sys};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// The kernel's BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// The kernel's MAX_ERRNO; it takes none above.
const MAX_ERRNO: u32 = 4095;

/// A filter for system calls, ready for the kernel.
#[derive(Clone)]
pub struct Filter {
    program: Vec<sock_filter>,
    /// `SECCOMP_FILTER_FLAG_…`
    flags: u64,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Filter({} instructions, flags {:#x})",
            self.program.len(),
            self.flags
        )
    }
}

impl Filter {
    /// Compiles `profile`.
    ///
    /// # Errors
    ///
    /// A field is wrong, or one that husk does not apply: it is named.
    pub fn new(profile: &LinuxSeccomp) -> Result<Self, Fault> {
        let refuse = |field: &str, why: &str| Err(Fault::spec(format_args!("linux.seccomp.{field}"), why));
        let notify = "is not supported: no agent of the host can be asked about system calls of the guest";
        if profile
            .listener_path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
        {
            return refuse("listenerPath", notify);
        }
        if profile
            .listener_metadata()
            .as_ref()
            .is_some_and(|text| !text.is_empty())
        {
            return refuse("listenerMetadata", notify);
        }
        let default = action(
            profile.default_action(),
            profile.default_errno_ret(),
            ["linux.seccomp.defaultAction", "linux.seccomp.defaultErrnoRet"],
        )?;
        let mut abis = vec![Abi::X86_64];
        for arch in profile.architectures().iter().flatten() {
            let abi = match arch {
                Arch::ScmpArchX86 => Abi::X86,
                Arch::ScmpArchX32 => Abi::X32,
                // No program can make such calls here.
                _ => continue,
            };
            if !abis.contains(&abi) {
                abis.push(abi);
            }
        }
        let mut tables: Vec<Table> = abis.into_iter().map(Table::new).collect();
        for (index, syscall) in profile.syscalls().iter().flatten().enumerate() {
            let field = format!("linux.seccomp.syscalls[{index}]");
            let rules = rules(syscall, &field)?;
            for name in syscall.names() {
                if name.is_empty() {
                    return Err(Fault::spec(
                        format_args!("{field}.names"),
                        "contains an empty name",
                    ));
                }
                tables
                    .iter_mut()
                    .for_each(|table| table.add(name, &rules, default));
            }
        }
        let program = program(&tables, default);
        if program.len() > MAX_INSTRUCTIONS {
            return refuse(
                "syscalls",
                &format!(
                    "are {} instructions for the kernel, which takes {MAX_INSTRUCTIONS}; use fewer conditions",
                    program.len()
                ),
            );
        }
        Ok(Self {
            program,
            flags: flags(profile)?,
        })
    }

    /// Puts the calling thread, and all that it will start, under the filter.
    ///
    /// # Errors
    ///
    /// The kernel's; without CAP_SYS_ADMIN in its user namespace, the thread must not be able to gain privileges.
    pub fn load(&self) -> Result<(), Fault> {
        sys::load_seccomp_filter(&self.program, self.flags)
            .map_err(|error| Fault::system("load linux.seccomp", error))
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<u64, Fault> {
    let Some(flags) = profile.flags() else {
        // What runc does if the profile does not say.
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    };
    flags.iter().try_fold(0, |bits, flag| {
        Ok(bits
            | match flag {
                // There is one thread.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    return Err(Fault::spec(
                        "linux.seccomp.flags",
                        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs SCMP_ACT_NOTIFY, which is not supported",
                    ));
                }
            })
    })
}

/// As the kernel's `SECCOMP_RET_…`; `fields` are the names of the action and of its errno.
fn action(action: LinuxSeccompAction, errno: Option<u32>, fields: [&str; 2]) -> Result<u32, Fault> {
    use LinuxSeccompAction::*;
    let [action_field, errno_field] = fields;
    let takes_value = matches!(action, ScmpActErrno | ScmpActTrace);
    if errno.is_some() && !takes_value {
        return Err(Fault::spec(errno_field, format_args!("{action} takes none")));
    }
    let value = errno.unwrap_or(libc::EPERM as u32);
    let max = if action == ScmpActErrno { MAX_ERRNO } else { 0xffff };
    if value > max {
        return Err(Fault::spec(errno_field, format_args!("{value} is above {max}")));
    }
    Ok(match action {
        ScmpActKill | ScmpActKillThread => libc::SECCOMP_RET_KILL_THREAD,
        ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        ScmpActTrap => libc::SECCOMP_RET_TRAP,
        ScmpActErrno => libc::SECCOMP_RET_ERRNO | value,
        ScmpActTrace => libc::SECCOMP_RET_TRACE | value,
        ScmpActLog => libc::SECCOMP_RET_LOG,
        ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        ScmpActNotify => {
            return Err(Fault::spec(
                action_field,
                "SCMP_ACT_NOTIFY is not supported: no agent of the host can be asked about system calls of the guest",
            ));
        }
    })
}

/// The rules that one entry of `syscalls` makes for each of its names.
fn rules(syscall: &LinuxSyscall, field: &str) -> Result<Vec<Rule>, Fault> {
    let action = action(
        syscall.action(),
        syscall.errno_ret(),
        [&format!("{field}.action"), &format!("{field}.errnoRet")],
    )?;
    let mut conditions = Vec::new();
    for (index, arg) in syscall.args().iter().flatten().enumerate() {
        conditions.push(condition(arg, &format!("{field}.args[{index}]"))?);
    }
    let mut indices: Vec<u8> = conditions.iter().map(|condition| condition.index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| matches!(pair, [a, b] if a == b));
    if !repeated {
        return Ok(vec![Rule { conditions, action }]);
    }
    let alone = conditions.into_iter().map(|condition| Rule {
        conditions: vec![condition],
        action,
    });
    Ok(alone.collect())
}

fn condition(arg: &LinuxSeccompArg, field: &str) -> Result<Condition, Fault> {
    use LinuxSeccompOperator::*;
    let index = u8::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or_else(|| Fault::spec(format_args!("{field}.index"), "is not within 0 to 5"))?;
    let value = arg.value();
    let comparison = match arg.op() {
        ScmpCmpNe => Comparison::Ne(value),
        ScmpCmpLt => Comparison::Lt(value),
        ScmpCmpLe => Comparison::Le(value),
        ScmpCmpEq => Comparison::Eq(value),
        ScmpCmpGe => Comparison::Ge(value),
        ScmpCmpGt => Comparison::Gt(value),
        ScmpCmpMaskedEq => Comparison::MaskedEq(value, arg.value_two().unwrap_or(0)),
    };
    Ok(Condition { index, comparison })
}

/// What an ABI's system calls get.
struct Table {
    abi: Abi,
    rules: BTreeMap<u32, Vec<Rule>>,
    /// The highest number that the profile names, whatever for.
    last: Option<u32>,
}

impl Table {
    fn new(abi: Abi) -> Self {
        Self {
            abi,
            rules: BTreeMap::new(),
            last: None,
        }
    }

    fn add(&mut self, name: &str, rules: &[Rule], default: u32) {
        let number = syscalls::number(name, self.abi);
        self.last = self.last.max(number);
        let rules = rules.iter().filter(|rule| rule.action != default);
        if let Some(number) = number {
            rules.clone().for_each(|rule| self.insert(number, rule.clone()));
        }
        if self.abi != Abi::X86 {
            return;
        }
        if let Some((number, call)) = syscalls::multiplexed(name) {
            for rule in rules {
                let mut rule = rule.clone();
                // The call is the first argument; its own are in memory, out of a filter's reach.
                rule.conditions.retain(|condition| condition.index != 0);
                rule.conditions.push(Condition {
                    index: 0,
                    comparison: Comparison::Eq(call.into()),
                });
                self.insert(number, rule);
            }
        }
    }

    fn insert(&mut self, number: u32, rule: Rule) {
        let rules = self.rules.entry(number).or_default();
        if rules.iter().any(|rule| rule.conditions.is_empty()) {
            return;
        }
        if rule.conditions.is_empty() {
            rules.clear();
        }
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }

    /// Appends the verdicts from the ABI's first number on; `beyond` is that of numbers above the last.
    fn ranges(&self, ranges: &mut Ranges, default: u32, beyond: u32) {
        let first = if self.abi == Abi::X32 { X32_BIT } else { 0 };
        ranges.push(first, Verdict::Action(default));
        for (number, rules) in &self.rules {
            let verdict = match rules.as_slice() {
                [rule] if rule.conditions.is_empty() => Verdict::Action(rule.action),
                _ => Verdict::Rules {
                    rules: rules.clone(),
                    otherwise: default,
                    narrow: self.abi != Abi::X86_64,
                },
            };
            ranges.push(*number, verdict);
            ranges.push(number.saturating_add(1), Verdict::Action(default));
        }
        if let Some(last) = self.last {
            ranges.push(last.saturating_add(1), Verdict::Action(beyond));
        }
    }
}

fn program(tables: &[Table], default: u32) -> Vec<sock_filter> {
    const BAD_ABI: u32 = libc::SECCOMP_RET_KILL_THREAD;
    let refuses = !matches!(
        default & libc::SECCOMP_RET_ACTION_FULL,
        libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE
    );
    let beyond = if refuses {
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
    } else {
        default
    };
    let (mut wide, mut narrow) = (Ranges::default(), None);
    let mut has_x32 = false;
    for table in tables {
        match table.abi {
            Abi::X86_64 => table.ranges(&mut wide, default, beyond),
            Abi::X32 => {
                has_x32 = true;
                table.ranges(&mut wide, default, beyond);
            }
            Abi::X86 => table.ranges(narrow.insert(Ranges::default()), default, beyond),
        }
    }
    if !has_x32 {
        wide.push(X32_BIT, Verdict::Action(BAD_ABI));
        // A tracer's way to skip a system call.
        wide.push(u32::MAX, Verdict::Action(default));
    }
    let mut architectures = vec![(AUDIT_ARCH_X86_64, wide)];
    architectures.extend(narrow.map(|ranges| (AUDIT_ARCH_I386, ranges)));
    bpf::program(&architectures, BAD_ABI)
}

#[cfg(test)]
mod tests {
    use super::bpf::interpret;
    use super::*;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    fn filter(json: &str) -> Result<Filter, Fault> {
        Filter::new(&serde_json::from_str(json).unwrap())
    }

    /// What happens to an x86_64 call.
    fn verdict(filter: &Filter, number: i64, arguments: &[u64]) -> u32 {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        interpret(&filter.program, AUDIT_ARCH_X86_64, number as u32, all)
    }

    #[test]
    fn the_default_profile_of_an_engine_is_what_it_says() {
        let filter = filter(include_str!("../../../tests/fixtures/containerd-seccomp.json")).unwrap();
        assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
        // 1,000 names in three ABIs; the kernel runs a dozen instructions of it for a call.
        assert!(filter.program.len() < 1000, "{}", filter.program.len());
        let call = |number, arguments: &[u64]| verdict(&filter, number, arguments);
        assert_eq!(call(libc::SYS_read, &[]), ALLOW);
        assert_eq!(call(libc::SYS_mount, &[]), EPERM);
        assert_eq!(call(libc::SYS_clone, &[libc::SIGCHLD as u64]), ALLOW);
        assert_eq!(call(libc::SYS_clone, &[libc::CLONE_NEWUSER as u64]), EPERM);
        assert_eq!(call(libc::SYS_clone3, &[]), ENOSYS);
        assert_eq!(call(libc::SYS_socket, &[libc::AF_INET as u64]), ALLOW);
        assert_eq!(call(libc::SYS_socket, &[libc::AF_VSOCK as u64]), EPERM);
        assert_eq!(call(libc::SYS_socket, &[libc::AF_ALG as u64]), EPERM);
        assert_eq!(call(libc::SYS_personality, &[0xffff_ffff]), ALLOW);
        assert_eq!(call(libc::SYS_personality, &[0x0040_0000]), EPERM);
        assert_eq!(call(466, &[]), ALLOW);
        assert_eq!(call(467, &[]), ENOSYS);
        assert_eq!(call(0x3fff_ffff, &[]), ENOSYS);
        let x86 = |number, first| interpret(&filter.program, AUDIT_ARCH_I386, number, [first, 0, 0, 0, 0, 0]);
        // read, mount, clone, socketcall, and what nobody knows.
        assert_eq!(x86(3, 0), ALLOW);
        assert_eq!(x86(21, 0), EPERM);
        assert_eq!(x86(120, 0x1000_0000), EPERM);
        assert_eq!(x86(120, 0xffff_ffff_0000_0011), ALLOW);
        assert_eq!(x86(102, 1), ALLOW);
        assert_eq!(x86(500, 0), ENOSYS);
        // x32: readv of its own, an x86_64 number that is not its own.
        assert_eq!(call(0x4000_0000 + 515, &[]), ALLOW);
        assert_eq!(call(0x4000_0000 + 19, &[]), EPERM);
        assert_eq!(call(0x4000_0000 + 600, &[]), ENOSYS);
        // AUDIT_ARCH_AARCH64
        assert_eq!(
            interpret(&filter.program, 0xc000_00b7, 0, [0; 6]),
            libc::SECCOMP_RET_KILL_THREAD
        );
    }

    #[test]
    fn without_their_architectures_other_abis_are_killed() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_AARCH64"],
                "syscalls":[{"names":["mount","no_such_call"],"action":"SCMP_ACT_TRACE","errnoRet":7}]}"#,
        )
        .unwrap();
        let kill = libc::SECCOMP_RET_KILL_THREAD;
        assert_eq!(
            verdict(&filter, libc::SYS_mount, &[]),
            libc::SECCOMP_RET_TRACE | 7
        );
        assert_eq!(verdict(&filter, libc::SYS_read, &[]), ALLOW);
        assert_eq!(verdict(&filter, 0x3fff_ffff, &[]), ALLOW);
        assert_eq!(verdict(&filter, 0x4000_0000, &[]), kill);
        assert_eq!(verdict(&filter, -1, &[]), ALLOW);
        assert_eq!(interpret(&filter.program, AUDIT_ARCH_I386, 3, [0; 6]), kill);
    }

    #[test]
    fn actions_are_the_kernels() {
        for (word, expected) in [
            ("KILL", libc::SECCOMP_RET_KILL_THREAD),
            ("KILL_THREAD", libc::SECCOMP_RET_KILL_THREAD),
            ("KILL_PROCESS", libc::SECCOMP_RET_KILL_PROCESS),
            ("TRAP", libc::SECCOMP_RET_TRAP),
            ("ERRNO", EPERM),
            ("TRACE", libc::SECCOMP_RET_TRACE | 1),
            ("LOG", libc::SECCOMP_RET_LOG),
        ] {
            let json = format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["sync"],"action":"SCMP_ACT_{word}"}}]}}"#
            );
            assert_eq!(
                verdict(&filter(&json).unwrap(), libc::SYS_sync, &[]),
                expected,
                "{word}"
            );
        }
    }

    #[test]
    fn conditions_are_an_and_unless_two_are_about_one_argument() {
        let profile = |second: u32| {
            filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["chmod"],"action":"SCMP_ACT_ERRNO","args":[
                    {{"index":1,"value":1,"op":"SCMP_CMP_EQ"}},{{"index":{second},"value":2,"op":"SCMP_CMP_EQ"}}]}}]}}"#
            ))
            .unwrap()
        };
        let both = profile(2);
        assert_eq!(verdict(&both, libc::SYS_chmod, &[0, 1, 2]), EPERM);
        assert_eq!(verdict(&both, libc::SYS_chmod, &[0, 1, 0]), ALLOW);
        let either = profile(1);
        assert_eq!(verdict(&either, libc::SYS_chmod, &[0, 1]), EPERM);
        assert_eq!(verdict(&either, libc::SYS_chmod, &[0, 2]), EPERM);
        assert_eq!(verdict(&either, libc::SYS_chmod, &[0, 3]), ALLOW);
    }

    #[test]
    fn a_rule_without_conditions_decides() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5,"syscalls":[
                {"names":["chmod"],"action":"SCMP_ACT_TRAP","args":[{"index":1,"value":1,"op":"SCMP_CMP_EQ"}]},
                {"names":["chmod"],"action":"SCMP_ACT_ERRNO","errnoRet":5},
                {"names":["chmod"],"action":"SCMP_ACT_ALLOW"},
                {"names":["chmod"],"action":"SCMP_ACT_KILL"}]}"#,
        )
        .unwrap();
        assert_eq!(verdict(&filter, libc::SYS_chmod, &[0, 1]), ALLOW);
        assert_eq!(verdict(&filter, libc::SYS_read, &[]), libc::SECCOMP_RET_ERRNO | 5);
    }

    #[test]
    fn flags_are_the_kernels() {
        let with = |flags: &str| {
            filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":[{flags}]}}"#
            ))
            .map(|f| f.flags)
        };
        assert_eq!(with(""), Ok(0));
        assert_eq!(with(r#""SECCOMP_FILTER_FLAG_TSYNC""#), Ok(0));
        assert_eq!(
            with(r#""SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW""#),
            Ok(2 | 4)
        );
        assert!(with(r#""SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV""#).is_err());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let rule = |json: &str| {
            format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["read"],{json}}}]}}"#)
        };
        for (field, json) in [
            (
                "listenerPath",
                r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x"}"#.to_owned(),
            ),
            (
                "listenerMetadata",
                r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerMetadata":"x"}"#.to_owned(),
            ),
            (
                "defaultAction",
                r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#.to_owned(),
            ),
            (
                "defaultErrnoRet",
                r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#.to_owned(),
            ),
            ("syscalls[0].action", rule(r#""action":"SCMP_ACT_NOTIFY""#)),
            (
                "syscalls[0].errnoRet",
                rule(r#""action":"SCMP_ACT_ERRNO","errnoRet":4096"#),
            ),
            (
                "syscalls[0].errnoRet",
                rule(r#""action":"SCMP_ACT_KILL","errnoRet":1"#),
            ),
            (
                "syscalls[0].args[1].index",
                rule(
                    r#""action":"SCMP_ACT_KILL","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},
                        {"index":6,"value":0,"op":"SCMP_CMP_EQ"}]"#,
                ),
            ),
            (
                "syscalls[0].names",
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[""],"action":"SCMP_ACT_KILL"}]}"#
                    .to_owned(),
            ),
        ] {
            let fault = filter(&json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("linux.seccomp.{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    #[test]
    fn more_than_the_kernel_takes_is_refused() {
        let arguments: Vec<String> = (0..2000)
            .map(|value| format!(r#"{{"index":1,"value":{value},"op":"SCMP_CMP_EQ"}}"#))
            .collect();
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["chmod"],"action":"SCMP_ACT_KILL","args":[{}]}}]}}"#,
            arguments.join(",")
        );
        let fault = filter(&json).unwrap_err();
        assert!(fault.message.contains("takes 4096"), "{}", fault.message);
    }

    /// The kernel's own view. A thread is put under the filter; it may, since it can gain no privileges any more.
    #[test]
    fn the_kernel_does_what_a_profile_says() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {"names":["getppid"],"action":"SCMP_ACT_ERRNO","errnoRet":77},
                {"names":["getpgid"],"action":"SCMP_ACT_ERRNO","errnoRet":78,"args":[
                    {"index":0,"value":1099511627776,"op":"SCMP_CMP_GE"}]},
                {"names":["getsid"],"action":"SCMP_ACT_ERRNO","errnoRet":79,"args":[
                    {"index":0,"value":255,"valueTwo":3,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        )
        .unwrap();
        let under = std::thread::spawn(move || {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).unwrap();
            filter.load().unwrap();
            let errno = |number, argument: u64| {
                // SAFETY: calls that only take a pid.
                let result = unsafe { libc::syscall(number, argument) };
                if result < 0 {
                    std::io::Error::last_os_error().raw_os_error().unwrap()
                } else {
                    0
                }
            };
            [
                errno(libc::SYS_getppid, 0),
                errno(libc::SYS_getpgid, 0),
                errno(libc::SYS_getpgid, 1 << 40),
                errno(libc::SYS_getsid, 0),
                errno(libc::SYS_getsid, 0x103),
            ]
        });
        assert_eq!(under.join().unwrap(), [77, 0, 78, 0, 79]);
    }
}
