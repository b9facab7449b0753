//! `hooks.startContainer`: programs of the container that run in it between its start and its command. (The other kinds
//! run on the host.)
//!
//! As with runc, a hook runs as the container's user, in its working directory and under its seccomp filter, with the
//! container's environment if it has none of its own, and gets the state on its stdin. The first that fails ends the
//! container.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, execve, fork},
};
use oci_spec::runtime::{Hook, Spec};

use super::seccomp::Filter;
use crate::{
    fault::{Fault, describe},
    sys,
};

/// Most bytes of a hook's stdout and of its stderr that are told if it fails.
const MAX_OUTPUT: u64 = 1024;

#[derive(Debug, PartialEq, Eq)]
struct HookPlan {
    path: CString,
    /// Beginning with its own name; never empty.
    args: Vec<CString>,
    /// `None`: the container's.
    env: Option<Vec<CString>>,
    timeout: Option<Duration>,
}

/// The hooks of a container to be.
#[derive(Debug, Default)]
pub struct StartHooks {
    hooks: Vec<HookPlan>,
    version: String,
    /// What the state calls the bundle.
    pub bundle: String,
    annotations: HashMap<String, String>,
}

impl StartHooks {
    /// Reads `hooks.startContainer`.
    ///
    /// # Errors
    ///
    /// A field is wrong.
    pub fn new(spec: &Spec) -> Result<Self, Fault> {
        let hooks = spec
            .hooks()
            .as_ref()
            .and_then(|hooks| hooks.start_container().as_ref());
        let hooks = hooks.into_iter().flatten().enumerate();
        Ok(Self {
            hooks: hooks
                .map(|(index, hook)| HookPlan::new(hook, &name(index)))
                .collect::<Result<_, _>>()?,
            version: spec.version().clone(),
            bundle: String::new(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        })
    }

    /// Makes ready what a filter for system calls might forbid later. `None`: there are no hooks.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn prepare(&self, id: &str) -> Result<Option<PreparedHooks<'_>>, Fault> {
        if self.hooks.is_empty() {
            return Ok(None);
        }
        let failed = |error: io::Error| Fault::system("prepare hooks.startContainer", error);
        let file = |name| {
            memfd_create(name, MFdFlags::MFD_CLOEXEC)
                .map(File::from)
                .map_err(io::Error::from)
        };
        let state = serde_json::json!({
            "ociVersion": self.version,
            "id": id,
            "status": "created",
            "pid": std::process::id(),
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        let mut stdin = file(c"state").map_err(failed)?;
        stdin.write_all(state.to_string().as_bytes()).map_err(failed)?;
        Ok(Some(PreparedHooks {
            hooks: &self.hooks,
            stdin,
            stdout: file(c"stdout").map_err(failed)?,
            stderr: file(c"stderr").map_err(failed)?,
        }))
    }
}

/// Hooks with their stdio, which is of memory: so nobody has to read what a hook or its children write.
#[derive(Debug)]
pub struct PreparedHooks<'a> {
    hooks: &'a [HookPlan],
    stdin: File,
    stdout: File,
    stderr: File,
}

impl PreparedHooks<'_> {
    /// Runs one after the other, each under `filter`, with `env` if it has no environment of its own.
    ///
    /// # Errors
    ///
    /// One fails, or takes longer than it may.
    pub fn run(mut self, env: &[CString], filter: Option<&Filter>) -> Result<(), Fault> {
        for (index, hook) in self.hooks.iter().enumerate() {
            self.run_one(hook, env, filter).map_err(|problem| Fault {
                kind: crate::fault::Kind::System,
                message: format!("{}: {problem}", name(index)),
            })?;
        }
        Ok(())
    }

