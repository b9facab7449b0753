//! The shim's `delete`: remove what a dead server left behind.
//!
//! containerd calls this whenever its connection for a container ends: after a server died, but also after each
//! ordinary end of a container, while the server may go on for the sandbox's others. It has 5 seconds, then it is killed.
//! On a busy machine a clean-up can take longer; therefore a process of its own does it ([`apart`]), which goes on.

use std::{
    ffi::OsString,
    io::{self, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{DeleteResponse, ShutdownRequest},
    shim_async::{Client, TaskClient},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use protobuf::{Message, MessageField};
use tokio::time::timeout;
use ttrpc::context;

use super::{bootstrap::Invocation, bundle::Bundle, publish::timestamp, socket, status::chain};
use crate::engine;

/// As after SIGKILL.
const KILLED: u32 = 128 + 9;
/// Time for a living server to say so.
const SERVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the clean-up.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(120);
/// When containerd is answered, whether the clean-up is done or goes on.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(4500);
/// In the environment of the process that does it.
const APART: &str = "HUSK_SHIM_DELETE";
/// Most layers of mounts that are taken off a root file system.
const MAX_LAYERS: usize = 64;

/// Whether this is the process that is to do it.
pub fn is_apart() -> bool {
    std::env::var_os(APART).is_some()
}

/// Has a process of its own do it, with the same arguments. Its answer, or one that does not wait for it any longer.
///
/// # Errors
/// When there can be no such process.
pub fn apart(invocation: &Invocation, args: &[OsString]) -> io::Result<Vec<u8>> {
    let mut child = Command::new("/proc/self/exe")
        .args(args)
        .env(APART, "1")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (done, answers) = mpsc::channel();
    // What it logs is containerd's as long as that listens.
    if let Some(mut log) = child.stderr.take() {
        std::thread::spawn(move || io::copy(&mut log, &mut io::stderr()));
    }
    if let Some(mut answer) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = answer.read_to_end(&mut bytes).map(|_| bytes);
            // Nobody waits any longer.
            let _ = done.send(read);
        });
    }
    match answers.recv_timeout(ANSWER_TIMEOUT) {
        Ok(Ok(bytes)) if !bytes.is_empty() => Ok(bytes),
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) => Err(io::Error::other("the clean-up failed")),
        Err(_) => Ok(response(read_pid(&bundle(invocation)))),
    }
}

fn bundle(invocation: &Invocation) -> PathBuf {
    let given = invocation.bundle.clone();
    given.or_else(|| std::env::current_dir().ok()).unwrap_or_default()
}

/// Does it; the answer is to be printed. What could not be removed is told in the log: containerd goes on anyway,
/// and the answer is what it needs for that.
pub async fn delete(invocation: &Invocation) -> Vec<u8> {
    let bundle = bundle(invocation);
    let sandbox = Bundle::read(&bundle)
        .and_then(|bundle| bundle.outline.group(&invocation.id))
        .unwrap_or_else(|_| invocation.id.clone());
    let pid = read_pid(&bundle);
    if !lives(&server(&bundle, invocation, &sandbox), &invocation.id).await {
        match timeout(CLEANUP_TIMEOUT, engine::cleanup(&invocation.namespace, &sandbox)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("{}", chain(&error)),
            Err(_) => tracing::warn!("the clean-up of {sandbox} took too long and is not complete"),
        }
        // Where this has outlived its caller, the next of that id may be here.
        let server = server(&bundle, invocation, &sandbox);
        if !socket::is_served(&server).unwrap_or(false) {
            if let Err(error) = socket::remove(&server) {
                tracing::warn!("the server's socket is left: {error}");
            }
            unmount(&bundle.join("rootfs"));
        }
    }
    response(pid)
}

fn response(pid: u32) -> Vec<u8> {
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    // Encoding into memory fails only for a message past 2 GiB.
    response.write_to_bytes().unwrap_or_default()
}

/// The server's socket: as its `start` noted it, else as it would be made.
fn server(bundle: &Path, invocation: &Invocation, sandbox: &str) -> PathBuf {
    let noted = std::fs::read_to_string(bundle.join("address")).ok();
    let noted = noted
        .as_deref()
        .and_then(|address| address.trim().strip_prefix("unix://"))
        .map(PathBuf::from);
    noted
        .or_else(|| {
            let directory = Path::new(socket::DEFAULT_DIRECTORY);
            socket::path(directory, &invocation.address, &invocation.namespace, sandbox).ok()
        })
        .unwrap_or_default()
}

/// Whether a server answers at `path`. It is told that this container is done with, so that one which has no other
/// ends: containerd will not call it again.
async fn lives(path: &Path, id: &str) -> bool {
    if !socket::is_served(path).unwrap_or(false) {
        return false;
    }
    let asked = timeout(SERVER_TIMEOUT, async {
        let client = Client::connect(&format!("unix://{}", path.display())).await?;
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        TaskClient::new(client)
            .shutdown(context::with_duration(SERVER_TIMEOUT), &request)
            .await
    });
    match asked.await {
        Ok(Ok(_)) => true,
        // It answers, whatever it says.
        Ok(Err(ttrpc::Error::RpcStatus(_))) => true,
        Ok(Err(_)) => false,
        // It is there and busy (its own end may take longer than this).
        Err(_) => socket::is_served(path).unwrap_or(false),
    }
}

fn read_pid(bundle: &Path) -> u32 {
    std::fs::read_to_string(bundle.join("init.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

fn unmount(rootfs: &Path) {
    for _ in 0..MAX_LAYERS {
        match umount2(rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(error) => {
                tracing::warn!("cannot unmount {}: {error}", rootfs.display());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn after_a_server_died_the_answer_is_137_and_its_socket_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        std::fs::write(dir.path().join("address"), format!("unix://{}", path.display())).unwrap();
        std::fs::write(dir.path().join("init.pid"), "4711").unwrap();
        let bundle = dir.path().to_str().unwrap().to_owned();
        let args = [
            "-namespace",
            "husk-test-none",
            "-id",
            "none",
            "-bundle",
            &bundle,
            "delete",
        ];
        let invocation = Invocation::parse(&args).unwrap();
        let answer = DeleteResponse::parse_from_bytes(&delete(&invocation).await).unwrap();
        assert_eq!((answer.pid, answer.exit_status), (4711, 137));
        assert!(answer.exited_at.seconds > 1_600_000_000);
        assert!(!path.exists());
    }
}
