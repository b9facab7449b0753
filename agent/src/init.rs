//! PID 1 of the guest: what the kernel leaves to the first program, and how the machine ends.

use std::{
    fmt, fs, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use husk_agent_protocol::limits::GUEST_SHARE;
use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, umask},
    unistd::{chdir, chroot},
};

use crate::{
    dial::Dial,
    log,
    network::Network,
    process::{launch, oom},
    sandbox::{Config, Sandbox},
    serve, sys,
};

/// Where cgroup v2 is.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Descriptors that a process may have. The agent itself takes as many.
const MAX_FILES: u64 = 1 << 20;

/// (source, target, type, flags, data)
type Mount = (&'static str, &'static str, &'static str, MsFlags, &'static str);

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

const MOUNTS: &[Mount] = &[
    ("proc", "/proc", "proc", SAFE, ""),
    ("sysfs", "/sys", "sysfs", SAFE, ""),
    ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755"),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "mode=0620,gid=5,ptmxmode=0666",
    ),
    ("tmpfs", "/dev/shm", "tmpfs", SAFE, "mode=1777"),
    ("mqueue", "/dev/mqueue", "mqueue", SAFE, ""),
    (
        "tmpfs",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=0755",
    ),
    (
        "tmpfs",
        "/tmp",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=1777",
    ),
    (
        "cgroup2",
        CGROUPS,
        "cgroup2",
        SAFE,
        "nsdelegate,memory_recursiveprot",
    ),
];

/// Settings of the kernel: (below /proc/sys, value).
const SETTINGS: &[(&str, &str)] = &[
    // The agent bounds its own log; the kernel's bound is too low to tell what went wrong.
    ("kernel/printk_devkmsg", "on\n"),
    ("kernel/pid_max", "4194304"),
    // What the kernel runs on its own account (a core_pattern's program, a release_agent) runs as root beside the agent.
    // A container that has got so far as to name one finds that it has no rights: these sets can only be lowered.
    ("kernel/usermodehelper/bset", "0 0\n"),
    ("kernel/usermodehelper/inheritable", "0 0\n"),
];

/// Something that the guest cannot do without failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct InitError {
    what: String,
    error: io::Error,
}

fn failed(what: impl fmt::Display) -> impl FnOnce(io::Error) -> InitError {
    move |error| InitError {
        what: what.to_string(),
        error,
    }
}

/// What Rust's runtime does before main, but without a need for `/dev/null`: descriptors 0, 1 and 2 are taken, so that
/// no file of ours gets one of their numbers, and a closed peer is an error rather than a signal.
pub fn prepare_process() {
    for number in 0..=2 {
        // SAFETY: integers and a C string. A descriptor that is closed is opened, with the lowest free number,
        // which is its own since those below are open.
        unsafe {
            if libc::fcntl(number, libc::F_GETFD) < 0 {
                libc::open(c"/".as_ptr(), libc::O_RDONLY);
            }
        }
    }
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Lets go of the console that the kernel may have opened: the log is what reaches it.
fn null_stdio() -> io::Result<()> {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for number in 0..=2 {
        // SAFETY: integers only. Nobody owns 0, 1 and 2 in this process as Rust values.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs as PID 1 until the machine is reset.
pub fn run_machine() -> ! {
    let error = match prepare_machine() {
        Err(error) => error.to_string(),
        Ok((config, network)) => match run(config, network) {
            Ok(()) => "the agent has nothing left to do".to_owned(),
            Err(error) => error.to_string(),
        },
    };
    die(format_args!("{error}"))
}

/// Runs the agent where the machine is somebody else's.
///
/// # Errors
///
/// Something the agent needs is missing.
pub fn run_outside(config: Config) -> io::Result<()> {
    // Whatever loses its parent in a container shall be ours to reap, as it is PID 1's.
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0)?;
    fs::create_dir_all(&config.cgroups)?;
    run(config, Network::outside()?)
}

fn run(config: Config, network: Network) -> io::Result<()> {
    // What is forked from here must not be traced or inspected by a container before its exec.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0)?;
    umask(Mode::from_bits_truncate(0o022));
    report_panics();
    // One thread, always: forking without exec is safe only so. Nothing here may use blocking tasks.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve::run(Sandbox::new(config, network)?))
}

fn prepare_machine() -> Result<(Config, Network), InitError> {
    enter_tmpfs()?;
    for (source, target, kind, flags, data) in MOUNTS {
        fs::create_dir_all(target).map_err(failed(format_args!("mkdir {target}")))?;
        let mounted = mount(Some(*source), *target, Some(*kind), *flags, Some(*data));
        mounted.map_err(|error| failed(format_args!("mount {target}"))(error.into()))?;
        if *target == "/dev" {
            null_stdio().map_err(failed("open /dev/null"))?;
            log::to_kernel().map_err(failed("open /dev/kmsg"))?;
        }
    }
    for (name, value) in SETTINGS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            log::warning!("set {name}: {error}");
        }
    }
    oom::protect().map_err(failed("set oom_score_adj"))?;
    sys::set_rlimit(libc::RLIMIT_NOFILE, MAX_FILES, MAX_FILES).map_err(failed("RLIMIT_NOFILE"))?;
    let network = Network::of_machine().map_err(failed("make the network"))?;
    let cgroups = prepare_cgroups(Path::new(CGROUPS)).map_err(failed("prepare cgroups"))?;
    let config = Config {
        dial: Dial::vsock(),
        share: GUEST_SHARE.into(),
        cgroups,
        machine: true,
    };
    Ok((config, network))
}

