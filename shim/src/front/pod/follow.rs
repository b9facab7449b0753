//! What the engine reports, told to containerd.

use std::sync::Arc;

use containerd_shim_protos::{
    events::task::{TaskExecStarted, TaskExit, TaskOOM, TaskStart},
    topics::{
        TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
    },
};
use protobuf::MessageField;
use tokio::sync::mpsc;

use super::{Pod, State};
use crate::{
    engine::{Event, Exit},
    front::{order::Announcement, publish::timestamp},
};

impl Pod {
    /// Follows the engine's events.
    pub(super) async fn follow(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Oom { container } => {
                    let mut state = self.lock();
                    let announcements = state.order.oom(&container);
                    self.announce(&mut state, announcements);
                }
                Event::Exited {
                    container,
                    exec,
                    status,
                    at,
                    ..
                } => self.exited(&container, exec.as_deref(), Exit { status, at }),
                // The engine's log has the reason.
                Event::SandboxEnded { .. } => {}
            }
            self.handled.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    fn exited(&self, id: &str, exec: Option<&str>, exit: Exit) {
        let mut state = self.lock();
        let held = state.held(id, exec).map(std::mem::take);
        let sandbox = state.sandbox.get();
        let announcements = state.order.exited(id, exec, exit);
        self.announce(&mut state, announcements);
        drop(state);
        // Once the output is at its end nobody has to be kept from being told so.
        if let (Some(held), Some(sandbox)) = (held, sandbox) {
            let (id, exec) = (id.to_owned(), exec.map(str::to_owned));
            tokio::spawn(async move {
                sandbox.drained(&id, exec.as_deref()).await;
                drop(held);
            });
        }
    }

    /// Publishes what the order lets go. Under the lock, so that nothing comes between.
    pub(super) fn announce(&self, state: &mut State, announcements: Vec<Announcement>) {
        for announcement in announcements {
            match announcement {
                Announcement::Started {
                    container,
                    exec: None,
                } => {
                    let pid = state.pid(&container, None);
                    let event = TaskStart {
                        container_id: container,
                        pid,
                        ..TaskStart::default()
                    };
                    self.publisher.publish(TASK_START_EVENT_TOPIC, &event);
                }
                Announcement::Started {
                    container,
                    exec: Some(exec_id),
                } => {
                    let pid = state.pid(&container, Some(&exec_id));
                    let event = TaskExecStarted {
                        container_id: container,
                        exec_id,
                        pid,
                        ..TaskExecStarted::default()
                    };
                    self.publisher.publish(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
                }
                Announcement::Oom { container } => {
                    let event = TaskOOM {
                        container_id: container,
                        ..TaskOOM::default()
                    };
                    self.publisher.publish(TASK_OOM_EVENT_TOPIC, &event);
                }
                Announcement::Exited {
                    container,
                    exec,
                    exit,
                } => {
                    let event = TaskExit {
                        pid: state.pid(&container, exec.as_deref()),
                        id: exec.unwrap_or_else(|| container.clone()),
                        container_id: container,
                        exit_status: exit.status,
                        exited_at: MessageField::some(timestamp(exit.at)),
                        ..TaskExit::default()
                    };
                    self.publisher.publish(TASK_EXIT_EVENT_TOPIC, &event);
                }
            }
        }
    }
}
