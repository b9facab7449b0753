//! `linux.resources.devices`: which device nodes a container may make, read and write, and the program that the
//! kernel asks.
//!
//! The rules have the meaning that version 1 of the devices cgroup gave them, which other runtimes keep: a rule for all
//! devices says what holds where nothing else does; what follows it are exceptions. Without any, nothing is allowed. In
//! the end what every container may use is allowed once more, so that no rule can take it away.

use std::collections::BTreeMap;

use husk_bpf::{Instruction, Register::*};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use crate::fault::Fault;

const FIELD: &str = "linux.resources.devices";

/// Most exceptions of one container: the kernel goes through them at each open.
const MAX_EXCEPTIONS: usize = 1000;

/// Bits as the kernel's program finds them in its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access(u8);

impl Access {
    const MKNOD: u8 = 1;
    const READ: u8 = 2;
    const WRITE: u8 = 4;
    const ALL: Self = Self(7);

    /// Of letters `r`, `w`, `m`.
    fn new(letters: &str) -> Option<Self> {
        let mut bits = 0;
        for letter in letters.bytes() {
            bits |= match letter {
                b'r' => Self::READ,
                b'w' => Self::WRITE,
                b'm' => Self::MKNOD,
                _ => return None,
            };
        }
        (bits != 0).then_some(Self(bits))
    }
}

/// The discriminants are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// `None`: any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Devices {
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
}

/// What every container may use: (path that the spec can redefine, devices, access). `mknod` is no access: a node that
/// cannot be opened is of no use.
const ALWAYS: &[(Option<&str>, Devices, Access)] = &[
    (None, char(None, None), Access(Access::MKNOD)),
    (
        None,
        Devices {
            kind: Kind::Block,
            major: None,
            minor: None,
        },
        Access(Access::MKNOD),
    ),
    (Some("/dev/null"), char(Some(1), Some(3)), Access::ALL),
    (Some("/dev/random"), char(Some(1), Some(8)), Access::ALL),
    (Some("/dev/full"), char(Some(1), Some(7)), Access::ALL),
    (Some("/dev/tty"), char(Some(5), Some(0)), Access::ALL),
    (Some("/dev/zero"), char(Some(1), Some(5)), Access::ALL),
    (Some("/dev/urandom"), char(Some(1), Some(9)), Access::ALL),
    // /dev/pts and /dev/ptmx.
    (None, char(Some(136), None), Access::ALL),
    (None, char(Some(5), Some(2)), Access::ALL),
    // /dev/net/tun, which engines rely on.
    (None, char(Some(10), Some(200)), Access::ALL),
];

const fn char(major: Option<u32>, minor: Option<u32>) -> Devices {
    Devices {
        kind: Kind::Char,
        major,
        minor,
    }
}

/// What is allowed to each container whatever the rules say; fewer when its spec has nodes of its own at these paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Always(Vec<usize>);

impl Always {
    /// For a container whose `linux.devices` are these.
    pub fn new(nodes: &[LinuxDevice]) -> Self {
        let is_kept = |path: &Option<&str>| match path {
            Some(path) => nodes.iter().all(|node| node.path().as_os_str() != *path),
            None => true,
        };
        let kept = ALWAYS.iter().enumerate().filter(|(_, (path, ..))| is_kept(path));
        Self(kept.map(|(index, _)| index).collect())
    }
}

/// The rules of one container, with no redundancy left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRules {
    allow: bool,
    exceptions: BTreeMap<Devices, u8>,
}

impl DeviceRules {
    /// Reads `rules`.
    ///
    /// # Errors
    ///
    /// A rule that says nothing, or that would make a hole in an exception of many devices, which cannot be held to.
    pub fn new(rules: &[LinuxDeviceCgroup], always: &Always) -> Result<Self, Fault> {
        let mut all = Self {
            allow: false,
            exceptions: BTreeMap::new(),
        };
        for (index, rule) in rules.iter().enumerate() {
            all.apply(rule)
                .map_err(|problem| Fault::spec(format_args!("{FIELD}[{index}]"), problem))?;
        }
        for index in &always.0 {
            if let Some((_, devices, access)) = ALWAYS.get(*index) {
                all.add(*devices, *access, true)
                    .map_err(|problem| Fault::spec(FIELD, problem))?;
            }
        }
        if all.exceptions.len() > MAX_EXCEPTIONS {
            return Err(Fault::spec(FIELD, format_args!("are more than {MAX_EXCEPTIONS}")));
        }
        Ok(all)
    }

