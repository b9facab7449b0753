//! The machine: `husk-vmm` and `husk-fsd`, launched side by side with all they need, and watched to their end.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};

use husk_vmm_protocol::{
    config::{CONFIG_VERSION, ConfigError, MachineConfig, NicConfig},
    control::{EndReason, MAX_REPORT_LEN, Report},
    fds,
    vsock::StreamOffer,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::{net::unix::pipe::Receiver, sync::Mutex, task::JoinHandle, time::timeout};

use super::{
    console::{Console, TAIL, printable},
    log::{self, LastLine},
    proof::{Ports, Secret},
};
use crate::{
    engine::Programs,
    host::{
        cgroup::Cgroup,
        child::{self, Child, End, Program, Surroundings},
        memory::guest_memory,
        network::Tap,
        ringlog::RingLog,
        seqpacket::Seqpacket,
        share,
    },
};

/// How long what a child said before its end may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long a VMM that is ending may take to be gone: its memory and its VM are taken down.
const DYING: Duration = Duration::from_secs(2);

/// How long the VMM may take to take a stream over. It does nothing else that takes time.
const OFFER: Duration = Duration::from_secs(10);

/// What to launch.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The programs and the guest image.
    pub programs: &'a Programs,
    /// The KVM device.
    pub kvm: &'a Path,
    /// The share's root: a mount of its own.
    pub share: &'a Path,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Added to the kernel's command line.
    pub kernel_params: &'a str,
    /// Where what the guest writes on its console is kept.
    pub console: RingLog,
    /// Where the two programs are born.
    pub cgroup: Option<Arc<Cgroup>>,
    /// What its NICs are plugged into.
    pub taps: Vec<Tap>,
}

/// Why a machine was not launched. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The KVM device cannot be opened.
    #[error("{}: {}", path.display(), kvm_advice(source))]
    Kvm {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the guest image cannot be opened.
    #[error("cannot open {what} {}; run `make install`", path.display())]
    Image {
        /// Which.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Vcpus, memory or kernel parameters are out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Memory, a pipe or a socket was refused.
    #[error("cannot make {what}")]
    Resource {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program cannot be executed.
    #[error("cannot execute {}", path.display())]
    Execute {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to do when `/dev/kvm` cannot be opened.
pub fn kvm_advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "it does not exist; enable virtualization (VT-x or AMD-V) in the firmware and load kvm_intel or kvm_amd"
        }
        Some(libc::EACCES | libc::EPERM) => "permission denied; run as root or add yourself to the group kvm",
        Some(libc::ENXIO | libc::ENODEV) => {
            "no such device; enable virtualization (VT-x or AMD-V) in the firmware and load kvm_intel or kvm_amd"
        }
        _ => "it cannot be opened",
    }
}

/// A launched machine.
#[derive(Debug)]
pub struct Machine {
    vmm: Child,
    fsd: Child,
    control: Mutex<Seqpacket>,
    channel: Seqpacket,
    ports: Ports,
    secret: Secret,
    console: Arc<Console>,
    readers: Mutex<Vec<JoinHandle<()>>>,
    vmm_log: LastLine,
    fsd_log: LastLine,
}

/// What a child is given, for tests to play the child.
#[cfg(test)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ChildEnds {
    pub control: OwnedFd,
    pub vsock: OwnedFd,
    pub console: OwnedFd,
}

