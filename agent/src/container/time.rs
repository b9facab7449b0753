//! `linux.timeOffsets`: what a time namespace adds to the clocks.

use std::{collections::HashMap, fmt::Write, fs};

use oci_spec::runtime::LinuxTimeOffset;

use crate::fault::Fault;

/// The clocks that a time namespace has of its own.
const CLOCKS: &[&str] = &["boottime", "monotonic"];

/// Below a second, in nanoseconds.
const MAX_NANOSECONDS: u32 = 999_999_999;

/// Offsets as `/proc/PID/timens_offsets` takes them; empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets(String);

impl TimeOffsets {
    /// Reads `linux.timeOffsets`; `has_namespace` tells whether the container has a new time namespace.
    ///
    /// # Errors
    ///
    /// An unknown clock, or no namespace to have offsets.
    pub fn new(
        offsets: &Option<HashMap<String, LinuxTimeOffset>>,
        has_namespace: bool,
    ) -> Result<Self, Fault> {
        let mut text = String::new();
        for (clock, offset) in offsets.iter().flatten() {
            let field = format!("linux.timeOffsets.{clock}");
            if !CLOCKS.contains(&clock.as_str()) {
                return Err(Fault::spec(
                    field,
                    "is no clock of a time namespace: use boottime or monotonic",
                ));
            }
            if !has_namespace {
                return Err(Fault::spec(field, "needs a time namespace of its own"));
            }
            let (seconds, nanoseconds) = (
                offset.secs().unwrap_or_default(),
                offset.nanosecs().unwrap_or_default(),
            );
            if nanoseconds > MAX_NANOSECONDS {
                return Err(Fault::spec(
                    format_args!("{field}.nanosecs"),
                    "is a second or more",
                ));
            }
            let _ = writeln!(text, "{clock} {seconds} {nanoseconds}");
        }
        Ok(Self(text))
    }

    /// Sets them in the time namespace that the calling process has made for its children, and that none is in yet.
    pub fn apply(&self) -> Result<(), Fault> {
        if self.0.is_empty() {
            return Ok(());
        }
        fs::write("/proc/self/timens_offsets", &self.0)
            .map_err(|error| Fault::system("set linux.timeOffsets", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(json: &str, has_namespace: bool) -> Result<TimeOffsets, Fault> {
        TimeOffsets::new(&Some(serde_json::from_str(json).unwrap()), has_namespace)
    }

    #[test]
    fn offsets_are_written_as_the_kernel_takes_them() {
        assert_eq!(
            offsets(r#"{"monotonic":{"secs":-3,"nanosecs":5}}"#, true)
                .unwrap()
                .0,
            "monotonic -3 5\n"
        );
        assert_eq!(
            offsets(r#"{"boottime":{"secs":86400}}"#, true).unwrap().0,
            "boottime 86400 0\n"
        );
    }

    #[test]
    fn wrong_offsets_are_refused_by_name() {
        for (field, json, has_namespace) in [
            ("linux.timeOffsets.realtime", r#"{"realtime":{"secs":1}}"#, true),
            ("linux.timeOffsets.boottime", r#"{"boottime":{"secs":1}}"#, false),
            (
                "linux.timeOffsets.boottime.nanosecs",
                r#"{"boottime":{"nanosecs":1000000000}}"#,
                true,
            ),
        ] {
            let fault = offsets(json, has_namespace).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }
}
