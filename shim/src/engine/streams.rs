//! The streams of a process: for each a stream offered to the guest, and a task that copies.

use std::{io, os::fd::OwnedFd};

use husk_vmm_protocol::vsock::StreamOffer;
use tokio::{net::UnixStream, sync::watch, task::AbortHandle};

use super::{EngineError, Stdio};
use crate::{
    guest::{agent::StdioPorts, proof::Unproven, vm::Machine},
    host::stdio::{Handle, drain, feed, stream_pair},
};

/// The streams of a process. Dropped, all copying ends.
#[derive(Debug)]
pub struct Streams {
    close_input: watch::Sender<bool>,
    input: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
    open_outputs: watch::Receiver<usize>,
}

/// An output that is still open. Dropped after its descriptors are.
struct OpenOutput(watch::Sender<usize>);

impl OpenOutput {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for OpenOutput {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Streams {
    /// Offers the streams of `stdio` to the guest and copies whatever comes. Tells the ports that the agent dials.
    ///
    /// # Errors
    /// When a descriptor cannot be used or the machine takes no offer; then nothing is copied.
    pub async fn open(machine: &Machine, stdio: Stdio) -> Result<(Self, StdioPorts), EngineError> {
        let (close_input, close) = watch::channel(false);
        let (count, open_outputs) = watch::channel(0);
        let mut streams = Self {
            close_input,
            input: None,
            outputs: Vec::new(),
            open_outputs,
        };
        let mut ports = StdioPorts::default();
        if let Some(fd) = stdio.stdin {
            let source = handle("stdin", fd)?;
            let (port, stream) = offer(machine).await?;
            ports.stdin = port;
            let copy = tokio::spawn(async move {
                let Some(stream) = proven(stream, "stdin").await else {
                    return;
                };
                if let Err(error) = feed(source, stream, close).await {
                    tracing::warn!(%error, "stdin cannot be read");
                }
            });
            streams.input = Some(copy.abort_handle());
        }
        // A pty has one output.
        let stderr = stdio.stderr.filter(|_| !stdio.terminal);
        for (name, fd, port) in [
            ("stdout", stdio.stdout, &mut ports.stdout),
            ("stderr", stderr, &mut ports.stderr),
        ] {
            let Some(fd) = fd else { continue };
            let sink = handle(name, fd)?;
            let (number, stream) = offer(machine).await?;
            *port = number;
            let open = OpenOutput::new(&count);
            let copy = tokio::spawn(async move {
                let _open = open;
                let Some(stream) = proven(stream, name).await else {
                    return;
                };
                if let Err(error) = drain(stream, sink).await {
                    tracing::warn!(%error, "{name} cannot be written");
                }
            });
            streams.outputs.push(copy.abort_handle());
        }
        Ok((streams, ports))
    }

    /// The streams of a process that has none.
    #[cfg(test)]
    pub fn none() -> Self {
        let (close_input, _) = watch::channel(false);
        let (_, open_outputs) = watch::channel(0);
        Self {
            close_input,
            input: None,
            outputs: Vec::new(),
            open_outputs,
        }
    }

    /// Ends the process's input after what was sent before.
    pub fn close_input(&self) {
        self.close_input.send_replace(true);
    }

    /// Nobody reads the input any more. Outputs are copied on to their end.
    pub fn process_ended(&self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }

    /// The number of outputs that are still open.
    pub fn open_outputs(&self) -> watch::Receiver<usize> {
        self.open_outputs.clone()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.process_ended();
        for output in &self.outputs {
            output.abort();
        }
    }
}

fn handle(name: &str, fd: OwnedFd) -> Result<Handle, EngineError> {
    Handle::new(fd).map_err(|source| EngineError::Host {
        what: format!("cannot use {name}"),
        source,
    })
}

/// The stream once the agent has dialled it; `None` if it does not.
async fn proven(stream: Unproven, name: &str) -> Option<UnixStream> {
    match stream.proven().await {
        Ok(stream) => Some(stream),
        Err(error) => {
            if error.kind() == io::ErrorKind::PermissionDenied {
                tracing::error!(%error, name, "a stream was not the agent's");
            }
            None
        }
    }
}

/// Offers the guest a stream: the port that the agent is to dial, and our end.
///
/// # Errors
/// When the machine takes no offer.
pub(super) async fn offer(machine: &Machine) -> Result<(u32, Unproven), EngineError> {
    let error = |source| EngineError::Host {
        what: "cannot offer a stream to the guest".into(),
        source,
    };
    let port = machine.fresh_port().map_err(error)?;
    let (own, guest) = stream_pair().map_err(error)?;
    machine
        .offer(StreamOffer::Listen(port), guest)
        .await
        .map_err(error)?;
    Ok((port, Unproven::new(own, machine.secret().clone())))
}
