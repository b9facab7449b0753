//! The shim's `delete`: remove what a dead server left behind.
//!
//! containerd calls this whenever its connection for a container ends: after a server died, but also after each
//! ordinary end of a container, while the server may go on for the sandbox's others. It has 5 seconds.

use std::{
    path::{Path, PathBuf},
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
/// Time for a living server to say so. With what follows it stays within containerd's 5 seconds.
const SERVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the clean-up.
const CLEANUP_TIMEOUT: Duration = Duration::from_millis(3500);
/// Most layers of mounts that are taken off a root file system.
const MAX_LAYERS: usize = 64;

/// Does it; the answer is to be printed. What could not be removed is told in the log: containerd goes on anyway,
/// and the answer is what it needs for that.
pub async fn delete(invocation: &Invocation) -> Vec<u8> {
    let bundle = invocation
        .bundle
        .clone()
        .or_else(|| std::env::current_dir().ok())
        .unwrap_or_default();
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
        if let Err(error) = socket::remove(&server(&bundle, invocation, &sandbox)) {
            tracing::warn!("the server's socket is left: {error}");
        }
        unmount(&bundle.join("rootfs"));
    }
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
