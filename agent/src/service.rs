//! The ttrpc service: checks what comes over the wire and turns it into calls of [`Sandbox`].
//!
//! Each call that changes something runs in a task of its own: a host that hangs up or whose deadline passes does not
//! leave it half done.

use std::sync::Arc;

use async_trait::async_trait;
use husk_agent_protocol::{
    limits::{MAX_MESSAGE_LEN, MAX_SPEC_LEN, is_valid_id},
    messages::{
        ConnectLocalhostRequest, ConnectLocalhostResponse, ContainerStatsRequest, ContainerStatsResponse,
        CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, Empty, Event,
        ExecProcessRequest, ExecProcessResponse, ForwardDnsRequest, ForwardDnsResponse, ListProcessesRequest,
        ListProcessesResponse, PauseContainerRequest, RemoveMirrorRequest, ResizeTerminalRequest,
        ResumeContainerRequest, SetNetworkRequest, SetNetworkResponse, SetupRequest, SetupResponse,
        SignalProcessRequest, StartContainerRequest, StartContainerResponse, UpdateContainerRequest,
        UpdateContainerResponse, UpdateMirrorRequest, list_processes_response,
    },
    service::Agent,
};
use ttrpc::{
    Code,
    asynchronous::{ServerStreamSender, TtrpcContext},
    error::get_rpc_status,
};

use crate::{
    dns,
    fault::cut,
    init, localhost, log,
    process::plan::TerminalSize,
    sandbox::{Error, Sandbox},
    setup,
};

/// The service.
#[derive(Debug)]
pub struct Service {
    sandbox: Arc<Sandbox>,
}

impl Service {
    /// Serves `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }
}

fn status(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
        Error::Fault(_) | Error::System { .. } => Code::INTERNAL,
    };
    get_rpc_status(code, cut(&error.to_string(), MAX_MESSAGE_LEN))
}

fn check_id(id: &str, what: &str) -> ttrpc::Result<()> {
    if is_valid_id(id) {
        return Ok(());
    }
    Err(get_rpc_status(
        Code::INVALID_ARGUMENT,
        format!("{:?} is no {what} id", cut(id, 256)),
    ))
}

/// The id of an exec, or empty for the init process.
fn check_process(container: &str, exec: &str) -> ttrpc::Result<()> {
    check_id(container, "container")?;
    if exec.is_empty() {
        Ok(())
    } else {
        check_id(exec, "exec")
    }
}

fn check_document(document: &[u8]) -> ttrpc::Result<()> {
    if document.len() <= MAX_SPEC_LEN {
        return Ok(());
    }
    Err(get_rpc_status(
        Code::INVALID_ARGUMENT,
        "the OCI document is too large",
    ))
}

/// Runs `work` to its end, whatever becomes of the caller.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Error::System {
            what: "task",
            error: std::io::Error::other(error),
        })
    })
}

