//! The options, one line each: name, and how its value becomes part of the [`Config`].

use std::{ops::RangeInclusive, path::PathBuf, str::FromStr, time::Duration};

use husk_vmm_protocol::config::{MAX_KERNEL_PARAMS_LEN, MAX_NICS, MAX_QUEUE_PAIRS, MAX_VCPUS, MEMORY_MIB};
use toml::de::DeValue;
use tracing_subscriber::filter::LevelFilter;

use super::{Annotation, Config, GuestLogLevel, Pattern};
use crate::host::cgroup::Driver;

/// An option.
pub struct Key {
    /// Its table.
    pub table: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// Takes its value over. `Err`: what is wrong with it.
    pub set: fn(&mut Config, &DeValue<'_>) -> Result<(), String>,
}

macro_rules! key {
    ($table:ident . $name:ident, |$config:ident, $value:ident| $set:expr) => {
        Key {
            table: stringify!($table),
            name: stringify!($name),
            set: |$config, $value| {
                $set;
                Ok(())
            },
        }
    };
}

const VCPUS: RangeInclusive<u64> = 1..=MAX_VCPUS as u64;
const MIB: RangeInclusive<u64> = *MEMORY_MIB.start() as u64..=*MEMORY_MIB.end() as u64;
const SECONDS: RangeInclusive<u64> = 1..=3600;
const KIB: RangeInclusive<u64> = 4..=64 << 10;

/// All of them, as `configs/husk.toml` lists them.
pub const KEYS: [Key; 27] = [
    key!(machine.vcpus, |c, v| c.machine.vcpus = Some(integer(v, VCPUS)?)),
    key!(machine.memory_mib, |c, v| c.machine.memory_mib = integer(v, MIB)?),
    key!(machine.memory_overhead_mib, |c, v| c
        .machine
        .memory_overhead_mib =
        integer(v, 16..=65536)?),
    key!(machine.max_vcpus, |c, v| c.machine.max_vcpus =
        Some(integer(v, VCPUS)?)),
    key!(machine.max_memory_mib, |c, v| c.machine.max_memory_mib =
        Some(integer(v, MIB)?)),
    key!(guest.kernel, |c, v| c.guest.kernel = Some(path(v)?)),
    key!(guest.initramfs, |c, v| c.guest.initramfs = Some(path(v)?)),
    key!(guest.kernel_params, |c, v| c.guest.kernel_params =
        kernel_params(string(v)?)?),
    key!(guest.log_level, |c, v| c.guest.log_level =
        one_of(v, &GuestLogLevel::NAMES, GuestLogLevel::of)?),
    key!(programs.vmm, |c, v| c.programs.vmm = Some(path(v)?)),
    key!(programs.fsd, |c, v| c.programs.fsd = Some(path(v)?)),
    key!(programs.standin, |c, v| c.programs.standin = Some(path(v)?)),
    key!(cgroup.driver, |c, v| c.cgroup.driver =
        one_of(v, &Driver::NAMES, Driver::of)?),
    key!(cgroup.limits, |c, v| c.cgroup.limits = boolean(v)?),
    key!(security.ignored_apparmor_profiles, |c, v| c
        .security
        .ignored_apparmor_profiles =
        strings(v)?),
    key!(volumes.watched, |c, v| c.volumes.watched = patterns(v)?),
    key!(network.spare_nics, |c, v| c.network.spare_nics =
        Some(integer(v, 0..=MAX_NICS as u64)?)),
    key!(network.queue_pairs, |c, v| c.network.queue_pairs =
        integer(v, 1..=u64::from(MAX_QUEUE_PAIRS))?),
    key!(network.vhost, |c, v| c.network.vhost = boolean(v)?),
    key!(timeouts.boot_seconds, |c, v| c.timeouts.boot = seconds(v)?),
    key!(timeouts.call_seconds, |c, v| c.timeouts.call = seconds(v)?),
    key!(timeouts.shutdown_seconds, |c, v| c.timeouts.shutdown =
        seconds(v)?),
    key!(log.level, |c, v| c.log.level =
        one_of(v, &LEVELS, |name| { LevelFilter::from_str(name).ok() })?),
    key!(log.journald, |c, v| c.log.journald = boolean(v)?),
    key!(log.kept_kib, |c, v| c.log.kept = kib(v)?),
    key!(log.console_kept_kib, |c, v| c.log.console_kept = kib(v)?),
    key!(annotations.allowed, |c, v| c.allowed_annotations =
        annotations(v)?),
];

/// What is logged, from little to much.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

fn integer<T: TryFrom<u64>>(value: &DeValue<'_>, range: RangeInclusive<u64>) -> Result<T, String> {
    let (start, end) = (range.start(), range.end());
    let wanted = format!("must be a whole number from {start} to {end}");
    let number = match value {
        DeValue::Integer(integer) => u64::from_str_radix(integer.as_str(), integer.radix()).ok(),
        // Docker's daemon.json has no other numbers: what it hands over as `8` arrives as `8.0`.
        DeValue::Float(float) => float
            .as_str()
            .split_once('.')
            .filter(|(_, fraction)| fraction.bytes().all(|digit| digit == b'0'))
            .and_then(|(whole, _)| whole.parse().ok()),
        _ => None,
    };
    number
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or(wanted)
}

fn seconds(value: &DeValue<'_>) -> Result<Duration, String> {
    integer(value, SECONDS).map(Duration::from_secs)
}

fn kib(value: &DeValue<'_>) -> Result<usize, String> {
    integer::<usize>(value, KIB).map(|kib| kib << 10)
}

fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    match value {
        DeValue::Boolean(value) => Ok(*value),
        _ => Err("must be true or false".into()),
    }
}

fn string<'a>(value: &'a DeValue<'_>) -> Result<&'a str, String> {
    match value {
        DeValue::String(value) => Ok(value),
        _ => Err("must be a string".into()),
    }
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = PathBuf::from(string(value)?);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err("must be an absolute path".into())
    }
}

fn one_of<T>(value: &DeValue<'_>, names: &[&str], of: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    let wanted = || format!("must be one of \"{}\"", names.join("\", \""));
    let name = string(value).map_err(|_| wanted())?;
    if !names.contains(&name) {
        return Err(wanted());
    }
    of(name).ok_or_else(wanted)
}

/// Checks parameters for the guest's kernel; gives them back.
pub fn kernel_params(params: &str) -> Result<String, String> {
    if params.len() > MAX_KERNEL_PARAMS_LEN || !params.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(format!(
            "must be at most {MAX_KERNEL_PARAMS_LEN} printable ASCII characters"
        ));
    }
    Ok(params.trim().to_owned())
}

fn strings(value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let wanted = || "must be a list of strings".to_owned();
    let DeValue::Array(items) = value else {
        return Err(wanted());
    };
    items
        .iter()
        .map(|item| string(item.get_ref()).map(str::to_owned).map_err(|_| wanted()))
        .collect()
}

fn annotations(value: &DeValue<'_>) -> Result<Vec<Annotation>, String> {
    strings(value)?
        .iter()
        .map(|name| {
            Annotation::of(name).ok_or_else(|| {
                format!(
                    "{name:?} is not an annotation of husk's; there are {}",
                    Annotation::names()
                )
            })
        })
        .collect()
}

fn patterns(value: &DeValue<'_>) -> Result<Vec<Pattern>, String> {
    strings(value)?
        .iter()
        .map(|text| {
            Pattern::of(text)
                .ok_or_else(|| format!("{text:?} is not an absolute path: it must begin with / or *"))
        })
        .collect()
}