/// Moves from the initial ramfs to a tmpfs: pivot_root(2) refuses a root that is mounted on nothing, as the initial
/// one is, and every container needs it.
fn enter_tmpfs() -> Result<(), InitError> {
    const NEW: &str = "/newroot";
    let failed = |what| move |error: nix::Error| failed(what)(error.into());
    fs::create_dir_all(NEW).map_err(|error| InitError {
        what: "mkdir /newroot".into(),
        error,
    })?;
    mount(
        Some("root"),
        NEW,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .map_err(failed("mount the root"))?;
    chdir(NEW).map_err(failed("chdir"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed("move the root"))?;
    chroot(".").map_err(failed("chroot"))?;
    chdir("/").map_err(failed("chdir"))
}

/// The agent moves to a leaf of its own, so that every controller can be handed down. Answers where containers'
/// cgroups go.
fn prepare_cgroups(root: &Path) -> io::Result<PathBuf> {
    let own = root.join("husk-agent");
    fs::create_dir(&own)?;
    fs::write(own.join("cgroup.procs"), "0")?;
    let containers = root.join("husk");
    fs::create_dir(&containers)?;
    for directory in [root, &containers] {
        let controllers = fs::read_to_string(directory.join("cgroup.controllers"))?;
        for controller in controllers.split_whitespace() {
            // One at a time, so that the log can name the one that does not work; a limit that needs it is refused.
            if let Err(error) = fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"))
            {
                log::warning!("cgroup controller {controller}: {error}");
            }
        }
    }
    Ok(containers)
}

/// Says why on the log, and ends the machine: a guest without its agent is of no use to anybody, and the host sees a
/// reset at once.
pub fn die(why: fmt::Arguments<'_>) -> ! {
    log::log(log::Level::Emergency, format_args!("fatal: {why}"));
    shut_down(std::process::id() == 1)
}

/// Flushes file systems and resets the machine, or ends the process if the machine is somebody else's.
pub fn shut_down(machine: bool) -> ! {
    if machine {
        nix::unistd::sync();
        // SAFETY: ends this machine, which is ours.
        unsafe { libc::reboot(libc::RB_AUTOBOOT) };
        log::log(
            log::Level::Emergency,
            format_args!("reset: {}", io::Error::last_os_error()),
        );
    }
    std::process::exit(if machine { 1 } else { 0 })
}

fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        // A child that panics is an exit of that child; its parent reports it.
        if launch::is_forked() {
            // SAFETY: ends this process without running the exit handlers that belong to the agent.
            unsafe { libc::_exit(125) }
        }
        die(format_args!("{panic}"))
    }));
}
