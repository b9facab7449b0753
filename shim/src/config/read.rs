//! From the text of a `husk.toml` to a [`Config`], or to all that is wrong with it, each with its line.

use std::{fmt, ops::Range};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, ConfigError,
    options::{KEYS, Key},
};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, or what else the text is from.
    pub origin: String,
    /// The line, from 1 on.
    pub line: usize,
    /// The option, as `table.name`; empty for what is no TOML.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.origin, self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)
    }
}

struct Reader<'a> {
    text: &'a str,
    origin: &'a str,
    faults: Vec<Fault>,
    /// Lines of the options that were given.
    lines: Vec<(&'static str, &'static str, usize)>,
}

impl Config {
    /// Reads a configuration. `origin` is what the text is from, for errors.
    ///
    /// # Errors
    /// `Faults`: all that is wrong in it.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let mut reader = Reader {
            text,
            origin,
            faults: Vec::new(),
            lines: Vec::new(),
        };
        let mut config = Self::default();
        match DeTable::parse(text) {
            Ok(document) => reader.document(document.get_ref(), &mut config),
            Err(error) => {
                let at = error.span().unwrap_or_default();
                reader.fault(&at, String::new(), one_line(error.message()));
            }
        }
        if reader.faults.is_empty() {
            reader.agree(&config);
        }
        if reader.faults.is_empty() {
            Ok(config)
        } else {
            reader.faults.sort_by_key(|fault| fault.line);
            Err(ConfigError::Faults(reader.faults))
        }
    }
}

impl Reader<'_> {
    fn document(&mut self, document: &DeTable<'_>, config: &mut Config) {
        for (table, content) in document {
            let name: &str = table.get_ref();
            if !KEYS.iter().any(|key| key.table == name) {
                let problem = format!("there is no such table or option; there are {}", tables());
                self.fault(&table.span(), name.to_owned(), problem);
                continue;
            }
            match content.get_ref() {
                DeValue::Table(options) => self.table(name, options, config),
                _ => self.fault(
                    &table.span(),
                    name.to_owned(),
                    format!("must be a table: [{name}]"),
                ),
            }
        }
    }

    fn table(&mut self, table: &str, options: &DeTable<'_>, config: &mut Config) {
        for (name, value) in options {
            let key = KEYS
                .iter()
                .find(|key| key.table == table && key.name == name.get_ref().as_ref());
            match key {
                Some(key) => self.option(key, value, config),
                None => {
                    let known: Vec<&str> = KEYS
                        .iter()
                        .filter(|key| key.table == table)
                        .map(|key| key.name)
                        .collect();
                    let problem = format!("there is no such option; [{table}] has {}", known.join(", "));
                    self.fault(&name.span(), format!("{table}.{}", name.get_ref()), problem);
                }
            }
        }
    }

    fn option(&mut self, key: &Key, value: &Spanned<DeValue<'_>>, config: &mut Config) {
        let line = self.line(&value.span());
        self.lines.push((key.table, key.name, line));
        if let Err(problem) = (key.set)(config, value.get_ref()) {
            self.fault(&value.span(), format!("{}.{}", key.table, key.name), problem);
        }
    }

    /// Options that are each right may still contradict each other.
    fn agree(&mut self, config: &Config) {
        let machine = &config.machine;
        if let (Some(most), Some(vcpus)) = (machine.max_vcpus, machine.vcpus) {
            if vcpus > most {
                self.contradiction("machine", "vcpus", format!("is more than max_vcpus, {most}"));
            }
        }
        if config.network.vhost && config.network.queue_pairs > 1 {
            self.contradiction(
                "network",
                "vhost",
                "is for NICs of one pair of queues; leave queue_pairs out".into(),
            );
        }
        if let Some(most) = machine.max_memory_mib {
            if machine.memory_mib > most {
                let given = ["memory_mib", "max_memory_mib"]
                    .into_iter()
                    .find(|name| {
                        self.lines
                            .iter()
                            .any(|line| (line.0, line.1) == ("machine", *name))
                    })
                    .unwrap_or("memory_mib");
                let problem = format!(
                    "memory_mib, {}, is more than max_memory_mib, {most}",
                    machine.memory_mib
                );
                self.contradiction("machine", given, problem);
            }
        }
    }

    fn contradiction(&mut self, table: &str, name: &str, problem: String) {
        let line = self
            .lines
            .iter()
            .find(|line| (line.0, line.1) == (table, name))
            .map_or(1, |line| line.2);
        self.faults.push(Fault {
            origin: self.origin.to_owned(),
            line,
            key: format!("{table}.{name}"),
            problem,
        });
    }

    fn fault(&mut self, at: &Range<usize>, key: String, problem: String) {
        let line = self.line(at);
        self.faults.push(Fault {
            origin: self.origin.to_owned(),
            line,
            key,
            problem,
        });
    }

    fn line(&self, at: &Range<usize>) -> usize {
        let before = self.text.as_bytes().iter().take(at.start);
        1 + before.filter(|byte| **byte == b'\n').count()
    }
}

fn tables() -> String {
    let mut names: Vec<String> = Vec::new();
    for key in &KEYS {
        let name = format!("[{}]", key.table);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

fn one_line(message: &str) -> String {
    message.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}
