use containerd_shim_protos::{
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
        DeleteResponse, Empty, ShutdownRequest,
    },
    shim_async::Client,
};
use protobuf::Message;
use ttrpc::{Code, Request};

use super::*;

struct Served {
    client: Client,
    pod: Arc<Pod>,
    _server: Server,
    dir: tempfile::TempDir,
}

async fn served() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix://{}", dir.path().join("s").display());
    let pod = Pod::new("test".into(), "pod".into(), Publisher::start("", "test"));
    let mut server = server(&pod, Listener::bind(&address).unwrap());
    server.start().await.unwrap();
    let client = Client::connect(&address).await.unwrap();
    Served {
        client,
        pod,
        _server: server,
        dir,
    }
}

impl Served {
    async fn call<Q: Message, A: Message>(
        &self,
        service: &str,
        method: &str,
        request: &Q,
    ) -> Result<A, (Code, String)> {
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload: request.write_to_bytes().unwrap(),
            timeout_nano: 5_000_000_000,
            ..Request::default()
        };
        match self.client.request(request).await {
            Ok(response) => Ok(A::parse_from_bytes(&response.payload).unwrap()),
            Err(ttrpc::Error::RpcStatus(status)) => Err((status.code(), status.message)),
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn both_names_of_the_service_answer() {
    let served = served().await;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let request = ConnectRequest {
            id: "unknown".into(),
            ..ConnectRequest::default()
        };
        let answer: ConnectResponse = served.call(service, "Connect", &request).await.unwrap();
        assert_eq!((answer.shim_pid, answer.task_pid), (std::process::id(), 0));
        for method in [
            "Delete",
            "Wait",
            "State",
            "Kill",
            "Pids",
            "Start",
            "Exec",
            "ResizePty",
            "CloseIO",
            "Stats",
            "Pause",
            "Resume",
            "Update",
        ] {
            let mut request = DeleteRequest::new();
            request.id = "unknown".into();
            // An exec needs a valid id of its own; the field has the same number in all of these.
            request.exec_id = if method == "Exec" {
                "e".into()
            } else {
                String::new()
            };
            let (code, text) = served
                .call::<_, DeleteResponse>(service, method, &request)
                .await
                .unwrap_err();
            assert_eq!(code, Code::NOT_FOUND, "{method}: {text}");
            assert_eq!(text, "container unknown does not exist", "{method}");
        }
        let (code, text) = served
            .call::<_, Empty>(service, "Checkpoint", &Empty::new())
            .await
            .unwrap_err();
        assert_eq!(code, Code::UNIMPLEMENTED);
        assert!(text.starts_with("husk does not support "), "{text}");
    }
}

#[tokio::test]
async fn bad_creations_are_refused_and_leave_the_server_empty() {
    let served = served().await;
    let service = "containerd.task.v3.Task";
    let bundle = served.dir.path().to_str().unwrap().to_owned();
    let create = |id: &str| CreateTaskRequest {
        id: id.into(),
        bundle: bundle.clone(),
        ..CreateTaskRequest::default()
    };
    let refused = async |request: &CreateTaskRequest| {
        served
            .call::<_, CreateTaskResponse>(service, "Create", request)
            .await
            .unwrap_err()
    };
    assert_eq!(refused(&create("../x")).await.0, Code::INVALID_ARGUMENT);
    let (code, text) = refused(&create("c")).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.ends_with("config.json: no such file"), "{text}");
    std::fs::write(
        served.dir.path().join("config.json"),
        r#"{"process":{"terminal":true}}"#,
    )
    .unwrap();
    let (_, text) = refused(&create("c")).await;
    assert!(text.contains("terminal"), "{text}");
    let mut request = create("c");
    request.terminal = true;
    request.stdout = "binary:///nonexistent".into();
    let (code, text) = refused(&request).await;
    assert_eq!(code, Code::INTERNAL);
    assert!(
        text.starts_with("cannot start the logging program /nonexistent: No such file"),
        "{text}"
    );
    request.stdout = "https://x/y".into();
    assert_eq!(refused(&request).await.0, Code::UNIMPLEMENTED);
    let mut request = create("c");
    request.checkpoint = "/x".into();
    assert_eq!(refused(&request).await.0, Code::UNIMPLEMENTED);

    let _: Empty = served
        .call(service, "Shutdown", &ShutdownRequest::new())
        .await
        .unwrap();
    timeout(Duration::from_secs(5), served.pod.finished())
        .await
        .unwrap();
    assert_eq!(refused(&create("c")).await.0, Code::UNAVAILABLE);
}
