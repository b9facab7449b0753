//! The volumes of a sandbox: each source is shown to the guest once, whichever containers have it. So they see the
//! same files there, with one cache and one set of locks, and can meet at its sockets and FIFOs; and what one of them
//! mounts there can reach the other.

use std::{
    fs::{self, DirBuilder},
    io,
    os::{fd::AsFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{lock, mirrors::Mirrors};
use crate::host::{
    mount::{open_path, unmount_below},
    volume::{FileId, Volume, VolumeError},
};

/// Where they are in the share. No container has such an id.
pub(super) const DIRECTORY: &str = ".volumes";

/// Volumes in the share.
#[derive(Debug)]
pub(super) struct Volumes {
    directory: PathBuf,
    shown: Mutex<Shown>,
    mirrors: Mirrors,
}

#[derive(Debug, Default)]
struct Shown {
    /// Numbers are not used again: the guest may still know the old one.
    next: u32,
    volumes: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    number: u32,
    file: FileId,
    volume: Volume,
    users: usize,
}

impl Entry {
    /// Whether the guest loses and gains nothing if it uses this one for `volume`. One that is writable will do for
    /// one that is not: the guest has the source writable anyway, and makes the mount read-only itself.
    fn serves(&self, file: FileId, volume: &Volume) -> bool {
        let own = &self.volume;
        let writable = !own.read_only && !own.read_only_below;
        let same_access = own.read_only == volume.read_only && own.read_only_below == volume.read_only_below;
        self.file == file
            && own.recursive == volume.recursive
            && own.id_map == volume.id_map
            && (writable || same_access)
    }
}

impl Volumes {
    /// None yet, in the share at `share`.
    pub(super) fn new(share: &Path, mirrors: Mirrors) -> Self {
        Self {
            directory: share.join(DIRECTORY),
            shown: Mutex::default(),
            mirrors,
        }
    }

    /// Shows the guest `volume`; tells its number. To be given back by [`Self::release`].
    ///
    /// # Errors
    /// When it cannot be shown; then nothing is left.
    pub(super) fn take(&self, volume: &Volume) -> Result<u32, VolumeError> {
        let error = |source| VolumeError::Source {
            index: volume.index,
            path: volume.source.clone(),
            source,
        };
        let source = open_path(&volume.source).map_err(error)?;
        let file = FileId::of(source.as_fd()).map_err(error)?;
        let mut shown = lock(&self.shown);
        if let Some(entry) = shown.volumes.iter_mut().find(|entry| entry.serves(file, volume)) {
            entry.users = entry.users.saturating_add(1);
            return Ok(entry.number);
        }
        match DirBuilder::new().mode(0o755).create(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(error)?,
        }
        let number = shown.next;
        let target = self.path(number);
        if let Err(error) = volume.make(&target) {
            if let Err(error) = remove(&target) {
                tracing::warn!(%error, target = %target.display(), "a mount point is left behind");
            }
            return Err(error);
        }
        shown.next = number.saturating_add(1);
        shown.volumes.push(Entry {
            number,
            file,
            volume: volume.clone(),
            users: 1,
        });
        Ok(number)
    }

    /// Where a volume is.
    pub(super) fn path(&self, number: u32) -> PathBuf {
        self.directory.join(number.to_string())
    }

    /// Has the guest mirror `volume`, which has been taken, if it is one to be mirrored and can be. `true`: it does, once
    /// it has read what has been sent to it before this returns.
    pub(super) async fn mirror(&self, volume: &Volume, number: u32) -> bool {
        self.mirrors.begin(volume, number, self.path(number)).await
    }

    /// Gives a volume back; the last user takes it away.
    ///
    /// # Errors
    /// When it cannot be unmounted.
    pub(super) fn release(&self, number: u32) -> io::Result<()> {
        let mut shown = lock(&self.shown);
        let Some(index) = shown.volumes.iter().position(|entry| entry.number == number) else {
            return Ok(());
        };
        if let Some(entry) = shown.volumes.get_mut(index) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users > 0 {
                return Ok(());
            }
        }
        shown.volumes.swap_remove(index);
        self.mirrors.end(number);
        let target = self.path(number);
        unmount_below(&target)?;
        // The directory stays: the guest would look for the next volume in one that it remembers and that is gone.
        remove(&target)
    }
}

/// Removes a mount point: an empty directory or an empty file. Nothing there is fine.
fn remove(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if found.is_dir() {
        return fs::remove_dir(path);
    }
    if found.len() > 0 {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_shown_once_and_goes_with_its_last_user() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("precious"), "data").unwrap();
        let volumes = Volumes::new(dir.path(), Mirrors::default());
        let volume = |read_only| Volume {
            index: 0,
            source: source.clone(),
            recursive: true,
            read_only,
            read_only_below: false,
            id_map: None,
        };
        let below = |number: u32| dir.path().join(DIRECTORY).join(number.to_string());
        // What one may only read, another who may write must not get.
        let reader = volumes.take(&volume(true)).unwrap();
        let writer = volumes.take(&volume(false)).unwrap();
        assert_ne!(reader, writer);
        assert!(fs::write(below(reader).join("x"), "").is_err());
        fs::write(below(writer).join("x"), "").unwrap();
        // By another name, too.
        let mut second = volume(false);
        second.source = dir.path().join("source/../source");
        assert_eq!(volumes.take(&second).unwrap(), writer);
        volumes.release(writer).unwrap();
        assert!(below(writer).join("precious").exists());
        volumes.release(writer).unwrap();
        assert!(!below(writer).exists());
        // And its number is not given to another one.
        let again = volumes.take(&volume(false)).unwrap();
        assert!(again > writer);
        assert_eq!(volumes.take(&volume(true)).unwrap(), reader);
        for number in [reader, reader, again] {
            volumes.release(number).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count(), 0);
        assert_eq!(fs::read(source.join("precious")).unwrap(), b"data");

        second.source = dir.path().join("missing");
        assert!(volumes.take(&second).is_err());
        assert_eq!(fs::read_dir(dir.path().join(DIRECTORY)).unwrap().count(), 0);
    }
}
