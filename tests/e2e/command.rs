//! Running a command to its end within a deadline, with all that it says kept.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::{host, violations};

/// How long a command may take if a test does not say otherwise: generous, since emulated hosts are slow and
/// only a hang must be caught.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// What a finished command left.
pub struct Finished {
    /// Exit code, or 128 plus the number of the signal that ended it.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Finished {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Asserts the exit code, showing everything when it is another.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        if self.code != code {
            host::print_logs();
            panic!(
                "exit code {} instead of {code}\nstdout: {}\nstderr: {}",
                self.code,
                tail(&self.out()),
                tail(&self.err())
            );
        }
        self
    }
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(4000);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// What a command gets on its standard input.
pub enum Input {
    Nothing,
    Bytes(Vec<u8>),
    File(File),
}

/// Runs `argv` with nothing on its standard input.
#[track_caller]
pub fn run(argv: &[&str]) -> Finished {
    run_with(argv, Input::Nothing, DEADLINE)
}

/// Runs `argv` and asserts that it succeeds; gives its standard output.
#[track_caller]
pub fn ok(argv: &[&str]) -> String {
    run(argv).expect_code(0).out()
}

#[track_caller]
pub fn run_with(argv: &[&str], input: Input, deadline: Duration) -> Finished {
    Running::start(argv, input).finish(deadline)
}

/// A command under way.
pub struct Running {
    child: Option<Child>,
    argv: String,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Running {
    #[track_caller]
    pub fn start(argv: &[&str], input: Input) -> Self {
        let mut command = Command::new(argv[0]);
        command
            .args(&argv[1..])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let bytes = match input {
            Input::Nothing => {
                command.stdin(Stdio::null());
                None
            }
            Input::Bytes(bytes) => {
                command.stdin(Stdio::piped());
                Some(bytes)
            }
            Input::File(file) => {
                command.stdin(file);
                None
            }
        };
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", argv[0]));
        if let (Some(bytes), Some(mut stdin)) = (bytes, child.stdin.take()) {
            // A command that ends early does not read all of it: that is the test's business, not an error.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        Self {
            child: Some(child),
            argv: argv.join(" "),
            stdout,
            stderr,
            seen: Vec::new(),
        }
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Waits until the standard output has `text` in it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        self.wait_for_within(DEADLINE, text);
    }

    #[track_caller]
    pub fn wait_for_within(&mut self, deadline: Duration, text: &str) {
        let end = Instant::now() + deadline;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => {
                    let stderr: Vec<u8> = self.stderr.try_iter().flatten().collect();
                    host::print_logs();
                    panic!(
                        "{}: no '{text}' in its output: {}\nstderr: {}",
                        self.argv,
                        String::from_utf8_lossy(&self.seen),
                        String::from_utf8_lossy(&stderr)
                    );
                }
            }
        }
    }

    /// The standard output so far.
    pub fn seen(&mut self) -> String {
        self.seen.extend(self.stdout.try_iter().flatten());
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Whether the standard output has `text` in it by now.
    pub fn has(&mut self, text: &str) -> bool {
        self.seen().contains(text)
    }

    #[track_caller]
    pub fn finish(mut self, deadline: Duration) -> Finished {
        let mut child = self.child.take().unwrap();
        let pid = child.id() as i32;
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || sender.send(child.wait().unwrap()));
        let Ok(status) = ended.recv_timeout(deadline) else {
            kill_group(pid);
            let stdout: Vec<u8> = self.stdout.iter().flatten().collect();
            let stderr: Vec<u8> = self.stderr.iter().flatten().collect();
            host::print_logs();
            panic!(
                "{} did not end within {deadline:?}\nstdout: {}\nstderr: {}",
                self.argv,
                tail(&String::from_utf8_lossy(&stdout)),
                tail(&String::from_utf8_lossy(&stderr))
            );
        };
        let mut stdout = std::mem::take(&mut self.seen);
        stdout.extend(self.stdout.iter().flatten());
        let stderr: Vec<u8> = self.stderr.iter().flatten().collect();
        violations::note(&String::from_utf8_lossy(&stderr));
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Finished { code, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            kill_group(child.id() as i32);
            let _ = child.wait();
        }
    }
}

fn kill_group(pid: i32) {
    let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

fn drain(mut from: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n) = from.read(&mut buffer) {
            if n == 0 || sender.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Waits until `condition` gives a value.
#[track_caller]
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(200);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        if Instant::now() >= end {
            host::print_logs();
            panic!("within 200 s there was not: {what}");
        }
        thread::sleep(Duration::from_millis(200));
    }
}
