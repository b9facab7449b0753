//! `husk run`: a container in the foreground, without any daemon.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use husk_agent_protocol::limits::is_valid_id;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

use super::{
    bundle::{Bundle, BundleError},
    cli::{FAILURE, RunArgs},
    log,
    options::Options,
    settings::{Settings, SettingsError},
    start::write_atomically,
    status::chain,
    terminal::{self, RawMode},
};
use crate::config::Source;
use crate::engine::{
    CreateContainer, EngineError, Event, Exit, LocateError, Programs, Sandbox, StartError, Stdio, last_words,
};

/// The namespace of the command's sandboxes.
pub const NAMESPACE: &str = "husk-run";

/// Signals that are passed on to the container. Not: those that stop a job, which the shell means for this command;
/// SIGCHLD, SIGPIPE and SIGURG, which are about this process; and those of a fault in it.
const FORWARDED: [i32; 14] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGCONT,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// Those that end a container that was not started yet.
const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// The exit code of a container that was killed: by SIGKILL, or with its machine.
const KILLED: u8 = 137;

/// How long the report of a machine's own end may follow the end of what ran in it.
const REPORT_TIMEOUT: Duration = Duration::from_millis(100);

/// What the user is told, and the exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// One sentence; lines after the first are what the guest said last.
    pub message: String,
}

impl Failure {
    fn own(message: String) -> Self {
        Self {
            code: FAILURE,
            message,
        }
    }
}

impl From<BundleError> for Failure {
    fn from(error: BundleError) -> Self {
        Self::own(chain(&error))
    }
}

impl From<LocateError> for Failure {
    fn from(error: LocateError) -> Self {
        Self::own(chain(&error))
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Self::own(chain(&error))
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self {
            code: error.exit_code(),
            message: chain(&error),
        }
    }
}

/// Does it. Returns the container's exit code.
///
/// # Errors
/// When the container could not be run; nothing of it is left.
pub async fn run(args: &RunArgs, config: Source) -> Result<u8, Failure> {
    if !is_valid_id(&args.id) {
        return Err(Failure::own(format!(
            "container id {:?} is not valid: it must be 1 to 128 of [A-Za-z0-9_.+-], the first a letter, a digit or _",
            args.id
        )));
    }
    let directory = std::path::absolute(&args.bundle)
        .map_err(|error| Failure::own(format!("bundle {}: {error}", args.bundle.display())))?;
    let bundle = Bundle::read(&directory)?;
    let terminal = bundle.process(&directory)?.terminal;
    let options = Options {
        config,
        ..Options::default()
    };
    let settings = Settings::read(&options, &bundle.outline)?;
    log::apply(&settings.config.log);
    let programs = Programs::locate(&settings.config)?;
    // From here on a signal is the container's, or ends it in order.
    let mut signals =
        Signals::catch().map_err(|error| Failure::own(format!("cannot catch signals: {error}")))?;

    let config = settings.sandbox(NAMESPACE, &args.id, &args.id, &bundle.outline, programs);
    let (events, mut reports) = mpsc::unbounded_channel();
    let sandbox = Sandbox::start(config, events)
        .await
        .map_err(|error| not_started(&args.id, &error))?;
    let container = Foreground {
        sandbox: &sandbox,
        id: &args.id,
        terminal,
    };
    let ended = container
        .run(directory, bundle.spec, args.pid_file.as_deref(), &mut signals)
        .await;
    let crash = match ended {
        Ok(KILLED) => crash(&mut reports).await,
        _ => None,
    };
    sandbox.shutdown().await;
    match crash {
        Some(message) => Err(Failure {
            code: KILLED,
            message,
        }),
        None => ended,
    }
}

/// Why the machine ended by itself, if it did. It says so right after the exits of what ran in it.
async fn crash(reports: &mut mpsc::UnboundedReceiver<Event>) -> Option<String> {
    let report = async {
        loop {
            if let Event::SandboxEnded { reason, console_tail } = reports.recv().await? {
                return Some(format!(
                    "the sandbox has ended: {reason}{}",
                    last_words(&console_tail)
                ));
            }
        }
    };
    timeout(REPORT_TIMEOUT, report).await.ok().flatten()
}

fn not_started(id: &str, error: &StartError) -> Failure {
    Failure::own(match error {
        StartError::AlreadyExists(_) => format!("container {id} already exists"),
        StartError::Guest { console_tail, .. } => {
            format!("{}{}", chain(error), last_words(console_tail))
        }
        error => chain(error),
    })
}

struct Foreground<'a> {
    sandbox: &'a Arc<Sandbox>,
    id: &'a str,
    terminal: bool,
}

