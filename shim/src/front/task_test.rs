use containerd_shim_protos::{cgroups_v2::metrics::Metrics, protobuf::EnumOrUnknown};
use ttrpc::proto::MessageHeader;

use super::*;
use crate::front::pod::tests::{Theatre, code, soon};

fn context() -> TtrpcContext {
    TtrpcContext {
        mh: MessageHeader::default(),
        metadata: Default::default(),
        timeout_nano: 0,
        connection_data: Default::default(),
    }
}

fn any(type_url: &str, value: &str) -> Any {
    Any {
        type_url: type_url.into(),
        value: value.into(),
        ..Any::default()
    }
}

fn state(id: &str, exec_id: &str) -> StateRequest {
    StateRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..StateRequest::default()
    }
}

async fn status_of(service: &TaskService, id: &str, exec_id: &str) -> EnumOrUnknown<Status> {
    service
        .state(&context(), state(id, exec_id))
        .await
        .unwrap()
        .status
}

fn pause(id: &str) -> PauseRequest {
    PauseRequest {
        id: id.into(),
        ..PauseRequest::default()
    }
}

fn resume(id: &str) -> ResumeRequest {
    ResumeRequest {
        id: id.into(),
        ..ResumeRequest::default()
    }
}

fn update(id: &str, resources: Option<Any>) -> UpdateTaskRequest {
    UpdateTaskRequest {
        id: id.into(),
        resources: resources.into(),
        annotations: [("io.kubernetes.cri.x".to_owned(), "y".to_owned())].into(),
        ..UpdateTaskRequest::default()
    }
}

fn kill(id: &str, exec_id: &str, signal: u32, all: bool) -> KillRequest {
    KillRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        signal,
        all,
        ..KillRequest::default()
    }
}

fn start(id: &str, exec_id: &str) -> StartRequest {
    StartRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..StartRequest::default()
    }
}

fn delete(id: &str, exec_id: &str) -> DeleteRequest {
    DeleteRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..DeleteRequest::default()
    }
}

