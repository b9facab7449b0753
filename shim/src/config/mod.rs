//! The operator's configuration: `husk.toml`, read once for each sandbox, checked whole before anything uses it.
//!
//! What a pod's author writes (annotations) has effect only where the operator's file allows it, each by its name:
//! [`annotations`].

pub mod annotations;
mod options;
mod pattern;
mod read;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use husk_vmm_protocol::config::{MAX_VCPUS, MEMORY_MIB};
use tracing_subscriber::filter::LevelFilter;

pub use annotations::{Annotation, AnnotationError, Wishes};
pub use pattern::Pattern;
pub use read::Fault;

use crate::host::cgroup::Driver;

/// Where the configuration is read from unless the engine names another file. It need not exist.
pub const DEFAULT_PATH: &str = "/etc/husk/husk.toml";

/// Longest configuration that is read, in bytes.
const MAX_LEN: u64 = 1 << 20;

/// The configuration. [`Default`] is what holds without any file.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Config {
    /// The machine's size.
    pub machine: Machine,
    /// What is booted.
    pub guest: Guest,
    /// The programs.
    pub programs: ProgramPaths,
    /// The host's cgroups.
    pub cgroup: Cgroup,
    /// What of a container's confinement may be without effect.
    pub security: Security,
    /// Volumes.
    pub volumes: Volumes,
    /// The sandbox's network.
    pub network: Network,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// What is logged, and where.
    pub log: Log,
    /// The annotations that have effect.
    pub allowed_annotations: Vec<Annotation>,
}

/// `[machine]`: how large a sandbox's machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs of a sandbox without a CPU limit; `None`: two, or one on a host with one CPU.
    pub vcpus: Option<u8>,
    /// Memory of a sandbox without a memory limit, in MiB; also the least that any has.
    pub memory_mib: u32,
    /// Memory that a sandbox with a limit gets on top of it, in MiB: for the guest's kernel and agent.
    pub memory_overhead_mib: u32,
    /// Most vCPUs of a sandbox; `None`: as many as the host has.
    pub max_vcpus: Option<u8>,
    /// Most memory of a sandbox, in MiB; `None`: as much as the host has.
    pub max_memory_mib: Option<u32>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            vcpus: None,
            memory_mib: 256,
            memory_overhead_mib: 96,
            max_vcpus: None,
            max_memory_mib: None,
        }
    }
}

impl Machine {
    /// vCPUs of a sandbox without a CPU limit, on a host with `cpus`.
    pub fn default_vcpus(&self, cpus: usize) -> u8 {
        let wanted = self
            .vcpus
            .unwrap_or_else(|| u8::try_from(cpus.min(2)).unwrap_or(1));
        wanted.clamp(1, self.most_vcpus(cpus))
    }

    /// Most vCPUs of a sandbox, on a host with `cpus`.
    pub fn most_vcpus(&self, cpus: usize) -> u8 {
        let host = u8::try_from(cpus).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS);
        self.max_vcpus.unwrap_or(host)
    }

    /// Most memory of a sandbox, on a host with `memory_mib`; in MiB.
    pub fn most_memory_mib(&self, memory_mib: u64) -> u32 {
        let host = u32::try_from(memory_mib).unwrap_or(u32::MAX);
        self.max_memory_mib
            .unwrap_or(host)
            .clamp(*MEMORY_MIB.start(), *MEMORY_MIB.end())
    }
}

/// `[guest]`: what is booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The kernel; `None`: the one that was installed with this program.
    pub kernel: Option<PathBuf>,
    /// The initramfs; `None`: the one that was installed with this program.
    pub initramfs: Option<PathBuf>,
    /// Added to the kernel's command line.
    pub kernel_params: String,
    /// What of the guest's kernel log reaches the console, and with it `husk console`.
    pub log_level: GuestLogLevel,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            kernel: None,
            initramfs: None,
            kernel_params: String::new(),
            log_level: GuestLogLevel(4),
        }
    }
}

/// An urgency of the guest's kernel's, 0 (emergency) to 7 (debug): this and the more urgent ones are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestLogLevel(u8);

impl GuestLogLevel {
    /// The names, most urgent first, as `dmesg` has them.
    pub const NAMES: [&str; 8] = ["emerg", "alert", "crit", "err", "warn", "notice", "info", "debug"];

    /// The level of a name.
    pub fn of(name: &str) -> Option<Self> {
        let at = Self::NAMES.iter().position(|known| *known == name)?;
        u8::try_from(at).ok().map(Self)
    }

    /// The kernel's parameter for it.
    pub fn parameter(self) -> String {
        format!("loglevel={}", self.0 + 1)
    }
}

/// `[programs]`: what a sandbox consists of on the host.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ProgramPaths {
    /// `husk-vmm`; `None`: the installed one.
    pub vmm: Option<PathBuf>,
    /// `husk-fsd`; `None`: the installed one.
    pub fsd: Option<PathBuf>,
    /// `husk-standin`; `None`: the installed one.
    pub standin: Option<PathBuf>,
}

/// `[cgroup]`: where a sandbox's processes are on the host, and what they may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Who makes cgroups.
    pub driver: Driver,
    /// The limits of a sandbox's containers also hold for its processes on the host.
    pub limits: bool,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self {
            driver: Driver::Auto,
            limits: true,
        }
    }
}