    fn apply(&mut self, rule: &LinuxDeviceCgroup) -> Result<(), String> {
        let access = match rule.access().as_deref() {
            None | Some("") => return Err("access cannot be empty".to_owned()),
            Some(letters) => {
                Access::new(letters).ok_or_else(|| format!("access {letters:?} is not of r, w and m"))?
            }
        };
        let number = |what: &str, number: Option<i64>| match number {
            None | Some(-1) => Ok(None),
            Some(number) => u32::try_from(number)
                .map(Some)
                .map_err(|_| format!("{what} {number} is out of range")),
        };
        let (major, minor) = (number("major", rule.major())?, number("minor", rule.minor())?);
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => {
                if major.is_some() || minor.is_some() || access != Access::ALL {
                    return Err("type \"a\" stands for every access to every device".to_owned());
                }
                self.allow = rule.allow();
                self.exceptions.clear();
                return Ok(());
            }
            Some(LinuxDeviceType::B) => Kind::Block,
            Some(LinuxDeviceType::C) => Kind::Char,
            Some(LinuxDeviceType::U | LinuxDeviceType::P) => {
                return Err("the type must be \"a\", \"b\" or \"c\"".to_owned());
            }
        };
        self.add(Devices { kind, major, minor }, access, rule.allow())
    }

    fn add(&mut self, devices: Devices, access: Access, allow: bool) -> Result<(), String> {
        if allow != self.allow {
            *self.exceptions.entry(devices).or_default() |= access.0;
            return Ok(());
        }
        // The rule takes an exception back. One for more devices would still hold for these.
        for (major, minor) in [(None, devices.minor), (devices.major, None), (None, None)] {
            let wider = Devices {
                major,
                minor,
                ..devices
            };
            if wider != devices
                && self
                    .exceptions
                    .get(&wider)
                    .is_some_and(|bits| bits & access.0 != 0)
            {
                return Err(format!(
                    "cannot punch a hole for {} in the rule for {}",
                    name(devices),
                    name(wider)
                ));
            }
        }
        if let Some(bits) = self.exceptions.get_mut(&devices) {
            *bits &= !access.0;
            if *bits == 0 {
                self.exceptions.remove(&devices);
            }
        }
        Ok(())
    }

    /// The program that answers 1 for what is allowed and 0 for the rest. Its context is the kernel's
    /// `struct bpf_cgroup_dev_ctx`: type and access in the halves of one number, major, minor.
    pub fn program(&self) -> Vec<Instruction> {
        let mut program = vec![
            Instruction::load(R2, R1, 0),
            Instruction::and(R2, 0xffff),
            Instruction::load(R3, R1, 0),
            Instruction::shift_right(R3, 16),
            Instruction::load(R4, R1, 4),
            Instruction::load(R5, R1, 8),
        ];
        for (devices, bits) in &self.exceptions {
            // Each test goes on behind the block if it fails.
            let mut block = vec![Instruction::jump_unless_equal(R2, devices.kind as u32)];
            if *bits != Access::ALL.0 {
                block.push(Instruction::copy(R1, R3));
                block.push(Instruction::and(R1, u32::from(*bits)));
                block.push(if self.allow {
                    // Denied if any of what is asked for is.
                    Instruction::jump_if_equal(R1, 0)
                } else {
                    // Allowed only if all of it is.
                    Instruction::jump_unless_same(R1, R3)
                });
            }
            for (register, number) in [(R4, devices.major), (R5, devices.minor)] {
                if let Some(number) = number {
                    block.push(Instruction::jump_unless_equal(register, number));
                }
            }
            block.push(Instruction::set(R0, u32::from(!self.allow)));
            block.push(Instruction::exit());
            let length = block.len();
            for (index, instruction) in block.into_iter().enumerate() {
                program.push(instruction.jumping(length - index - 1));
            }
        }
        program.push(Instruction::set(R0, u32::from(self.allow)));
        program.push(Instruction::exit());
        program
    }
}

