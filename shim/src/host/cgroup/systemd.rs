//! Units of systemd's as cgroups: asked for over D-Bus, as `StartTransientUnit`. systemd owns its part of the hierarchy:
//! directories made there behind its back may be removed or emptied by it.
//!
//! Three calls and one signal are all that is needed of D-Bus, so [`bus`] speaks just that.

mod bus;

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use self::bus::{Body, Bus, Reply};
use super::{Limits, Unit};

/// How long systemd may take to make a unit.
const START: Duration = Duration::from_secs(20);

/// How long it may take to answer anything else.
const ANSWER: Duration = Duration::from_millis(1500);

const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";

/// Where it listens: the bus that all use, and its own for when that does not run.
const SOCKETS: [(&str, bool); 2] = [
    ("/run/dbus/system_bus_socket", true),
    ("/run/systemd/private", false),
];

/// Whether systemd runs this host, as sd_booted(3) tells it.
pub fn runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn connect(patience: Duration) -> io::Result<Bus> {
    let deadline = Instant::now() + patience;
    let mut result = Err(io::ErrorKind::NotFound.into());
    for (path, shared) in SOCKETS {
        result = Bus::connect(Path::new(path), shared, deadline);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Makes a unit with a process in it. Returns when it is there.
///
/// # Errors
/// When systemd does not answer or does not make it.
pub fn start(unit: &Unit, first: u32, limits: &Limits) -> io::Result<()> {
    start_on(&mut connect(START)?, unit, first, limits)
}

fn start_on(bus: &mut Bus, unit: &Unit, first: u32, limits: &Limits) -> io::Result<()> {
    bus.listen_to_jobs()?;
    let call = |bus: &mut Bus, oom: bool| {
        let mut body = Body::default();
        body.string(&unit.name).string("replace");
        body.array(8, |properties| describe(properties, unit, first, limits, oom));
        body.array(8, |_| ());
        bus.call_manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
    };
    let mut reply = call(bus, true)?;
    if matches!(&reply, Reply::Error { name, .. } if name == EXISTS) {
        // It failed once, and is kept to tell so.
        reset(bus, &unit.name)?;
        reply = call(bus, true)?;
    }
    // Scopes have an OOMPolicy since version 253.
    if let Reply::Error { message, .. } = &reply {
        if message.contains("OOMPolicy") {
            reply = call(bus, false)?;
        }
    }
    let job = reply.into_string()?;
    match bus.job_result(&job)?.as_str() {
        "done" => Ok(()),
        result => Err(io::Error::other(format!("its start came to: {result}"))),
    }
}

fn describe(properties: &mut Body, unit: &Unit, first: u32, limits: &Limits, oom: bool) {
    let set = |properties: &mut Body, name: &str, signature: &str, value: &dyn Fn(&mut Body)| {
        properties.property(name, signature, value);
    };
    let description = format!("husk sandbox {}", unit.name);
    set(properties, "Description", "s", &|value| {
        value.string(&description);
    });
    if unit.name.ends_with(".slice") {
        set(properties, "Wants", "as", &|value| {
            value.array(4, |list| {
                list.string(&unit.slice);
            });
        });
    } else {
        set(properties, "Slice", "s", &|value| {
            value.string(&unit.slice);
        });
        set(properties, "Delegate", "b", &|value| value.number(1));
        set(properties, "PIDs", "au", &|value| {
            value.array(4, |list| list.number(first));
        });
        if oom {
            // By default systemd ends the whole unit, and with it the one who would tell why.
            set(properties, "OOMPolicy", "s", &|value| {
                value.string("continue");
            });
        }
    }
    set(properties, "DefaultDependencies", "b", &|value| value.number(0));
    for name in [
        "CPUAccounting",
        "MemoryAccounting",
        "TasksAccounting",
        "IOAccounting",
    ] {
        set(properties, name, "b", &|value| value.number(1));
    }
    describe_limits(properties, limits);
}

fn describe_limits(properties: &mut Body, limits: &Limits) {
    // Its quotas are per second, and by default for periods of 100 ms.
    let quota = limits
        .cpu
        .filter(|(_, period)| *period > 0)
        .map(|(quota, period)| match quota {
            Limits::UNLIMITED => (quota, period),
            quota => (quota.saturating_mul(1_000_000).div_ceil(period), period),
        });
    for (name, value) in [
        ("MemoryMax", limits.memory),
        ("CPUWeight", limits.weight()),
        ("CPUQuotaPerSecUSec", quota.map(|(quota, _)| quota)),
        ("CPUQuotaPeriodUSec", quota.map(|(_, period)| period)),
        ("TasksMax", limits.pids),
    ] {
        if let Some(number) = value {
            properties.property(name, "t", &|value| value.long(number));
        }
    }
}

/// Sets the limits of a unit that is there.
///
/// # Errors
/// When systemd does not answer or refuses.
pub fn set(unit: &str, limits: &Limits) -> io::Result<()> {
    let mut body = Body::default();
    body.string(unit).number(1);
    body.array(8, |properties| describe_limits(properties, limits));
    connect(ANSWER)?
        .call_manager("SetUnitProperties", "sba(sv)", body)?
        .into_nothing()
}

/// Lets a unit end, and be forgotten if it failed. One that is not there is fine.
///
/// # Errors
/// When systemd does not answer.
pub fn stop(unit: &str) -> io::Result<()> {
    let mut bus = connect(ANSWER)?;
    let mut body = Body::default();
    body.string(unit).string("replace");
    bus.call_manager("StopUnit", "ss", body)?;
    reset(&mut bus, unit)
}

fn reset(bus: &mut Bus, unit: &str) -> io::Result<()> {
    let mut body = Body::default();
    body.string(unit);
    bus.call_manager("ResetFailedUnit", "s", body).map(drop)
}

#[cfg(test)]
#[path = "systemd_test.rs"]
mod tests;
