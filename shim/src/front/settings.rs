//! What a sandbox is started with: the operator's configuration, and what its first container asks for and may have.

use std::sync::Arc;

use super::{
    bundle::{LinuxOutline, Outline},
    log,
    options::Options,
    sizing::{Asked, Host, Size},
};
use crate::{
    config::{AnnotationError, Config, ConfigError, Wishes, annotations::Most},
    engine::{CgroupConfig, Programs, SandboxConfig},
    host::cgroup::Limits,
};

/// See the module.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The operator's configuration.
    pub config: Arc<Config>,
    /// What the annotations ask for.
    pub wishes: Wishes,
    /// The spec's cgroup path is one of systemd's: `slice:prefix:name`.
    pub systemd_cgroup: bool,
    host: Host,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The operator's file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An annotation is refused.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
}

impl Settings {
    /// Reads the configuration that the options name, and the container's annotations by it.
    ///
    /// # Errors
    /// For all that is wrong in the configuration, and for an annotation that is not allowed.
    pub fn read(options: &Options, outline: &Outline) -> Result<Self, SettingsError> {
        let config = Arc::new(options.config.load()?);
        let host = Host::this();
        let wishes = wishes(outline, &config, host)?;
        Ok(Self {
            config,
            wishes,
            systemd_cgroup: options.systemd_cgroup,
            host,
        })
    }

    /// Whether a further container may join the sandbox.
    ///
    /// # Errors
    /// For an annotation that is not allowed, or that asks for another sandbox than this.
    pub fn admit(&self, outline: &Outline) -> Result<(), SettingsError> {
        let later = wishes(outline, &self.config, self.host)?;
        Ok(self.wishes.admit(&later)?)
    }

    /// The sandbox `id` for its first container.
    pub fn sandbox(
        &self,
        namespace: &str,
        id: &str,
        container: &str,
        outline: &Outline,
        programs: Programs,
    ) -> SandboxConfig {
        let asked = Asked::of(outline);
        let size = Size::of(&asked, self.host, &self.config.machine);
        let memory_mib = self.wishes.memory_mib.unwrap_or(size.memory_mib);
        let limits = if self.config.cgroup.limits {
            asked.limits(memory_mib)
        } else {
            Limits::default()
        };
        SandboxConfig {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            programs,
            vcpus: self.wishes.vcpus.unwrap_or(size.vcpus),
            memory_mib,
            hostname: outline.hostname.clone().unwrap_or_default(),
            kernel_params: self.wishes.kernel_params(&self.config),
            operator: self.config.clone(),
            cgroup: CgroupConfig {
                path: outline
                    .linux
                    .as_ref()
                    .and_then(|linux| linux.cgroups_path.clone()),
                container: container.to_owned(),
                by_systemd: self.systemd_cgroup,
                limits,
                whole: asked.whole,
            },
            network: outline.linux.as_ref().and_then(LinuxOutline::network),
            log: log::kept(),
        }
    }
}

fn wishes(outline: &Outline, config: &Config, host: Host) -> Result<Wishes, AnnotationError> {
    let most = Most {
        vcpus: config.machine.most_vcpus(host.cpus),
        memory_mib: config.machine.most_memory_mib(host.memory_mib),
    };
    Wishes::read(outline.annotations.as_ref(), config, most)
}
