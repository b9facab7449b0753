//! Volumes whose changes the guest is told of: one task for each sandbox watches them and sends what changed.

use std::{
    collections::HashSet, future::Future, io, os::fd::OwnedFd, path::PathBuf, pin::Pin, sync::Arc, task::Poll,
};

use futures::future::pending;
use husk_agent_protocol::messages::MirrorChange;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
    task::{JoinSet, spawn_blocking},
};

use super::{EngineError, container::chain};
use crate::{
    config::Pattern,
    guest::agent::{Agent, mirror_updates},
    host::{mirror::Trees, volume::Volume},
};

/// The mirrors of a sandbox. [`Default`]: there are none.
#[derive(Debug, Default)]
pub(super) struct Mirrors {
    watched: Vec<Pattern>,
    /// To the task, which ends with this.
    orders: Option<UnboundedSender<Order>>,
}

#[derive(Debug)]
enum Order {
    Begin {
        number: u32,
        /// The volume, in the share.
        directory: PathBuf,
        /// For messages.
        source: PathBuf,
        /// Whether it is mirrored.
        done: oneshot::Sender<bool>,
    },
    End(u32),
}

impl Mirrors {
    /// Those of volumes whose sources match one of `watched`.
    pub(super) fn new(watched: Vec<Pattern>, agent: Arc<Agent>) -> Self {
        let orders = (!watched.is_empty()).then(|| {
            let (orders, received) = unbounded_channel();
            tokio::spawn(Watcher::new(agent).run(received));
            orders
        });
        Self { watched, orders }
    }

    /// Begins to mirror the volume `number`, which is shown at `directory`, unless it has been begun already. `false`: it
    /// is not mirrored. What the guest needs for it is under way then, ahead of whatever is sent later.
    pub(super) async fn begin(&self, volume: &Volume, number: u32, directory: PathBuf) -> bool {
        let wanted = volume.read_only
            && self.watched.iter().any(|pattern| pattern.matches(&volume.source))
            && directory.is_dir();
        let (true, Some(orders)) = (wanted, &self.orders) else {
            return false;
        };
        let (done, is_mirrored) = oneshot::channel();
        let order = Order::Begin {
            number,
            directory,
            source: volume.source.clone(),
            done,
        };
        orders.send(order).is_ok() && is_mirrored.await.unwrap_or(false)
    }

    /// Mirrors a volume no longer. One that is not mirrored is fine.
    pub(super) fn end(&self, number: u32) {
        if let Some(orders) = &self.orders {
            // Without the task there are no mirrors.
            let _ = orders.send(Order::End(number));
        }
    }
}

/// What became of a request to the agent.
type Sent = (u32, Result<(), EngineError>);

/// The task.
struct Watcher {
    agent: Arc<Agent>,
    /// What is watched, once something is. Away while a thread works on it.
    trees: Option<Trees>,
    news: Option<AsyncFd<OwnedFd>>,
    /// There is more to read already.
    more: bool,
    /// Requests that have not been answered.
    sent: JoinSet<Sent>,
    /// Sources by number, of those that the guest is told of.
    sources: Vec<(u32, PathBuf)>,
    /// Numbers of those that could not be followed, which has been said.
    behind: HashSet<u32>,
}

/// Waits until there may be news.
async fn wait(news: Option<&AsyncFd<OwnedFd>>, more: bool) -> io::Result<()> {
    match news {
        None => pending().await,
        Some(_) if more => Ok(()),
        // All is read then: what comes from now on makes it ready again.
        Some(news) => news.readable().await.map(|mut ready| ready.clear_ready()),
    }
}

