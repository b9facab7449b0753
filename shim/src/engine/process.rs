//! The life of a process: what may be done with it, when.

use tokio::sync::watch;

use super::{EngineError, Exit, ProcessStatus, streams::Streams};

/// Where a process is in its life. It only ever moves downwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made (or, an exec, added).
    Created,
    /// Its start is under way.
    Starting,
    /// Started.
    Running,
    /// Ended.
    Stopped(Exit),
}

impl State {
    /// Whether it may be started.
    pub fn can_start(self) -> bool {
        self == Self::Created
    }

    /// Whether it runs, or is about to.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running)
    }

    /// What others are told.
    pub fn status(self) -> ProcessStatus {
        match self {
            Self::Created | Self::Starting => ProcessStatus::Created,
            Self::Running => ProcessStatus::Running,
            Self::Stopped(Exit { status, at }) => ProcessStatus::Stopped { status, at },
        }
    }
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    state: State,
    /// Whether it has a pty.
    pub terminal: bool,
    /// Its pid in the guest, as the agent told it; 0 until then.
    pub guest_pid: i32,
    /// Its pid on the host: its stand-in's; 0 while it has none.
    pub host_pid: u32,
    /// The status that it ends with whatever the guest says, since its stand-in was killed.
    pub killed: Option<u32>,
    /// Its streams, once there are any.
    pub streams: Option<Streams>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that was not started.
    pub fn new(terminal: bool, streams: Option<Streams>) -> Self {
        Self {
            state: State::Created,
            terminal,
            guest_pid: 0,
            host_pid: 0,
            killed: None,
            streams,
            exit: watch::Sender::new(None),
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.state
    }

    /// Marks that its start is under way.
    ///
    /// # Errors
    /// `FailedPrecondition` unless it may be started.
    pub fn begin_start(&mut self, name: &str) -> Result<(), EngineError> {
        if !self.state.can_start() {
            let state = if self.state.is_live() {
                "is already started"
            } else {
                "has already ended"
            };
            return Err(EngineError::FailedPrecondition(format!("{name} {state}")));
        }
        self.state = State::Starting;
        Ok(())
    }

    /// Marks that it runs, unless it has ended already.
    pub fn started(&mut self) {
        if self.state == State::Starting {
            self.state = State::Running;
        }
    }

    /// Marks its end and wakes who waits for it. False if it had ended before.
    pub fn stop(&mut self, exit: Exit) -> bool {
        if matches!(self.state, State::Stopped(_)) {
            return false;
        }
        self.state = State::Stopped(exit);
        if let Some(streams) = &self.streams {
            streams.process_ended();
        }
        self.exit.send_replace(Some(exit));
        true
    }

    /// The end of the process, when it comes. The channel closes when the process is deleted.
    pub fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn a_process_lives_once() {
        let mut process = Process::new(false, None);
        let end = process.watch();
        process.begin_start("it").unwrap();
        assert_eq!(process.state().status(), ProcessStatus::Created);
        assert!(process.begin_start("it").is_err());
        process.started();
        assert_eq!(process.state().status(), ProcessStatus::Running);
        let exit = Exit {
            status: 7,
            at: SystemTime::now(),
        };
        assert!(process.stop(exit));
        assert!(!process.stop(Exit {
            status: 0,
            at: SystemTime::now()
        }));
        process.started();
        assert_eq!(process.state(), State::Stopped(exit));
        assert_eq!(*end.borrow(), Some(exit));
        assert!(process.begin_start("it").is_err());
    }
}
