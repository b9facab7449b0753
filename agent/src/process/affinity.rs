//! `process.execCPUAffinity`: on which processors a process that joins a container runs.

use oci_spec::runtime::ExecCPUAffinity;

use crate::{
    fault::{Fault, describe},
    sys,
};

/// Highest number of a processor, as runc has it: no machine has so many, and no list makes a larger mask.
const MAX_PROCESSOR: usize = 64 * 1024;

/// A set of processors, one bit each.
pub type Processors = Vec<u64>;

/// Where an exec'd process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// From its fork on.
    pub initial: Option<Processors>,
    /// Once it is in the container's cgroup.
    pub last: Option<Processors>,
}

impl Affinity {
    /// Reads `affinity`; `field` is its name in messages (`process.execCPUAffinity`).
    ///
    /// # Errors
    ///
    /// A list of processors is wrong.
    pub fn new(affinity: &ExecCPUAffinity, field: &str) -> Result<Self, Fault> {
        let read = |name: &str, list: &Option<String>| match list.as_deref() {
            None | Some("") => Ok(None),
            Some(list) => parse(list)
                .map(Some)
                .map_err(|problem| Fault::spec(format_args!("{field}.{name}"), problem)),
        };
        Ok(Self {
            initial: read("initial", affinity.initial())?,
            last: read("final", affinity.cpu_affinity_final())?,
        })
    }

    /// Runs `fork` on the initial processors. The agent has one thread, so what it forks begins there.
    pub fn start<T>(&self, fork: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
        let Some(initial) = &self.initial else {
            return fork();
        };
        let before = sys::processors().map_err(|error| Fault::system("processors of the agent", error))?;
        set(initial, "initial")?;
        let forked = fork();
        if let Err(error) = sys::set_processors(&before) {
            crate::log::warning!("the agent stays on some processors only: {}", describe(&error));
        }
        forked
    }

    /// Moves this process, which has been forked by [`Affinity::start`], to its final processors.
    pub fn finish(&self) -> Result<(), Fault> {
        self.last.as_ref().map_or(Ok(()), |last| set(last, "final"))
    }
}

fn set(processors: &Processors, name: &str) -> Result<(), Fault> {
    sys::set_processors(processors)
        .map_err(|error| Fault::system(format_args!("set process.execCPUAffinity.{name}"), error))
}

/// A list such as `0-3,7`.
fn parse(list: &str) -> Result<Processors, String> {
    let number = |text: &str| match text.trim().parse::<usize>() {
        Ok(number) if number <= MAX_PROCESSOR => Ok(number),
        _ => Err(format!("{text:?} is not a number up to {MAX_PROCESSOR}")),
    };
    let mut processors = Processors::new();
    for range in list.split(',').filter(|range| !range.trim().is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{range:?} ends before it begins"));
        }
        processors.resize(processors.len().max(last / 64 + 1), 0);
        for number in first..=last {
            if let Some(word) = processors.get_mut(number / 64) {
                *word |= 1 << (number % 64);
            }
        }
    }
    if processors.is_empty() {
        return Err(format!("{list:?} names no processor"));
    }
    Ok(processors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_runc_reads_them() {
        assert_eq!(parse("0-3,7"), Ok(vec![0b1000_1111]));
        assert_eq!(parse(" 1 , 65,"), Ok(vec![2, 2]));
        for bad in ["", ",", "x", "3-1", "65537", "-1", "1-", "0-99999999999999999999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn faults_name_the_field() {
        let affinity = serde_json::from_str(r#"{"initial":"0","final":"9-7"}"#).unwrap();
        let fault = Affinity::new(&affinity, "process.execCPUAffinity").unwrap_err();
        assert_eq!(
            fault.message,
            "process.execCPUAffinity.final: \"9-7\" ends before it begins"
        );
    }
}
