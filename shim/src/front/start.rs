//! The shim's `start`: find the server of a container's sandbox or start it, and say where it listens.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    bootstrap::{Answer, Invocation, StartParams, UsageError},
    bundle::{Bundle, BundleError},
    socket::{self, Claim},
};

/// The environment variable by which the server is told where to publish events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// Time for containerd's program to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for a server whose sandbox is being shut down to end: containerd waits for it for three seconds only, and what
/// the guest has written may have to reach a slow disk.
const ENDING: Duration = Duration::from_secs(30);

/// Where the last answer of containerd's program is kept. Not in /run/husk, which is empty when nothing runs.
const VERSION_CACHE: &str = "/run/husk-containerd-version";

/// Why the server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// How the program was called.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |source| StartError::Host { what, source }
}

/// Does it, with the bundle as working directory; the answer is to be printed, and nothing else.
///
/// # Errors
/// Then no server was started.
pub fn start(invocation: &Invocation, stdin: &[u8]) -> Result<Vec<u8>, StartError> {
    let params = StartParams::resolve(invocation, |name| std::env::var(name).ok(), stdin)?;
    let bundle = match &invocation.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(host("cannot tell the working directory"))?,
    };
    let sandbox = Bundle::read(&bundle)?.outline.group(&invocation.id)?;
    let directory = params
        .socket_dir
        .clone()
        .unwrap_or_else(|| socket::DEFAULT_DIRECTORY.into());
    let path = socket::path(&directory, &params.grpc_address, &invocation.namespace, &sandbox)
        .map_err(host("cannot name the socket"))?;
    let address = format!("unix://{}", path.display());

    // A sandbox's first container is started once, so a server that is there already is about to end.
    let patience = if sandbox == invocation.id {
        ENDING
    } else {
        Duration::ZERO
    };
    let claim = claim(&path, patience).map_err(host(format!("cannot make the socket {}", path.display())))?;
    if let Claim::Ours(listener) = claim {
        // The socket listens already: whoever connects waits there until the server serves. Nobody has to wait here.
        let spawned = spawn(
            invocation,
            &params,
            &sandbox,
            &path,
            &bundle,
            OwnedFd::from(listener),
        );
        if let Err(error) = spawned {
            let _ = socket::remove(&path);
            return Err(error);
        }
    }
    // What containerd 1.7 reads when it is started anew; later ones keep our answer themselves.
    write_atomically(&bundle.join("address"), address.as_bytes())
        .map_err(host("cannot write the bundle's `address`"))?;
    let answer = if params.protobuf {
        Answer::Protobuf
    } else {
        version_of_caller(&invocation.publish_binary)
    };
    Ok(answer.encode(&address))
}

/// [`socket::claim`]; whoever serves there may take so long to end.
fn claim(path: &Path, patience: Duration) -> io::Result<Claim> {
    let end = Instant::now() + patience;
    loop {
        match socket::claim(path)? {
            Claim::Served if Instant::now() < end => std::thread::sleep(Duration::from_millis(50)),
            claim => return Ok(claim),
        }
    }
}

fn spawn(
    invocation: &Invocation,
    params: &StartParams,
    sandbox: &str,
    path: &Path,
    bundle: &Path,
    listener: OwnedFd,
) -> Result<(), StartError> {
    // The kernel should end a sandbox before the daemon that runs all of them.
    let score = oom_score_adj(nix::unistd::getppid().as_raw())
        .saturating_add(1)
        .min(1000);
    if let Err(error) = fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::debug!(%error, "oom_score_adj is left as it is");
    }
    let log = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(
            std::env::args_os()
                .next()
                .unwrap_or_else(|| "containerd-shim-husk-v2".into()),
        )
        .args([
            "-namespace",
            &invocation.namespace,
            "-id",
            sandbox,
            "-address",
            &params.grpc_address,
        ])
        .arg("-socket")
        .arg(path)
        .current_dir(bundle)
        .env_clear()
        .env(TTRPC_ADDRESS, &params.ttrpc_address)
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(log.map_or_else(|_| Stdio::null(), Stdio::from));
    if params.debug {
        command.arg("-debug");
    }
    command.spawn().map(drop).map_err(host("cannot start the server"))
}

