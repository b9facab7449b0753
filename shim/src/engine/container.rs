//! Containers: made on the host and in the guest, and removed in both.

use std::{
    fs::DirBuilder,
    io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use husk_agent_protocol::limits::MAX_SUBMOUNTS;
use tokio::time::timeout;

use super::{
    CreateContainer, EngineError, Exit, Sandbox, cgroups::Home, lock, sandbox::check_id, spec::Spec,
    streams::Streams, table::KILLED, undo::Undo,
};
use crate::{
    guest::agent::Shown,
    host::{
        hooks::Phase,
        mount::{Clone, clone_tree, mounts_below, open_path, unmount_below},
        rootfs::{self, Mount},
        share::remove_mount_points,
    },
};

/// How long the end of a killed init process is awaited.
const KILL: Duration = Duration::from_secs(10);

/// An id that was taken for a container in the making; given back unless the container was made.
struct Reservation<'a> {
    sandbox: &'a Sandbox,
    id: &'a str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.sandbox.table().abandon(self.id);
    }
}

impl Sandbox {
    /// Makes a container and its init process, stopped before its exec.
    ///
    /// # Errors
    /// When it cannot be made; then nothing of it is left.
    pub async fn create(&self, request: CreateContainer) -> Result<(), EngineError> {
        let CreateContainer {
            id,
            bundle,
            spec,
            rootfs,
            stdio,
        } = request;
        check_id("container", &id)?;
        let needs = Spec::read(&spec, &bundle, stdio.terminal, &self.parts.operator.security)?;
        self.table().reserve(&id, stdio.terminal)?;
        let _reservation = Reservation {
            sandbox: self,
            id: &id,
        };

        let mut undo = Undo::default();
        let made = async {
            // On the host: what stands for the container; its root file system and its volumes, in the share. The
            // hooks run where runc runs them. Meanwhile the guest boots.
            let plan = self.parts.standins.plan(&needs.namespaces)?;
            let joined = plan.joined.clone();
            self.step("stand-in")?;
            let (home, planned) = match self.home(&id, needs.cgroups_path.as_deref(), &mut undo).await? {
                Home::Born(home) => (home, None),
                Home::Moved(home, planned) => (home, Some(planned)),
            };
            let pid = self.stand_in(&id, plan, home, &mut undo).await?;
            if let Some(planned) = planned {
                self.move_home(planned, pid).await?;
            }
            self.offer_to_oom(needs.oom_score_adj);
            let root = self.root(&bundle, &needs, &rootfs, &mut undo)?;
            self.begin_hooks(&id, pid, &bundle, &needs)?;
            self.run_hooks(&id, Phase::Prestart).await?;
            self.run_hooks(&id, Phase::CreateRuntime).await?;
            let mut shown = self.show(&id, &root, &needs, &mut undo)?;
            self.mirror(&needs, &mut shown).await?;
            self.run_hooks(&id, Phase::CreateContainer).await?;
            // What the hooks have wired.
            self.parts.network.catch_up().await?;
            let resolv_conf = needs.resolv_conf.as_deref();
            self.parts.localhost.resolve_by(&id, resolv_conf, &mut undo).await;

            // In the guest: the container and its init process.
            self.step("streams")?;
            let (streams, ports) = Streams::open(&self.parts.machine, stdio).await?;
            self.step("create")?;
            let pid = self
                .parts
                .agent
                .create_container(&id, spec, ports, shown, joined, &bundle)
                .await?;
            self.table().commit(&id, pid, streams, &mut undo)
        };
        match made.await {
            Ok(()) => {
                self.attend_container(&id);
                Ok(())
            }
            Err(error) => {
                let error = self.explain(error).await;
                undo.run();
                self.run_poststop(&id).await;
                Err(error)
            }
        }
    }

    /// The root file system of a container: mounted, if the engine described it.
    fn root(
        &self,
        bundle: &Path,
        needs: &Spec,
        mounts: &[Mount],
        undo: &mut Undo,
    ) -> Result<PathBuf, EngineError> {
        let root = if mounts.is_empty() {
            needs.root.clone()
        } else {
            self.mount_root(bundle, mounts, undo)?
        };
        if !root.is_dir() {
            let root = root.display();
            return Err(EngineError::InvalidSpec(format!(
                "the root file system {root} does not exist"
            )));
        }
        Ok(root)
    }

