//! `process.scheduler`: how the kernel schedules a process, by sched_setattr(2).

use oci_spec::runtime::{LinuxSchedulerFlag, LinuxSchedulerPolicy, Scheduler};

use crate::{fault::Fault, sys};

/// Argument of sched_setattr(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerPlan {
    /// `SCHED_…`
    pub policy: u32,
    /// `SCHED_FLAG_…`
    pub flags: u64,
    /// -20 to 19.
    pub nice: i32,
    /// 1 to 99 with SCHED_FIFO and SCHED_RR, else 0.
    pub priority: u32,
    /// In nanoseconds, with SCHED_DEADLINE; else 0.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

impl SchedulerPlan {
    /// Reads `scheduler`; `field` is its name in messages (`process.scheduler`). What is refused is what runc refuses, or
    /// the kernel's business.
    ///
    /// # Errors
    ///
    /// A field is wrong, or does not go with the policy.
    pub fn new(scheduler: &Scheduler, field: &str) -> Result<Self, Fault> {
        use LinuxSchedulerPolicy::*;
        let refuse = |name: &str, why: &str| Err(Fault::spec(format_args!("{field}.{name}"), why));
        let policy = *scheduler.policy();
        let nice = scheduler.nice().unwrap_or(0);
        if !(-20..=19).contains(&nice) {
            return refuse("nice", "is not within -20 to 19");
        }
        let priority = scheduler.priority().unwrap_or(0);
        if priority != 0 && !matches!(policy, SchedFifo | SchedRr) {
            return refuse("priority", "is for SCHED_FIFO and SCHED_RR only");
        }
        let Ok(priority) = u32::try_from(priority) else {
            return refuse("priority", "is negative");
        };
        for (name, value) in [
            ("runtime", scheduler.runtime()),
            ("deadline", scheduler.deadline()),
            ("period", scheduler.period()),
        ] {
            if value.is_some_and(|value| value != 0) && policy != SchedDeadline {
                return refuse(name, "is for SCHED_DEADLINE only");
            }
        }
        Ok(Self {
            policy: match policy {
                SchedOther => 0,
                SchedFifo => 1,
                SchedRr => 2,
                SchedBatch => 3,
                SchedIso => return refuse("policy", "Linux has no SCHED_ISO"),
                SchedIdle => 5,
                SchedDeadline => 6,
            },
            flags: scheduler
                .flags()
                .iter()
                .flatten()
                .map(flag)
                .fold(0, |bits, flag| bits | flag),
            nice,
            priority,
            runtime: scheduler.runtime().unwrap_or(0),
            deadline: scheduler.deadline().unwrap_or(0),
            period: scheduler.period().unwrap_or(0),
        })
    }

    /// Applies it to this thread, which has to be root still.
    pub fn apply(&self) -> Result<(), Fault> {
        let attributes = libc::sched_attr {
            size: size_of::<libc::sched_attr>() as u32,
            sched_policy: self.policy,
            sched_flags: self.flags,
            sched_nice: self.nice,
            sched_priority: self.priority,
            sched_runtime: self.runtime,
            sched_deadline: self.deadline,
            sched_period: self.period,
        };
        sys::set_scheduler(&attributes).map_err(|error| Fault::system("set process.scheduler", error))
    }
}

fn flag(flag: &LinuxSchedulerFlag) -> u64 {
    use LinuxSchedulerFlag::*;
    match flag {
        SchedResetOnFork => 0x01,
        SchedFlagReclaim => 0x02,
        SchedFlagDLOverrun => 0x04,
        SchedFlagKeepPolicy => 0x08,
        SchedFlagKeepParams => 0x10,
        SchedFlagUtilClampMin => 0x20,
        SchedFlagUtilClampMax => 0x40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<SchedulerPlan, Fault> {
        SchedulerPlan::new(&serde_json::from_str(json).unwrap(), "process.scheduler")
    }

    #[test]
    fn a_scheduler_is_what_the_system_call_takes() {
        let made = plan(
            r#"{"policy":"SCHED_DEADLINE","nice":-3,"flags":["SCHED_FLAG_RECLAIM","SCHED_FLAG_KEEP_PARAMS"],
                "runtime":1,"deadline":2,"period":3}"#,
        );
        let expected = SchedulerPlan {
            policy: 6,
            flags: 0x12,
            nice: -3,
            priority: 0,
            runtime: 1,
            deadline: 2,
            period: 3,
        };
        assert_eq!(made, Ok(expected));
        assert_eq!(plan(r#"{"policy":"SCHED_RR","priority":7}"#).unwrap().priority, 7);
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (name, json) in [
            ("nice", r#"{"policy":"SCHED_OTHER","nice":20}"#),
            ("priority", r#"{"policy":"SCHED_BATCH","priority":1}"#),
            ("priority", r#"{"policy":"SCHED_RR","priority":-1}"#),
            ("runtime", r#"{"policy":"SCHED_FIFO","runtime":1}"#),
            ("policy", r#"{"policy":"SCHED_ISO"}"#),
        ] {
            let fault = plan(json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("process.scheduler.{name}: ")),
                "{}",
                fault.message
            );
        }
    }
}
