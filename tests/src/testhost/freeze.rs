//! Boots that make the next boot unnecessary: one that fills the engines' stores on the disk, and one whose memory is
//! written to a file.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::client;
use super::instance::free_port;
use super::qemu::{Clock, Machine};
use super::qmp::Qmp;
use super::wire::Run;

/// How long a boot to the runner may take, on a machine that does much else.
const BOOT_DEADLINE: Duration = Duration::from_secs(600);

/// How long loading the container images may take.
const LOAD_DEADLINE: Duration = Duration::from_secs(3600);

/// Where everything is that a boot needs, and where its results go.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Directory with `root/`, which holds QEMU.
    pub tools: PathBuf,
    /// The script that enters a root file system.
    pub in_root: PathBuf,
    /// Directory that holds every heavy artifact.
    pub cache: PathBuf,
    /// Directory with `disk.qcow2`, `vmlinuz` and `initrd`; logs and results go there too.
    pub dir: PathBuf,
    /// See [`Clock`].
    pub clock: Clock,
}

impl Boot {
    fn machine<'a>(&'a self, cmdline: &'a str, port: u16) -> Machine<'a> {
        Machine {
            tools: &self.tools,
            binds: vec![self.cache.clone()],
            in_root: &self.in_root,
            run_dir: &self.dir,
            disk: self.dir.join("disk.qcow2"),
            discard_writes: false,
            kernel: self.dir.join("vmlinuz"),
            initrd: self.dir.join("initrd"),
            cmdline,
            clock: self.clock,
            port,
            // Any directory: nothing is mounted before a restore.
            share: self.dir.clone(),
            restore: false,
        }
    }

    /// Boots to load the container images into the engines' stores on the disk, and waits for the end.
    ///
    /// # Errors
    /// When the boot fails or does not end in half an hour.
    pub fn load(&self) -> io::Result<()> {
        let mut qemu = self.machine("testhost=load", free_port()?).spawn()?;
        let pid = qemu.id();
        // The monitor is not used; a closed one does not end QEMU.
        let deadline = Instant::now() + LOAD_DEADLINE;
        while qemu.try_wait()?.is_none() {
            if Instant::now() > deadline {
                qemu.kill()?;
                qemu.wait()?;
                return Err(self.failure(&format!("loading the images does not end (QEMU was {pid})")));
            }
            thread::sleep(Duration::from_millis(100));
        }
        if self
            .serial()
            .lines()
            .any(|line| line.trim_end() == "testhost: loaded")
        {
            return Ok(());
        }
        Err(self.failure("the container images were not loaded"))
    }

    /// Boots, runs `warm_up` in the host, and writes the memory to `memory` in the directory.
    ///
    /// # Errors
    /// When any of it fails, with the end of the console's log.
    pub fn freeze(&self, warm_up: &[String]) -> io::Result<()> {
        let port = free_port()?;
        let mut qemu = self.machine("", port).spawn()?;
        let (Some(to), Some(from)) = (qemu.stdin.take(), qemu.stdout.take()) else {
            return Err(io::Error::other("QEMU has no streams"));
        };
        let mut qmp = Qmp::new(to, from)?;
        let deadline = Instant::now() + BOOT_DEADLINE;
        while !client::answers(port) {
            if Instant::now() > deadline || qemu.try_wait()?.is_some() {
                // Killed by the end of this process otherwise.
                let _ = qemu.kill();
                return Err(self.failure("the host does not come up"));
            }
            thread::sleep(Duration::from_millis(200));
        }
        let run = Run {
            argv: warm_up.to_vec(),
            timeout: Some(BOOT_DEADLINE.as_secs()),
            ..Run::default()
        };
        let code = client::run(port, run, false)?;
        if code != 0 {
            return Err(self.failure(&format!("{} in the host ends with {code}", warm_up.join(" "))));
        }
        qmp.freeze_to(&self.dir.join("memory").display().to_string())?;
        qemu.kill()?;
        qemu.wait()?;
        Ok(())
    }

    fn serial(&self) -> String {
        let bytes = fs::read(self.dir.join("serial.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn failure(&self, what: &str) -> io::Error {
        let qemu = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
        io::Error::other(format!("{what}\n{qemu}{}", last_lines(&self.serial(), 40)))
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}
