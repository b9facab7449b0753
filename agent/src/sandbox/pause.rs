//! Pausing a container, and letting it go on.

use std::{sync::Arc, time::Duration};

use super::{
    Error, Sandbox,
    state::{Container, Freezer, Phase},
};
use crate::log;

/// How long processes may take to stand still.
const STANDSTILL: Duration = Duration::from_secs(10);

impl Sandbox {
    /// Freezes a container, whose init process runs; answers when it stands still. On failure it goes on.
    pub async fn pause(self: Arc<Self>, id: String) -> Result<(), Error> {
        let (cgroup, mut preparing) = {
            let mut state = self.state();
            let container = state.container(&id)?;
            if container.init.phase != Phase::Running || container.deleting {
                return Err(not(&id, "running"));
            }
            if container.freezer != Freezer::Thawed {
                return Err(Error::FailedPrecondition(format!("container {id} is paused")));
            }
            container.freezer = Freezer::Freezing;
            (Arc::clone(&container.cgroup), container.preparing.subscribe())
        };
        let frozen = tokio::time::timeout(STANDSTILL, async {
            // Fails only if the container is gone, which is seen below.
            let _ = preparing.wait_for(|count| *count == 0).await;
            cgroup.freeze().await
        });
        let frozen = frozen.await.unwrap_or_else(|_| {
            Err(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                "a process does not stand still",
            ))
        });
        let mut state = self.state();
        // It can have ended meanwhile, been deleted, even made anew.
        let container = state
            .container(&id)
            .ok()
            .filter(|container| Arc::ptr_eq(&container.cgroup, &cgroup));
        let Some(container) = container else {
            return Err(Error::NotFound(format!("container {id}")));
        };
        match frozen {
            Ok(()) if container.init.phase == Phase::Running && !container.deleting => {
                container.freezer = Freezer::Frozen;
                Ok(())
            }
            Ok(()) => {
                thaw(container, &id);
                Err(not(&id, "running"))
            }
            Err(error) => {
                thaw(container, &id);
                Err(Error::System {
                    what: "freeze the container",
                    error,
                })
            }
        }
    }

    /// Lets a frozen container go on.
    pub fn resume(&self, id: &str) -> Result<(), Error> {
        let mut state = self.state();
        let container = state.container(id)?;
        if container.freezer != Freezer::Frozen {
            return Err(not(id, "paused"));
        }
        container.cgroup.thaw().map_err(|error| Error::System {
            what: "thaw the container",
            error,
        })?;
        container.freezer = Freezer::Thawed;
        Ok(())
    }
}

fn not(id: &str, what: &str) -> Error {
    Error::FailedPrecondition(format!("container {id} is not {what}"))
}

/// For a container whose pause has come to nothing, or whose init process has ended.
pub(super) fn thaw(container: &mut Container, id: &str) {
    if container.freezer == Freezer::Thawed {
        return;
    }
    if let Err(error) = container.cgroup.thaw() {
        log::error!("container {id}: thaw: {error}");
    }
    container.freezer = Freezer::Thawed;
}
