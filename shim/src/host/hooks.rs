//! Hooks that run on the host: all of config.json's but `startContainer`, which runs in the guest.

use std::{
    collections::BTreeMap,
    ffi::{CString, c_char},
    fs::File,
    future::Future,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::Receiver,
    process::Command,
    time::timeout,
};

/// How much of a hook's last output is shown, in bytes.
const TAIL: usize = 2048;

/// How long the rest of an ended hook's output is awaited: something that it started may hold it open.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// A hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments with its own name.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its whole environment, `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// How long it may take, in seconds.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// The hooks of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    create_container: Vec<Hook>,
    /// The guest's; here for how long they may take.
    start_container: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

/// When hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// With the container's namespaces there, before its root is.
    Prestart,
    /// Right after those.
    CreateRuntime,
    /// With its root file system and volumes there as well; in the namespaces that stand for the container's.
    CreateContainer,
    /// When its process was started.
    Poststart,
    /// When nothing of it is left.
    Poststop,
}

impl Phase {
    const ALL: [Self; 5] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::CreateContainer,
        Self::Poststart,
        Self::Poststop,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The container's status that its hooks are told.
    fn status(self) -> &'static str {
        match self {
            Self::Prestart | Self::CreateRuntime | Self::CreateContainer => "creating",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }
}

impl Hooks {
    /// Those of a phase.
    pub fn of(&self, phase: Phase) -> &[Hook] {
        match phase {
            Phase::Prestart => &self.prestart,
            Phase::CreateRuntime => &self.create_runtime,
            Phase::CreateContainer => &self.create_container,
            Phase::Poststart => &self.poststart,
            Phase::Poststop => &self.poststop,
        }
    }

    /// How long the startContainer hooks may take in the guest, by their timeouts.
    pub fn time_in_guest(&self) -> Duration {
        let seconds = self.start_container.iter().filter_map(|hook| hook.timeout);
        let seconds = seconds.filter_map(|seconds| u64::try_from(seconds).ok());
        // What is above a day is as good as for ever, and does not overflow a clock.
        Duration::from_secs(seconds.fold(0, u64::saturating_add).min(86_400))
    }

    /// Whether they can be run at all.
    ///
    /// # Errors
    /// A message that names the field.
    pub fn check(&self) -> Result<(), String> {
        for phase in Phase::ALL {
            for (index, hook) in self.of(phase).iter().enumerate() {
                let field = format!("hooks.{}[{index}]", phase.name());
                if !hook.path.is_absolute() {
                    let path = hook.path.display();
                    return Err(format!("{field}.path: {path:?} is not an absolute path"));
                }
                if hook.timeout.is_some_and(|seconds| seconds <= 0) {
                    return Err(format!("{field}.timeout: it must be greater than zero"));
                }
                Image::new(hook).map_err(|error| format!("{field}: {error}"))?;
            }
        }
        Ok(())
    }
}

/// What hooks are told of their container: the state of the runtime specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The specification's version, as config.json has it.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// Filled in by [`run`].
    #[serde(default)]
    status: String,
    /// Its pid: the stand-in's. Not told of one that has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl State {
    /// Of a container whose stand-in has `pid`.
    pub fn new(
        oci_version: String,
        id: String,
        pid: u32,
        bundle: PathBuf,
        annotations: BTreeMap<String, String>,
    ) -> Self {
        Self {
            oci_version,
            id,
            status: String::new(),
            pid: Some(pid),
            bundle,
            annotations,
        }
    }

    fn encode(&self, phase: Phase) -> io::Result<Vec<u8>> {
        let state = Self {
            status: phase.status().to_owned(),
            pid: self.pid.filter(|_| phase != Phase::Poststop),
            ..self.clone()
        };
        Ok(serde_json::to_vec(&state)?)
    }
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be executed.
    #[error("{hook} cannot be executed")]
    Execute {
        /// Which, and its path.
        hook: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended in failure.
    #[error("{hook} failed: {how}{}", said(output))]
    Failed {
        /// Which, and its path.
        hook: String,
        /// How it ended.
        how: ExitStatus,
        /// The last of what it said.
        output: String,
    },
    /// It took too long and was killed.
    #[error("{hook} was killed: it took longer than {} s{}", after.as_secs(), said(output))]
    TimedOut {
        /// Which, and its path.
        hook: String,
        /// What it was given.
        after: Duration,
        /// The last of what it said.
        output: String,
    },
    /// It was killed since it was no longer wanted.
    #[error("{hook} was killed: the sandbox has ended")]
    Cancelled {
        /// Which, and its path.
        hook: String,
    },
}

