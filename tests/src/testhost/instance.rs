//! A running host and its run directory. A supervisor process holds QEMU: it dies with it, and ends it after hours
//! without use. Both hold a lock on `alive.lock`, so that whether a host runs is a question to the kernel, not to a
//! file that a crash leaves behind.

use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use serde::{Deserialize, Serialize};

use super::client;
use super::qemu::{CHECKOUT_PATH, CHECKOUT_TAG, Clock, Machine};
use super::qmp::Qmp;
use super::wire::Wake;

/// How long a restore may take: a second as a rule, more on a machine that is short of memory.
const START_DEADLINE: Duration = Duration::from_secs(180);

/// How long a killed host may take to be gone.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How often the supervisor looks whether the host is still in use.
const IDLE_CHECK: Duration = Duration::from_secs(60);

/// Where everything is that a host is started from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Parts {
    /// Directory with `root/`, which holds QEMU.
    pub tools: PathBuf,
    /// Directory with the frozen state, made by [`super::freeze::freeze`].
    pub frozen: PathBuf,
    /// The script that enters a root file system.
    pub in_root: PathBuf,
    /// Directory that holds every heavy artifact; disks refer to others below it.
    pub cache: PathBuf,
    /// The checkout, shared with the host.
    pub checkout: PathBuf,
}

/// How to reach a running host: the content of `instance.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Address {
    /// Port on 127.0.0.1.
    pub port: u16,
    /// What the runner asks for.
    pub token: String,
    /// Process id of the supervisor.
    pub supervisor: i32,
    /// Process id of QEMU.
    pub qemu: u32,
    /// The frozen state it came from.
    pub frozen: PathBuf,
}

/// A run directory: one per checkout, suite and clock.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

/// Says that the host is in use, for as long as it is held.
#[derive(Debug)]
pub struct InUse(Flock<File>);

impl Drop for InUse {
    fn drop(&mut self) {
        touch(&self.0);
    }
}

fn touch(file: &File) {
    // A clock that cannot be kept only ends the host earlier.
    let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
}

fn lock(path: &Path, how: FlockArg) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

impl RunDir {
    /// Opens the run directory, making it when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// A file of this directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The way to the host, when one runs.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn running(&self) -> io::Result<Option<Address>> {
        if lock(&self.file("alive.lock"), FlockArg::LockExclusiveNonblock)?.is_some() {
            return Ok(None);
        }
        match fs::read(self.file("instance.json")) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            // It is being started or stopped right now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Notes that the host is in use.
    ///
    /// # Errors
    /// When the lock cannot be taken.
    pub fn in_use(&self) -> io::Result<InUse> {
        let lock = lock(&self.file("users.lock"), FlockArg::LockShared)?;
        let lock = lock.ok_or_else(|| io::Error::other("users.lock is locked"))?;
        touch(&lock);
        Ok(InUse(lock))
    }

    /// Holds off everybody else who would start or stop this host.
    ///
    /// # Errors
    /// When the lock cannot be taken.
    pub fn exclusive(&self) -> io::Result<impl Drop + use<>> {
        let lock = lock(&self.file("start.lock"), FlockArg::LockExclusive)?;
        lock.ok_or_else(|| io::Error::other("start.lock is locked"))
    }

