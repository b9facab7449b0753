//! A logging program: containerd's `binary://` as the destination of a process's output.
//!
//! `binary:///path?name=value&env.NAME=value` names a program, its arguments and its environment. It gets the
//! process's output as descriptors 3 (stdout) and 4 (stderr), and says that it is ready by writing a byte to 5 or by
//! closing it. When both outputs have ended it is to end, too. Source: containerd's `core/runtime/v2/logging` and its
//! shim for runc.

use std::{
    ffi::CString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::Receiver,
    sync::{oneshot, watch},
    time::timeout,
};

use super::io::IoError;
use crate::host::child::{Child, End, Program, Surroundings, spawn_in};

/// How long a program may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a program that was never ready may take to be seen.
const DEATH_TIMEOUT: Duration = Duration::from_millis(100);
/// How long a program may take to end after its input has, and again after it was asked to.
const END_TIMEOUT: Duration = Duration::from_secs(6);
/// The parameters with this before their name are the program's environment.
const ENV_PREFIX: &str = "env.";
/// Variables that are not the client's to set.
const OWN_VARIABLES: [&str; 2] = ["CONTAINER_ID", "CONTAINER_NAMESPACE"];

/// Whose output it is.
#[derive(Clone, Copy, Debug)]
pub struct Whose<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id, or the exec's.
    pub id: &'a str,
}

/// A program as it is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    path: PathBuf,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Binary {
    /// Reads what follows `binary://`.
    pub fn parse(rest: &str) -> Option<Self> {
        let rest = without_fragment(rest);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = path_of(path)?;
        let (mut args, mut env, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decoded(name, true)?, decoded(value, true)?);
            // Of several of one name the first counts.
            if seen.contains(&name) {
                continue;
            }
            match name.strip_prefix(ENV_PREFIX) {
                Some(variable) if OWN_VARIABLES.contains(&variable) => {}
                Some(variable) => env.push(CString::new(format!("{variable}={value}")).ok()?),
                None => {
                    args.push(CString::new(name.as_str()).ok()?);
                    args.push(CString::new(value).ok()?);
                }
            }
            seen.push(name);
        }
        Some(Self { path, args, env })
    }
}

/// What stands before a fragment.
pub fn without_fragment(uri: &str) -> &str {
    uri.split_once('#').map_or(uri, |(before, _)| before)
}

/// The absolute path in a URI, with its escapes resolved.
pub fn path_of(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(decoded(path, false)?);
    let has_nul = path.as_os_str().as_encoded_bytes().contains(&0);
    (path.is_absolute() && !has_nul).then_some(path)
}