#[async_trait]
impl Agent for Service {
    async fn setup(&self, _: &TtrpcContext, mut request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        setup::set_up(&self.sandbox, &mut request).map_err(|error| status(&error))
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<SetNetworkResponse> {
        let wanted = request.network.into_option().unwrap_or_default();
        let mut response = SetNetworkResponse::new();
        if let Err(fault) = self.sandbox.set_network(wanted) {
            response.failure = Some(fault.to_wire()).into();
        }
        Ok(response)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        check_id(&request.container_id, "container")?;
        check_document(&request.spec_json)?;
        let work = Arc::clone(&self.sandbox).create(request);
        let mut response = CreateContainerResponse::new();
        match to_the_end(work).await {
            Ok(pid) => response.pid = pid,
            Err(Error::Fault(fault)) => response.failure = Some(fault.to_wire()).into(),
            Err(error) => return Err(status(&error)),
        }
        Ok(response)
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<StartContainerResponse> {
        check_id(&request.container_id, "container")?;
        let mut response = StartContainerResponse::new();
        match to_the_end(Arc::clone(&self.sandbox).start(request.container_id)).await {
            Ok(()) => {}
            Err(Error::Fault(fault)) => response.failure = Some(fault.to_wire()).into(),
            Err(error) => return Err(status(&error)),
        }
        Ok(response)
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        check_id(&request.container_id, "container")?;
        check_id(&request.exec_id, "exec")?;
        check_document(&request.process_json)?;
        let work = Arc::clone(&self.sandbox).exec(
            request.container_id,
            request.exec_id,
            request.process_json,
            request.stdio.unwrap_or_default(),
        );
        let mut response = ExecProcessResponse::new();
        match to_the_end(work).await {
            Ok(pid) => response.pid = pid,
            Err(Error::Fault(fault)) => response.failure = Some(fault.to_wire()).into(),
            Err(error) => return Err(status(&error)),
        }
        Ok(response)
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        check_process(&request.container_id, &request.exec_id)?;
        let sent = self.sandbox.signal(
            &request.container_id,
            &request.exec_id,
            request.signal,
            request.all,
        );
        sent.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        check_process(&request.container_id, &request.exec_id)?;
        let characters = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = TerminalSize {
            columns: characters(request.columns),
            rows: characters(request.rows),
        };
        let resized = self.sandbox.resize(&request.container_id, &request.exec_id, size);
        resized.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        check_id(&request.container_id, "container")?;
        let processes = self
            .sandbox
            .processes(&request.container_id)
            .map_err(|error| status(&error))?;
        let processes = processes
            .into_iter()
            .map(|(pid, exec_id)| list_processes_response::Process {
                pid,
                exec_id,
                ..Default::default()
            });
        Ok(ListProcessesResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<Empty> {
        check_id(&request.container_id, "container")?;
        let paused = to_the_end(Arc::clone(&self.sandbox).pause(request.container_id)).await;
        paused.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        check_id(&request.container_id, "container")?;
        let resumed = self.sandbox.resume(&request.container_id);
        resumed.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<UpdateContainerResponse> {
        check_id(&request.container_id, "container")?;
        check_document(&request.resources_json)?;
        let mut response = UpdateContainerResponse::new();
        match self
            .sandbox
            .update(&request.container_id, &request.resources_json)
        {
            Ok(()) => {}
            Err(Error::Fault(fault)) => response.failure = Some(fault.to_wire()).into(),
            Err(error) => return Err(status(&error)),
        }
        Ok(response)
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        check_id(&request.container_id, "container")?;
        let files = self.sandbox.statistics(&request.container_id);
        Ok(ContainerStatsResponse {
            files: files.map_err(|error| status(&error))?,
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        check_id(&request.container_id, "container")?;
        let deleted = to_the_end(Arc::clone(&self.sandbox).delete(request.container_id)).await;
        deleted.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn update_mirror(&self, _: &TtrpcContext, request: UpdateMirrorRequest) -> ttrpc::Result<Empty> {
        // There is no await in it: see the protocol.
        let updated = self.sandbox.update_mirror(request.volume, &request.changes);
        updated.map(|()| Empty::new()).map_err(|error| status(&error))
    }

    async fn remove_mirror(&self, _: &TtrpcContext, request: RemoveMirrorRequest) -> ttrpc::Result<Empty> {
        self.sandbox.remove_mirror(request.volume);
        Ok(Empty::new())
    }

    async fn connect_localhost(
        &self,
        _: &TtrpcContext,
        request: ConnectLocalhostRequest,
    ) -> ttrpc::Result<ConnectLocalhostResponse> {
        let connected = localhost::connect(&self.sandbox.config().dial, &request).await;
        Ok(ConnectLocalhostResponse {
            failure: connected.err().map(|fault| fault.to_wire()).into(),
            ..Default::default()
        })
    }

    async fn forward_dns(
        &self,
        _: &TtrpcContext,
        request: ForwardDnsRequest,
    ) -> ttrpc::Result<ForwardDnsResponse> {
        let forwarded = dns::forward(&self.sandbox.config().dial, &request).await;
        Ok(ForwardDnsResponse {
            failure: forwarded.err().map(|fault| fault.to_wire()).into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        log::notice!("shutting down");
        init::shut_down(self.sandbox.config().machine)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let sender = &sender;
        self.sandbox
            .events()
            .deliver(|event| async move { sender.send(&event).await })
            .await
    }
}
