//! Filters of system calls (seccomp(2)): what is not named is not carried out, and its thread tells of it and ends the
//! process (see [`crate::violation`]). Code that kept it from doing so would still have gained nothing.

use crate::violation;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    TargetArch,
};
use std::collections::BTreeMap;
use std::ops::Range;

pub use seccompiler::{BackendError as RuleError, SeccompRule as Rule};

/// System calls that are allowed whatever their arguments.
pub type Allowed = &'static [libc::c_long];

/// System calls that are allowed if one of their rules holds.
pub type Rules = Vec<(libc::c_long, Vec<Rule>)>;

/// Why a thread could not be locked in.
#[derive(Debug, thiserror::Error)]
#[error("the system calls of thread {thread} cannot be limited")]
pub struct SeccompError {
    /// Its name.
    pub thread: String,
    /// The cause.
    #[source]
    pub source: seccompiler::Error,
}

/// Limits the calling thread, called `name`, to `plain` system calls and those that `rules` allow, for good. Threads that
/// it starts are limited alike.
///
/// # Errors
/// When the kernel refuses; the thread must not go on then.
pub fn limit(
    name: &str,
    plain: impl IntoIterator<Item = libc::c_long>,
    rules: Result<Rules, RuleError>,
) -> Result<(), SeccompError> {
    #[cfg(feature = "captured")]
    if crate::captured::is_free() {
        return Ok(());
    }
    let failed = |source| SeccompError {
        thread: name.to_owned(),
        source,
    };
    violation::set_thread_name(name);
    #[cfg(feature = "captured")]
    crate::captured::attack_unfiltered(name);
    // Hostile code goes on after a forbidden call: its handler returns.
    #[cfg(feature = "captured")]
    let plain = plain.into_iter().chain([libc::SYS_rt_sigreturn]);
    let filter = rules.and_then(|rules| filter(plain, rules));
    let filter = filter.map_err(|e| failed(e.into()))?;
    seccompiler::apply_filter(&filter).map_err(failed)?;
    #[cfg(feature = "captured")]
    crate::captured::attack(name);
    Ok(())
}

fn filter(plain: impl IntoIterator<Item = libc::c_long>, rules: Rules) -> Result<BpfProgram, BackendError> {
    let mut all: BTreeMap<i64, Vec<Rule>> = plain.into_iter().map(|call| (call, Vec::new())).collect();
    all.extend(rules);
    let filter = SeccompFilter::new(all, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// Memory may be mapped, but no file, and none to be executed; whether a descriptor is open may be asked, as a debug build
/// does before it closes one. With `heap` a heap beside the first one may grow, and buffers, to where the kernel chooses.
///
/// # Errors
/// None for these conditions.
pub fn memory(heap: bool) -> Result<Rules, RuleError> {
    let protection = masked(2, !(libc::PROT_READ | libc::PROT_WRITE), 0)?;
    let anonymous = masked(3, libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS)?;
    let mmap = Rule::new(vec![protection.clone(), anonymous])?;
    let is_open = Rule::new(vec![equal(1, u64::from(libc::F_GETFD.unsigned_abs()))?])?;
    let mut rules = vec![(libc::SYS_mmap, vec![mmap]), (libc::SYS_fcntl, vec![is_open])];
    if heap {
        rules.push((libc::SYS_mprotect, vec![Rule::new(vec![protection])?]));
        let may_move = Rule::new(vec![equal(3, u64::from(libc::MREMAP_MAYMOVE.unsigned_abs()))?])?;
        rules.push((libc::SYS_mremap, vec![may_move]));
    }
    Ok(rules)
}

/// The lower 32 bits of the argument (from 0) are `value`.
///
/// # Errors
/// When there is no such argument.
pub fn equal(argument: u8, value: u64) -> Result<SeccompCondition, RuleError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// The lower 32 bits of the argument (from 0) are one of these numbers, none of which is negative.
///
/// # Errors
/// When there is no such argument.
pub fn within(argument: u8, numbers: &Range<i32>) -> Result<Vec<SeccompCondition>, RuleError> {
    let (first, end) = (numbers.start.unsigned_abs(), numbers.end.unsigned_abs());
    if end.checked_sub(first) == Some(1) {
        return Ok(vec![equal(argument, first.into())?]);
    }
    let compare = |op, value: u32| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value.into());
    Ok(vec![
        compare(SeccompCmpOp::Ge, first)?,
        compare(SeccompCmpOp::Lt, end)?,
    ])
}

/// The bits of `mask` in the argument (from 0) are those of `value`.
///
/// # Errors
/// When there is no such argument.
pub fn masked(argument: u8, mask: i32, value: i32) -> Result<SeccompCondition, RuleError> {
    let bits = |value: i32| u64::from(u32::from_ne_bytes(value.to_ne_bytes()));
    let op = SeccompCmpOp::MaskedEq(bits(mask));
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, bits(value))
}
