//! The log: one line of UTF-8 text per record, written to descriptor 2.
//!
//! A guest can provoke records, so their number is bounded: after [`BURST`] records one per
//! [`INTERVAL`] gets through, and the next record that does says how many were left out.

use std::fmt;
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest record in bytes, line end included; what is longer is cut off. A pipe takes this in one piece.
const MAX_RECORD: usize = 1024;

/// Records that may come at once.
pub const BURST: u32 = 256;

/// Once the burst is used up, one record may come per interval.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// How grave a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Good to know.
    Info,
    /// Something was refused or lost; the machine goes on.
    Warn,
    /// A part of the machine, or all of it, ends.
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warning",
            Self::Error => "error",
        }
    }
}

struct Limit {
    left: u32,
    refilled: Option<Instant>,
    dropped: u64,
}

impl Limit {
    const fn new() -> Self {
        Self {
            left: BURST,
            refilled: None,
            dropped: 0,
        }
    }

    /// Whether a record may be written at `now`; if so, how many were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.refilled.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_secs() / INTERVAL.as_secs();
        if earned > 0 {
            self.left = self
                .left
                .saturating_add(u32::try_from(earned).unwrap_or(BURST))
                .min(BURST);
            self.refilled = Some(now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped = self.dropped.saturating_add(1);
                None
            }
        }
    }
}

static LIMIT: Mutex<Limit> = Mutex::new(Limit::new());

/// Writes one record. Line breaks and other control characters in it become spaces; a log that nobody reads any
/// more is no reason to fail.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    // A fuzzer is told of a broken guest all the time.
    #[cfg(feature = "fuzzing")]
    if crate::worker::inline::is_on() {
        drop(record(level, message));
        return;
    }
    let admitted = match LIMIT.lock() {
        Ok(mut limit) => limit.admit(Instant::now()),
        Err(_) => return,
    };
    let Some(dropped) = admitted else { return };
    if dropped > 0 {
        emit(Level::Warn, format_args!("{dropped} log records were left out"));
    }
    emit(level, message);
}

fn emit(level: Level, message: fmt::Arguments<'_>) {
    let _ = std::io::stderr()
        .lock()
        .write_all(record(level, message).as_bytes());
}

fn record(level: Level, message: fmt::Arguments<'_>) -> String {
    let text = format!("husk-vmm: {}: {message}", level.name());
    let mut line = String::with_capacity(text.len().min(MAX_RECORD).saturating_add(1));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if line.len().saturating_add(c.len_utf8()) >= MAX_RECORD {
            break;
        }
        line.push(c);
    }
    line.push('\n');
    line
}

/// Logs a record of [`Level::Info`].
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) };
}

/// Logs a record of [`Level::Warn`].
#[macro_export]
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warn, format_args!($($arg)*)) };
}

/// Logs a record of [`Level::Error`].
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) };
}

/// An error and all its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        line.push_str(": ");
        line.push_str(&next.to_string());
        cause = next.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::{BURST, INTERVAL, Level, Limit, MAX_RECORD, record};
    use std::time::Instant;

    #[test]
    fn a_record_is_one_line_of_bounded_length() {
        assert_eq!(
            record(Level::Warn, format_args!("a\nb\x1b")),
            "husk-vmm: warning: a b \n"
        );
        let long = record(Level::Error, format_args!("{}", "ü".repeat(4000)));
        assert!(long.len() <= MAX_RECORD);
        assert_eq!(long.matches('\n').count(), 1);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = Limit::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.admit(start), Some(0));
        }
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start), None);
        assert_eq!(limit.admit(start + INTERVAL), Some(2));
        assert_eq!(limit.admit(start + INTERVAL), None);
    }
}
