//! What happened, kept in order until the host has it.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use husk_agent_protocol::messages::{Event, event};
use tokio::sync::Notify;

/// The queue of events. There is one reader at a time: the newest stream.
#[derive(Debug, Default)]
pub struct Events {
    queue: Mutex<VecDeque<Event>>,
    changed: Notify,
    reader: AtomicU64,
}

impl Events {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, kind: event::Kind) {
        self.queue().push_back(Event {
            kind: Some(kind),
            ..Default::default()
        });
        self.changed.notify_waiters();
    }

    /// A process ended with `status` (as a shell reports it). `exec_id` is empty for an init process.
    pub fn exit(&self, container_id: &str, exec_id: &str, status: u32) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.push(event::Kind::Exit(event::Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            status,
            exited_at_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
            ..Default::default()
        }));
    }

    /// The kernel killed a process of the container because the container's memory was used up.
    pub fn oom(&self, container_id: &str) {
        self.push(event::Kind::Oom(event::Oom {
            container_id: container_id.to_owned(),
            ..Default::default()
        }));
    }

    /// Gives each event to `send`, in order, until `send` fails or another reader takes over. An event leaves the
    /// queue only when it has been sent.
    ///
    /// # Errors
    ///
    /// What `send` failed with.
    pub async fn deliver<E, F>(&self, mut send: impl FnMut(Event) -> F) -> Result<(), E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let me = self.reader.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        self.changed.notify_waiters();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that nothing that happens in between is missed.
            changed.as_mut().enable();
            if self.reader.load(Ordering::Relaxed) != me {
                return Ok(());
            }
            let next = self.queue().front().cloned();
            match next {
                None => changed.await,
                Some(event) => {
                    send(event).await?;
                    if self.reader.load(Ordering::Relaxed) != me {
                        return Ok(());
                    }
                    self.queue().pop_front();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, convert::Infallible, rc::Rc, sync::Arc};

    use super::*;

    fn name(event: &Event) -> String {
        match &event.kind {
            Some(event::Kind::Exit(exit)) => format!("exit {} {}", exit.container_id, exit.status),
            Some(event::Kind::Oom(oom)) => format!("oom {}", oom.container_id),
            _ => String::new(),
        }
    }

    #[tokio::test]
    async fn events_from_before_the_stream_come_first_and_a_failed_one_comes_again() {
        let events = Events::default();
        events.oom("a");
        events.exit("a", "", 137);
        let failed = events.deliver(|_| async { Err("broken") }).await;
        assert_eq!(failed, Err("broken"));

        let seen = Rc::new(RefCell::new(Vec::new()));
        let reader = events.deliver(|event| {
            seen.borrow_mut().push(name(&event));
            async { Ok::<_, Infallible>(()) }
        });
        tokio::select! {
            _ = reader => panic!("the stream ended"),
            () = tokio::task::yield_now() => {}
        }
        assert_eq!(*seen.borrow(), ["oom a", "exit a 137"]);
    }

    #[tokio::test]
    async fn the_newest_stream_takes_over() {
        let events = Arc::new(Events::default());
        let old = events.clone();
        let old = tokio::spawn(async move { old.deliver(|_| async { Ok::<_, Infallible>(()) }).await });
        tokio::task::yield_now().await;
        let new = events.clone();
        let new = tokio::spawn(async move { new.deliver(|_| async { Ok::<_, Infallible>(()) }).await });
        assert_eq!(old.await.unwrap(), Ok(()));
        assert!(!new.is_finished());
    }
}