/// `[security]`: what of a container's confinement may be without effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Security {
    /// Names of AppArmor profiles that a container may ask for in vain; a `*` at the end stands for anything.
    pub ignored_apparmor_profiles: Vec<String>,
}

impl Security {
    /// Whether an AppArmor profile (`process.apparmorProfile`) may be without effect.
    pub fn ignores_apparmor(&self, profile: &str) -> bool {
        let mut ignored = self.ignored_apparmor_profiles.iter();
        matches!(profile, "" | "unconfined")
            || ignored.any(|name| match name.strip_suffix('*') {
                Some(start) => profile.starts_with(start),
                None => profile == name,
            })
    }
}

impl Default for Security {
    fn default() -> Self {
        let profiles = [
            "docker-default",
            "nerdctl-default",
            "cri-containerd.apparmor.d",
            "crio-default",
            "containers-default-*",
        ];
        Self {
            ignored_apparmor_profiles: profiles.map(str::to_owned).to_vec(),
        }
    }
}

/// `[volumes]`: what of the host's file systems containers see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volumes {
    /// Directories whose changes the containers are told of, if they have them read-only.
    pub watched: Vec<Pattern>,
}

impl Default for Volumes {
    fn default() -> Self {
        // Where Kubernetes has what it may exchange while a pod runs.
        let kinds = ["configmap", "secret", "projected", "downward-api"];
        let pattern = |kind| Pattern::of(&format!("*/volumes/kubernetes.io~{kind}/*"));
        Self {
            watched: kinds.into_iter().filter_map(pattern).collect(),
        }
    }
}

/// `[network]`: the NICs of a sandbox's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// NICs beyond those that there are at the start; `None`: two if there are none, none otherwise.
    pub spare_nics: Option<u8>,
    /// Pairs of queues of each NIC.
    pub queue_pairs: u8,
    /// The host's kernel moves the frames (vhost-net).
    pub vhost: bool,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            spare_nics: None,
            queue_pairs: 1,
            vhost: false,
        }
    }
}

/// `[timeouts]`: how long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From the machine's launch to its agent's first answer. An emulated host is some twenty times slower than a
    /// real one, where it takes a fraction of a second.
    pub boot: Duration,
    /// A call of the agent, once it has answered for the first time.
    pub call: Duration,
    /// The guest's orderly end; then it is killed.
    pub shutdown: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(120),
            call: Duration::from_secs(30),
            shutdown: Duration::from_secs(2),
        }
    }
}

/// `[log]`: what is logged, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least urgent that is logged.
    pub level: LevelFilter,
    /// Also to the journal, where there is one.
    pub journald: bool,
    /// What is kept of each running sandbox's log for `husk logs`, in bytes.
    pub kept: usize,
    /// What is kept of each running sandbox's console for `husk console`, in bytes.
    pub console_kept: usize,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: LevelFilter::INFO,
            journald: true,
            kept: 256 << 10,
            console_kept: 256 << 10,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Unreadable {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too long to be one.
    #[error("the configuration {} is longer than {MAX_LEN} bytes", .0.display())]
    TooLong(PathBuf),
    /// A path that depends on who reads it.
    #[error("the configuration's path {:?} is not absolute", .0)]
    Relative(PathBuf),
    /// What is wrong in it, all of it.
    #[error("{}", list(.0))]
    Faults(Vec<Fault>),
}

fn list(faults: &[Fault]) -> String {
    let lines: Vec<String> = faults.iter().map(Fault::to_string).collect();
    lines.join("; ")
}

/// Where a configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// [`DEFAULT_PATH`] if it is there, the built-in defaults if not.
    Default,
    /// A file, which must be there.
    File(PathBuf),
    /// The text itself, from the engine's own configuration.
    Text(String),
}

impl Source {
    /// Reads and checks it.
    ///
    /// # Errors
    /// When it cannot be read, and for all that is wrong in it.
    pub fn load(&self) -> Result<Config, ConfigError> {
        match self {
            Self::Default => load_or_default(Path::new(DEFAULT_PATH)),
            Self::File(path) if !path.is_absolute() => Err(ConfigError::Relative(path.clone())),
            Self::File(path) => Config::parse(&read_text(path)?, &path.display().to_string()),
            Self::Text(text) => Config::parse(text, "the runtime's options"),
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Default if Path::new(DEFAULT_PATH).exists() => DEFAULT_PATH.into(),
            Self::Default => format!("built-in defaults (no {DEFAULT_PATH})"),
            Self::File(path) => path.display().to_string(),
            Self::Text(_) => "the runtime's options".into(),
        }
    }
}

fn load_or_default(path: &Path) -> Result<Config, ConfigError> {
    match read_text(path) {
        Err(ConfigError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(Config::default())
        }
        Err(error) => Err(error),
        Ok(text) => Config::parse(&text, &path.display().to_string()),
    }
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_LEN + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_LEN {
        return Err(ConfigError::TooLong(path.to_owned()));
    }
    Ok(text)
}

impl Config {
    /// The guest kernel's parameters as this configuration wants them, and whatever `more` a container may add.
    pub fn kernel_params(&self, more: Option<&str>) -> String {
        let level = self.guest.log_level;
        let default = Guest::default().log_level;
        let own = (level != default).then(|| level.parameter());
        let parts = [
            own.as_deref().unwrap_or_default(),
            &self.guest.kernel_params,
            more.unwrap_or_default(),
        ];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join(" ")
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