fn oom_score_adj(pid: i32) -> i32 {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// The form of answer that the calling daemon understands, by what its program says of its version.
fn version_of_caller(publish_binary: &str) -> Answer {
    if publish_binary.is_empty() {
        return Answer::JsonV2;
    }
    // The file may have been replaced since the daemon started; what runs is what answers.
    let running = PathBuf::from(format!("/proc/{}/exe", nix::unistd::getppid()));
    let is_caller = fs::read_link(&running)
        .is_ok_and(|exe| exe.to_string_lossy().trim_end_matches(" (deleted)") == publish_binary);
    let program = if is_caller {
        running
    } else {
        PathBuf::from(publish_binary)
    };
    let identity = fs::metadata(&program).map(|m| {
        format!(
            "{} {} {} {}.{}",
            m.dev(),
            m.ino(),
            m.size(),
            m.mtime(),
            m.mtime_nsec()
        )
    });
    let Ok(identity) = identity else {
        return Answer::JsonV2;
    };
    let cache = Path::new(VERSION_CACHE);
    let cached = fs::read_to_string(cache).ok();
    if let Some((known, output)) = cached.as_deref().and_then(|text| text.split_once('\n')) {
        if known == identity {
            return Answer::for_version_output(output);
        }
    }
    match output_of(&program, publish_binary, VERSION_TIMEOUT) {
        Ok(output) => {
            if let Err(error) = write_atomically(cache, format!("{identity}\n{output}").as_bytes()) {
                tracing::debug!(%error, "containerd's version is not kept");
            }
            Answer::for_version_output(&output)
        }
        Err(error) => {
            tracing::debug!(%error, "containerd's version is unknown");
            Answer::JsonV2
        }
    }
}

/// What `program --version` prints, at most 4 KiB of it, within `limit`.
fn output_of(program: &Path, name: &str, limit: Duration) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    let mut child = Command::new(program)
        .arg0(name)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("no pipe"))
        .and_then(|stdout| read_until(File::from(OwnedFd::from(stdout)), deadline));
    let _ = child.kill();
    child.wait()?;
    output
}

fn read_until(mut pipe: File, deadline: Instant) -> io::Result<String> {
    const MOST: usize = 4096;
    let mut all = Vec::new();
    while all.len() < MOST {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&pipe), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::TimedOut)),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 1024];
        let n = pipe.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        all.extend(buffer.iter().take(n));
    }
    Ok(String::from_utf8_lossy(&all).into_owned())
}

/// Writes a file so that whoever reads it sees all of it or what was there before.
///
/// # Errors
/// When the host refuses; then nothing new is there.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_help;

    fn program(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd");
        test_help::script(&path, text);
        (dir, path)
    }

    #[test]
    fn a_server_that_is_about_to_end_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let Claim::Ours(old) = claim(&path, Duration::ZERO).unwrap() else {
            panic!()
        };
        assert!(matches!(claim(&path, Duration::ZERO).unwrap(), Claim::Served));
        let ending = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(old);
        });
        let new = claim(&path, Duration::from_secs(60)).unwrap();
        assert!(matches!(new, Claim::Ours(_)));
        ending.join().unwrap();
    }

    #[test]
    fn a_program_is_asked_for_its_version() {
        let (_dir, path) = program("echo noise >&2; echo containerd x 2.1.9 $1");
        let output = output_of(&path, "containerd", Duration::from_secs(10)).unwrap();
        assert_eq!(output, "containerd x 2.1.9 --version\n");
    }

    #[test]
    fn a_program_that_hangs_or_floods_is_given_up() {
        let (_dir, path) = program("exec sleep 60");
        let before = Instant::now();
        let error = output_of(&path, "containerd", Duration::from_millis(100)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (_dir, path) = program("exec yes");
        assert!(
            output_of(&path, "containerd", Duration::from_secs(10))
                .unwrap()
                .len()
                <= 8192
        );
        assert!(before.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("address");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