fn said(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        output => format!("; its output ends with: {output}"),
    }
}

/// Runs the hooks of a phase, one after the other, in the namespaces `join` and otherwise this process's, until `cancel`
/// is ready. A hook without a timeout of its own has `limit`.
///
/// # Errors
/// The first hook that failed; those after it are not run. Only at [`Phase::Poststop`] the rest are, and failures are
/// told in the log alone.
pub async fn run(
    hooks: &[Hook],
    phase: Phase,
    state: &State,
    join: &[OwnedFd],
    limit: Option<Duration>,
    cancel: impl Future<Output = ()>,
) -> Result<(), HookError> {
    tokio::pin!(cancel);
    for (index, hook) in hooks.iter().enumerate() {
        let name = format!("hooks.{}[{index}] ({})", phase.name(), hook.path.display());
        tracing::debug!(container = state.id, "running {name}");
        let done = tokio::select! {
            biased;
            done = run_one(hook, &name, phase, state, join, limit) => done,
            () = &mut cancel => Err(HookError::Cancelled { hook: name }),
        };
        match done {
            Err(error) if phase == Phase::Poststop => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                tracing::warn!(container = state.id, "{error}{}", cause.unwrap_or_default());
            }
            done => done?,
        }
    }
    Ok(())
}

async fn run_one(
    hook: &Hook,
    name: &str,
    phase: Phase,
    state: &State,
    join: &[OwnedFd],
    limit: Option<Duration>,
) -> Result<(), HookError> {
    let execute = |source| HookError::Execute {
        hook: name.to_owned(),
        source,
    };
    let text = state.encode(phase).map_err(execute)?;
    let (output, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| execute(errno.into()))?;
    let mut process = start(hook, &state.bundle, join, theirs).map_err(execute)?;
    let group = Group(process.id());
    let tail = Tail::follow(output).map_err(execute)?;
    let input = process.stdin.take();
    let told = tokio::spawn(async move {
        if let Some(mut input) = input {
            // A hook need not listen.
            let _ = input.write_all(&text).await;
        }
    });
    let given = hook
        .timeout
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map(Duration::from_secs)
        .or(limit);
    let ended = match given {
        Some(given) => timeout(given, process.wait()).await.map_err(|_| given),
        None => Ok(process.wait().await),
    };
    told.abort();
    let ended = match ended {
        Ok(ended) => {
            // What it left running in its group is its own affair.
            std::mem::forget(group);
            ended.map_err(execute)
        }
        Err(after) => {
            drop(group);
            let _ = process.wait().await;
            let (hook, output) = (name.to_owned(), tail.read().await);
            return Err(HookError::TimedOut { hook, after, output });
        }
    };
    let how = ended?;
    if how.success() {
        return Ok(());
    }
    let (hook, output) = (name.to_owned(), tail.read().await);
    Err(HookError::Failed { hook, how, output })
}

/// Starts a hook in the bundle's directory, in a process group of its own and in the cgroup where this process came
/// from, to be killed when this process dies.
fn start(hook: &Hook, bundle: &Path, join: &[OwnedFd], output: OwnedFd) -> io::Result<tokio::process::Child> {
    let join: Vec<RawFd> = join.iter().map(AsRawFd::as_raw_fd).collect();
    let image = Image::new(hook)?;
    let mut command = Command::new(&hook.path);
    command
        .current_dir(bundle)
        .process_group(0)
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .stdout(output.try_clone()?)
        .stderr(output);
    let home = super::cgroup::origin();
    // SAFETY: prctl, setns, write and execve are async-signal-safe; all memory was made before the fork, and the
    // descriptors are open until the hook has been started.
    unsafe {
        command.pre_exec(move || {
            // It may start what outlives the sandbox: that must not be in the sandbox's cgroup.
            if home.is_some_and(|home| !home.enter(false)) {
                return Err(io::Error::last_os_error());
            }
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            for fd in &join {
                if libc::setns(*fd, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Err(image.execute())
        });
    }
    command.spawn()
}

/// A process group, killed when it is dropped.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(|pid| i32::try_from(pid).ok()) {
            // SAFETY: the group's leader was not waited for yet, so the number is still its own.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
        }
    }
}

/// What a hook is executed with: exactly what config.json says.
struct Image {
    path: CString,
    args: Strings,
    env: Strings,
}

