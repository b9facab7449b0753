//! One command inside the host: started in a session of its own, its streams carried by frames, and killed with all
//! of its session when the client goes away or its time is up.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, pipe2};

use super::wire::{Frame, MAX_PAYLOAD, Outcome, Run};

/// Between the request to end and the kill.
const GRACE: Duration = Duration::from_secs(2);

/// The most that is read of an output after its command has ended: what a pipe can hold. A child left behind could
/// write for ever.
const DRAIN_LIMIT: usize = 1 << 20;

/// The environment every command starts from.
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("USER", "root"),
    ("LANG", "C.UTF-8"),
];

/// Where frames to the client are written, each as one piece.
#[derive(Clone)]
struct Sink(Arc<Mutex<TcpStream>>);

impl Sink {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The session of the command, as long as its leader is not reaped: its id could be another's afterwards.
#[derive(Clone)]
struct Session(Arc<Mutex<Option<Pid>>>);

impl Session {
    fn signal(&self, signal: Signal) {
        if let Some(leader) = *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // ESRCH: they are gone, which is what a signal of ours is for.
            let _ = killpg(leader, signal);
        }
    }

    /// Asks the session to end, then makes it end.
    fn end(&self) {
        self.signal(Signal::SIGTERM);
        let session = self.clone();
        thread::spawn(move || {
            thread::sleep(GRACE);
            session.signal(Signal::SIGKILL);
        });
    }

