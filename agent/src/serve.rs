//! The agent's one connection: dialled at boot, served, and dialled again when it is lost.

use std::{io, sync::Arc, time::Duration};

use husk_agent_protocol::{limits::AGENT_PORT, service::create_agent};
use tokio::sync::Notify;
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    dial::{Dial, Stream},
    log, reaper,
    sandbox::Sandbox,
    service::Service,
};

/// Pauses between attempts to dial: from the first to the longest, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Serves `sandbox` and reaps its processes, for ever.
///
/// # Errors
///
/// The runtime cannot watch for signals, or the server does not start.
pub async fn run(sandbox: Arc<Sandbox>) -> io::Result<()> {
    let ended = reaper::listen()?;
    let reap = tokio::spawn(reaper::reap(ended, Arc::clone(&sandbox)));
    let listener = Listener::new(connections(sandbox.config().dial.clone()));
    let service = create_agent(Arc::new(Service::new(sandbox)));
    let mut server = Server::new().register_service(service).add_listener(listener);
    server.start().await.map_err(io::Error::other)?;
    // Ends only if it panics.
    reap.await.map_err(io::Error::other)
}

/// Connections to the agent's port of the host, one after the other.
fn connections(dial: Dial) -> impl futures::Stream<Item = io::Result<Stream>> {
    futures::stream::unfold((dial, None::<Arc<Notify>>), |(dial, last)| async move {
        if let Some(last) = last {
            last.notified().await;
            log::notice!("the connection to the host has ended");
        }
        let ended = Arc::new(Notify::new());
        let stream = connect(&dial).await.notify_end(Arc::clone(&ended));
        Some((Ok(stream), (dial, Some(ended))))
    })
}

async fn connect(dial: &Dial) -> Stream {
    let mut pause = FIRST_PAUSE;
    loop {
        match dial.call(AGENT_PORT).await {
            Ok(stream) => return stream,
            Err(error) => {
                if pause == FIRST_PAUSE {
                    log::notice!("dialling port {AGENT_PORT} of the host: {error}; trying on");
                }
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
            }
        }
    }
}
