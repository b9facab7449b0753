use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use containerd_shim_protos::{
    events::task::{TaskExit, TaskStart},
    protobuf::well_known_types::empty::Empty,
    shim_async::{Events, create_events},
    topics,
};
use protobuf::Message;
use ttrpc::{
    asynchronous::{Server, TtrpcContext, transport::Listener},
    error::get_rpc_status,
};

use super::*;

/// Takes events, refusing the first `refusals`.
struct Containerd {
    refusals: Mutex<u32>,
    taken: mpsc::UnboundedSender<Envelope>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut refusals = self.refusals.lock().unwrap();
        if *refusals > 0 {
            *refusals -= 1;
            return Err(get_rpc_status(ttrpc::Code::UNAVAILABLE, "busy"));
        }
        self.taken.send(request.envelope.unwrap()).unwrap();
        Ok(Empty::new())
    }
}

async fn serve(path: &std::path::Path, refusals: u32, taken: mpsc::UnboundedSender<Envelope>) -> Server {
    let listener = Listener::bind(format!("unix://{}", path.display())).unwrap();
    let service = Arc::new(Containerd {
        refusals: Mutex::new(refusals),
        taken,
    });
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_events(service));
    server.start().await.unwrap();
    server
}

fn start(pid: u32) -> TaskStart {
    TaskStart {
        container_id: "c".into(),
        pid,
        ..TaskStart::default()
    }
}

#[tokio::test]
async fn events_arrive_in_order_through_refusals_and_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let publisher = Publisher::start(&format!("unix://{}", path.display()), "ns");
    // Nobody listens yet.
    publisher.publish(topics::TASK_START_EVENT_TOPIC, &start(1));
    publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &TaskExit::new());
    let (taken, mut arrivals) = mpsc::unbounded_channel();
    let mut server = serve(&path, 2, taken.clone()).await;
    publisher.flush(Duration::from_secs(20)).await;
    let first = arrivals.try_recv().unwrap();
    assert_eq!(first.topic, "/tasks/start");
    assert_eq!(first.namespace, "ns");
    assert_eq!(first.event.type_url, "containerd.events.TaskStart");
    assert_eq!(TaskStart::parse_from_bytes(&first.event.value).unwrap(), start(1));
    assert_eq!(arrivals.try_recv().unwrap().topic, "/tasks/exit");

    server.shutdown().await.unwrap();
    drop(server);
    std::fs::remove_file(&path).ok();
    for pid in 2..6 {
        publisher.publish(topics::TASK_START_EVENT_TOPIC, &start(pid));
    }
    let _server = serve(&path, 1, taken).await;
    publisher.flush(Duration::from_secs(20)).await;
    for pid in 2..6 {
        let envelope = arrivals.try_recv().unwrap();
        assert_eq!(
            TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid,
            pid
        );
    }
}

#[tokio::test]
async fn without_an_address_nothing_waits() {
    let publisher = Publisher::start("", "ns");
    publisher.publish(topics::TASK_START_EVENT_TOPIC, &start(1));
    timeout(Duration::from_secs(1), publisher.flush(Duration::from_secs(60)))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_flush_ends_though_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::start(dir.path().join("none").to_str().unwrap(), "ns");
    publisher.publish(topics::TASK_START_EVENT_TOPIC, &start(1));
    timeout(Duration::from_secs(5), publisher.flush(Duration::from_millis(50)))
        .await
        .unwrap();
}

#[test]
fn times_are_seconds_and_nanoseconds() {
    let time = timestamp(SystemTime::UNIX_EPOCH + Duration::new(12, 345));
    assert_eq!((time.seconds, time.nanos), (12, 345));
    let time = timestamp(SystemTime::UNIX_EPOCH - Duration::new(12, 345));
    assert_eq!((time.seconds, time.nanos), (0, 0));
}