/// Strings, and pointers to them that end with null.
struct Strings {
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers are to memory that the strings own and nobody changes.
unsafe impl Send for Strings {}
// SAFETY: as above.
unsafe impl Sync for Strings {}

impl Strings {
    fn new(strings: &[String]) -> io::Result<Self> {
        let strings: Vec<CString> = strings
            .iter()
            .map(|string| CString::new(string.as_str()))
            .collect::<Result<_, _>>()?;
        let end = [std::ptr::null()];
        let pointers = strings.iter().map(|string| string.as_ptr()).chain(end).collect();
        Ok(Self {
            _strings: strings,
            pointers,
        })
    }
}

impl Image {
    fn new(hook: &Hook) -> io::Result<Self> {
        let own_name = [hook.path.to_string_lossy().into_owned()];
        let args = if hook.args.is_empty() {
            &own_name
        } else {
            hook.args.as_slice()
        };
        Ok(Self {
            path: CString::new(hook.path.as_os_str().as_bytes())?,
            args: Strings::new(args)?,
            env: Strings::new(&hook.env)?,
        })
    }

    /// Returns when it cannot be executed.
    fn execute(&self) -> io::Error {
        // SAFETY: the path and both arrays end with null, and live as long as this.
        unsafe {
            libc::execve(
                self.path.as_ptr(),
                self.args.pointers.as_ptr(),
                self.env.pointers.as_ptr(),
            )
        };
        io::Error::last_os_error()
    }
}

/// Reads a hook's output to its end and keeps the last of it.
struct Tail {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Tail {
    fn follow(output: OwnedFd) -> io::Result<Self> {
        nix::fcntl::fcntl(&output, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut output = Receiver::from_file(File::from(output))?;
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&kept);
        let reader = tokio::spawn(async move {
            let mut buffer = vec![0; TAIL];
            while let Ok(length @ 1..) = output.read(&mut buffer).await {
                let mut kept = keep.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
                let surplus = kept.len().saturating_sub(TAIL);
                kept.drain(..surplus);
            }
        });
        Ok(Self { kept, reader })
    }

