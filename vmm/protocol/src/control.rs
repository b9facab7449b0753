//! What the VMM tells the engine on the control socket: one JSON packet per report.

use serde::{Deserialize, Serialize};

/// Largest report, in bytes.
pub const MAX_REPORT_LEN: usize = 16 * 1024;

/// A report of the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// The machine is made and its vCPUs run.
    Running,
    /// The machine has ended; the VMM exits next.
    Ended {
        /// Why.
        reason: EndReason,
    },
    /// The machine could not be made or had to be stopped: the error with its causes, for a person.
    Failed {
        /// The chain of causes in one line.
        message: String,
    },
    /// A thread of the VMM made a system call that it has no use for, as only hostile code in it would. The call was not
    /// carried out, and the VMM has ended.
    Violation {
        /// Name of the thread.
        thread: String,
        /// Number of the system call (x86_64).
        system_call: u32,
    },
}

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest reset itself, as it does on an orderly shutdown.
    Reset,
    /// The guest's kernel panicked, then reset. Known by the kernel's own line on its console.
    Panic,
    /// A vCPU's triple fault.
    TripleFault,
}
