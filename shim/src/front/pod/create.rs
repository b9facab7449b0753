//! Making containers and adding execs.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use containerd_shim_protos::{
    api::Mount as AnnouncedMount,
    events::task::{TaskCreate, TaskExecAdded, TaskIO},
    topics::{TASK_CREATE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC},
};
use husk_agent_protocol::limits::is_valid_id;
use protobuf::MessageField;
use tokio::sync::watch;
use ttrpc::Code;

use super::{Exec, Pod, Slot, Task};
use crate::{
    engine::{CreateContainer, Programs, Sandbox, StartError, Stdio},
    front::{
        bundle::Bundle,
        io::{self, Held, Names},
        log,
        logger::Whose,
        options::Options,
        settings::Settings,
        start::write_atomically,
        status::{self, answer},
    },
    host::rootfs::Mount,
};

/// A container to create, in containerd's words.
#[derive(Debug)]
pub struct TaskConfig {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// The runtime's options.
    pub options: Options,
    /// Its streams.
    pub names: Names,
    /// What to mount on its root.
    pub rootfs: Vec<Mount>,
    /// The same, as it is announced.
    pub announced_rootfs: Vec<AnnouncedMount>,
}

impl Pod {
    /// Creates a container and, with the first one, the sandbox. Returns its pid.
    ///
    /// # Errors
    /// Then nothing of it is left, nor of the sandbox if it has no other.
    pub async fn create(&self, config: TaskConfig) -> ttrpc::Result<u32> {
        if !is_valid_id(&config.id) {
            return Err(answer(
                Code::INVALID_ARGUMENT,
                format!("container id {:?} is not valid", config.id),
            ));
        }
        {
            let mut state = self.lock();
            if state.closing {
                return Err(answer(Code::UNAVAILABLE, "the sandbox is being shut down"));
            }
            if state.tasks.contains_key(&config.id) || !state.creating.insert(config.id.clone()) {
                return Err(answer(
                    Code::ALREADY_EXISTS,
                    format!("container {} already exists", config.id),
                ));
            }
            state.order.creating(&config.id);
        }
        let id = config.id.clone();
        let result = self.create_reserved(config).await;
        if result.is_err() {
            let abandoned = {
                let mut state = self.lock();
                state.creating.remove(&id);
                state.order.forget(&id, None);
                state.is_empty().then(|| state.sandbox.take()).flatten()
            };
            if let Some(sandbox) = abandoned {
                sandbox.shutdown().await;
            }
        }
        result
    }

