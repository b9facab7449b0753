//! The outer half of a command: carries this process's standard streams, terminal and exit code.

use std::io::{self, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::wire::{Frame, MAX_PAYLOAD, Outcome, Request, Run, STDIN_WINDOW, Wake};

/// How long a host may take to say anything to a request that it answers at once.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// How much later than the host we give up on a command that has a deadline: the host may hang itself.
const LATE: Duration = Duration::from_secs(60);

/// Exit code of a command that outlived its time.
pub const TIMED_OUT: i32 = 124;

/// Exit code for what went wrong between here and the command.
pub const BROKEN: i32 = 255;

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), ANSWER_DEADLINE)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Wakes a restored host: sets its clock and mounts its shares.
///
/// # Errors
/// When the host does not answer within a minute, or refuses.
pub fn wake(port: u16, wake: Wake) -> io::Result<()> {
    let mut stream = connect(port)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    Frame::Request(Request::Wake(wake)).write(&mut stream)?;
    match Frame::read(&mut stream)? {
        Some(Frame::Outcome(Outcome::Exited(0))) => Ok(()),
        other => Err(io::Error::other(format!("the host answers {other:?}"))),
    }
}

/// The time now, as [`Wake`] carries it.
#[must_use]
pub fn unix_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether the runner answers at `port`; QEMU takes connections before anybody listens in the host.
#[must_use]
pub fn answers(port: u16) -> bool {
    let probe = Run {
        argv: vec!["/bin/true".into()],
        ..Run::default()
    };
    let ask = || -> io::Result<bool> {
        let mut stream = connect(port)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Frame::Request(Request::Run(probe)).write(&mut stream)?;
        Ok(matches!(Frame::read(&mut stream)?, Some(Frame::Outcome(_))))
    };
    ask().unwrap_or(false)
}

/// Gives the terminal back the mode it had.
struct RawMode(Termios);

impl RawMode {
    fn new() -> Option<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

/// Rows and columns of the terminal this process runs on.
#[must_use]
pub fn terminal_size() -> (u16, u16) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, which `size` is.
    let result = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if result == 0 && size.ws_row > 0 {
        (size.ws_row, size.ws_col)
    } else {
        (24, 80)
    }
}

/// Runs a command in the host behind `port` and gives the exit code for this process: the command's own, 128 and
/// the signal it died of, [`TIMED_OUT`], or [`BROKEN`] with an error.
///
/// # Errors
/// When the connection breaks or this process's own output cannot be written.
pub fn run(port: u16, run: Run, forward_stdin: bool) -> io::Result<i32> {
    let mut stream = connect(port)?;
    let timeout = run.timeout;
    let on_terminal = run.tty.is_some();
    if let Some(seconds) = timeout {
        give_up_after(Duration::from_secs(seconds).saturating_add(LATE));
    }
    Frame::Request(Request::Run(run)).write(&mut stream)?;

    let window = Arc::new((Mutex::new(STDIN_WINDOW), Condvar::new()));
    // Frames of the two threads that send must not mix.
    let sender = Arc::new(Mutex::new(stream.try_clone()?));
    if on_terminal {
        follow_size(Arc::clone(&sender));
    }
    thread::spawn({
        let (sender, window) = (Arc::clone(&sender), Arc::clone(&window));
        // A connection that breaks is seen by the reading side.
        move || send_input(&sender, &window, forward_stdin)
    });
    let raw = if on_terminal && io::stdin().is_terminal() {
        RawMode::new()
    } else {
        None
    };
    let outcome = receive(&mut stream, &window);
    drop(raw);
    Ok(match outcome? {
        Outcome::Exited(code) => code,
        Outcome::Signaled(signal) => signal.saturating_add(128),
        Outcome::TimedOut => {
            eprintln!("test host: killed after {} s", timeout.unwrap_or_default());
            TIMED_OUT
        }
        Outcome::NotStarted(code, reason) => {
            eprintln!("test host: {reason}");
            code
        }
        Outcome::Refused(reason) => return Err(io::Error::other(reason)),
    })
}

fn receive(stream: &mut TcpStream, window: &(Mutex<usize>, Condvar)) -> io::Result<Outcome> {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    loop {
        match Frame::read(stream)? {
            Some(Frame::Stdout(bytes)) => {
                stdout.write_all(&bytes)?;
                stdout.flush()?;
            }
            Some(Frame::Stderr(bytes)) => stderr.write_all(&bytes)?,
            Some(Frame::Credit(bytes)) => {
                let (room, grown) = window;
                let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
                *room = room.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
                grown.notify_one();
            }
            Some(Frame::Outcome(outcome)) => return Ok(outcome),
            Some(_) => return Err(io::Error::other("the host sent what only a client may")),
            None => return Err(io::Error::other("the host went away")),
        }
    }
}

fn send_input(sender: &Mutex<TcpStream>, window: &(Mutex<usize>, Condvar), forward: bool) -> Option<()> {
    let (room, grown) = window;
    let mut buffer = vec![0; MAX_PAYLOAD];
    loop {
        let mut available = room.lock().unwrap_or_else(PoisonError::into_inner);
        while *available == 0 {
            available = grown.wait(available).unwrap_or_else(PoisonError::into_inner);
        }
        let allowed = (*available).min(MAX_PAYLOAD);
        drop(available);
        let length = match if forward {
            io::stdin().read(buffer.get_mut(..allowed)?)
        } else {
            Ok(0)
        } {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Input that cannot be read has ended.
            result => result.unwrap_or(0),
        };
        let bytes = buffer.get(..length)?.to_vec();
        Frame::Stdin(bytes)
            .write(&mut *sender.lock().unwrap_or_else(PoisonError::into_inner))
            .ok()?;
        if length == 0 {
            return Some(());
        }
        let mut available = room.lock().unwrap_or_else(PoisonError::into_inner);
        *available = available.saturating_sub(length);
    }
}

/// Tells the host when the terminal's size changes.
fn follow_size(sender: Arc<Mutex<TcpStream>>) {
    let mut resized = SigSet::empty();
    resized.add(Signal::SIGWINCH);
    // Blocked here and so in every thread started later; one thread takes it.
    if resized.thread_block().is_err() {
        return;
    }
    thread::spawn(move || {
        while resized.wait().is_ok() {
            let (rows, columns) = terminal_size();
            let mut stream = sender.lock().unwrap_or_else(PoisonError::into_inner);
            if Frame::Resize(rows, columns).write(&mut *stream).is_err() {
                return;
            }
        }
    });
}

fn give_up_after(limit: Duration) {
    thread::spawn(move || {
        thread::sleep(limit);
        eprintln!(
            "test host: no end after {} s: the host hangs; tests/host/stop ends it",
            limit.as_secs()
        );
        std::process::exit(TIMED_OUT);
    });
}