    /// Mounts a container's root file system and volumes in the share. Tells what the guest
    /// has to know of them.
    fn show(&self, id: &str, root: &Path, needs: &Spec, undo: &mut Undo) -> Result<Shown, EngineError> {
        let base = self.parts.dir.join("share").join(id);
        let shown = base.clone();
        undo.push("remove the container from the share", move || {
            unmount_below(&shown)?;
            remove_mount_points(&shown)
        });
        self.step("share")?;
        for dir in [base.clone(), base.join("rootfs")] {
            DirBuilder::new()
                .mode(0o755)
                .create(&dir)
                .map_err(host("cannot make a mount point", &dir))?;
        }

        self.step("rootfs")?;
        let how = Clone {
            recursive: true,
            read_only: false,
            follow: false,
        };
        open_path(root)
            .and_then(|from| clone_tree(from.as_fd(), &base.join("rootfs"), how))
            .map_err(host("cannot show the guest the root file system", root))?;

        let mut paths = vec![base.join("rootfs")];
        let mut shown = Shown::default();
        for volume in &needs.volumes {
            self.step("volume")?;
            let volumes = Arc::clone(&self.parts.volumes);
            let number = volumes.take(volume).map_err(|error| {
                EngineError::InvalidSpec(format!("mounts[{}]: {}", volume.index, chain(&error)))
            })?;
            paths.push(volumes.path(number));
            undo.push("remove a volume", move || volumes.release(number));
            shown.volumes.push((volume.index, number));
        }
        let share = self.parts.dir.join("share");
        for path in paths {
            let below = mounts_below(&path).map_err(host("cannot list the mounts in", &path))?;
            let below = below.iter().filter_map(|point| point.strip_prefix(&share).ok());
            shown
                .submounts
                .extend(below.map(|point| point.as_os_str().as_bytes().to_vec()));
        }
        shown.submounts.truncate(MAX_SUBMOUNTS);
        Ok(shown)
    }

    /// Has the guest mirror those of the volumes that are to be.
    async fn mirror(&self, needs: &Spec, shown: &mut Shown) -> Result<(), EngineError> {
        self.step("mirror")?;
        for (volume, (index, number)) in needs.volumes.iter().zip(&shown.volumes) {
            if self.parts.volumes.mirror(volume, *number).await {
                shown.mirrored.push(*index);
            }
        }
        Ok(())
    }

    /// Mounts the root file system that the engine described on the bundle's `rootfs`.
    fn mount_root(&self, bundle: &Path, mounts: &[Mount], undo: &mut Undo) -> Result<PathBuf, EngineError> {
        let root = bundle.join("rootfs");
        let mut record = lock(&self.parts.record);
        record.mounts.push(root.clone());
        record
            .save(&self.parts.dir)
            .map_err(host("cannot write the record in", &self.parts.dir))?;
        drop(record);
        let (mounted, record, dir) = (
            root.clone(),
            Arc::clone(&self.parts.record),
            self.parts.dir.clone(),
        );
        undo.push("unmount the root file system", move || {
            unmount_below(&mounted)?;
            // Another sandbox may mount there next.
            let mut record = lock(&record);
            record.mounts.retain(|mount| *mount != mounted);
            record.save(&dir)
        });
        self.step("mount")?;
        rootfs::mount_all(mounts, &root).map_err(|error| EngineError::InvalidArgument(chain(&error)))?;
        Ok(root)
    }

    pub(super) fn step(&self, name: &'static str) -> Result<(), EngineError> {
        self.parts.places.step(name).map_err(|source| EngineError::Host {
            what: format!("step {name}"),
            source,
        })
    }

    /// Removes a container and its execs. One that was never started is ended first.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it runs.
    pub async fn delete_container(&self, id: &str) -> Result<Exit, EngineError> {
        let ended = self.table().begin_delete(id)?;
        let exit = match ended {
            Some(exit) => exit,
            None => self.end_unstarted(id).await,
        };
        if self.parts.ended.borrow().is_none() {
            if let Err(error) = self.parts.agent.delete_container(id).await {
                // The host's side goes all the same: the guest can keep nothing of it.
                tracing::warn!(%error, container = id, "the guest did not delete the container");
            }
        }
        let mut undo = self.table().finish_delete(id);
        let undone = tokio::task::spawn_blocking(move || undo.run()).await;
        undone.map_err(|error| EngineError::Host {
            what: format!("cannot remove container {id}"),
            source: io::Error::other(error),
        })?;
        self.run_poststop(id).await;
        Ok(exit)
    }

    /// Kills a container. Returns when it has ended, or does not.
    pub(super) async fn kill_and_wait(&self, id: &str) {
        let Ok(mut exit) = self.table().watch(id, None) else {
            return;
        };
        let killed = self
            .parts
            .agent
            .signal(id, None, libc::SIGKILL as u32, true)
            .await;
        if let Err(error) = killed {
            tracing::debug!(%error, container = id, "it was not killed: it may have ended");
        }
        if timeout(KILL, exit.wait_for(Option::is_some)).await.is_err() {
            tracing::warn!(container = id, "it was killed and does not end");
        }
    }

    /// Ends the init process of a container that was never started.
    async fn end_unstarted(&self, id: &str) -> Exit {
        let killed = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        let Ok(mut exit) = self.table().watch(id, None) else {
            return killed;
        };
        if let Err(error) = self
            .parts
            .agent
            .signal(id, None, libc::SIGKILL as u32, true)
            .await
        {
            tracing::warn!(%error, container = id, "the guest did not kill the container");
            return killed;
        }
        let exit = timeout(KILL, exit.wait_for(Option::is_some)).await;
        exit.ok()
            .and_then(Result::ok)
            .and_then(|exit| *exit)
            .unwrap_or(killed)
    }
}

fn host(what: &str, path: &Path) -> impl FnOnce(io::Error) -> EngineError + use<> {
    let what = format!("{what} {}", path.display());
    move |source| EngineError::Host { what, source }
}

/// An error with its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
