//! Whether this machine can run husk, and what to do if not; and what is true of a sandbox that runs ([`sandbox`]).

pub mod expected;
pub mod process;
pub mod sandbox;
pub mod settings;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsRawFd,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc::unbounded_channel, time::timeout};

use self::settings::Advice;
use crate::{
    config::{Config, ConfigError, Source},
    engine::{CgroupConfig, LocateError, Programs, Sandbox, SandboxConfig, cleanup},
    front::sizing::Host,
    guest::vm::kvm_advice,
    host::{memory::guest_memory, network::tap, pid::pidfd_open, ringlog::RingLog},
};

/// Where KVM is.
const KVM: &str = "/dev/kvm";

/// `KVM_GET_API_VERSION` and the only answer there has been since Linux 2.6.22.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_API_VERSION: i32 = 12;

/// `KVM_CHECK_EXTENSION`.
const KVM_CHECK_EXTENSION: libc::c_ulong = 0xae03;

/// What husk-vmm needs of KVM (linux/kvm.h).
const CAPABILITIES: [(&str, libc::c_ulong); 7] = [
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_EXT_CPUID", 7),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_TSC_DEADLINE_TIMER", 72),
    ("KVM_CAP_SIGNAL_MSI", 77),
    ("KVM_CAP_SPLIT_IRQCHIP", 121),
];

/// Namespace of the sandbox that is booted to see whether one can be.
const NAMESPACE: &str = "husk-check";

/// How long a program may take to tell its version.
const VERSION: Duration = Duration::from_secs(10);

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Boot a guest to the agent's hello, within this time. `None`: look only at what can be seen without.
    pub boot: Option<Duration>,
    /// The configuration to look at, and to boot with.
    pub config: Source,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            boot: Some(Duration::from_secs(30)),
            config: Source::Default,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What, e.g. `/dev/kvm`.
    pub name: &'static str,
    /// What was found.
    pub found: Result<String, Fault>,
}

/// What is wrong and how to put it right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

/// All that was looked at, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The items in the order they were looked at.
    pub items: Vec<Item>,
    /// What had better be otherwise.
    pub advice: Vec<Advice>,
    /// From the start of the machine to the agent's hello, if a guest was booted.
    pub boot: Option<Duration>,
}

impl Report {
    /// Whether husk can run here.
    pub fn ok(&self) -> bool {
        self.items.iter().all(|item| item.found.is_ok())
    }
}

/// Looks at this machine. What is made for it is gone when this returns.
pub async fn check(options: Options) -> Report {
    let mut boot_time = None;
    let mut items = vec![
        item("rights", rights()),
        item(KVM, kvm(Path::new(KVM))),
        item("host kernel", host_kernel()),
        item("user namespaces", settings::user_namespaces(Path::new("/"))),
        item(tap::DEVICE, taps()),
    ];
    let config = match options.config.load() {
        Ok(config) => {
            items.push(item("configuration", Ok(options.config.name())));
            Arc::new(config)
        }
        Err(error) => {
            items.push(item("configuration", wrong(&error)));
            Arc::default()
        }
    };
    match Programs::locate(&config) {
        Ok(programs) => {
            items.push(item("programs", versions(&programs).await));
            items.push(item("guest image", image(&programs)));
            let fine = items.iter().all(|item| item.found.is_ok());
            if let (true, Some(limit)) = (fine, options.boot) {
                items.push(item("guest", boot(programs, config, limit, &mut boot_time).await));
            }
        }
        Err(error) => {
            let remedy = match error {
                LocateError::Named { .. } => "correct the configuration",
                _ => "run `make install` as root",
            };
            items.push(item("programs", fault(error.to_string(), remedy)));
        }
    }
    Report {
        items,
        advice: settings::advice(Path::new("/")),
        boot: boot_time,
    }
}

type Found = Result<String, Fault>;

fn item(name: &'static str, found: Found) -> Item {
    Item { name, found }
}

fn fault(problem: impl Into<String>, remedy: impl Into<String>) -> Found {
    Err(Fault {
        problem: problem.into(),
        remedy: remedy.into(),
    })
}

/// What is wrong with the configuration, a line each.
fn wrong(error: &ConfigError) -> Found {
    let remedy = "correct the file; husk.toml in share/husk of the installation lists all options";
    match error {
        ConfigError::Faults(faults) => {
            let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
            fault(lines.join("\n"), remedy)
        }
        error => fault(crate::front::status::chain(error), remedy),
    }
}

fn rights() -> Found {
    if nix::unistd::geteuid().is_root() {
        Ok("root".into())
    } else {
        fault(
            "husk mounts root file systems and needs root for that",
            "run as root, e.g. with sudo",
        )
    }
}