    /// Ends the host, if it runs, and waits until it is gone. Logs stay.
    ///
    /// # Errors
    /// When it does not go.
    pub fn stop(&self) -> io::Result<()> {
        let alive = self.file("alive.lock");
        let deadline = std::time::Instant::now() + STOP_DEADLINE;
        let mut signaled = false;
        loop {
            if lock(&alive, FlockArg::LockExclusiveNonblock)?.is_some() {
                break;
            }
            if let (false, Some(address)) = (signaled, self.running()?) {
                // QEMU dies with its supervisor.
                match kill(Pid::from_raw(address.supervisor), Signal::SIGTERM) {
                    Ok(()) | Err(Errno::ESRCH) => signaled = true,
                    Err(error) => return Err(error.into()),
                }
            }
            if std::time::Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "the host of {} does not end",
                    self.0.display()
                )));
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.forget()
    }

    fn forget(&self) -> io::Result<()> {
        match fs::remove_file(self.file("instance.json")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Starts the host in the background and waits until it can run commands. The caller holds [`Self::exclusive`].
    ///
    /// # Errors
    /// What keeps it from starting, in words of the supervisor.
    pub fn start(&self, parts: &Parts, clock: Clock, idle: Duration) -> io::Result<()> {
        self.forget()?;
        let log = File::create(self.file("supervisor.log"))?;
        let (ready, tell) = pipe2(OFlag::O_CLOEXEC)?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("supervise")
            .arg("--run-dir")
            .arg(&self.0)
            .arg("--parts")
            .arg(serde_json::to_string(parts)?);
        command.args(["--clock", clock.name()]);
        command.args(["--idle", &idle.as_secs().to_string()]);
        command.stdin(Stdio::null()).stdout(tell).stderr(log);
        // SAFETY: between fork and exec only setsid(2) is called.
        unsafe {
            command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?));
        }
        let mut child = command.spawn()?;
        // Our copy of the pipe's writing end goes with the command.
        drop(command);
        let (answer, answered) = channel();
        thread::spawn(move || {
            let mut word = String::new();
            let _ = answer.send(File::from(ready).read_to_string(&mut word).map(|_| word));
        });
        match answered.recv_timeout(START_DEADLINE) {
            Ok(Ok(word)) if word == "ready\n" => Ok(()),
            outcome => {
                let _ = child.kill();
                let _ = child.wait();
                let mut said = fs::read_to_string(self.file("supervisor.log")).unwrap_or_default();
                said.push_str(&fs::read_to_string(self.file("qemu.log")).unwrap_or_default());
                let late = matches!(outcome, Err(RecvTimeoutError::Timeout));
                let how = if late {
                    "does not answer in time"
                } else {
                    "does not start"
                };
                Err(io::Error::other(format!(
                    "the host {how}; logs are in {}:\n{said}",
                    self.0.display()
                )))
            }
        }
    }

    /// What the background process does: restores the host, says `ready` on standard output, and stays until QEMU
    /// ends or nobody has used it for `idle`.
    ///
    /// # Errors
    /// What keeps the host from starting.
    pub fn supervise(&self, parts: &Parts, clock: Clock, idle: Duration) -> io::Result<()> {
        let alive = lock(&self.file("alive.lock"), FlockArg::LockExclusiveNonblock)?;
        let alive = alive.ok_or_else(|| io::Error::other("this host runs already"))?;
        // QEMU inherits the lock: it is free only when both are gone.
        fcntl(&*alive, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let port = free_port()?;
        let machine = Machine {
            tools: &parts.tools,
            binds: vec![parts.cache.clone(), parts.checkout.clone(), self.0.clone()],
            in_root: &parts.in_root,
            run_dir: &self.0,
            disk: parts.frozen.join("disk.qcow2"),
            discard_writes: true,
            kernel: parts.frozen.join("vmlinuz"),
            initrd: parts.frozen.join("initrd"),
            cmdline: "",
            clock,
            port,
            share: parts.checkout.clone(),
            restore: true,
        };
        let mut qemu = machine.spawn()?;
        fcntl(&*alive, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let (Some(to), Some(from)) = (qemu.stdin.take(), qemu.stdout.take()) else {
            return Err(io::Error::other("QEMU has no streams"));
        };
        let mut qmp = Qmp::new(to, from)?;
        qmp.restore_from(&parts.frozen.join("memory").display().to_string())?;
        let token = random_token()?;
        let shares = [(CHECKOUT_TAG.to_owned(), CHECKOUT_PATH.to_owned())].into();
        client::wake(
            port,
            Wake {
                token: token.clone(),
                unix_nanos: client::unix_nanos(),
                shares,
            },
        )?;
        let supervisor = i32::try_from(std::process::id()).unwrap_or_default();
        let address = Address {
            port,
            token,
            supervisor,
            qemu: qemu.id(),
            frozen: parts.frozen.clone(),
        };
        self.publish(&address)?;
        drop(self.in_use()?);
        tell_ready()?;

        let (ended, end) = channel();
        thread::spawn(move || {
            qmp.drain();
            let _ = ended.send(());
        });
        while end.recv_timeout(IDLE_CHECK) == Err(RecvTimeoutError::Timeout) {
            if self.idle_for()? > idle {
                eprintln!("nobody used the host for {} s: it ends", idle.as_secs());
                break;
            }
        }
        qemu.kill()?;
        let status = qemu.wait()?;
        eprintln!("QEMU ended: {status}");
        self.forget()
    }

    fn publish(&self, address: &Address) -> io::Result<()> {
        let new = self.file("instance.json.new");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(address)?)?;
        fs::rename(new, self.file("instance.json"))
    }

    fn idle_for(&self) -> io::Result<Duration> {
        let users = self.file("users.lock");
        if lock(&users, FlockArg::LockExclusiveNonblock)?.is_none() {
            return Ok(Duration::ZERO);
        }
        // A clock that was set back is no idleness.
        Ok(fs::metadata(users)?.modified()?.elapsed().unwrap_or_default())
    }
}

/// Says `ready` to whoever started us and lets go of the pipe, which would keep them waiting.
fn tell_ready() -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(b"ready\n")?;
    stdout.flush()?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    // SAFETY: dup2 on two descriptors that are open; standard output is ours.
    match unsafe { libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A port nobody listens on. Somebody could take it before QEMU does; QEMU then says so and ends.
///
/// # Errors
/// When there is none.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn random_token() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
