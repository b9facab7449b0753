//! The compiler from rules to the kernel's classic BPF.
//!
//! Every piece of code here ends in a return on each of its paths, and jumps only within itself. So pieces can be
//! put one behind the other without any fix-up, which is what makes the compiler small. The number of the system call
//! is found by a binary search over ranges, in which neighbours that are treated alike are one.

use libc::sock_filter;

/// How a 64-bit argument of a system call is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Ne(u64),
    Lt(u64),
    Le(u64),
    Eq(u64),
    Ge(u64),
    Gt(u64),
    /// `argument & .0 == .1`
    MaskedEq(u64, u64),
}

/// A comparison of the argument `index`, 0 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    pub index: u8,
    pub comparison: Comparison,
}

/// What happens (a `SECCOMP_RET_…`) if all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub conditions: Vec<Condition>,
    pub action: u32,
}

/// What happens to a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Action(u32),
    /// What the first rule that holds says, else `otherwise`. A `narrow` ABI has arguments of 32 bits.
    Rules {
        rules: Vec<Rule>,
        otherwise: u32,
        narrow: bool,
    },
}

/// The verdicts over all numbers: each from a number up to that of the next.
#[derive(Debug, Default)]
pub struct Ranges(Vec<(u32, Verdict)>);

impl Ranges {
    /// Appends the range that begins at `from`, which is not below any that is there; it replaces one that begins there.
    pub fn push(&mut self, from: u32, verdict: Verdict) {
        if self.0.last().is_some_and(|(last, _)| *last == from) {
            self.0.pop();
        }
        if self.0.last().is_none_or(|(_, last)| *last != verdict) {
            self.0.push((from, verdict));
        }
    }
}

/// Offsets in the kernel's `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// The code for system calls of several architectures (`AUDIT_ARCH_…`), and `otherwise` for all others.
pub fn program(architectures: &[(u32, Ranges)], otherwise: u32) -> Vec<sock_filter> {
    let mut code = vec![load(ARCHITECTURE)];
    for (architecture, ranges) in architectures {
        let mut body = vec![load(NUMBER)];
        body.extend(search(&ranges.0, otherwise));
        code.push(jump(libc::BPF_JEQ, *architecture, 1, 0));
        code.push(jump(libc::BPF_JA, length(&body), 0, 0));
        code.extend(body);
    }
    code.push(give(otherwise));
    code
}

fn search(ranges: &[(u32, Verdict)], otherwise: u32) -> Vec<sock_filter> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    match (low, high) {
        ([], []) => vec![give(otherwise)],
        ([], [(_, verdict), ..]) => verdict_code(verdict),
        (_, [(pivot, _), ..]) => {
            let below = search(low, otherwise);
            let mut code = match u8::try_from(below.len()) {
                Ok(skip) => vec![jump(libc::BPF_JGE, *pivot, skip, 0)],
                // Too far for a conditional jump.
                Err(_) => vec![
                    jump(libc::BPF_JGE, *pivot, 0, 1),
                    jump(libc::BPF_JA, length(&below), 0, 0),
                ],
            };
            code.extend(below);
            code.extend(search(high, otherwise));
            code
        }
        // Not with a split at the half.
        (_, []) => vec![give(otherwise)],
    }
}