/// Opens what the machine needs and starts its two programs.
///
/// # Errors
/// Then nothing of it is left.
pub async fn launch(
    launch: Launch<'_>,
    #[cfg(test)] play: impl FnOnce(ChildEnds),
) -> Result<Machine, LaunchError> {
    let config = MachineConfig {
        version: CONFIG_VERSION,
        vcpus: launch.vcpus,
        memory_mib: launch.memory_mib,
        kernel_params: launch.kernel_params.to_owned(),
        nics: launch
            .taps
            .iter()
            .map(|tap| NicConfig {
                mac: tap.mac,
                queue_pairs: u8::try_from(tap.queues.len()).unwrap_or(0),
            })
            .collect(),
    }
    .encode()?;
    let kvm = File::options()
        .read(true)
        .write(true)
        .open(launch.kvm)
        .map_err(|source| LaunchError::Kvm {
            path: launch.kvm.to_owned(),
            source,
        })?;
    let image = |what, path: &Path| {
        File::open(path).map_err(|source| LaunchError::Image {
            what,
            path: path.to_owned(),
            source,
        })
    };
    let kernel = image("the guest kernel", &launch.programs.kernel)?;
    let initramfs = image("the guest's initramfs", &launch.programs.initramfs)?;
    let resource = |what| move |source| LaunchError::Resource { what, source };
    let memory = guest_memory(launch.memory_mib).map_err(resource("the guest's memory"))?;
    let secret = Secret::new().map_err(resource("the secret of the agent's streams"))?;
    let share = share::open_root(launch.share).map_err(resource("the share"))?;
    let (console, console_end) = pipe().map_err(resource("the console's pipe"))?;
    // Only this end's file description: the guest never waits for who reads its console.
    fcntl(&console_end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(|errno| resource("the console's pipe")(errno.into()))?;
    let (vmm_log, vmm_log_end) = pipe().map_err(resource("a log's pipe"))?;
    let (fsd_log, fsd_log_end) = pipe().map_err(resource("a log's pipe"))?;
    let (control, control_end) = Seqpacket::pair().map_err(resource("the control socket"))?;
    let (channel, channel_end) = Seqpacket::pair().map_err(resource("the vsock channel"))?;
    let (fs_vmm, fs_fsd) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| resource("the fs channel")(errno.into()))?;

    #[cfg(test)]
    play(ChildEnds {
        control: control_end.try_clone().map_err(resource("a test"))?,
        vsock: channel_end.try_clone().map_err(resource("a test"))?,
        console: console_end.try_clone().map_err(resource("a test"))?,
    });

    // The configuration waits in the socket: the VMM finds it when it gets there.
    control
        .send(&config, None)
        .await
        .map_err(resource("the control socket"))?;
    let surroundings = || Surroundings {
        own_pids: true,
        cgroup: launch.cgroup.clone(),
        ..Surroundings::default()
    };
    let as_user = Surroundings {
        args: vec![
            c"--user".into(),
            CString::new(vmm_user().to_string()).unwrap_or_default(),
        ],
        ..surroundings()
    };
    let mut vmm = Program {
        path: &launch.programs.vmm,
        fds: vec![
            (fds::vmm::LOG, vmm_log_end),
            (fds::vmm::CONTROL, control_end),
            (fds::vmm::KVM, kvm.into()),
            (fds::vmm::MEMORY, memory),
            (fds::vmm::KERNEL, kernel.into()),
            (fds::vmm::INITRAMFS, initramfs.into()),
            (fds::vmm::CONSOLE, console_end),
            (fds::vmm::FS, fs_vmm),
            (fds::vmm::VSOCK, channel_end),
        ],
    };
    let mut queues = Vec::new();
    let mut vhost = Vec::new();
    for tap in launch.taps {
        queues.extend(tap.queues);
        vhost.extend(tap.vhost);
    }
    vmm.fds.extend((fds::vmm::TAPS..).zip(queues));
    vmm.fds.extend((fds::vmm::VHOST..).zip(vhost));
    let fsd = Program {
        path: &launch.programs.fsd,
        fds: vec![
            (fds::fsd::LOG, fsd_log_end),
            (fds::fsd::SHARE, share),
            (fds::fsd::CHANNEL, fs_fsd),
        ],
    };
    let (vmm, fsd) = (
        child::spawn_in(vmm, as_user),
        child::spawn_in(fsd, surroundings()),
    );
    let (vmm, fsd) = match tokio::join!(vmm, fsd) {
        (Ok(vmm), Ok(fsd)) => (vmm, fsd),
        (vmm, fsd) => {
            let mut result = None;
            for (child, path) in [(vmm, &launch.programs.vmm), (fsd, &launch.programs.fsd)] {
                match child {
                    Ok(child) => {
                        child.kill();
                        child.ended().await;
                    }
                    Err(source) => {
                        result.get_or_insert(LaunchError::Execute {
                            path: path.clone(),
                            source,
                        });
                    }
                }
            }
            return Err(result.unwrap_or(LaunchError::Execute {
                path: launch.programs.vmm.clone(),
                source: io::ErrorKind::Other.into(),
            }));
        }
    };
    let (console, console_task) = Console::read(console, launch.console);
    let (vmm_log, vmm_log_task) = log::carry("husk-vmm", vmm_log);
    let (fsd_log, fsd_log_task) = log::carry("husk-fsd", fsd_log);
    Ok(Machine {
        vmm,
        fsd,
        control: Mutex::new(control),
        channel,
        ports: Ports::default(),
        secret,
        console,
        readers: Mutex::new(vec![console_task, vmm_log_task, fsd_log_task]),
        vmm_log,
        fsd_log,
    })
}

