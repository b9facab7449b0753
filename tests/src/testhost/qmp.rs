//! QEMU's control protocol: one JSON object a line, answers in order, events in between.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use serde_json::{Value, json};

/// A connection to QEMU's monitor, over its standard streams.
#[derive(Debug)]
pub struct Qmp {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

fn failed(what: impl Into<String>) -> io::Error {
    io::Error::other(what.into())
}

impl Qmp {
    /// Takes QEMU's streams and ends the negotiation.
    ///
    /// # Errors
    /// When QEMU ends or says something else than a greeting.
    pub fn new(to: ChildStdin, from: ChildStdout) -> io::Result<Self> {
        let mut qmp = Self {
            to,
            from: BufReader::new(from),
        };
        if qmp.read()?.get("QMP").is_none() {
            return Err(failed("QEMU did not greet"));
        }
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives its answer.
    ///
    /// # Errors
    /// What QEMU answers, or that it ended.
    pub fn call(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        writeln!(self.to, "{}", json!({"execute": command, "arguments": arguments}))?;
        loop {
            let mut message = self.read()?;
            if let Some(error) = message.get("error") {
                return Err(failed(format!("QEMU: {command}: {error}")));
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// Writes the machine's memory and devices to `file`, leaving the machine stopped.
    ///
    /// # Errors
    /// What QEMU says about it.
    pub fn freeze_to(&mut self, file: &str) -> io::Result<()> {
        self.call("stop", &json!({}))?;
        self.prepare_migration()?;
        self.call("migrate", &json!({"uri": format!("file:{file}")}))?;
        self.wait_for_migration()
    }

    /// Reads what [`Self::freeze_to`] wrote, on a QEMU started with `-incoming defer`, and lets the machine run.
    ///
    /// # Errors
    /// What QEMU says about it.
    pub fn restore_from(&mut self, file: &str) -> io::Result<()> {
        self.prepare_migration()?;
        self.call("migrate-incoming", &json!({"uri": format!("file:{file}")}))?;
        self.wait_for_migration()?;
        self.call("cont", &json!({})).map(drop)
    }

    /// Reads on until QEMU ends.
    pub fn drain(&mut self) {
        while self.read().is_ok() {}
    }

    fn prepare_migration(&mut self) -> io::Result<()> {
        // mapped-ram: every page at a fixed place in the file, which reads several times faster than a stream.
        let capabilities = json!({"capabilities": [
            {"capability": "mapped-ram", "state": true},
            {"capability": "events", "state": true},
        ]});
        self.call("migrate-set-capabilities", &capabilities)?;
        self.call("migrate-set-parameters", &json!({"max-bandwidth": 1_u64 << 40}))
            .map(drop)
    }

    fn wait_for_migration(&mut self) -> io::Result<()> {
        loop {
            let message = self.read()?;
            if message.get("event").and_then(Value::as_str) != Some("MIGRATION") {
                continue;
            }
            match message.pointer("/data/status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed") => {
                    let status = self.call("query-migrate", &json!({}))?;
                    return Err(failed(format!("QEMU: migration failed: {status}")));
                }
                _ => {}
            }
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err(failed("QEMU ended; its log tells why"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