fn verdict_code(verdict: &Verdict) -> Vec<sock_filter> {
    match verdict {
        Verdict::Action(action) => vec![give(*action)],
        Verdict::Rules {
            rules,
            otherwise,
            narrow,
        } => {
            let mut code = Vec::new();
            for rule in rules {
                code.extend(rule_code(rule, *narrow));
            }
            code.push(give(*otherwise));
            code
        }
    }
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum To {
    /// So many instructions further.
    Skip(u8),
    /// Behind the rule: it does not hold.
    Out,
}

/// An instruction whose jumps out of its rule are not yet known.
struct Draft(sock_filter, To, To);

fn rule_code(rule: &Rule, narrow: bool) -> Vec<sock_filter> {
    let mut drafts: Vec<Draft> = Vec::new();
    for condition in &rule.conditions {
        drafts.extend(condition_code(*condition, narrow));
    }
    // At most six arguments of seven instructions each, and the return.
    let length = drafts.len() as u8;
    let mut code: Vec<sock_filter> = (0..length)
        .zip(drafts)
        .map(|(at, Draft(mut instruction, jt, jf))| {
            let resolve = |to| match to {
                To::Skip(count) => count,
                To::Out => length - at,
            };
            (instruction.jt, instruction.jf) = (resolve(jt), resolve(jf));
            instruction
        })
        .collect();
    code.push(give(rule.action));
    code
}

/// The two halves are compared apart, the high one first: the machine has 32 bits.
fn condition_code(condition: Condition, narrow: bool) -> Vec<Draft> {
    use To::{Out, Skip};
    let at = ARGUMENTS + 8 * u32::from(condition.index);
    let (high, low) = (|value: u64| (value >> 32) as u32, |value: u64| value as u32);
    let plain = |instruction| Draft(instruction, Skip(0), Skip(0));
    let test = |operation, value, jt, jf| Draft(jump(operation, value, 0, 0), jt, jf);
    let (load_high, load_low) = (|| plain(load(at + 4)), || plain(load(at)));
    let and = |mask| plain(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask));

    // What the low half has to be, if the high ones are equal: an operation, its value, and whether it shall hold.
    let (operation, value, holds) = match condition.comparison {
        Comparison::MaskedEq(mask, value) => {
            let mut code = Vec::new();
            if !narrow {
                code.extend([
                    load_high(),
                    and(high(mask)),
                    test(libc::BPF_JEQ, high(value), Skip(0), Out),
                ]);
            }
            code.extend([
                load_low(),
                and(low(mask)),
                test(libc::BPF_JEQ, low(value), Skip(0), Out),
            ]);
            return code;
        }
        Comparison::Eq(value) => (libc::BPF_JEQ, value, true),
        Comparison::Ne(value) => (libc::BPF_JEQ, value, false),
        Comparison::Gt(value) => (libc::BPF_JGT, value, true),
        Comparison::Le(value) => (libc::BPF_JGT, value, false),
        Comparison::Ge(value) => (libc::BPF_JGE, value, true),
        Comparison::Lt(value) => (libc::BPF_JGE, value, false),
    };
    let (jt, jf) = if holds { (Skip(0), Out) } else { (Out, Skip(0)) };
    let mut code = Vec::new();
    if !narrow {
        code.push(load_high());
        match condition.comparison {
            Comparison::Eq(_) => code.push(test(libc::BPF_JEQ, high(value), Skip(0), Out)),
            // Behind the two instructions for the low half.
            Comparison::Ne(_) => code.push(test(libc::BPF_JEQ, high(value), Skip(0), Skip(2))),
            Comparison::Gt(_) | Comparison::Ge(_) => code.extend([
                test(libc::BPF_JGT, high(value), Skip(3), Skip(0)),
                test(libc::BPF_JEQ, high(value), Skip(0), Out),
            ]),
            _ => code.extend([
                test(libc::BPF_JGT, high(value), Out, Skip(0)),
                test(libc::BPF_JEQ, high(value), Skip(0), Skip(2)),
            ]),
        }
    }
    code.extend([load_low(), test(operation, low(value), jt, jf)]);
    code
}

fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn give(action: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action)
}

fn jump(operation: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        jt,
        jf,
        ..instruction(libc::BPF_JMP | operation | libc::BPF_K, k)
    }
}