    fn run_one(&mut self, hook: &HookPlan, env: &[CString], filter: Option<&Filter>) -> Result<(), String> {
        let failed = |error: io::Error| describe(&error);
        self.stdin.rewind().map_err(failed)?;
        for output in [&mut self.stdout, &mut self.stderr] {
            output.set_len(0).map_err(failed)?;
            output.rewind().map_err(failed)?;
        }
        // SAFETY: this process is a forked child of the agent, with one thread and no locks held.
        let pid = match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => child,
            Ok(ForkResult::Child) => {
                let problem = self.become_hook(hook, env, filter);
                let _ = self.stderr.write_all(problem.as_bytes());
                // SAFETY: ends this process without running the exit handlers that belong to the agent.
                unsafe { libc::_exit(127) }
            }
            Err(error) => return Err(format!("fork: {}", describe(&error.into()))),
        };
        let in_time = match hook.timeout {
            Some(timeout) => wait_for_end(pid, timeout).map_err(failed)?,
            None => true,
        };
        if !in_time {
            // Not waited for yet, so the pid is its own still.
            let _ = sys::kill(pid.as_raw(), libc::SIGKILL);
        }
        let status = loop {
            match waitpid(pid, None) {
                Err(Errno::EINTR) => {}
                result => break result.map_err(|error| describe(&error.into()))?,
            }
        };
        if let (false, Some(timeout)) = (in_time, hook.timeout) {
            return Err(format!(
                "hook ran past specified timeout of {:.1}s",
                timeout.as_secs_f64()
            ));
        }
        let end = match status {
            WaitStatus::Exited(_, 0) => return Ok(()),
            WaitStatus::Exited(_, status) => format!("exit status {status}"),
            WaitStatus::Signaled(_, signal, _) => format!("signal: {}", describe_signal(signal)),
            other => format!("{other:?}"),
        };
        Err(format!(
            "{end}, stdout: {}, stderr: {}",
            told(&mut self.stdout),
            told(&mut self.stderr)
        ))
    }

    /// In the forked child. Answers why it could not.
    fn become_hook(&self, hook: &HookPlan, env: &[CString], filter: Option<&Filter>) -> String {
        let put = |file: BorrowedFd<'_>, number: i32| {
            // SAFETY: integers only. Nobody owns 0, 1 and 2 in this process as Rust values.
            Errno::result(unsafe { libc::dup2(file.as_raw_fd(), number) }).map(drop)
        };
        let stdio = [(&self.stdin, 0), (&self.stdout, 1), (&self.stderr, 2)];
        for (file, number) in stdio {
            if let Err(error) = put(file.as_fd(), number) {
                return format!("set up stdio: {}", describe(&error.into()));
            }
        }
        if let Some(Err(fault)) = filter.map(Filter::load) {
            return fault.message;
        }
        match execve(&hook.path, &hook.args, hook.env.as_deref().unwrap_or(env)) {
            Ok(never) => match never {},
            Err(error) => format!(
                "exec {}: {}",
                hook.path.to_string_lossy(),
                describe(&error.into())
            ),
        }
    }
}

impl HookPlan {
    fn new(hook: &Hook, field: &str) -> Result<Self, Fault> {
        let text = |name: &str, text: &str| {
            CString::new(text)
                .map_err(|_| Fault::spec(format_args!("{field}.{name}"), "contains a NUL character"))
        };
        let texts = |name: &str, texts: &Option<Vec<String>>| {
            let texts = texts.as_deref().filter(|texts| !texts.is_empty());
            let texts = texts.map(|texts| texts.iter().map(|entry| text(name, entry)).collect());
            texts.transpose()
        };
        let path = hook.path().to_str().unwrap_or_default();
        if !path.starts_with('/') {
            return Err(Fault::spec(
                format_args!("{field}.path"),
                "must be an absolute path",
            ));
        }
        let path = text("path", path)?;
        let timeout = match hook.timeout() {
            None => None,
            Some(seconds) => match u64::try_from(seconds) {
                Ok(seconds @ 1..) => Some(Duration::from_secs(seconds)),
                _ => return Err(Fault::spec(format_args!("{field}.timeout"), "must be above zero")),
            },
        };
        Ok(Self {
            args: texts("args", hook.args())?.unwrap_or_else(|| vec![path.clone()]),
            env: texts("env", hook.env())?,
            path,
            timeout,
        })
    }
}

fn name(index: usize) -> String {
    format!("hooks.startContainer[{index}]")
}

/// Waits until the child `pid` has ended. `false`: it has not in time.
fn wait_for_end(pid: Pid, timeout: Duration) -> io::Result<bool> {
    let pidfd: OwnedFd = sys::pidfd_open(pid.as_raw())?;
    let begin = Instant::now();
    loop {
        let left = timeout.saturating_sub(begin.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        // Up, so as not to spin in the last millisecond.
        let left = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// In the words of the C library and Go.
fn describe_signal(signal: Signal) -> String {
    match signal {
        Signal::SIGKILL => "killed".to_owned(),
        Signal::SIGTERM => "terminated".to_owned(),
        other => other.as_str().to_owned(),
    }
}

/// The beginning of what was written.
fn told(output: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = output
        .rewind()
        .and_then(|()| output.take(MAX_OUTPUT).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
        Err(error) => describe(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &str) -> Result<StartHooks, Fault> {
        let json = format!(r#"{{"ociVersion":"1.1.0","hooks":{{"startContainer":[{json}]}}}}"#);
        StartHooks::new(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn a_hook_without_arguments_is_called_by_its_path() {
        let plan = hooks(r#"{"path":"/bin/x","timeout":3}"#).unwrap();
        assert_eq!(
            plan.hooks,
            [HookPlan {
                path: c"/bin/x".into(),
                args: vec![c"/bin/x".into()],
                env: None,
                timeout: Some(Duration::from_secs(3)),
            }]
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (field, json) in [
            ("[0].path", r#"{"path":"x"}"#),
            ("[1].timeout", r#"{"path":"/x"},{"path":"/x","timeout":0}"#),
            ("[0].timeout", r#"{"path":"/x","timeout":-1}"#),
            ("[0].args", r#"{"path":"/x","args":["\u0000"]}"#),
        ] {
            let fault = hooks(json).unwrap_err();
            assert!(
                fault
                    .message
                    .starts_with(&format!("hooks.startContainer{field}: ")),
                "{}",
                fault.message
            );
        }
    }
}