impl Foreground<'_> {
    async fn run(
        &self,
        bundle: PathBuf,
        spec: Vec<u8>,
        pid_file: Option<&Path>,
        signals: &mut Signals,
    ) -> Result<u8, Failure> {
        let request = CreateContainer {
            id: self.id.to_owned(),
            bundle,
            spec,
            rootfs: Vec::new(),
            stdio: self
                .stdio()
                .map_err(|error| Failure::own(format!("standard streams: {error}")))?,
        };
        self.sandbox.create(request).await?;
        if let Some(path) = pid_file {
            let pid = self.sandbox.host_pid(self.id, None)?;
            write_atomically(path, pid.to_string().as_bytes())
                .map_err(|error| Failure::own(format!("cannot write {}: {error}", path.display())))?;
        }
        while let Ok(number) = signals.queue.try_recv() {
            if ENDING.contains(&number) {
                return Ok(exit_code(128_u32.saturating_add(number.unsigned_abs())));
            }
        }
        let screen = if self.terminal { terminal::find() } else { None };
        // Restored when this returns, however it does.
        let _raw = screen
            .as_ref()
            .and_then(|screen| RawMode::enter(screen.as_fd()).ok());
        self.sandbox.start_container(self.id).await?;
        if let Some((columns, rows)) = screen.as_ref().and_then(|screen| terminal::size(screen.as_fd())) {
            self.resize(columns, rows).await;
        }
        let exit = self.attend(screen.as_ref().map(AsFd::as_fd), signals).await?;
        self.drain(signals).await;
        if let Err(error) = self.sandbox.delete_container(self.id).await {
            tracing::debug!("{}", chain(&error));
        }
        Ok(exit_code(exit.status))
    }

    /// Our own standard streams, as the container's.
    fn stdio(&self) -> io::Result<Stdio> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let stderr = io::stderr().as_fd().try_clone_to_owned()?;
        Ok(Stdio {
            terminal: self.terminal,
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: (!self.terminal).then_some(stderr),
        })
    }

    /// Until the process ends: signals and sizes are passed on.
    async fn attend(
        &self,
        screen: Option<std::os::fd::BorrowedFd<'_>>,
        signals: &mut Signals,
    ) -> Result<Exit, EngineError> {
        let wait = self.sandbox.wait(self.id, None);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                exit = &mut wait => return exit,
                Some(number) = signals.queue.recv() => self.signal(number).await,
                Some(()) = signals.resized.recv() => {
                    if let Some((columns, rows)) = screen.and_then(terminal::size) {
                        self.resize(columns, rows).await;
                    }
                }
            }
        }
    }

    /// Until the last of the output is out, or the user has enough.
    async fn drain(&self, signals: &mut Signals) {
        let drained = self.sandbox.drained(self.id, None);
        tokio::pin!(drained);
        loop {
            tokio::select! {
                () = &mut drained => return,
                Some(number) = signals.queue.recv() => {
                    if ENDING.contains(&number) {
                        return;
                    }
                }
            }
        }
    }

    async fn signal(&self, number: i32) {
        if let Err(error) = self
            .sandbox
            .signal(self.id, None, number.unsigned_abs(), false)
            .await
        {
            // It may just have ended.
            tracing::debug!(number, "a signal was not passed on: {}", chain(&error));
        }
    }

    async fn resize(&self, columns: u16, rows: u16) {
        if let Err(error) = self.sandbox.resize(self.id, None, columns, rows).await {
            tracing::debug!("the terminal's size was not passed on: {}", chain(&error));
        }
    }
}

fn exit_code(status: u32) -> u8 {
    u8::try_from(status & 0xff).unwrap_or(u8::MAX)
}

/// The signals that this process got.
struct Signals {
    /// Those to pass on, by number.
    queue: mpsc::UnboundedReceiver<i32>,
    /// The terminal's size changed.
    resized: tokio::signal::unix::Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        let (caught, queue) = mpsc::unbounded_channel();
        for number in FORWARDED {
            let mut signal = signal(SignalKind::from_raw(number))?;
            let caught = caught.clone();
            tokio::spawn(
                async move { while signal.recv().await.is_some() && caught.send(number).is_ok() {} },
            );
        }
        Ok(Self {
            queue,
            resized: signal(SignalKind::window_change())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(bundle: &Path, id: &str) -> RunArgs {
        RunArgs {
            bundle: bundle.into(),
            pid_file: None,
            id: id.into(),
        }
    }

    #[tokio::test]
    async fn what_a_user_got_wrong_is_one_sentence_and_125() {
        let dir = tempfile::tempdir().unwrap();
        let refused = async |id: &str| {
            let failure = run(&arguments(dir.path(), id), Source::Default)
                .await
                .unwrap_err();
            assert_eq!(failure.code, 125);
            assert_eq!(failure.message.lines().count(), 1);
            failure.message
        };
        for id in ["a/b", "..", ""] {
            assert!(refused(id).await.contains("id"));
        }
        assert!(refused("c").await.ends_with("config.json: no such file"));
        std::fs::write(dir.path().join("config.json"), "{ this is not json").unwrap();
        assert!(
            refused("c")
                .await
                .contains("config.json is not a valid OCI configuration")
        );
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(refused("c").await.contains("\"process\" is missing"));
    }

    #[test]
    fn errors_of_the_command_have_their_own_codes() {
        let text = r#"exec: "nope": executable file not found in $PATH"#;
        let failure = Failure::from(EngineError::CommandNotFound(text.into()));
        assert_eq!((failure.code, failure.message.as_str()), (127, text));
        assert_eq!(
            Failure::from(EngineError::CommandNotExecutable("x".into())).code,
            126
        );
        let failure = not_started("twin", &StartError::AlreadyExists("husk-run/twin".into()));
        assert_eq!(
            (failure.code, failure.message.as_str()),
            (125, "container twin already exists")
        );
    }

    #[tokio::test]
    async fn signals_are_caught_in_the_order_they_come() {
        let mut signals = Signals::catch().unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGUSR1).unwrap();
        assert_eq!(signals.queue.recv().await, Some(libc::SIGUSR1));
    }
}