/// Whether KVM is there, may be used and can do what is needed.
fn kvm(path: &Path) -> Found {
    let device = match File::options().read(true).write(true).open(path) {
        Ok(device) => device,
        Err(error) => {
            let advice = kvm_advice(&error);
            let (problem, remedy) = advice
                .split_once("; ")
                .unwrap_or((advice, "see dmesg for what KVM says"));
            return fault(format!("{problem} ({error})"), remedy);
        }
    };
    let ask = |request, argument: libc::c_ulong| {
        // SAFETY: both requests take an integer and touch no memory; the descriptor is open.
        unsafe { libc::ioctl(device.as_raw_fd(), request, argument) }
    };
    match ask(KVM_GET_API_VERSION, 0) {
        KVM_API_VERSION => {}
        ..0 => {
            let error = io::Error::last_os_error();
            return fault(
                format!("{} is not KVM ({error})", path.display()),
                "load kvm_intel or kvm_amd",
            );
        }
        version => {
            return fault(
                format!("KVM has API version {version}, not {KVM_API_VERSION}"),
                "use a kernel of this century",
            );
        }
    }
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(_, number)| ask(KVM_CHECK_EXTENSION, *number) <= 0)
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        return Ok(format!("KVM, API version {KVM_API_VERSION}"));
    }
    fault(
        format!("KVM lacks {}", missing.join(", ")),
        "use Linux 5.13 or later; within a virtual machine, one whose hypervisor offers nested virtualization",
    )
}

/// What the machine's NICs are plugged into.
fn taps() -> Found {
    match tap::check() {
        Ok(()) => Ok("usable".into()),
        Err(error) => fault(
            format!("{}: {error}", tap::DEVICE),
            "load the kernel's module tun (`modprobe tun`)",
        ),
    }
}

/// Whether the kernel has what the engine uses.
fn host_kernel() -> Found {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    // Called with arguments that are wrong, a system call tells whether it is there.
    let there = |number: libc::c_long, arguments: [libc::c_long; 5]| {
        let [a, b, c, d, e] = arguments;
        // SAFETY: no call with these arguments reaches memory or changes anything.
        let result = unsafe { libc::syscall(number, a, b, c, d, e) };
        result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
    };
    let probes = [
        ("pidfd_open", pidfd_open(std::process::id()).is_ok()),
        ("sealed memfds", guest_memory(1).is_ok()),
        ("close_range", there(libc::SYS_close_range, [-1, -1, 0, 0, 0])),
        ("openat2", there(libc::SYS_openat2, [-1, 0, 0, 0, 0])),
        ("open_tree", there(libc::SYS_open_tree, [-1, 0, -1, 0, 0])),
        ("mount_setattr", there(libc::SYS_mount_setattr, [-1, 0, 0, 0, 0])),
    ];
    let missing: Vec<&str> = probes
        .iter()
        .filter(|(_, there)| !there)
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        return Ok(release);
    }
    fault(
        format!("Linux {release} lacks {}", missing.join(", ")),
        "use Linux 5.12 or later (in a container: one whose seccomp profile allows these calls)",
    )
}

/// Whether the programs are of one version.
async fn versions(programs: &Programs) -> Found {
    let own = env!("CARGO_PKG_VERSION");
    for program in [&programs.vmm, &programs.fsd, &programs.standin] {
        let command = {
            let program = program.clone();
            move || {
                Command::new(program)
                    .arg("--version")
                    .stdin(Stdio::null())
                    .env_clear()
                    .output()
            }
        };
        let output = match timeout(VERSION, tokio::task::spawn_blocking(command)).await {
            Ok(Ok(Ok(output))) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            Ok(Ok(Err(error))) => {
                return fault(
                    format!("{} cannot be executed ({error})", program.display()),
                    "run `make install`",
                );
            }
            _ => {
                return fault(
                    format!("{} does not answer", program.display()),
                    "run `make install`",
                );
            }
        };
        if output.split_ascii_whitespace().last() != Some(own) {
            return fault(
                format!("{} is {output:?}, this is version {own}", program.display()),
                "run `make install`, which installs all of one version",
            );
        }
    }
    Ok(format!("version {own}"))
}

/// Whether the guest image is what it should be.
fn image(programs: &Programs) -> Found {
    let starts = |path: &Path, magic: &[u8]| -> io::Result<bool> {
        let mut start = vec![0; magic.len()];
        File::open(path)?.read_exact(&mut start)?;
        Ok(start == magic)
    };
    for (path, magic, what) in [
        (&programs.kernel, b"\x7fELF".as_slice(), "an ELF kernel"),
        (&programs.initramfs, b"070701".as_slice(), "a newc cpio archive"),
    ] {
        match starts(path, magic) {
            Ok(true) => {}
            Ok(false) => return fault(format!("{} is not {what}", path.display()), "run `make install`"),
            Err(error) => {
                return fault(
                    format!("{} cannot be read ({error})", path.display()),
                    "run `make install`",
                );
            }
        }
    }
    Ok(programs.kernel.display().to_string())
}

