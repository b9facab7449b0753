//! Volumes through which containers see each other's mounts.
//!
//! Mount propagation (`shared`, `slave`) is among the mounts of one peer group. The volume's is one that the agent makes
//! when the first container asks for propagation, over the volume in its own mount namespace, and that goes with the
//! last: what a `shared` container mounts in the volume reaches it, and from there all that are `shared` or `slave`.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
};

use crate::{
    container::{mounts::Propagation, plan::ContainerPlan},
    fault::Fault,
    log, sys,
};

/// The mount over a volume. Unmounted when dropped, with all that containers have mounted in it.
#[derive(Debug)]
pub(super) struct Peer(PathBuf);

impl Peer {
    fn new(volume: &Path) -> io::Result<Self> {
        let place = directory(volume)?;
        let tree = sys::clone_tree(place.as_fd(), true)?;
        // First out of the group that it may be cloned from.
        for propagation in [libc::MS_PRIVATE, libc::MS_SHARED] {
            sys::set_mount_attributes(tree.as_fd(), 0, 0, propagation, true)?;
        }
        sys::attach_tree(tree.as_fd(), place.as_fd())?;
        Ok(Self(volume.to_owned()))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        match umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // The volume went before, and its mounts with it.
            Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
            Err(error) => log::error!("unmount {}: {error}", self.0.display()),
        }
    }
}

fn directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(
        path,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

/// The mounts over volumes, by the volume.
#[derive(Debug, Default)]
pub(super) struct Peers(HashMap<PathBuf, Weak<Peer>>);

/// What a container has of them.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// To be kept as long as the container is there.
    pub(super) peers: Vec<Arc<Peer>>,
    /// Detached mounts that are peers of them, by their index in the plan's mounts.
    pub(super) mounts: HashMap<usize, OwnedFd>,
}

impl Peers {
    /// Makes what `plan` needs. To be called before the container's mount namespace is made from the agent's.
    ///
    /// # Errors
    ///
    /// The kernel refuses a mount; then what was made goes again.
    pub(super) fn take(&mut self, plan: &ContainerPlan) -> Result<Held, Fault> {
        let mut held = Held::default();
        for (index, mount) in plan.mounts.iter().enumerate() {
            let (Some(volume), Some(propagation)) = (mount.volume(), mount.propagation()) else {
                continue;
            };
            // In a file nothing can be mounted.
            if !volume.is_dir() {
                continue;
            }
            let failed =
                |error: io::Error| Fault::system(format_args!("share mounts in {}", volume.display()), error);
            let peer = match self.0.get(volume).and_then(Weak::upgrade) {
                Some(peer) => peer,
                None => {
                    let peer = Arc::new(Peer::new(volume).map_err(failed)?);
                    self.0.retain(|_, peer| peer.strong_count() > 0);
                    self.0.insert(volume.to_owned(), Arc::downgrade(&peer));
                    peer
                }
            };
            held.peers.push(peer);
            // A slave comes of itself: the container's namespace is one of the agent's.
            if propagation == Propagation::Shared {
                let place = directory(volume).map_err(failed)?;
                let tree = sys::clone_tree(place.as_fd(), mount.is_recursive()).map_err(failed)?;
                held.mounts.insert(index, tree);
            }
        }
        Ok(held)
    }
}
