//! Directories of the host whose changes the guest is told of, one by one: the host's side of the mirrors that the
//! agent keeps (`agent/protocol`).
//!
//! They are watched by inotify(7). What it tells is made again in the mirror in the same order, so that whoever watches
//! there sees what he would see on the host. Since it tells names, not contents, and the directory may have changed
//! again when a name is looked up, a batch that does not end where the directory is, is read again with what follows it, and
//! ends with a comparison of the whole tree: in a directory that never rests an order of events may get lost, never a state.

mod read;
mod tree;
mod watches;

#[cfg(test)]
mod tree_test;

use std::io;

use husk_agent_protocol::limits::{MAX_MIRROR_BYTES, MAX_MIRROR_ENTRIES, MAX_MIRROR_PATH, MAX_MIRRORED_FILE};
use nix::errno::Errno;

use read::shown;
pub use tree::Trees;

/// Most bytes of files in a directory when its mirror is made. Later it may have twice as much: while a configuration is
/// exchanged for another, both are there.
pub const MAX_BYTES: usize = MAX_MIRROR_BYTES / 2;

/// Most files, links and directories in it then, itself included.
pub const MAX_ENTRIES: usize = MAX_MIRROR_ENTRIES / 2;

/// Most bytes of files in all directories of a sandbox when a mirror is made.
pub const MAX_SANDBOX_BYTES: usize = 2 * MAX_BYTES;

/// Why a directory cannot be mirrored, or not be followed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Too many entries.
    #[error("it has more than {MAX_ENTRIES} files ({MAX_MIRROR_ENTRIES} while they are exchanged)")]
    Entries,
    /// Too many bytes.
    #[error("its files have more than {MAX_BYTES} bytes ({MAX_MIRROR_BYTES} while they are exchanged)")]
    Bytes,
    /// With those of the sandbox's other mirrors.
    #[error("the sandbox's mirrors would have more than {MAX_SANDBOX_BYTES} bytes")]
    Sandbox,
    /// One file is too large.
    #[error("{} has more than {MAX_MIRRORED_FILE} bytes", shown(.0))]
    File(Vec<u8>),
    /// A path is too long.
    #[error("the path {} is longer than {MAX_MIRROR_PATH} bytes", shown(.0))]
    Path(Vec<u8>),
    /// Something that is neither a directory nor a regular file nor a link.
    #[error("{} is {}", shown(.0), .1)]
    Kind(Vec<u8>, &'static str),
    /// It cannot be read.
    #[error("cannot read {}", shown(.0))]
    Unreadable(Vec<u8>, #[source] io::Error),
    /// inotify(7) has limits of its own.
    #[error("cannot watch {} (fs.inotify.max_user_watches and max_user_instances limit that)", shown(.0))]
    Watch(Vec<u8>, #[source] io::Error),
    /// More happened at once than is worth telling one by one.
    #[error("too much changed at once")]
    Burst,
}

impl Refusal {
    fn unreadable(path: &[u8], error: Errno) -> Self {
        Self::Unreadable(path.to_vec(), error.into())
    }
}