fn length(code: &[sock_filter]) -> u32 {
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

/// The kernel's machine, as far as programs from here use it.
#[cfg(test)]
pub fn interpret(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = vec![number, architecture, 0, 0];
    data.extend(
        arguments
            .iter()
            .flat_map(|argument| [*argument as u32, (argument >> 32) as u32]),
    );
    let (mut a, mut pc) = (0u32, 0usize);
    loop {
        let sock_filter { code, jt, jf, k } = program[pc];
        pc += 1;
        let mut branch = |condition: bool| pc += usize::from(if condition { jt } else { jf });
        match u32::from(code) {
            0x20 => a = data[k as usize / 4],
            0x54 => a &= k,
            0x05 => pc += k as usize,
            0x15 => branch(a == k),
            0x25 => branch(a > k),
            0x35 => branch(a >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holds(comparison: Comparison, argument: u64) -> bool {
        match comparison {
            Comparison::Ne(value) => argument != value,
            Comparison::Lt(value) => argument < value,
            Comparison::Le(value) => argument <= value,
            Comparison::Eq(value) => argument == value,
            Comparison::Ge(value) => argument >= value,
            Comparison::Gt(value) => argument > value,
            Comparison::MaskedEq(mask, value) => argument & mask == value,
        }
    }

    /// Numbers that are often equal, in one half or both.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            (0u64..3, 0u64..3).prop_map(|(high, low)| high << 32 | low),
            Just(u64::MAX),
        ]
    }

    fn condition() -> impl Strategy<Value = Condition> {
        let comparison = prop_oneof![
            number().prop_map(Comparison::Ne),
            number().prop_map(Comparison::Lt),
            number().prop_map(Comparison::Le),
            number().prop_map(Comparison::Eq),
            number().prop_map(Comparison::Ge),
            number().prop_map(Comparison::Gt),
            (number(), number()).prop_map(|(mask, value)| Comparison::MaskedEq(mask, value & mask)),
        ];
        (0u8..6, comparison).prop_map(|(index, comparison)| Condition { index, comparison })
    }

    proptest! {
        #[test]
        fn rules_hold_as_they_read(
            rules in prop::collection::vec(prop::collection::vec(condition(), 1..7), 1..5),
            arguments in prop::array::uniform6(number()),
            narrow in any::<bool>(),
        ) {
            let rules: Vec<Rule> = (1..)
                .zip(rules)
                .map(|(action, conditions)| Rule { conditions, action })
                .collect();
            let cut = |value: u64| if narrow { value & 0xffff_ffff } else { value };
            let shorten = |comparison| match comparison {
                Comparison::Ne(value) => Comparison::Ne(cut(value)),
                Comparison::Lt(value) => Comparison::Lt(cut(value)),
                Comparison::Le(value) => Comparison::Le(cut(value)),
                Comparison::Eq(value) => Comparison::Eq(cut(value)),
                Comparison::Ge(value) => Comparison::Ge(cut(value)),
                Comparison::Gt(value) => Comparison::Gt(cut(value)),
                Comparison::MaskedEq(mask, value) => Comparison::MaskedEq(cut(mask), cut(value)),
            };
            let expected = rules
                .iter()
                .find(|rule| {
                    rule.conditions.iter().all(|condition| {
                        holds(shorten(condition.comparison), cut(arguments[usize::from(condition.index)]))
                    })
                })
                .map_or(99, |rule| rule.action);
            let mut ranges = Ranges::default();
            ranges.push(0, Verdict::Action(7));
            ranges.push(5, Verdict::Rules { rules, otherwise: 99, narrow });
            ranges.push(6, Verdict::Action(8));
            let program = program(&[(1, ranges)], 0);
            prop_assert_eq!(interpret(&program, 1, 5, arguments), expected);
            prop_assert_eq!(interpret(&program, 1, 4, arguments), 7);
            prop_assert_eq!(interpret(&program, 1, 6, arguments), 8);
            prop_assert_eq!(interpret(&program, 2, 5, arguments), 0);
        }

        #[test]
        fn every_number_gets_the_verdict_of_its_range(
            starts in prop::collection::btree_set(any::<u32>(), 0..600),
            numbers in prop::collection::vec(any::<u32>(), 50),
        ) {
            let mut ranges = Ranges::default();
            ranges.push(0, Verdict::Action(1));
            for start in &starts {
                ranges.push(*start, Verdict::Action(start | 1));
            }
            let program = program(&[(3, Ranges::default()), (1, ranges)], 0);
            for number in numbers.into_iter().chain(starts.iter().copied()) {
                let expected = starts.range(..=number).next_back().map_or(1, |start| start | 1);
                prop_assert_eq!(interpret(&program, 1, number, [0; 6]), expected);
            }
        }
    }

    #[test]
    fn neighbours_that_are_alike_are_one_range() {
        let mut ranges = Ranges::default();
        for from in 0..100 {
            ranges.push(from, Verdict::Action(1));
            ranges.push(from + 1, Verdict::Action(3));
        }
        ranges.push(100, Verdict::Action(2));
        assert_eq!(ranges.0.len(), 2);
    }
}