fn exec(id: &str, exec_id: &str, spec: &str) -> ExecProcessRequest {
    ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: MessageField::some(any(
            "types.containerd.io/opencontainers/runtime-spec/1/Process",
            spec,
        )),
        ..ExecProcessRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn states_are_told_as_containerd_calls_them() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "sleep").await.unwrap();
    assert_eq!(status_of(&service, "c", "").await, Status::CREATED.into());
    let created = service.state(&context(), state("c", "")).await.unwrap();
    assert_ne!(created.pid, 0);
    assert_eq!((created.id.as_str(), created.exec_id.as_str()), ("c", ""));
    assert_eq!(created.bundle, theatre.dir.path().join("c").to_str().unwrap());
    assert!(created.exited_at.is_none());
    soon(service.start(&context(), start("c", ""))).await.unwrap();
    soon(service.exec(&context(), exec("c", "e", r#"{"args":["sleep"]}"#)))
        .await
        .unwrap();
    assert_eq!(status_of(&service, "c", "").await, Status::RUNNING.into());
    assert_eq!(status_of(&service, "c", "e").await, Status::CREATED.into());
    soon(service.start(&context(), start("c", "e"))).await.unwrap();
    soon(service.pause(&context(), pause("c"))).await.unwrap();
    assert_eq!(status_of(&service, "c", "").await, Status::PAUSED.into());
    assert_eq!(status_of(&service, "c", "e").await, Status::PAUSED.into());
    soon(service.resume(&context(), resume("c"))).await.unwrap();
    assert_eq!(status_of(&service, "c", "e").await, Status::RUNNING.into());
    soon(service.kill(&context(), kill("c", "e", 9, false)))
        .await
        .unwrap();
    let wait = WaitRequest {
        id: "c".into(),
        exec_id: "e".into(),
        ..WaitRequest::default()
    };
    let waited = soon(service.wait(&context(), wait)).await.unwrap();
    let stopped = service.state(&context(), state("c", "e")).await.unwrap();
    assert_eq!(stopped.status, Status::STOPPED.into());
    assert_eq!((stopped.exit_status, stopped.id.as_str()), (137, "e"));
    assert_eq!(stopped.exited_at, waited.exited_at);
    let deleted = soon(service.delete(&context(), delete("c", "e"))).await.unwrap();
    assert_eq!((deleted.exit_status, deleted.exited_at), (137, waited.exited_at));
    soon(theatre.pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_told_with_the_ids_of_their_execs() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    let pid = theatre.create("c", "sleep").await.unwrap();
    soon(service.start(&context(), start("c", ""))).await.unwrap();
    soon(service.exec(&context(), exec("c", "e", r#"{"args":["sleep"]}"#)))
        .await
        .unwrap();
    soon(service.start(&context(), start("c", "e"))).await.unwrap();
    let request = PidsRequest {
        id: "c".into(),
        ..PidsRequest::default()
    };
    let processes = service.pids(&context(), request).await.unwrap().processes;
    assert_eq!(processes.len(), 2);
    assert_eq!((processes[0].pid, processes[0].info.is_none()), (pid, true));
    let info = &processes[1].info;
    assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(
        ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id,
        "e"
    );
    let request = ConnectRequest {
        id: "c".into(),
        ..ConnectRequest::default()
    };
    let connected = service.connect(&context(), request).await.unwrap();
    assert_eq!(
        (connected.shim_pid, connected.task_pid),
        (std::process::id(), pid)
    );
    soon(theatre.pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_changed_by_oci_s_document_only() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "exit0").await.unwrap();
    let url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    let call = async |resources| soon(service.update(&context(), update("c", resources))).await;
    call(Some(any(url, r#"{"cpu":{"quota":5}}"#))).await.unwrap();
    call(Some(any("", "{}"))).await.unwrap();
    for bad in [
        None,
        Some(any(
            "types.containerd.io/opencontainers/runtime-spec/1/WindowsResources",
            "{}",
        )),
        Some(any(url, "not json")),
        Some(any(url, r#"{"nope":1}"#)),
    ] {
        assert_eq!(code(call(bad).await), Code::INVALID_ARGUMENT);
    }
    soon(service.start(&context(), start("c", ""))).await.unwrap();
    soon(theatre.pod.wait("c", None)).await.unwrap();
    assert_eq!(code(call(Some(any(url, "{}"))).await), Code::FAILED_PRECONDITION);
    soon(theatre.pod.end()).await;
    assert_eq!(code(call(Some(any(url, "{}"))).await), Code::UNAVAILABLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_are_containerd_s_metrics() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "sleep").await.unwrap();
    let request = StatsRequest {
        id: "c".into(),
        ..StatsRequest::default()
    };
    let stats = soon(service.stats(&context(), request)).await.unwrap().stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!(metrics.pids.current, 7);
    soon(theatre.pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_wait_are_answered_alike() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "exit3").await.unwrap();
    let request = || WaitRequest {
        id: "c".into(),
        ..WaitRequest::default()
    };
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move { service.wait(&context(), request()).await })
        })
        .collect();
    soon(service.start(&context(), start("c", ""))).await.unwrap();
    let after = soon(service.wait(&context(), request())).await.unwrap();
    assert_eq!(after.exit_status, 3);
    for waiter in waiters {
        assert_eq!(soon(waiter).await.unwrap().unwrap(), after);
    }
    // A signal to all of a container that has ended finds nobody.
    assert_eq!(
        code(soon(service.kill(&context(), kill("c", "", 9, true))).await),
        Code::NOT_FOUND
    );
    let error = soon(service.exec(&context(), exec("c", "e", r#"{"args":["sleep"]}"#))).await;
    assert_eq!(code(error), Code::FAILED_PRECONDITION);
    soon(service.delete(&context(), delete("c", ""))).await.unwrap();
    assert_eq!(
        code(soon(service.delete(&context(), delete("c", ""))).await),
        Code::NOT_FOUND
    );
    assert_eq!(
        code(soon(service.wait(&context(), request())).await),
        Code::NOT_FOUND
    );
    soon(theatre.pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_or_was_never_there_is_told_apart() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "sleep").await.unwrap();
    soon(service.start(&context(), start("c", ""))).await.unwrap();
    soon(service.exec(&context(), exec("c", "e", r#"{"args":["exit5"]}"#)))
        .await
        .unwrap();
    let resize = |exec_id: &str| ResizePtyRequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        width: 80,
        height: u32::MAX,
        ..ResizePtyRequest::default()
    };
    let close = |exec_id: &str| CloseIORequest {
        id: "c".into(),
        exec_id: exec_id.into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    // Without a terminal there is nothing to size, before the start or after it.
    for exec_id in ["", "e"] {
        soon(service.resize_pty(&context(), resize(exec_id)))
            .await
            .unwrap();
    }
    soon(service.start(&context(), start("c", "e"))).await.unwrap();
    soon(theatre.pod.wait("c", Some("e"))).await.unwrap();
    assert_eq!(
        code(soon(service.resize_pty(&context(), resize("e"))).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        code(soon(service.kill(&context(), kill("c", "e", 15, false))).await),
        Code::NOT_FOUND
    );
    assert_eq!(
        code(soon(service.start(&context(), start("c", "e"))).await),
        Code::FAILED_PRECONDITION
    );
    for _ in 0..2 {
        service.close_io(&context(), close("e")).await.unwrap();
    }
    for answer in [
        code(soon(service.resize_pty(&context(), resize("none"))).await),
        code(soon(service.kill(&context(), kill("c", "none", 15, false))).await),
        code(soon(service.start(&context(), start("c", "none"))).await),
        code(service.close_io(&context(), close("none")).await),
        code(service.state(&context(), state("c", "none")).await),
        code(soon(service.delete(&context(), delete("c", "none"))).await),
    ] {
        assert_eq!(answer, Code::NOT_FOUND);
    }
    soon(theatre.pod.end()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_was_not_started_can_be_killed() {
    let theatre = Theatre::open().await;
    let service = TaskService::new(theatre.pod.clone());
    theatre.create("c", "sleep").await.unwrap();
    soon(service.kill(&context(), kill("c", "", 9, true)))
        .await
        .unwrap();
    assert_eq!(soon(theatre.pod.wait("c", None)).await.unwrap().status, 137);
    assert_eq!(
        code(soon(service.start(&context(), start("c", ""))).await),
        Code::FAILED_PRECONDITION
    );
    let deleted = soon(service.delete(&context(), delete("c", ""))).await.unwrap();
    assert_eq!(deleted.exit_status, 137);
    assert_eq!(theatre.heard().await, ["create", "exit c 137", "delete c 137"]);
    soon(theatre.pod.end()).await;
}