/// Text with its `%XX` resolved; `plus`: a `+` is a blank, as it is in a query.
fn decoded(text: &str, plus: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' if plus => b' ',
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high << 4 | low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// The programs that run. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Loggers(Arc<watch::Sender<Vec<Child>>>);

/// A program that runs. Dropped, it is given its time to end, and is then ended.
#[derive(Debug)]
pub struct Logger {
    child: Child,
    _held: oneshot::Sender<()>,
}

impl Logger {
    /// Its process, to wait for its end.
    pub fn child(&self) -> Child {
        self.child.clone()
    }
}

/// What a process writes to.
#[derive(Debug)]
pub struct Inputs {
    /// The program's descriptor 3.
    pub stdout: OwnedFd,
    /// The program's descriptor 4.
    pub stderr: OwnedFd,
}

impl Loggers {
    /// Starts a program and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be executed, ends or is not ready in time; it does not run then.
    pub async fn start(&self, binary: &Binary, whose: Whose<'_>) -> Result<(Logger, Inputs), IoError> {
        self.start_within(binary, whose, READY_TIMEOUT).await
    }

    async fn start_within(
        &self,
        binary: &Binary,
        whose: Whose<'_>,
        patience: Duration,
    ) -> Result<(Logger, Inputs), IoError> {
        let failed = |source| IoError::Logger {
            path: binary.path.clone(),
            source,
        };
        let (child, inputs, ready) = run(binary, whose).await.map_err(failed)?;
        let logger = self.watch(child.clone(), &binary.path);
        match timeout(patience, is_ready(&child, ready)).await {
            Ok(Ok(())) => Ok((logger, inputs)),
            Ok(Err(source)) => {
                child.kill();
                Err(failed(source))
            }
            Err(_) => {
                child.kill();
                Err(IoError::NotReady {
                    path: binary.path.clone(),
                    after: patience,
                })
            }
        }
    }

    fn watch(&self, child: Child, path: &Path) -> Logger {
        self.0.send_modify(|running| running.push(child.clone()));
        let (held, let_go) = oneshot::channel();
        let (loggers, path, watched) = (self.clone(), path.display().to_string(), child.clone());
        tokio::spawn(async move {
            tokio::select! {
                // It never sends: it waits for the sender to be dropped.
                _ = let_go => see_to_the_end_of(&watched, &path).await,
                how = watched.ended() => told(&path, &how),
            }
            let pid = watched.pid();
            loggers
                .0
                .send_modify(|running| running.retain(|child| child.pid() != pid));
        });
        Logger { child, _held: held }
    }

    /// Waits until none runs, at most `patience`; what runs then is told to end.
    pub async fn ended(&self, patience: Duration) {
        let mut running = self.0.subscribe();
        if timeout(patience, running.wait_for(Vec::is_empty)).await.is_err() {
            for child in self.0.borrow().iter() {
                tracing::warn!(pid = child.pid(), "a logging program did not end in time");
                child.terminate();
            }
        }
    }
}

/// It ended while its input was not known to have ended, which is known a moment later than the program knows it.
fn told(path: &str, how: &End) {
    if *how == End::Exited(0) {
        tracing::debug!("the logging program {path} has ended");
    } else {
        tracing::warn!("the logging program {path} {how}");
    }
}

async fn run(binary: &Binary, whose: Whose<'_>) -> io::Result<(Child, Inputs, Receiver)> {
    let (stdout, stdout_writer) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, stderr_writer) = pipe2(OFlag::O_CLOEXEC)?;
    let (ready, tell_ready) = pipe2(OFlag::O_CLOEXEC)?;
    // Only our ends: the program may take its time.
    for end in [&stdout_writer, &stderr_writer, &ready] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    let own = [whose.id, whose.namespace];
    let own = OWN_VARIABLES.iter().zip(own);
    let mut env: Vec<CString> = own
        .map(|(name, value)| CString::new(format!("{name}={value}")))
        .collect::<Result<_, _>>()?;
    env.extend(binary.env.iter().cloned());
    let program = Program {
        path: &binary.path,
        fds: vec![(2, null.into()), (3, stdout), (4, stderr), (5, tell_ready)],
    };
    let surroundings = Surroundings {
        args: binary.args.clone(),
        env,
        umask: 0o022,
        // After a crash of this process it still writes what it has.
        dies_with_us: false,
        own_pids: false,
        // It may still write when the sandbox is gone.
        cgroup: None,
    };
    let child = spawn_in(program, surroundings).await?;
    let inputs = Inputs {
        stdout: stdout_writer,
        stderr: stderr_writer,
    };
    Ok((child, inputs, Receiver::from_owned_fd(ready)?))
}

async fn is_ready(child: &Child, mut ready: Receiver) -> io::Result<()> {
    let mut byte = [0];
    if ready.read(&mut byte).await? > 0 {
        return Ok(());
    }
    // Closed: it is ready, or it has ended.
    match timeout(DEATH_TIMEOUT, child.ended()).await {
        Ok(how) if how != End::Exited(0) => Err(io::Error::other(format!("it {how} before it was ready"))),
        _ => Ok(()),
    }
}

/// Its input has ended.
async fn see_to_the_end_of(child: &Child, path: &str) {
    if timeout(END_TIMEOUT, child.ended()).await.is_ok() {
        return;
    }
    child.terminate();
    if timeout(END_TIMEOUT, child.ended()).await.is_err() {
        tracing::warn!("the logging program {path} does not end and is killed");
        child.kill();
        child.ended().await;
    }
}

#[cfg(test)]
#[path = "logger_test.rs"]
mod tests;
