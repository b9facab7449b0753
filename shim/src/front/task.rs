//! containerd's task service, turned into calls of the engine.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim::oci::ProcessDetails,
    shim_async::Task,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use ttrpc::{Code, asynchronous::TtrpcContext};

use super::{
    io::Names,
    options::Options,
    pod::{Pod, TaskConfig},
    publish::timestamp,
    status::{answer, unimplemented},
};
use crate::{engine::ProcessStatus, host::rootfs::Mount};

/// The service. A call goes on when its connection breaks: containerd, started anew, finds a task that is either
/// there or not, and nothing in between.
#[derive(Clone)]
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// The service of a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

async fn detached<T: Send + 'static>(
    call: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(call).await {
        Ok(result) => result,
        Err(error) => Err(answer(
            Code::INTERNAL,
            format!("the call was broken off: {error}"),
        )),
    }
}

/// An exec's id as the wire has it: empty for the init process.
fn exec_id(id: &str) -> Option<&str> {
    (!id.is_empty()).then_some(id)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(unimplemented("starting from a checkpoint"));
        }
        let options = Options::read(request.options.as_ref())
            .map_err(|error| answer(Code::INVALID_ARGUMENT, error.to_string()))?;
        let config = TaskConfig {
            id: request.id,
            bundle: request.bundle,
            options,
            names: Names {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
            rootfs: request
                .rootfs
                .iter()
                .map(|mount| Mount {
                    kind: mount.type_.clone(),
                    source: mount.source.clone(),
                    target: mount.target.clone(),
                    options: mount.options.clone(),
                })
                .collect(),
            announced_rootfs: request.rootfs,
        };
        let pod = self.pod.clone();
        let pid = detached(async move { pod.create(config).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.pod.clone();
        let pid = detached(async move { pod.start(&request.id, exec_id(&request.exec_id)).await }).await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let names = Names {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request
            .spec
            .into_option()
            .map(|spec| spec.value)
            .unwrap_or_default();
        let pod = self.pod.clone();
        detached(async move { pod.exec(&request.id, &request.exec_id, names, spec).await }).await?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let view = self.pod.view(&request.id, exec_id(&request.exec_id))?;
        let mut response = StateResponse {
            id: exec_id(&request.exec_id).unwrap_or(&request.id).to_owned(),
            bundle: view.bundle,
            pid: view.pid,
            stdin: view.names.stdin,
            stdout: view.names.stdout,
            stderr: view.names.stderr,
            terminal: view.names.terminal,
            exec_id: request.exec_id,
            ..StateResponse::default()
        };
        let status = match view.status {
            ProcessStatus::Created => Status::CREATED,
            ProcessStatus::Running => Status::RUNNING,
            ProcessStatus::Pausing => Status::PAUSING,
            ProcessStatus::Paused => Status::PAUSED,
            ProcessStatus::Stopped { status, at } => {
                response.exit_status = status;
                response.exited_at = MessageField::some(timestamp(at));
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.pod.wait(&request.id, exec_id(&request.exec_id)).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.kill(
                &request.id,
                exec_id(&request.exec_id),
                request.signal,
                request.all,
            )
            .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        let (pid, exit) =
            detached(async move { pod.delete(&request.id, exec_id(&request.exec_id)).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..DeleteResponse::default()
        })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        // A terminal's size is 16 bits wide in the kernel.
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let pod = self.pod.clone();
        detached(async move {
            let (columns, rows) = (size(request.width), size(request.height));
            pod.resize(&request.id, exec_id(&request.exec_id), columns, rows)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.pod
            .close_io(&request.id, exec_id(&request.exec_id), request.stdin)?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self
            .pod
            .processes(&request.id)?
            .into_iter()
            .map(|(pid, exec)| {
                let info = exec.and_then(|exec_id| {
                    let details = ProcessDetails {
                        exec_id,
                        ..ProcessDetails::default()
                    };
                    details.write_to_bytes().ok().map(|value| Any {
                        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                        value,
                        ..Any::default()
                    })
                });
                ProcessInfo {
                    pid,
                    info: info.into(),
                    ..ProcessInfo::default()
                }
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.pid_of(&request.id).unwrap_or(0),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.shutdown_if_empty().await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move { pod.pause(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move { pod.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(unimplemented("checkpoints"))
    }

    // The annotations of an update say nothing that the limits do not.
    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move { pod.update(&request.id, request.resources.into_option()).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod.stats(&request.id).await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..StatsResponse::default()
        })
    }
}

#[cfg(test)]
#[path = "task_test.rs"]
mod tests;
