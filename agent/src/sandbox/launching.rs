//! What making a container and joining one have in common.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use husk_agent_protocol::messages;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::Error;
use crate::{
    container::user::Mappings,
    fault::Fault,
    process::{
        launch::{Channel, Report},
        plan::ProcessPlan,
    },
    stdio::{self, AgentEnd, ProcessEnd, Streams},
};

/// A child just forked, not yet ready.
pub(super) struct Forked {
    pub(super) pid: i32,
    pub(super) channel: Channel,
    pub(super) pipes: AgentEnd,
    pub(super) ended: watch::Receiver<Option<u32>>,
}

pub(super) fn process_stdio(
    plan: &ProcessPlan,
    mappings: Option<&Mappings>,
    ports: &messages::Stdio,
) -> Result<(ProcessEnd, AgentEnd), Error> {
    if plan.terminal.is_none() {
        let uid = mappings.map_or(Some(plan.uid), |mappings| mappings.user(plan.uid));
        let uid = uid.ok_or_else(|| {
            Fault::spec(
                "process.user.uid",
                "is not mapped in the container's user namespace",
            )
        })?;
        return Ok(stdio::pipes(ports, uid)?);
    }
    if ports.stderr_port != 0 {
        return Err(Error::InvalidArgument(
            "a terminal has no stderr of its own".into(),
        ));
    }
    Ok((ProcessEnd::Terminal, AgentEnd::default()))
}

pub(super) fn descriptors(end: &ProcessEnd) -> Vec<RawFd> {
    match end {
        ProcessEnd::Terminal => Vec::new(),
        ProcessEnd::Files(files) => files.iter().map(AsRawFd::as_raw_fd).collect(),
    }
}

/// Waits until the forked child has prepared itself; answers its terminal's master.
pub(super) async fn ready(channel: &Channel) -> Result<Option<OwnedFd>, Fault> {
    let mut master = None;
    loop {
        match channel.report().await {
            Report::Terminal(fd) => master = Some(fd),
            Report::Ready => return Ok(master),
            Report::Fault(fault) => return Err(fault),
            Report::Closed => {
                return Err(Fault {
                    kind: crate::fault::Kind::System,
                    message: "the process was killed before its exec".into(),
                });
            }
        }
    }
}

/// Begins to copy between the process and the host.
pub(super) fn copy(
    master: Option<OwnedFd>,
    pipes: AgentEnd,
    streams: Streams,
) -> Result<Option<Arc<AsyncFd<OwnedFd>>>, Fault> {
    let failed = |error| Fault::system("watch stdio", error);
    let Some(master) = master else {
        stdio::copy_pipes(pipes, streams).map_err(failed)?;
        return Ok(None);
    };
    let master = stdio::watch(master, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
    let master = Arc::new(master);
    stdio::copy_terminal(Arc::clone(&master), streams);
    Ok(Some(master))
}