    fn reap(&self, child: &mut Child) -> io::Result<std::process::ExitStatus> {
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
        loop {
            match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut leader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *leader = None;
        child.wait()
    }
}

/// How bytes of an output are told to the client.
type AsFrame = fn(Vec<u8>) -> Frame;

/// What the command's process is connected to.
struct Started {
    child: Child,
    stdin: File,
    outputs: Vec<(File, AsFrame)>,
    terminal: Option<OwnedFd>,
}

/// Runs a command for the client at the other end of `stream`, to its end.
///
/// # Errors
/// The connection's; what the command does wrong is told to the client instead.
pub fn run(stream: TcpStream, run: Run) -> io::Result<()> {
    let sink = Sink(Arc::new(Mutex::new(stream.try_clone()?)));
    let Started {
        mut child,
        stdin,
        outputs,
        terminal,
    } = match start(&run) {
        Ok(started) => started,
        Err(error) => {
            let code = if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            let program = run.argv.first().map_or("", String::as_str);
            return sink.send(&Frame::Outcome(Outcome::NotStarted(
                code,
                format!("{program}: {error}"),
            )));
        }
    };
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
    let session = Session(Arc::new(Mutex::new(Some(pid))));

    let (input, taken) = channel();
    thread::spawn({
        let (sink, is_terminal) = (sink.clone(), terminal.is_some());
        move || feed(stdin, &taken, &sink, is_terminal)
    });
    thread::spawn({
        let (session, stream) = (session.clone(), stream.try_clone()?);
        move || listen(stream, &input, terminal, &session)
    });
    // Dropping the write end tells the pumps that the command has ended.
    let (ended, ending) = pipe2(OFlag::O_CLOEXEC)?;
    let ended = Arc::new(ended);
    let pumps: Vec<JoinHandle<()>> = outputs
        .into_iter()
        .map(|(output, frame)| {
            let (ended, sink, session) = (Arc::clone(&ended), sink.clone(), session.clone());
            thread::spawn(move || {
                if pump(output, &ended, |bytes| sink.send(&frame(bytes))).is_err() {
                    // Nobody takes the output.
                    session.end();
                }
            })
        })
        .collect();
    let (finished, clock) = channel::<()>();
    let watch = run.timeout.map(|seconds| {
        let session = session.clone();
        thread::spawn(move || {
            let late = clock.recv_timeout(Duration::from_secs(seconds)) == Err(RecvTimeoutError::Timeout);
            if late {
                session.end();
            }
            late
        })
    });

    let status = session.reap(&mut child)?;
    drop(finished);
    drop(ending);
    let late = watch.is_some_and(|watch| watch.join().unwrap_or(false));
    for pump in pumps {
        // A pump that panicked has told so on the console.
        let _ = pump.join();
    }
    let outcome = match (late, status.code(), status.signal()) {
        (true, ..) => Outcome::TimedOut,
        (_, Some(code), _) => Outcome::Exited(code),
        (_, _, signal) => Outcome::Signaled(signal.unwrap_or_default()),
    };
    sink.send(&Frame::Outcome(outcome))?;
    stream.shutdown(Shutdown::Both)
}

/// Starts the command as the leader of a session.
fn start(run: &Run) -> io::Result<Started> {
    let (program, arguments) = run
        .argv
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no command"))?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(ENVIRONMENT);
    command
        .env("TERM", if run.tty.is_some() { "xterm" } else { "dumb" })
        .envs(&run.env);
    command.current_dir(run.cwd.as_deref().unwrap_or("/root"));
    let on_terminal = run.tty.is_some();
    // SAFETY: the closure makes only system calls that are safe between fork and exec, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // Only the runner itself is protected.
            if let Ok(mut score) = File::options().write(true).open("/proc/self/oom_score_adj") {
                let _ = score.write_all(b"0");
            }
            if on_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    match run.tty {
        Some((rows, columns)) => {
            let size = Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            let pty = openpty(Some(&size), None)?;
            close_on_exec(&pty.master)?;
            command
                .stdin(pty.slave.try_clone()?)
                .stdout(pty.slave.try_clone()?)
                .stderr(pty.slave);
            let child = command.spawn()?;
            let master = File::from(pty.master.try_clone()?);
            Ok(Started {
                child,
                stdin: master.try_clone()?,
                outputs: vec![(master, Frame::Stdout)],
                terminal: Some(pty.master),
            })
        }
        None => {
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let missing = || io::Error::other("a standard stream is missing");
            let stdin = OwnedFd::from(child.stdin.take().ok_or_else(missing)?);
            let stdout = OwnedFd::from(child.stdout.take().ok_or_else(missing)?);
            let stderr = OwnedFd::from(child.stderr.take().ok_or_else(missing)?);
            Ok(Started {
                child,
                stdin: stdin.into(),
                outputs: vec![(stdout.into(), Frame::Stdout), (stderr.into(), Frame::Stderr)],
                terminal: None,
            })
        }
    }
}

fn close_on_exec(fd: &OwnedFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Reads the client's frames until it goes away, which ends the command.
fn listen(mut stream: TcpStream, input: &Sender<Vec<u8>>, terminal: Option<OwnedFd>, session: &Session) {
    loop {
        match Frame::read(&mut stream) {
            // A send fails when the command has closed its input; the rest is for nobody then.
            Ok(Some(Frame::Stdin(bytes))) => drop(input.send(bytes)),
            Ok(Some(Frame::Resize(rows, columns))) => {
                if let Some(terminal) = &terminal {
                    let size = libc::winsize {
                        ws_row: rows,
                        ws_col: columns,
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    // SAFETY: the descriptor is a terminal's, and `size` is valid for the call, which reads it.
                    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return session.end(),
        }
    }
}

/// Hands the client's bytes to the command and gives credit for what it took.
fn feed(mut stdin: File, input: &Receiver<Vec<u8>>, sink: &Sink, is_terminal: bool) {
    const END_OF_TRANSMISSION: &[u8] = &[4];
    while let Ok(bytes) = input.recv() {
        if bytes.is_empty() {
            if is_terminal {
                let _ = stdin.write_all(END_OF_TRANSMISSION);
            }
            return;
        }
        let taken = stdin.write_all(&bytes).is_ok();
        // Credit goes on when the command reads no more, so that the client gets to the end of its input.
        let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if sink.send(&Frame::Credit(credit)).is_err() {
            return;
        }
        if !taken {
            while let Ok(bytes) = input.recv() {
                let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                if bytes.is_empty() || sink.send(&Frame::Credit(credit)).is_err() {
                    return;
                }
            }
        }
    }
}

/// Carries one output to `send`, until its end or until the command has ended and what it wrote is read. Children
/// it left behind may hold the stream open: they do not hold up the command's end.
fn pump(
    mut output: File,
    ended: &OwnedFd,
    mut send: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; MAX_PAYLOAD];
    let mut left = None;
    loop {
        if left.is_none() {
            let mut fds = [
                PollFd::new(output.as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            let [_, end] = fds;
            if end.any().unwrap_or(true) {
                left = Some(DRAIN_LIMIT);
                fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            }
        }
        match output.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                send(buffer.get(..length).unwrap_or_default().to_vec())?;
                left = left.map(|left: usize| left.saturating_sub(length));
                if left == Some(0) {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // A terminal whose last process is gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[path = "command_test.rs"]
mod tests;
