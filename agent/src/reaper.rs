//! Reaping: the agent is the parent of every process of a container, and as PID 1 also of every orphan.

use std::{io, sync::Arc};

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{log, sandbox::Sandbox};

/// Asks to be told of ended children. To be called before there is any.
///
/// # Errors
///
/// Out of descriptors.
pub fn listen() -> io::Result<Signal> {
    signal(SignalKind::child())
}

/// Reaps whatever ends, for ever.
pub async fn reap(mut ended: Signal, sandbox: Arc<Sandbox>) {
    // Signals of one kind merge into one: each may stand for several children.
    while ended.recv().await.is_some() {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    sandbox.reaped(pid.as_raw(), u32::try_from(code).unwrap_or(255));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    sandbox.reaped(pid.as_raw(), (signal as u32).saturating_add(128));
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                // Stopped or continued: not an end.
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    log::error!("waitpid: {error}");
                    break;
                }
            }
        }
    }
}
