//! The agent's log: the kernel's (`/dev/kmsg`), which the console carries out of the guest; standard error
//! where there is no guest. Lines are bounded in length, and their number per second is, too.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::Write,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::fault::cut;

/// Longest line in bytes. The kernel's own bound is below 1 KiB.
const MAX_LINE: usize = 800;
/// Lines in one [`WINDOW`]; what is more is counted, and the count is logged.
const MAX_LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(5);

struct Log {
    kernel: Option<File>,
    window: Option<Instant>,
    lines: u32,
    dropped: u32,
}

static LOG: Mutex<Log> = Mutex::new(Log {
    kernel: None,
    window: None,
    lines: 0,
    dropped: 0,
});

/// How urgent a line is, by the kernel's numbers.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// The agent ends.
    Emergency = 0,
    /// Something failed.
    Error = 3,
    /// Something is odd.
    Warning = 4,
    /// Worth knowing.
    Notice = 5,
}

/// Sends what is logged from now on to the kernel's log.
///
/// # Errors
///
/// `/dev/kmsg` cannot be opened.
pub fn to_kernel() -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).open("/dev/kmsg")?;
    if let Ok(mut log) = LOG.lock() {
        log.kernel = Some(file);
    }
    Ok(())
}

/// Logs one line.
pub fn log(level: Level, line: fmt::Arguments<'_>) {
    // A poisoned lock would mean a panic while logging: nothing is left to do then.
    let Ok(mut log) = LOG.lock() else { return };
    let now = Instant::now();
    if log.window.is_none_or(|start| now.duration_since(start) > WINDOW) {
        log.window = Some(now);
        log.lines = 0;
        let dropped = std::mem::take(&mut log.dropped);
        if dropped > 0 {
            log.write(
                Level::Warning,
                &format!("{dropped} lines of the log were dropped"),
            );
        }
    }
    if log.lines >= MAX_LINES && !matches!(level, Level::Emergency) {
        log.dropped = log.dropped.saturating_add(1);
        return;
    }
    log.lines = log.lines.saturating_add(1);
    log.write(level, &line.to_string());
}

impl Log {
    fn write(&mut self, level: Level, line: &str) {
        let line = cut(line, MAX_LINE).replace('\n', " | ");
        // One write is one record. If the log itself fails there is nowhere to say so.
        let _ = match &mut self.kernel {
            Some(file) => file.write_all(format!("<{}>husk-agent: {line}\n", level as u8).as_bytes()),
            None => std::io::stderr().write_all(format!("husk-agent: {line}\n").as_bytes()),
        };
    }
}

macro_rules! error { ($($part:tt)*) => { $crate::log::log($crate::log::Level::Error, format_args!($($part)*)) } }
macro_rules! warning { ($($part:tt)*) => { $crate::log::log($crate::log::Level::Warning, format_args!($($part)*)) } }
macro_rules! notice { ($($part:tt)*) => { $crate::log::log($crate::log::Level::Notice, format_args!($($part)*)) } }
pub(crate) use {error, notice, warning};