    async fn read(mut self) -> String {
        let _ = timeout(LAST_WORDS, &mut self.reader).await;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        crate::guest::console::printable(&String::from_utf8_lossy(&kept))
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_help::{self, eventually};
    use std::{fs, time::Instant};

    #[test]
    fn hooks_in_the_guest_take_as_long_as_they_may() {
        let time = |json: &str| serde_json::from_str::<Hooks>(json).unwrap().time_in_guest();
        assert_eq!(time("{}"), Duration::ZERO);
        assert_eq!(
            time(
                r#"{"startContainer":[{"path":"/x","timeout":40},{"path":"/x"},{"path":"/x","timeout":2}]}"#
            ),
            Duration::from_secs(42)
        );
        let endless = format!(r#"{{"startContainer":[{{"path":"/x","timeout":{}}}]}}"#, i64::MAX);
        assert_eq!(time(&endless), Duration::from_secs(86_400));
    }

    struct Stage(tempfile::TempDir);

    impl Stage {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn hook(&self, script: &str) -> Hook {
            let path = self
                .0
                .path()
                .join(format!("hook-{}", fs::read_dir(self.0.path()).unwrap().count()));
            test_help::script(&path, script);
            Hook {
                path,
                args: vec!["name".into(), "a b".into()],
                env: vec!["A=1".into(), "B=x y".into(), "A=2".into()],
                timeout: Some(20),
            }
        }

        fn state(&self) -> State {
            let annotations = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
            State::new(
                "1.2.0".into(),
                "c".into(),
                4711,
                self.0.path().into(),
                annotations,
            )
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
        }

        /// Waits until a hook has written to a file.
        async fn written(&self, name: &str) {
            let written = async {
                while self.read(name).is_empty() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            timeout(Duration::from_secs(20), written).await.unwrap();
        }

        async fn run(&self, hooks: &[Hook], phase: Phase) -> Result<(), String> {
            let done = self.run_until(hooks, phase, std::future::pending()).await;
            done.map_err(|error| error.to_string())
        }

        async fn run_until(
            &self,
            hooks: &[Hook],
            phase: Phase,
            cancel: impl Future<Output = ()>,
        ) -> Result<(), HookError> {
            let state = self.state();
            let done = run(hooks, phase, &state, &[], None, cancel);
            timeout(Duration::from_secs(60), done).await.unwrap()
        }
    }

    #[tokio::test]
    async fn a_hook_gets_what_config_json_says_and_the_state() {
        let stage = Stage::new();
        let hook = stage.hook(
            "cat > state; cat /proc/$$/environ | tr '\\0' '\\n' > env; echo \"$1\" > arg; pwd -P > cwd",
        );
        stage.run(&[hook], Phase::Prestart).await.unwrap();
        let state: serde_json::Value = serde_json::from_str(&stage.read("state")).unwrap();
        assert_eq!(
            state,
            serde_json::json!({
                "ociVersion": "1.2.0", "id": "c", "status": "creating", "pid": 4711,
                "bundle": stage.0.path(), "annotations": { "k": "v" },
            })
        );
        assert_eq!(stage.read("env"), "A=1\nB=x y\nA=2\n");
        assert_eq!(stage.read("arg"), "a b\n");
        assert_eq!(
            Path::new(stage.read("cwd").trim()),
            stage.0.path().canonicalize().unwrap()
        );
        let hook = stage.hook("cat > state");
        stage.run(&[hook], Phase::Poststop).await.unwrap();
        let state: serde_json::Value = serde_json::from_str(&stage.read("state")).unwrap();
        assert_eq!((&state["status"], state.get("pid")), (&"stopped".into(), None));
    }

    #[tokio::test]
    async fn the_first_failure_is_told_and_is_the_last_to_run() {
        let stage = Stage::new();
        let hooks = [
            stage.hook("echo 1 >> log"),
            stage.hook("echo out of luck >&2; exit 3"),
            stage.hook("echo 3 >> log"),
        ];
        let error = stage.run(&hooks, Phase::CreateRuntime).await.unwrap_err();
        assert!(error.contains("hooks.createRuntime[1] (/"), "{error}");
        assert!(
            error.contains("exit status: 3") && error.ends_with("out of luck\n")
                || error.ends_with("out of luck"),
            "{error}"
        );
        assert_eq!(stage.read("log"), "1\n");
        stage.run(&hooks, Phase::Poststop).await.unwrap();
        assert_eq!(stage.read("log"), "1\n1\n3\n", "after the end all are run");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_with_its_group() {
        let stage = Stage::new();
        let mut hook = stage.hook("echo $$ > pid; echo waiting; sleep 1000 & echo $! > child; wait");
        // Its time is over as soon as it has come as far as it does, however long that takes.
        let time = async {
            stage.written("child").await;
            tokio::time::pause();
            tokio::time::advance(Duration::from_secs(21)).await;
            tokio::time::resume();
        };
        let hooks = std::slice::from_ref(&hook);
        let (done, ()) = tokio::join!(stage.run(hooks, Phase::Poststart), time);
        let error = done.unwrap_err();
        assert!(
            error.contains("hooks.poststart[0]") && error.contains("longer than 20 s"),
            "{error}"
        );
        assert!(error.contains("waiting"), "{error}");
        let gone = |file: &str| {
            let pid: u32 = stage.read(file).trim().parse().unwrap();
            // A child that nobody waits for may stay as a zombie.
            eventually(|| match fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) if !stat.contains(") Z") => Err(format!("{file} lives: {stat}")),
                _ => Ok(()),
            });
            fs::remove_file(stage.0.path().join(file)).unwrap();
        };
        gone("pid");
        gone("child");
        hook.timeout = None;
        let cancel = stage.written("child");
        let error = stage
            .run_until(&[hook], Phase::Prestart, cancel)
            .await
            .unwrap_err();
        assert!(matches!(error, HookError::Cancelled { .. }), "{error}");
        gone("pid");
        gone("child");
    }

    #[tokio::test]
    async fn what_a_hook_leaves_running_delays_nothing() {
        let stage = Stage::new();
        let begun = Instant::now();
        let hook = stage.hook("sleep 20 & exec true");
        stage.run(&[hook], Phase::Prestart).await.unwrap();
        // It does not read what it is told, either.
        let hook = stage.hook("sleep 20 & exit 1");
        stage.run(&[hook], Phase::Prestart).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn what_cannot_be_run_is_named() {
        let stage = Stage::new();
        let mut hook = stage.hook("true");
        hook.path = "/nonexistent/hook".into();
        let error = stage.run(&[hook], Phase::Prestart).await.unwrap_err();
        assert_eq!(error, "hooks.prestart[0] (/nonexistent/hook) cannot be executed");
        for (json, field) in [
            (
                r#"{"createRuntime":[{"path":"/x"},{"path":"x"}]}"#,
                "hooks.createRuntime[1].path",
            ),
            (
                r#"{"poststop":[{"path":"/x","timeout":0}]}"#,
                "hooks.poststop[0].timeout",
            ),
            (
                r#"{"prestart":[{"path":"/x","env":["a\u0000b"]}]}"#,
                "hooks.prestart[0]",
            ),
        ] {
            let hooks: Hooks = serde_json::from_str(json).unwrap();
            let error = hooks.check().unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