/// Boots a guest until its agent answers; says in `time` how long that took.
async fn boot(
    programs: Programs,
    operator: Arc<Config>,
    limit: Duration,
    time: &mut Option<Duration>,
) -> Found {
    const REMEDY: &str = "within a virtual machine, use one whose hypervisor offers nested virtualization that works; \
                          else see the text above and dmesg";
    let id = format!("check-{}", std::process::id());
    let config = SandboxConfig {
        namespace: NAMESPACE.into(),
        id: id.clone(),
        programs,
        vcpus: operator.machine.default_vcpus(Host::this().cpus),
        memory_mib: operator.machine.memory_mib,
        hostname: "check".into(),
        kernel_params: operator.kernel_params(None),
        operator,
        cgroup: CgroupConfig {
            container: id.clone(),
            ..CgroupConfig::default()
        },
        network: None,
        log: RingLog::default(),
    };
    let begin = Instant::now();
    let (events, _events) = unbounded_channel();
    let sandbox = match Sandbox::start(config, events).await {
        Ok(sandbox) => sandbox,
        Err(error) => return fault(format!("no guest could be started: {error}"), REMEDY),
    };
    let ready = timeout(limit, sandbox.ready()).await;
    let took = begin.elapsed();
    let console = sandbox.console();
    sandbox.shutdown().await;
    if let Err(error) = cleanup(NAMESPACE, &id).await {
        return fault(
            format!("the guest left something behind: {error}"),
            "remove it by hand",
        );
    }
    match ready {
        Ok(Ok(guest)) => {
            *time = Some(took);
            Ok(format!(
                "Linux {} in {} ms, agent {}",
                guest.kernel_release,
                took.as_millis(),
                guest.agent_version
            ))
        }
        Ok(Err(error)) => fault(format!("the guest did not come up: {error}"), REMEDY),
        Err(_) => {
            let last = console
                .lines()
                .rev()
                .take(5)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>();
            let said = if last.is_empty() {
                "its console is empty".into()
            } else {
                last.join("\n")
            };
            let seconds = limit.as_secs();
            fault(
                format!("the guest did not come up within {seconds} s: {said}"),
                REMEDY,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_help;

    fn problem(found: Found) -> String {
        let Fault { problem, remedy } = found.unwrap_err();
        assert!(!remedy.is_empty());
        problem
    }

    #[test]
    fn what_is_no_kvm_is_told_apart() {
        assert!(problem(kvm(Path::new("/nonexistent/kvm"))).contains("does not exist"));
        assert!(problem(kvm(Path::new("/dev/null"))).contains("is not KVM"));
    }

    #[test]
    fn an_image_is_looked_into() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let mut programs = Programs {
            vmm: "/nonexistent".into(),
            fsd: "/nonexistent".into(),
            standin: "/nonexistent".into(),
            kernel: file("vmlinux", b"\x7fELF..."),
            initramfs: file("initramfs", b"07070100"),
        };
        assert!(image(&programs).is_ok());
        programs.initramfs = file("compressed", b"\x1f\x8b......");
        assert!(problem(image(&programs)).contains("is not a newc cpio archive"));
        programs.kernel = file("empty", b"");
        assert!(problem(image(&programs)).contains("cannot be read"));
    }

    #[tokio::test]
    async fn programs_of_another_version_are_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, version: &str| {
            let path = dir.path().join(name);
            test_help::script(&path, &format!("echo {name} {version}"));
            path
        };
        let mut programs = Programs {
            vmm: script("husk-vmm", env!("CARGO_PKG_VERSION")),
            fsd: script("husk-fsd", env!("CARGO_PKG_VERSION")),
            standin: script("husk-standin", env!("CARGO_PKG_VERSION")),
            kernel: dir.path().into(),
            initramfs: dir.path().into(),
        };
        assert!(versions(&programs).await.is_ok());
        programs.fsd = script("husk-fsd", "0.0.0-other");
        assert!(problem(versions(&programs).await).contains("0.0.0-other"));
        programs.vmm = dir.path().join("missing");
        assert!(problem(versions(&programs).await).contains("cannot be executed"));
    }

    #[tokio::test]
    async fn a_program_outside_of_an_installation_says_so() {
        let report = check(Options {
            boot: None,
            config: Source::Default,
        })
        .await;
        let programs = report.items.iter().find(|item| item.name == "programs").unwrap();
        assert!(problem(programs.found.clone()).contains("make install"));
        assert!(!report.ok());
    }
}