impl Watcher {
    fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            trees: None,
            news: None,
            more: false,
            sent: JoinSet::new(),
            sources: Vec::new(),
            behind: HashSet::new(),
        }
    }

    async fn run(mut self, mut orders: UnboundedReceiver<Order>) {
        loop {
            // One batch after the other: what happens while the guest is busy becomes one batch.
            let news = self.news.as_ref().filter(|_| self.sent.is_empty());
            let news = wait(news, self.more);
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    None => return,
                    Some(order) => self.obey(order).await,
                },
                Some(sent) = self.sent.join_next() => self.answered(sent.ok()),
                ready = news => if let Err(error) = self.follow(ready).await {
                    tracing::error!(%error, "volumes cannot be watched any longer; their mirrors keep what they have");
                    self.news = None;
                },
            }
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::End(number) => {
                let Some(at) = self.sources.iter().position(|(known, _)| *known == number) else {
                    return;
                };
                self.sources.swap_remove(at);
                self.behind.remove(&number);
                if let Some(trees) = &mut self.trees {
                    trees.end(number);
                }
                let agent = Arc::clone(&self.agent);
                self.send(number, async move { agent.remove_mirror(number).await })
                    .await;
            }
            Order::Begin {
                number,
                directory,
                source,
                done,
            } => {
                let known = self.sources.iter().any(|(known, _)| *known == number);
                let begun = if known {
                    Ok(())
                } else {
                    self.begin(number, directory, source.clone()).await
                };
                if let Err(reason) = &begun {
                    tracing::warn!(
                        source = %source.display(),
                        reason,
                        "the container is not told of changes that the host makes in this volume"
                    );
                }
                let _ = done.send(begun.is_ok());
            }
        }
    }

    async fn begin(&mut self, number: u32, directory: PathBuf, source: PathBuf) -> Result<(), String> {
        if self.trees.is_none() {
            let failed =
                |error: io::Error| format!("inotify: {error} (fs.inotify.max_user_instances limits that)");
            let trees = Trees::new().map_err(failed)?;
            let descriptor = trees.descriptor().map_err(failed)?;
            // SAFETY: an OwnedFd gives the same descriptor as long as it lives, and nobody else closes it.
            let news = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
            self.news = Some(news.map_err(|error| failed(error.into()))?);
            self.trees = Some(trees);
        }
        let changes = self
            .work(move |trees| trees.begin(number, &directory))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|refusal| chain(&refusal))?;
        self.sources.push((number, source));
        self.update(number, changes).await;
        Ok(())
    }

    /// Reads what has happened, and sends it.
    async fn follow(&mut self, ready: io::Result<()>) -> io::Result<()> {
        ready?;
        let (told, drained) = self.work(Trees::read).await??;
        self.more = !drained;
        for (number, changes) in told {
            match changes {
                Ok(changes) => {
                    if self.behind.remove(&number) {
                        tracing::info!(
                            source = self.source(number),
                            "the volume's mirror follows it again"
                        );
                    }
                    self.update(number, changes).await;
                }
                Err(refusal) => {
                    if self.behind.insert(number) {
                        let (source, reason) = (self.source(number), chain(&refusal));
                        tracing::error!(source, reason, "the volume's mirror keeps its last state");
                    }
                }
            }
        }
        Ok(())
    }

    async fn update(&mut self, number: u32, changes: Vec<MirrorChange>) {
        for request in mirror_updates(number, changes) {
            let agent = Arc::clone(&self.agent);
            self.send(number, async move { agent.update_mirror(&request).await })
                .await;
        }
    }

    /// Sends a request without waiting for its answer.
    async fn send(
        &mut self,
        number: u32,
        request: impl Future<Output = Result<(), EngineError>> + Send + 'static,
    ) {
        let mut request: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(request);
        // The first poll puts it into the queue, so that the order on the wire is that of our calls.
        match futures::poll!(&mut request) {
            Poll::Ready(result) => self.answered(Some((number, result))),
            Poll::Pending => drop(self.sent.spawn(async move { (number, request.await) })),
        }
    }

    fn answered(&mut self, sent: Option<Sent>) {
        let Some((number, Err(error))) = sent else { return };
        if self.agent.is_lost() || !self.sources.iter().any(|(known, _)| *known == number) {
            return tracing::debug!(%error, number, "a mirror goes with its guest");
        }
        tracing::error!(source = self.source(number), %error, "the volume's mirror may be out of date until its next change");
        if let Some(trees) = &mut self.trees {
            trees.mistrust(number);
        }
    }

    fn source(&self, number: u32) -> String {
        let known = self.sources.iter().find(|(known, _)| *known == number);
        known
            .map(|(_, source)| source.display().to_string())
            .unwrap_or_default()
    }

    /// Does what reads files, on a thread for that.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Trees) -> T + Send + 'static,
    ) -> io::Result<T> {
        let mut trees = self
            .trees
            .take()
            .ok_or_else(|| io::Error::other("nothing is watched"))?;
        let done = spawn_blocking(move || {
            let done = work(&mut trees);
            (trees, done)
        });
        let (trees, done) = done.await.map_err(io::Error::other)?;
        self.trees = Some(trees);
        Ok(done)
    }
}
