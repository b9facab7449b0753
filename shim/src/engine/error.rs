//! What can go wrong in the engine, in words for the person who asked.

use std::{io, path::PathBuf, time::Duration};

/// husk's programs or the guest image are not there.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// `/proc/self/exe` could not be read.
    #[error("cannot tell where this program is installed (/proc/self/exe)")]
    OwnPath(#[source] io::Error),
    /// This program does not stand in PREFIX/bin.
    #[error(
        "{0} is not in the bin directory of an installation; run `make install` and use the installed program"
    )]
    NotInstalled(PathBuf),
    /// A file that the configuration names is missing.
    #[error("{what} is missing: {path}; correct the option {option} in husk.toml", path = path.display())]
    Named {
        /// Which.
        what: &'static str,
        /// The option that names it.
        option: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
    /// One of the files of the installation is missing.
    #[error("{what} is missing: {path}; run `make install`", path = path.display())]
    Missing {
        /// Which, e.g. `the guest kernel`.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
}

/// Why an operation on a sandbox, a container or a process failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such container or exec.
    #[error("{0} does not exist")]
    NotFound(String),
    /// A container, exec or sandbox of this id is already there.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The request itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// Not in this state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The command is not in the container.
    #[error("{0}")]
    CommandNotFound(String),
    /// The command is there but cannot be executed.
    #[error("{0}")]
    CommandNotExecutable(String),
    /// config.json (or an exec's process) is wrong, or asks for what cannot be applied.
    #[error("{0}")]
    InvalidSpec(String),
    /// A system call failed in the guest while it made the container or process.
    #[error("in the guest: {0}")]
    Guest(String),
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer {call} within {} s{}", after.as_secs(), last_words(console_tail))]
    Deadline {
        /// The call.
        call: &'static str,
        /// The time it was given.
        after: Duration,
        /// The last lines of the guest's console.
        console_tail: String,
    },
    /// The agent answered nonsense, or the connection broke.
    #[error("the guest's agent failed at {call}: {message}{}", last_words(console_tail))]
    Agent {
        /// The call.
        call: &'static str,
        /// What came back, cut to a bounded length.
        message: String,
        /// The last lines of the guest's console, where the agent cannot be relied on any more.
        console_tail: String,
    },
    /// The sandbox has ended.
    #[error("the sandbox has ended: {0}")]
    SandboxEnded(String),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The end of a message about a guest: the last lines of its console, where its kernel and its agent say what befell
/// them. They are text that is safe to show.
pub fn last_words(console_tail: &str) -> String {
    match console_tail.trim_end() {
        "" => String::new(),
        lines => format!("; the guest's console ends with:\n{lines}"),
    }
}

impl EngineError {
    /// The exit code that runc's and Docker's users know: 127 for a command that is not there, 126 for one that
    /// cannot be executed, 125 for all else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CommandNotFound(_) => 127,
            Self::CommandNotExecutable(_) => 126,
            _ => 125,
        }
    }
}

/// Why a sandbox did not start. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The id, namespace or sizing is not acceptable.
    #[error("{0}")]
    InvalidArgument(String),
    /// A sandbox of this id lives.
    #[error("a sandbox {0} is already running")]
    AlreadyExists(String),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was tried, and what to do.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The machine did not come up.
    #[error("the guest did not start: {reason}")]
    Guest {
        /// Why.
        reason: String,
        /// The last lines of its console.
        console_tail: String,
    },
    /// A file of the installation is missing.
    #[error(transparent)]
    Locate(#[from] LocateError),
}

/// What could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The namespace or id is not acceptable.
    #[error("{0}")]
    InvalidArgument(String),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}
