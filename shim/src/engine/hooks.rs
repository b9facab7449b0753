//! The hooks of a sandbox's containers: when they run, and what comes of their failures.

use std::{collections::BTreeMap, io, path::Path, sync::Mutex, time::Duration};

use serde::{Deserialize, Serialize};

use super::{EngineError, Sandbox, lock, spec::Spec, standins::update};
use crate::host::hooks::{self, Hook, HookError, Hooks, Phase, State};

/// How long a poststop hook without a timeout may take: nobody is left who could end it.
const POSTSTOP: Duration = Duration::from_secs(30);

/// The same while the sandbox ends, and when it is removed without its engine. Engines wait for that.
pub(super) const POSTSTOP_AT_END: Duration = Duration::from_secs(3);

/// The hooks of the containers that have begun to run some.
#[derive(Debug, Default)]
pub(super) struct Lives(Mutex<BTreeMap<String, Life>>);

#[derive(Clone, Debug)]
struct Life {
    hooks: Hooks,
    state: State,
}

/// What is to be run when a container's engine is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poststop {
    hooks: Vec<Hook>,
    state: State,
}

impl Poststop {
    /// Runs them.
    pub(super) async fn run(self) {
        let limit = Some(POSTSTOP_AT_END);
        let done = hooks::run(
            &self.hooks,
            Phase::Poststop,
            &self.state,
            &[],
            limit,
            std::future::pending(),
        );
        // What fails at this phase is in the log.
        let _ = done.await;
    }
}

impl Sandbox {
    /// How long a container's start may take in the guest on account of its hooks there.
    pub(super) fn time_of_start(&self, id: &str) -> Duration {
        let lives = lock(&self.parts.lives.0);
        lives
            .get(id)
            .map_or(Duration::ZERO, |life| life.hooks.time_in_guest())
    }

    /// Makes a container's hooks known; from now on its poststop hooks will run.
    pub(super) fn begin_hooks(
        &self,
        id: &str,
        pid: u32,
        bundle: &Path,
        spec: &Spec,
    ) -> Result<(), EngineError> {
        if spec.hooks == Hooks::default() {
            return Ok(());
        }
        let state = State::new(
            spec.oci_version.clone(),
            id.to_owned(),
            pid,
            bundle.to_owned(),
            spec.annotations.clone(),
        );
        let hooks = spec.hooks.clone();
        let poststop = Poststop {
            hooks: hooks.of(Phase::Poststop).to_vec(),
            state: state.clone(),
        };
        lock(&self.parts.lives.0).insert(id.to_owned(), Life { hooks, state });
        if poststop.hooks.is_empty() {
            return Ok(());
        }
        let noted = |record: &mut super::record::Record| record.poststop.push(poststop);
        update(&self.parts.record, noted, &self.parts.dir).map_err(|source| EngineError::Host {
            what: "cannot write the sandbox's record".into(),
            source,
        })
    }

    /// Runs a container's hooks of a phase that is not the last. They are killed with the sandbox.
    ///
    /// # Errors
    /// Of the first that fails.
    pub(super) async fn run_hooks(&self, id: &str, phase: Phase) -> Result<(), EngineError> {
        let Some(life) = lock(&self.parts.lives.0).get(id).cloned() else {
            return Ok(());
        };
        let ended = async {
            self.ended().await;
        };
        let join = match phase {
            Phase::CreateContainer => self.parts.standins.namespaces(id),
            _ => Ok(Vec::new()),
        };
        let join = join.map_err(|source| EngineError::Host {
            what: format!("cannot run the hooks of container {id}"),
            source,
        })?;
        let done = hooks::run(life.hooks.of(phase), phase, &life.state, &join, None, ended).await;
        match done {
            Ok(()) => Ok(()),
            Err(error) => {
                let cancelled = matches!(error, HookError::Cancelled { .. });
                let error = EngineError::Host {
                    what: format!("a hook of container {id} failed"),
                    source: io::Error::other(super::container::chain(&error)),
                };
                Err(if cancelled {
                    self.explain(error).await
                } else {
                    error
                })
            }
        }
    }

    /// Runs a container's poststop hooks, once.
    pub(super) async fn run_poststop(&self, id: &str) {
        let Some(life) = lock(&self.parts.lives.0).remove(id) else {
            return;
        };
        let (hooks, state) = (life.hooks.of(Phase::Poststop), &life.state);
        if hooks.is_empty() {
            return;
        }
        let limit = if self.parts.ended.borrow().is_some() {
            POSTSTOP_AT_END
        } else {
            POSTSTOP
        };
        // What fails at this phase is in the log.
        let _ = hooks::run(
            hooks,
            Phase::Poststop,
            state,
            &[],
            Some(limit),
            std::future::pending(),
        )
        .await;
        let done = |record: &mut super::record::Record| record.poststop.retain(|known| known.state != *state);
        if let Err(error) = update(&self.parts.record, done, &self.parts.dir) {
            tracing::warn!(%error, container = id, "the record still has its poststop hooks");
        }
    }

    /// Runs the poststop hooks of all containers whose hooks have begun.
    pub(super) async fn run_all_poststop(&self) {
        let ids: Vec<String> = lock(&self.parts.lives.0).keys().cloned().collect();
        for id in ids {
            self.run_poststop(&id).await;
        }
    }
}
