//! The machine that is emulated. A frozen state fits only the very same machine, so all of it is told here, and the
//! name of a frozen state holds the hash of this file.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;

use super::agentd;

/// Tag of the 9p share that holds the checkout.
pub const CHECKOUT_TAG: &str = "checkout";

/// Where the checkout is mounted in the host, read-only.
pub const CHECKOUT_PATH: &str = "/src";

/// What the emulated processors' time is tied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Clock {
    /// The machine's; one processor. For everything but measurements.
    Wall,
    /// The machine's; two processors that take turns in one thread. For what needs two. (With a thread each, every few
    /// hundred boots the whole machine went idle for good with interrupts pending, or a guest's processor
    /// hung and the machine's kernel found its stack overwritten.)
    Smp,
    /// The number of executed instructions, 2 ns each: one processor, and times that repeat within a few percent.
    Icount,
}

impl Clock {
    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Smp => "smp",
            Self::Icount => "icount",
        }
    }
}

/// What the disk does with writes, and what else differs between the uses of the machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Directory that holds `root/`, the file system QEMU runs in.
    pub tools: &'a Path,
    /// The host's own directories that QEMU opens files in.
    pub binds: Vec<PathBuf>,
    /// Script that enters another root file system.
    pub in_root: &'a Path,
    /// Where the logs and temporary files go.
    pub run_dir: &'a Path,
    /// Disk, in qcow2.
    pub disk: PathBuf,
    /// Whether writes to the disk are forgotten at the end.
    pub discard_writes: bool,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: PathBuf,
    /// Further words on the kernel's command line.
    pub cmdline: &'a str,
    /// See [`Clock`].
    pub clock: Clock,
    /// Port on 127.0.0.1 that leads to the runner.
    pub port: u16,
    /// Directory shared as [`CHECKOUT_TAG`].
    pub share: PathBuf,
    /// Whether the machine waits for a frozen state instead of booting.
    pub restore: bool,
}

impl Machine<'_> {
    /// Starts QEMU with its monitor on its standard streams. It dies with the thread that calls this.
    ///
    /// # Errors
    /// When the logs cannot be made or the script does not run.
    pub fn spawn(&self) -> io::Result<Child> {
        let mut command = Command::new(self.in_root);
        command.arg(self.tools.join("root"));
        for bind in &self.binds {
            command.arg("--bind").arg(bind);
        }
        command.args(["--", "qemu-system-x86_64"]).args(self.arguments());
        command.current_dir(self.run_dir);
        // For the file that takes the writes of a disk that forgets them.
        command.env("TMPDIR", self.run_dir);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.run_dir.join("qemu.log"))?);
        // SAFETY: between fork and exec only prctl(2) is called.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        command.spawn()
    }

    fn arguments(&self) -> Vec<String> {
        let (accel, processors) = match self.clock {
            Clock::Wall => ("tcg,thread=multi,tb-size=1024", "1"),
            Clock::Smp => ("tcg,thread=single,tb-size=1024", "2"),
            Clock::Icount => ("tcg,thread=single,tb-size=1024", "1"),
        };
        let path = |path: &Path| path.display().to_string();
        let cmdline = format!(
            "console=ttyS0 panic=-1 mitigations=off quiet net.ifnames=0 {}",
            self.cmdline
        );
        let snapshot = if self.discard_writes { "on" } else { "off" };
        let mut arguments: Vec<String> = [
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-M",
            "q35",
            "-accel",
            accel,
            // Five-level paging and the fast string instructions are slow to emulate.
            "-cpu",
            "max,+svm,-la57,-erms,-fsrm",
            "-smp",
            processors,
            "-m",
            "4096",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
            "-device",
            &format!("virtio-9p-pci,fsdev=checkout,mount_tag={CHECKOUT_TAG}"),
            "-chardev",
            "stdio,id=qmp,signal=off",
            "-mon",
            "chardev=qmp,mode=control",
            "-append",
            &cmdline,
            // restrict: nothing leaves the emulated machine but answers on the forwarded port.
            "-netdev",
            &format!(
                "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{}-:{}",
                self.port,
                agentd::PORT
            ),
        ]
        .map(str::to_owned)
        .into();
        arguments.extend([
            "-kernel".into(),
            path(&self.kernel),
            "-initrd".into(),
            path(&self.initrd),
            "-serial".into(),
            format!("file:{}", path(&self.run_dir.join("serial.log"))),
            "-drive".into(),
            format!(
                "file={},if=virtio,format=qcow2,snapshot={snapshot},cache=unsafe,discard=unmap",
                path(&self.disk)
            ),
            "-fsdev".into(),
            format!(
                "local,id=checkout,path={},security_model=none,readonly=on,multidevs=remap",
                path(&self.share)
            ),
        ]);
        if self.clock == Clock::Icount {
            arguments.extend(["-icount".into(), "shift=1,sleep=on".into()]);
        }
        if self.restore {
            arguments.extend(["-incoming".into(), "defer".into()]);
        }
        arguments
    }
}
