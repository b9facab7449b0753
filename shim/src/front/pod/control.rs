//! Pausing, resuming, changing and measuring containers.

use containerd_shim_protos::{
    events::task::{TaskPaused, TaskResumed},
    topics::{TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC},
};
use protobuf::well_known_types::any::Any;
use ttrpc::Code;

use super::Pod;
use crate::front::{
    metrics,
    status::{self, answer},
};

/// The name of OCI's `linux.resources` in the type of an update. Others (Windows') are refused.
const RESOURCES_TYPE: &str = "LinuxResources";

impl Pod {
    /// Pauses a container: none of its processes runs when this returns.
    ///
    /// # Errors
    /// `NOT_FOUND`; `FAILED_PRECONDITION` unless it runs.
    pub async fn pause(&self, id: &str) -> ttrpc::Result<()> {
        let (sandbox, _) = self.lock().find(id, None)?;
        let frozen = sandbox.pause(id).await.map_err(|error| status::engine(&error))?;
        let state = self.lock();
        // Whoever listens is told of no pause after the end.
        if frozen && !state.order.is_over(id, None) {
            let event = TaskPaused {
                container_id: id.to_owned(),
                ..TaskPaused::default()
            };
            self.publisher.publish(TASK_PAUSED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Lets a paused container run on.
    ///
    /// # Errors
    /// `NOT_FOUND`; `FAILED_PRECONDITION` unless it is paused.
    pub async fn resume(&self, id: &str) -> ttrpc::Result<()> {
        let (sandbox, _) = self.lock().find(id, None)?;
        sandbox.resume(id).await.map_err(|error| status::engine(&error))?;
        let state = self.lock();
        if !state.order.is_over(id, None) {
            let event = TaskResumed {
                container_id: id.to_owned(),
                ..TaskResumed::default()
            };
            self.publisher.publish(TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// `NOT_FOUND`; `FAILED_PRECONDITION` when it has ended; `INVALID_ARGUMENT` for what cannot be applied.
    pub async fn update(&self, id: &str, resources: Option<Any>) -> ttrpc::Result<()> {
        let (sandbox, _) = self.lock().find(id, None)?;
        let resources =
            resources.ok_or_else(|| answer(Code::INVALID_ARGUMENT, "the update names no resources"))?;
        let name = resources.type_url.rsplit('/').next().unwrap_or_default();
        if !name.is_empty() && name != RESOURCES_TYPE {
            let text = format!("resources of type {:?} are not known to husk", resources.type_url);
            return Err(answer(Code::INVALID_ARGUMENT, text));
        }
        sandbox
            .update(id, resources.value)
            .await
            .map_err(|error| status::engine(&error))
    }

    /// What a container has used: containerd's metrics of cgroup v2.
    ///
    /// # Errors
    /// `NOT_FOUND`, and whatever befalls a call of the guest.
    pub async fn stats(&self, id: &str) -> ttrpc::Result<Any> {
        let (sandbox, _) = self.lock().find(id, None)?;
        let files = sandbox.stats(id).await.map_err(|error| status::engine(&error))?;
        Ok(metrics::encode(&metrics::metrics(&files)))
    }
}
