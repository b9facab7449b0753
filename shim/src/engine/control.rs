//! What is done to a container that is there: pausing and resuming it, changing its limits, counting what it used.

use std::{collections::BTreeMap, sync::Arc};

use super::{EngineError, Sandbox, lock, spec};

impl Sandbox {
    /// Freezes a container: none of its processes runs when this returns. True unless it has ended meanwhile.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it runs. After a failure it runs on; where the guest has not answered it is
    /// being paused until the guest has taken that back.
    pub async fn pause(&self, id: &str) -> Result<bool, EngineError> {
        self.table().begin_pause(id)?;
        match self.parts.agent.pause_container(id).await {
            Ok(()) => Ok(self.table().finish_freeze(id, true)),
            Err(error) => {
                if matches!(error, EngineError::Deadline { .. }) {
                    self.take_pause_back(id);
                } else {
                    self.table().finish_freeze(id, false);
                }
                Err(self.explain(error).await)
            }
        }
    }

    /// Thaws a container that may be frozen by an answer that came too late. Who asked for the pause does not wait for
    /// it: a guest that is stuck takes its time again.
    fn take_pause_back(&self, id: &str) {
        let (agent, table) = (Arc::clone(&self.parts.agent), Arc::clone(&self.parts.table));
        let id = id.to_owned();
        tokio::spawn(async move {
            if let Err(error) = agent.resume_container(&id).await {
                tracing::warn!(%error, container = id, "a pause that failed could not be taken back");
            }
            lock(&table).finish_freeze(&id, false);
        });
    }

    /// Lets a paused container run on.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` unless it is paused. After a failure it is still paused.
    pub async fn resume(&self, id: &str) -> Result<(), EngineError> {
        self.table().begin_resume(id)?;
        let result = match self.parts.agent.resume_container(id).await {
            // It is not frozen: an earlier resume was answered too late.
            Err(EngineError::FailedPrecondition(_)) => Ok(()),
            result => result,
        };
        self.table().finish_freeze(id, result.is_err());
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Changes a container's limits by an OCI `linux.resources` object in JSON; what it does not name stays.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it has ended; `InvalidSpec` for what is not such an object or cannot be
    /// applied.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), EngineError> {
        self.table().check_update(id)?;
        if let Err(error) = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&resources) {
            return Err(EngineError::InvalidSpec(format!(
                "linux.resources is not valid: {error}"
            )));
        }
        spec::check_resources(&resources)?;
        match self.parts.agent.update_container(id, resources.clone()).await {
            Ok(()) => {
                self.parts.cgroups.updated(id, &resources).await;
                Ok(())
            }
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// What the guest's kernel counts for a container: the files of its cgroup (v2), name -> text. They are the
    /// guest's words, bounded in length and no further checked.
    ///
    /// # Errors
    /// `NotFound`, and whatever befalls a call of the agent.
    pub async fn stats(&self, id: &str) -> Result<BTreeMap<String, String>, EngineError> {
        {
            let table = self.table();
            table.process(id, None)?;
            table.check_alive()?;
        }
        match self.parts.agent.container_stats(id).await {
            Ok(files) => Ok(files),
            Err(error) => Err(self.explain(error).await),
        }
    }
}