/// The user that the VMM becomes: no other VM's, since this process serves one sandbox, which ends with it. The range,
/// from 0x7000_0000 to as many pids as Linux can have above it, is nobody's by convention (systemd's UIDS-GIDS).
fn vmm_user() -> u32 {
    const FIRST: u32 = 0x7000_0000;
    FIRST.saturating_add(std::process::id())
}

fn pipe() -> io::Result<(Receiver, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((Receiver::from_owned_fd(read)?, write))
}

impl Machine {
    /// The VMM.
    pub fn vmm(&self) -> &Child {
        &self.vmm
    }

    /// The file server.
    pub fn fsd(&self) -> &Child {
        &self.fsd
    }

    /// The guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// A host port that was never used before in this machine.
    ///
    /// # Errors
    /// When all of them were used.
    pub fn fresh_port(&self) -> io::Result<u32> {
        self.ports.fresh()
    }

    /// What the agent's streams begin with.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Hands a stream to the VMM.
    ///
    /// # Errors
    /// `BrokenPipe` when the VMM is gone; others when it does not take it within [`OFFER`].
    pub async fn offer(&self, offer: StreamOffer, stream: OwnedFd) -> io::Result<()> {
        let sent = timeout(OFFER, self.channel.send(&offer.encode(), Some(stream.as_fd()))).await?;
        sent.map_err(|error| match error.kind() {
            // As the kernel calls it when earlier offers are still unread: the VMM is gone all the same.
            io::ErrorKind::ConnectionReset => io::Error::new(io::ErrorKind::BrokenPipe, error),
            _ => error,
        })
    }

    /// Kills both programs.
    pub fn kill(&self) {
        self.vmm.kill();
        self.fsd.kill();
    }