fn name(devices: Devices) -> String {
    let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let kind = match devices.kind {
        Kind::Block => 'b',
        Kind::Char => 'c',
    };
    format!("{kind} {}:{}", number(devices.major), number(devices.minor))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device_filter::{DeviceFilter, interpret};

    fn rules(json: &str) -> Result<DeviceRules, Fault> {
        DeviceRules::new(&serde_json::from_str::<Vec<_>>(json).unwrap(), &Always::new(&[]))
    }

    fn allows(rules: &DeviceRules, kind: char, major: u32, minor: u32, access: &str) -> bool {
        let kind = if kind == 'b' { 1 } else { 2 };
        let access = access.bytes().fold(0, |bits, letter| {
            bits | Access::new(std::str::from_utf8(&[letter]).unwrap()).unwrap().0
        });
        interpret(&rules.program(), [kind | u32::from(access) << 16, major, minor]) == 1
    }

    const NOTHING: &str = r#"{"allow":false,"access":"rwm"}"#;
    const ALL: &str = r#"{"allow":true,"access":"rwm"}"#;

    #[test]
    fn what_every_container_may_use() {
        for json in ["[]".to_owned(), format!("[{NOTHING}]")] {
            let rules = rules(&json).unwrap();
            for (major, minor) in [
                (1, 3),
                (1, 5),
                (1, 7),
                (1, 8),
                (1, 9),
                (5, 0),
                (5, 2),
                (136, 77),
                (10, 200),
            ] {
                assert!(allows(&rules, 'c', major, minor, "rw"), "{major}:{minor}");
                assert!(!allows(&rules, 'b', major, minor, "r"), "{major}:{minor}");
            }
            // Anything may be made, but not opened.
            assert!(allows(&rules, 'b', 8, 0, "m"));
            assert!(allows(&rules, 'c', 1, 1, "m"));
            assert!(!allows(&rules, 'b', 8, 0, "r"));
            assert!(!allows(&rules, 'c', 1, 1, "w"));
            assert!(!allows(&rules, 'c', 10, 229, "rw"));
        }
    }

    #[test]
    fn exceptions_are_as_narrow_as_they_say() {
        let rules = rules(&format!(
            r#"[{NOTHING},
                {{"allow":true,"type":"c","major":10,"minor":229,"access":"r"}},
                {{"allow":true,"type":"b","major":8,"access":"rw"}},
                {{"allow":true,"type":"c","major":4294967295,"minor":-1,"access":"rwm"}}]"#
        ))
        .unwrap();
        assert!(allows(&rules, 'c', 10, 229, "r"));
        assert!(!allows(&rules, 'c', 10, 229, "w"));
        assert!(!allows(&rules, 'c', 10, 229, "rw"));
        assert!(!allows(&rules, 'c', 10, 228, "r"));
        assert!(allows(&rules, 'b', 8, 17, "rw"));
        assert!(!allows(&rules, 'b', 7, 17, "r"));
        assert!(allows(&rules, 'c', u32::MAX, 5, "rw"));
    }

    #[test]
    fn rules_of_one_device_add_up_and_can_be_taken_back() {
        let both = rules(
            r#"[{"allow":true,"type":"c","major":10,"minor":1,"access":"r"},
                {"allow":true,"type":"c","major":10,"minor":1,"access":"w"}]"#,
        )
        .unwrap();
        assert!(allows(&both, 'c', 10, 1, "rw"));
        let one = rules(
            r#"[{"allow":true,"type":"c","major":10,"minor":1,"access":"rw"},
                {"allow":false,"type":"c","major":10,"minor":1,"access":"w"}]"#,
        )
        .unwrap();
        assert!(allows(&one, 'c', 10, 1, "r"));
        assert!(!allows(&one, 'c', 10, 1, "rw"));
        let none = rules(&format!(
            r#"[{{"allow":true,"type":"c","major":10,"minor":1,"access":"rw"}},{NOTHING}]"#
        ))
        .unwrap();
        assert!(!allows(&none, 'c', 10, 1, "r"));
    }

    #[test]
    fn all_but_some() {
        let rules = rules(&format!(
            r#"[{ALL},{{"allow":false,"type":"b","major":8,"minor":0,"access":"w"}}]"#
        ))
        .unwrap();
        assert!(allows(&rules, 'b', 8, 0, "r"));
        assert!(!allows(&rules, 'b', 8, 0, "w"));
        // Opened for both, it is opened for writing, too.
        assert!(!allows(&rules, 'b', 8, 0, "rw"));
        assert!(allows(&rules, 'b', 8, 1, "rw"));
        assert!(allows(&rules, 'c', 8, 0, "rwm"));
    }

    #[test]
    fn a_node_of_the_spec_takes_the_place_of_a_default() {
        let node = r#"[{"path":"/dev/null","type":"c","major":1,"minor":11}]"#;
        let always = Always::new(&serde_json::from_str::<Vec<_>>(node).unwrap());
        let rules = DeviceRules::new(&[], &always).unwrap();
        assert!(!allows(&rules, 'c', 1, 3, "r"));
        assert!(allows(&rules, 'c', 1, 5, "r"));
    }

    #[test]
    fn rules_that_cannot_be_held_to_are_refused_by_name() {
        for (field, json) in [
            (
                "[0]",
                r#"[{"allow":true,"type":"c","major":1,"minor":1}]"#.to_owned(),
            ),
            ("[0]", r#"[{"allow":true,"type":"c","access":"rx"}]"#.to_owned()),
            ("[0]", r#"[{"allow":true,"type":"p","access":"r"}]"#.to_owned()),
            (
                "[0]",
                r#"[{"allow":true,"type":"c","major":-2,"access":"r"}]"#.to_owned(),
            ),
            (
                "[0]",
                r#"[{"allow":true,"type":"c","major":4294967296,"access":"r"}]"#.to_owned(),
            ),
            (
                "[0]",
                r#"[{"allow":true,"type":"a","major":7,"access":"rwm"}]"#.to_owned(),
            ),
            ("[0]", r#"[{"allow":true,"access":"r"}]"#.to_owned()),
            (
                "[1]",
                r#"[{"allow":true,"type":"c","major":10,"access":"rw"},
                    {"allow":false,"type":"c","major":10,"minor":1,"access":"w"}]"#
                    .to_owned(),
            ),
            // It would take away what every container may use.
            (
                "",
                format!(r#"[{ALL},{{"allow":false,"type":"c","access":"rwm"}}]"#),
            ),
        ] {
            let fault = rules(&json).unwrap_err();
            assert!(
                fault
                    .message
                    .starts_with(&format!("linux.resources.devices{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    #[test]
    fn the_kernel_takes_the_programs() {
        let many: Vec<String> = (0..MAX_EXCEPTIONS - 20)
            .map(|minor| format!(r#"{{"allow":true,"type":"b","major":8,"minor":{minor},"access":"r"}}"#))
            .collect();
        for json in [
            "[]".to_owned(),
            format!("[{ALL}]"),
            format!("[{}]", many.join(",")),
            r#"[{"allow":true,"type":"c","major":4294967295,"minor":2147483648,"access":"r"}]"#.to_owned(),
        ] {
            match DeviceFilter::load(&rules(&json).unwrap().program()) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                    eprintln!("not allowed to load programs here: not tested");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    proptest! {
        /// Against the rules read one after the other, where there is nothing to take back.
        #[test]
        fn the_program_does_what_the_rules_say(
            rules in prop::collection::vec((0u8..2, prop::option::of(0i64..3), prop::option::of(0i64..3), 1u8..8), 0..8),
            (kind, major, minor, access) in (0u8..2, 0u32..3, 0u32..3, 1u8..8),
        ) {
            let letters = |bits: u8| {
                [(1, 'm'), (2, 'r'), (4, 'w')].iter().filter(|(bit, _)| bits & bit != 0).map(|(_, c)| c).collect::<String>()
            };
            let json: Vec<_> = rules.iter().map(|(kind, major, minor, access)| serde_json::json!({
                "allow": true, "type": if *kind == 0 { "b" } else { "c" },
                "major": major.unwrap_or(-1), "minor": minor.unwrap_or(-1), "access": letters(*access),
            })).collect();
            let parsed: Vec<LinuxDeviceCgroup> = serde_json::from_value(json.into()).unwrap();
            let program = DeviceRules::new(&parsed, &Always::default()).unwrap();
            let mut merged = std::collections::HashMap::new();
            for (kind, major, minor, access) in rules {
                *merged.entry((kind, major, minor)).or_insert(0) |= access;
            }
            let expected = merged.iter().any(|((k, ma, mi), bits)| {
                *k == kind && ma.is_none_or(|n| n == i64::from(major)) && mi.is_none_or(|n| n == i64::from(minor))
                    && access & bits == access
            });
            let kind = if kind == 0 { 'b' } else { 'c' };
            prop_assert_eq!(allows(&program, kind, major, minor, &letters(access)), expected);
        }
    }
}
