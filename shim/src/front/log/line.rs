//! One entry of a log: message, level and fields, as text in the form of containerd's own log.

use std::fmt::{self, Write};

use tracing::{
    Event, Level,
    field::{Field, Visit},
};
use tracing_subscriber::fmt::{
    format::Writer,
    time::{FormatTime, SystemTime},
};

use super::Identity;

/// Longest value that is logged, in bytes.
const MAX_VALUE: usize = 16 << 10;

/// See the module.
#[derive(Debug)]
pub struct Line {
    /// How urgent.
    pub level: Level,
    /// What is said.
    pub message: String,
    /// What it is said about, in the order it was given.
    pub fields: Vec<(&'static str, String)>,
}

impl Line {
    /// An event.
    pub fn of(event: &Event<'_>) -> Self {
        let mut line = Self {
            level: *event.metadata().level(),
            message: String::new(),
            fields: Vec::new(),
        };
        event.record(&mut line);
        line
    }

    /// As text: one line, with its end.
    pub fn text(&self, identity: &Identity) -> String {
        let mut text = String::from("time=\"");
        // Writing to memory does not fail.
        let _ = SystemTime.format_time(&mut Writer::new(&mut text));
        let level = match self.level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let _ = write!(text, "\" level={level} msg=");
        value(&mut text, &self.message);
        let own = [("namespace", &identity.namespace), ("sandbox", &identity.sandbox)];
        let own = own.into_iter().filter(|(_, value)| !value.is_empty());
        let fields = self.fields.iter().map(|(name, value)| (*name, value));
        for (name, content) in own.chain(fields) {
            let _ = write!(text, " {name}=");
            value(&mut text, content);
        }
        text.push('\n');
        text
    }
}

/// A value, in quotes if it has more than plain characters.
fn value(text: &mut String, value: &str) {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        text.push_str(value);
    } else {
        let _ = write!(text, "{value:?}");
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        let mut end = value.len().min(MAX_VALUE);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        let value = value.get(..end).unwrap_or_default().to_owned();
        if field.name() == "message" {
            self.message = value;
        } else {
            self.fields.push((field.name(), value));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}
