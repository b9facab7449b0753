//! The runner inside the host: takes connections and runs what they ask for.

use std::ffi::CString;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::command;
use super::wire::{Frame, Outcome, Request, Wake};

/// The TCP port inside the host.
pub const PORT: u16 = 7001;

/// How long a new connection may take to say what it wants.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// Serves for ever.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve() -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    let token = Arc::new(Mutex::new(String::new()));
    // Commands are what the out-of-memory killer should take, not the way in.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("testhost: no protection from the out-of-memory killer: {error}");
    }
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory: it passes when a command ends.
                eprintln!("testhost: accept: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let token = Arc::clone(&token);
        std::thread::spawn(move || {
            if let Err(error) = serve_one(stream, &token) {
                eprintln!("testhost: connection: {error}");
            }
        });
    }
}

fn serve_one(mut stream: TcpStream, token: &Mutex<String>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(REQUEST_DEADLINE))?;
    let request = Frame::read(&mut stream)?;
    stream.set_read_timeout(None)?;
    let outcome = match request {
        // A connection without a word is how the starter asks whether anybody listens.
        None => return Ok(()),
        Some(Frame::Request(Request::Wake(wake))) => {
            let mut known = token.lock().unwrap_or_else(PoisonError::into_inner);
            if known.is_empty() {
                known.clone_from(&wake.token);
                wake_up(&wake)
            } else {
                Outcome::Refused("the host is awake already".into())
            }
        }
        Some(Frame::Request(Request::Run(run))) => {
            let known = token.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if run.token == known {
                return command::run(stream, run);
            }
            Outcome::Refused("wrong token".into())
        }
        Some(_) => Outcome::Refused("the first frame must be a request".into()),
    };
    Frame::Outcome(outcome).write(&mut stream)
}

/// Brings a restored host up to date: its clock stood still, and shares cannot be frozen.
fn wake_up(wake: &Wake) -> Outcome {
    if let Err(error) = set_clock(wake.unix_nanos) {
        return Outcome::Refused(format!("cannot set the clock: {error}"));
    }
    for (tag, path) in &wake.shares {
        if let Err(error) = mount_share(tag, path) {
            return Outcome::Refused(format!("cannot mount share {tag} at {path}: {error}"));
        }
    }
    Outcome::Exited(0)
}

fn set_clock(unix_nanos: u64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: i64::try_from(unix_nanos / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(unix_nanos % 1_000_000_000).unwrap_or_default(),
    };
    // SAFETY: `time` is a valid timespec for the length of the call, which only reads it.
    match unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mount_share(tag: &str, path: &str) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    // cache=mmap keeps no file data beyond mappings, so that what is built outside is seen here at once.
    let options = CString::new("trans=virtio,version=9p2000.L,msize=1048576,cache=mmap")?;
    mount(
        Some(tag),
        Path::new(path),
        Some("9p"),
        MsFlags::MS_RDONLY,
        Some(options.as_c_str()),
    )?;
    Ok(())
}