    async fn create_reserved(&self, config: TaskConfig) -> ttrpc::Result<u32> {
        let directory = PathBuf::from(&config.bundle);
        let bundle = Bundle::read(&directory).map_err(|error| status::bundle(&error))?;
        let process = bundle
            .process(&directory)
            .map_err(|error| status::bundle(&error))?;
        if process.terminal != config.names.terminal {
            let text = "config.json and the request do not agree on whether the process has a terminal";
            return Err(answer(Code::INVALID_ARGUMENT, text));
        }
        let (stdio, held) = self.open(&config.names, &config.id).await?;
        let sandbox = self.sandbox(&config.id, &bundle, &config.options).await?;
        let request = CreateContainer {
            id: config.id.clone(),
            bundle: directory.clone(),
            spec: bundle.spec,
            rootfs: config.rootfs,
            stdio,
        };
        sandbox
            .create(request)
            .await
            .map_err(|error| status::engine(&error))?;
        let pid = sandbox
            .host_pid(&config.id, None)
            .map_err(|error| status::engine(&error))?;
        // For `delete`, should this process be gone by then.
        if let Err(error) = write_atomically(&directory.join("init.pid"), pid.to_string().as_bytes()) {
            tracing::warn!(%error, "the bundle's init.pid is not written");
        }
        let event = TaskCreate {
            container_id: config.id.clone(),
            bundle: config.bundle.clone(),
            rootfs: config.announced_rootfs,
            io: MessageField::some(TaskIO {
                stdin: config.names.stdin.clone(),
                stdout: config.names.stdout.clone(),
                stderr: config.names.stderr.clone(),
                terminal: config.names.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        };
        let task = Task {
            pid,
            bundle: config.bundle,
            names: config.names,
            logger: held.logger(),
            held,
            execs: HashMap::new(),
        };
        let mut state = self.lock();
        state.creating.remove(&config.id);
        state.tasks.insert(config.id.clone(), task);
        self.publisher.publish(TASK_CREATE_EVENT_TOPIC, &event);
        let announcements = state.order.created(&config.id);
        self.announce(&mut state, announcements);
        Ok(pid)
    }

    /// Opens the streams of a container or exec.
    pub(super) async fn open(&self, names: &Names, id: &str) -> ttrpc::Result<(Stdio, Held)> {
        let whose = Whose {
            namespace: &self.namespace,
            id,
        };
        io::open(names, whose, &self.loggers)
            .await
            .map_err(|error| status::io(&error))
    }

    /// The sandbox, started if need be for the container `id` in `bundle`.
    async fn sandbox(&self, id: &str, bundle: &Bundle, options: &Options) -> ttrpc::Result<Arc<Sandbox>> {
        loop {
            let (over, mut under_way) = {
                let mut state = self.lock();
                match &state.sandbox {
                    Slot::Running(sandbox) => {
                        // It is as it was started, whatever the configuration has become since.
                        if let Some(settings) = &state.settings {
                            settings
                                .admit(&bundle.outline)
                                .map_err(|error| status::settings(&error))?;
                        }
                        return Ok(sandbox.clone());
                    }
                    Slot::Starting(under_way) => (None, under_way.clone()),
                    Slot::Empty => {
                        let (over, under_way) = watch::channel(());
                        state.sandbox = Slot::Starting(under_way.clone());
                        (Some(over), under_way)
                    }
                }
            };
            let Some(over) = over else {
                // It fails when the sender is dropped, which is what it waits for.
                let _ = under_way.changed().await;
                continue;
            };
            let started = self.start_sandbox(id, bundle, options).await;
            let mut state = self.lock();
            state.sandbox = Slot::Empty;
            if let Ok((sandbox, settings)) = &started {
                state.sandbox = Slot::Running(sandbox.clone());
                state.settings = Some(settings.clone());
            }
            drop(state);
            drop(over);
            return started.map(|(sandbox, _)| sandbox);
        }
    }

    async fn start_sandbox(
        &self,
        id: &str,
        bundle: &Bundle,
        options: &Options,
    ) -> ttrpc::Result<(Arc<Sandbox>, Arc<Settings>)> {
        let settings = Settings::read(options, &bundle.outline).map_err(|error| status::settings(&error))?;
        log::apply(&settings.config.log);
        tracing::info!(configuration = options.config.name(), "the sandbox starts");
        let started = self.start_with(id, bundle, &settings).await;
        let sandbox = started.map_err(|error| {
            let error = status::start(&error);
            tracing::error!(%error, "the sandbox did not start");
            error
        })?;
        Ok((sandbox, Arc::new(settings)))
    }

    async fn start_with(
        &self,
        id: &str,
        bundle: &Bundle,
        settings: &Settings,
    ) -> Result<Arc<Sandbox>, StartError> {
        let config = |programs| settings.sandbox(&self.namespace, &self.id, id, &bundle.outline, programs);
        #[cfg(test)]
        if let Some(stage) = &self.stage {
            return stage
                .start(config(stage.player.programs()), self.events.clone())
                .await;
        }
        Sandbox::start(config(Programs::locate(&settings.config)?), self.events.clone()).await
    }

    /// Adds an exec: `spec` is an OCI `process` object in JSON.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`, and what is wrong with the request.
    pub async fn exec(&self, id: &str, exec: &str, names: Names, spec: Vec<u8>) -> ttrpc::Result<()> {
        if !is_valid_id(exec) {
            return Err(answer(
                Code::INVALID_ARGUMENT,
                format!("exec id {exec:?} is not valid"),
            ));
        }
        let sandbox = {
            let state = self.lock();
            let (sandbox, _) = state.find(id, None)?;
            if state
                .tasks
                .get(id)
                .is_some_and(|task| task.execs.contains_key(exec))
            {
                return Err(answer(
                    Code::ALREADY_EXISTS,
                    format!("exec {exec} already exists"),
                ));
            }
            sandbox
        };
        let spec = with_terminal(spec, names.terminal)?;
        // Its streams are opened when it is started: as soon as they are, clients may find that their input is at its
        // end, and they tell of that only once this call has been answered.
        sandbox
            .add_exec(id, exec, spec, names.terminal)
            .await
            .map_err(|error| status::engine(&error))?;
        let mut state = self.lock();
        if let Some(task) = state.tasks.get_mut(id) {
            let added = Exec {
                names,
                logger: None,
                held: Held::default(),
                input_ended: false,
                pid: None,
            };
            task.execs.insert(exec.to_owned(), added);
            state.order.added(id, exec);
            let event = TaskExecAdded {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                ..TaskExecAdded::default()
            };
            self.publisher.publish(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        }
        Ok(())
    }
}

/// A process object whose `terminal` is what the request says: clients set either or both.
fn with_terminal(spec: Vec<u8>, terminal: bool) -> ttrpc::Result<Vec<u8>> {
    let malformed = |why: &dyn std::fmt::Display| {
        answer(
            Code::INVALID_ARGUMENT,
            format!("the exec's process is not valid: {why}"),
        )
    };
    let mut process: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&spec).map_err(|error| malformed(&error))?;
    let said = match process.get("terminal") {
        None | Some(serde_json::Value::Null) => false,
        Some(serde_json::Value::Bool(said)) => *said,
        Some(_) => return Err(malformed(&"terminal is not a boolean")),
    };
    if said == terminal {
        return Ok(spec);
    }
    process.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&process).map_err(|error| malformed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_has_a_terminal_when_the_request_says_so() {
        let spec = br#"{"args":["sh"],"x":{"y":1.50}}"#.to_vec();
        assert_eq!(with_terminal(spec.clone(), false).unwrap(), spec);
        let with: serde_json::Value = serde_json::from_slice(&with_terminal(spec, true).unwrap()).unwrap();
        assert_eq!(
            with,
            serde_json::json!({ "args": ["sh"], "x": { "y": 1.5 }, "terminal": true })
        );
        for bad in ["", "[]", r#"{"terminal":1}"#] {
            with_terminal(bad.as_bytes().to_vec(), true).unwrap_err();
        }
    }
}
