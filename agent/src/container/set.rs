//! Writing limits to a cgroup, so that a failure leaves it as it was.

use std::{fs, io};

use super::{cgroup::Cgroup, resources::Setting};
use crate::{
    fault::{Fault, Kind, describe},
    log,
};

/// What a file held before it was written to.
#[derive(Debug)]
struct Before {
    file: String,
    text: String,
    /// What was then written.
    value: String,
}

/// How to take back what [`Cgroup::set`] wrote.
#[derive(Debug)]
pub struct Undo(Vec<Before>);

impl Cgroup {
    /// Writes `settings`, in order.
    ///
    /// # Errors
    ///
    /// The kernel refuses one; then those before it are taken back.
    pub fn set(&self, settings: &[Setting]) -> Result<Undo, Fault> {
        let mut undo = Undo(Vec::new());
        // Some pairs of values must not contradict each other at any time (a quota and its burst). What does not fit
        // yet is tried once more in the end.
        let mut later = Vec::new();
        for setting in settings {
            match self.set_one(setting, &mut undo) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => later.push(setting),
                Err(error) => return Err(self.give_up(undo, setting, &error)),
                Ok(()) => {}
            }
        }
        for setting in later {
            if let Err(error) = self.set_one(setting, &mut undo) {
                return Err(self.give_up(undo, setting, &error));
            }
        }
        Ok(undo)
    }

    fn set_one(&self, setting: &Setting, undo: &mut Undo) -> io::Result<()> {
        let mut before = fs::read_to_string(self.path().join(&setting.file));
        if setting.file.starts_with("cpuset.") && matches!(&before, Ok(text) if text.trim().is_empty()) {
            // None of its own, which the kernel does not let a cgroup with processes come back to.
            before = fs::read_to_string(self.path().join(format!("{}.effective", setting.file)));
        }
        if setting.optional && matches!(&before, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        // As the kernel's parsers want it: one entry a write. Nothing is an empty line, since writing no bytes is no
        // writing.
        let mut lines: Vec<&str> = setting.value.lines().collect();
        if lines.is_empty() {
            lines.push("\n");
        }
        for (index, line) in lines.into_iter().enumerate() {
            self.write(&setting.file, line)?;
            if let (0, Ok(text)) = (index, &before) {
                undo.0.push(Before {
                    file: setting.file.clone(),
                    text: text.clone(),
                    value: setting.value.clone(),
                });
            }
        }
        Ok(())
    }

    fn give_up(&self, undo: Undo, setting: &Setting, error: &io::Error) -> Fault {
        self.undo(undo);
        let controller = setting.file.split('.').next().unwrap_or_default();
        let controllers = fs::read_to_string(self.path().join("cgroup.controllers")).unwrap_or_default();
        let problem = if error.kind() != io::ErrorKind::NotFound {
            format!(
                "write {:?} to {}: {}",
                setting.value,
                setting.file,
                describe(error)
            )
        } else if controllers.split_whitespace().any(|name| name == controller) {
            format!("the guest's kernel has no {}", setting.file)
        } else {
            format!("{}: controller {controller:?} not available", setting.file)
        };
        Fault {
            kind: Kind::Spec,
            message: format!("{}: {problem}", setting.field),
        }
    }

    /// Takes back what `undo` is of; what cannot be taken back is logged.
    pub fn undo(&self, undo: Undo) {
        for before in undo.0.into_iter().rev() {
            for line in before.restore() {
                if let Err(error) = self.write(&before.file, &line) {
                    log::error!("write {line:?} back to {}: {error}", before.file);
                }
            }
        }
    }
}

impl Before {
    /// The lines that bring the file back.
    fn restore(&self) -> Vec<String> {
        // Entries by device: one that was not there has to be put out.
        let none = match self.file.as_str() {
            "io.max" => Some("rbps=max wbps=max riops=max wiops=max"),
            "io.weight" => Some("default"),
            "io.latency" => Some("target=0"),
            _ => None,
        };
        let key = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
        let mut lines = Vec::new();
        if let Some(none) = none {
            let keys = self.value.lines().map(key);
            let new = keys.filter(|new| new.contains(':') && self.text.lines().all(|line| key(line) != *new));
            lines.extend(new.map(|key| format!("{key} {none}")));
        }
        lines.extend(
            self.text
                .lines()
                .filter(|line| !line.is_empty())
                .map(str::to_owned),
        );
        if lines.is_empty() {
            lines.push("\n".to_owned());
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restore(file: &str, text: &str, value: &str) -> Vec<String> {
        Before {
            file: file.into(),
            text: text.into(),
            value: value.into(),
        }
        .restore()
    }

    #[test]
    fn a_file_is_brought_back_by_writing_what_it_held() {
        assert_eq!(restore("memory.max", "max\n", "4096"), ["max"]);
        assert_eq!(restore("cpuset.cpus", "0\n", "0-1"), ["0"]);
        assert_eq!(restore("cpuset.cpus.exclusive", "\n", "0-1"), ["\n"]);
    }

    #[test]
    fn an_entry_that_was_not_there_is_put_out() {
        assert_eq!(
            restore(
                "io.max",
                "8:0 rbps=5 wbps=max riops=max wiops=max\n",
                "8:16 rbps=7"
            ),
            [
                "8:16 rbps=max wbps=max riops=max wiops=max",
                "8:0 rbps=5 wbps=max riops=max wiops=max"
            ]
        );
        assert_eq!(
            restore("io.weight", "default 100\n", "8:16 50"),
            ["8:16 default", "default 100"]
        );
        assert_eq!(restore("io.weight", "default 100\n", "50"), ["default 100"]);
    }
}
