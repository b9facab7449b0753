//! Publishing events to containerd: one queue, sent in order.
//!
//! An event that cannot be sent is tried again before any later one is, so that none overtakes another; what is
//! older than [`MAX_AGE`] is given up, and said so.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
};
use protobuf::{
    MessageField, MessageFull, well_known_types::any::Any, well_known_types::timestamp::Timestamp,
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use ttrpc::{Code, asynchronous::transport::Socket, context};

/// Time for one event to be accepted.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failure: long enough not to be a burden, short enough for a restarted daemon.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long an event is tried: the restart of a daemon, an upgrade included.
pub const MAX_AGE: Duration = Duration::from_secs(300);
/// Most events that wait.
const QUEUE_LEN: usize = 4096;

enum Item {
    Event { envelope: Box<Envelope>, since: Instant },
    Flush(oneshot::Sender<()>),
}

/// The queue's entrance. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: Option<mpsc::Sender<Item>>,
}

impl Publisher {
    /// Starts the queue. `address` is the path of containerd's ttrpc socket, with or without `unix://`; empty: what
    /// is published goes nowhere.
    pub fn start(address: &str, namespace: &str) -> Self {
        let queue = (!address.is_empty()).then(|| {
            let (queue, items) = mpsc::channel(QUEUE_LEN);
            let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
            tokio::spawn(forward(path, items));
            queue
        });
        Self {
            namespace: namespace.to_owned(),
            queue,
        }
    }

    /// Queues an event. Never waits.
    pub fn publish<M: MessageFull>(&self, topic: &'static str, event: &M) {
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic, %error, "an event could not be encoded");
                return;
            }
        };
        let envelope = Box::new(Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                // containerd's typeurl has no host before the name.
                type_url: M::descriptor().full_name().to_owned(),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        });
        let item = Item::Event {
            envelope,
            since: Instant::now(),
        };
        if queue.try_send(item).is_err() {
            tracing::error!(
                topic,
                "an event was dropped: {QUEUE_LEN} are waiting for containerd"
            );
        }
    }

    /// Waits until all that was queued before is sent or given up, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(queue) = &self.queue else { return };
        let (done, wait) = oneshot::channel();
        let flushed = timeout(limit, async {
            if queue.send(Item::Flush(done)).await.is_ok() {
                let _ = wait.await;
            }
        });
        if flushed.await.is_err() {
            tracing::warn!(
                "events are left unsent: containerd did not take them within {} s",
                limit.as_secs()
            );
        }
    }
}

/// A time as protobuf has it. A time before 1970 becomes 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

async fn forward(path: PathBuf, mut items: mpsc::Receiver<Item>) {
    let mut client: Option<EventsClient> = None;
    while let Some(item) = items.recv().await {
        let (envelope, since) = match item {
            Item::Event { envelope, since } => (envelope, since),
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(*envelope),
            ..ForwardRequest::default()
        };
        loop {
            match send(&mut client, &path, &request).await {
                Ok(()) => break,
                Err(Refusal::Never(error)) => {
                    tracing::error!(topic, error, "an event was refused");
                    break;
                }
                Err(Refusal::NotNow(error)) if since.elapsed() >= MAX_AGE => {
                    tracing::error!(topic, error, "an event was given up");
                    break;
                }
                Err(Refusal::NotNow(error)) => {
                    tracing::warn!(topic, error, "an event was not taken; trying again");
                    // A daemon that restarts has a new socket; the old connection is of no use.
                    client = None;
                    sleep(RETRY_PAUSE).await;
                }
            }
        }
    }
}

/// Why an event was not taken.
enum Refusal {
    /// It may be, later.
    NotNow(String),
    /// It is wrong, and holding up the others for it would help nobody.
    Never(String),
}

async fn send(
    client: &mut Option<EventsClient>,
    path: &Path,
    request: &ForwardRequest,
) -> Result<(), Refusal> {
    let client = match client {
        Some(client) => client,
        none => {
            let stream = timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
                .await
                .map_err(|_| Refusal::NotNow(format!("connecting to {} took too long", path.display())))?
                .map_err(|error| Refusal::NotNow(format!("connecting to {}: {error}", path.display())))?;
            none.insert(EventsClient::new(Client::new(Socket::from(stream))))
        }
    };
    match timeout(
        CALL_TIMEOUT,
        client.forward(context::with_duration(CALL_TIMEOUT), request),
    )
    .await
    {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(ttrpc::Error::RpcStatus(status)))
            if matches!(status.code(), Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED) =>
        {
            Err(Refusal::Never(status.message().to_owned()))
        }
        Ok(Err(error)) => Err(Refusal::NotNow(error.to_string())),
        Err(_) => Err(Refusal::NotNow("no answer".to_owned())),
    }
}

#[cfg(test)]
#[path = "publish_test.rs"]
mod tests;