    /// Waits for the machine's end, by itself or by [`Machine::kill`]; tells why it ended. Both programs are gone
    /// then. One caller at a time.
    pub async fn ended(&self) -> String {
        let control = self.control.lock().await;
        let mut told = None;
        let told_or_over = async {
            loop {
                match self.report(&control).await {
                    Some(Ok(Report::Running)) => tracing::debug!("the machine runs"),
                    Some(Ok(report)) => told = Some(reason_of(&report)),
                    Some(Err(nonsense)) => {
                        told = Some(nonsense);
                        self.vmm.kill();
                    }
                    None => return,
                }
            }
        };
        let mut how = tokio::select! {
            biased;
            () = told_or_over => match timeout(DYING, self.vmm.ended()).await {
                Ok(how) => format!("husk-vmm {how}"),
                Err(_) => "husk-vmm closed its control socket".into(),
            },
            how = self.vmm.ended() => format!("husk-vmm {how}"),
            how = self.fsd.ended() => format!("husk-fsd {how}"),
        };
        // When the VMM ends so does the file server, which has less to take down and may be seen first.
        if let Ok(vmm @ End::Killed(_)) = timeout(DYING, self.vmm.ended()).await {
            how = format!("husk-vmm {vmm}");
        }
        let _ = timeout(LAST_WORDS, async {
            while let Some(report) = self.report(&control).await {
                if let Ok(
                    report @ (Report::Ended { .. } | Report::Failed { .. } | Report::Violation { .. }),
                ) = report
                {
                    told = Some(reason_of(&report));
                }
            }
        })
        .await;
        self.kill();
        self.vmm.ended().await;
        self.fsd.ended().await;
        for reader in std::mem::take(&mut *self.readers.lock().await) {
            let _ = timeout(LAST_WORDS, reader).await;
        }
        // The VMM only sees that the file server is gone; why, that one's log says.
        let last_words = |log: &LastLine| log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(message) = told.as_mut().filter(|message| message.contains("husk-fsd")) {
            let line = last_words(&self.fsd_log);
            if !line.is_empty() {
                message.push_str("; the last line of its log: ");
                message.push_str(&line);
            }
        }
        told.unwrap_or_else(|| {
            let log = if how.starts_with("husk-fsd") {
                &self.fsd_log
            } else {
                &self.vmm_log
            };
            match last_words(log).as_str() {
                "" => how,
                line => format!("{how}; the last line of its log: {line}"),
            }
        })
    }

    /// The last lines of the console, for an error.
    pub fn console_tail(&self) -> String {
        self.console.tail(TAIL)
    }

    async fn report(&self, control: &Seqpacket) -> Option<Result<Report, String>> {
        let mut packet = vec![0; MAX_REPORT_LEN + 1];
        match control.recv(&mut packet).await {
            Ok(0) | Err(_) => None,
            Ok(length) => Some(read_report(packet.get(..length).unwrap_or_default())),
        }
    }
}

/// Reads a packet of a VMM, which may be a captured one.
///
/// # Errors
/// For a person: why it is no report.
pub fn read_report(packet: &[u8]) -> Result<Report, String> {
    if packet.len() > MAX_REPORT_LEN {
        return Err("husk-vmm sent too long a report".into());
    }
    // What is wrong is told in the VMM's own words.
    serde_json::from_slice(packet)
        .map_err(|error| printable(&format!("husk-vmm sent a report that makes no sense: {error}")))
}

/// What a report says, for a person.
pub fn reason_of(report: &Report) -> String {
    match report {
        Report::Running => "the machine runs".into(),
        Report::Ended {
            reason: EndReason::Reset,
        } => "the guest shut down".into(),
        Report::Ended {
            reason: EndReason::Panic,
        } => "the guest's kernel panicked".into(),
        Report::Ended {
            reason: EndReason::TripleFault,
        } => "the guest's CPU had a triple fault".into(),
        Report::Failed { message } => printable(message),
        Report::Violation { thread, system_call } => {
            let call = husk_syscalls::name(*system_call).map_or_else(
                || system_call.to_string(),
                |name| format!("{name} ({system_call})"),
            );
            format!(
                "husk-vmm was ended: its thread {} made the system call {call}, which is forbidden to it",
                printable(thread)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_finds_nothing_to_obey_in_what_a_captured_vmm_reports() {
        let told = |report: &str| match read_report(report.as_bytes()) {
            Ok(report) => reason_of(&report),
            Err(nonsense) => nonsense,
        };
        for report in [
            r#"{"report":"\u001b[31mfail"}"#,
            r#"{"report":"ended","reason":"\u001b[31mfail"}"#,
            r#"{"report":"failed","\u001b[31mfail":1}"#,
            r#"{"report":"failed","message":"\u001b[31mfail"}"#,
            r#"{"report":"violation","thread":"\u001b[31mfail","system_call":1}"#,
        ] {
            let told = told(report);
            assert!(told.contains("?[31mfail") && !told.contains('\u{1b}'), "{told:?}");
        }
        assert!(told(&" ".repeat(MAX_REPORT_LEN + 1)).contains("too long"));
    }
}
