//! A log that keeps its last part on disk, bounded: two files, the newer of which takes the older one's place when it is
//! full. Whoever looks into a sandbox from outside reads them, also when its engine has died.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// What is kept of a log that has no place yet, in bytes.
const PENDING: usize = 16 << 10;

/// Longest file that is read, in bytes.
const MAX_READ: u64 = 64 << 20;

/// See the module. Cheap to clone: all clones are one log.
#[derive(Clone, Debug, Default)]
pub struct RingLog(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    /// No place yet.
    Pending(Vec<u8>),
    Open(Files),
    Closed,
}

impl Default for State {
    fn default() -> Self {
        Self::Pending(Vec::new())
    }
}

#[derive(Debug)]
struct Files {
    path: PathBuf,
    file: File,
    written: usize,
    /// Most bytes of one of the two files.
    half: usize,
}

/// The older of the two files.
pub fn older(path: &Path) -> PathBuf {
    path.with_extension("old")
}

impl RingLog {
    /// Gives the log its place, in two files of together at most `kept` bytes; what was said before goes there.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(&self, path: &Path, kept: usize) -> io::Result<()> {
        let mut files = Files {
            path: path.to_owned(),
            file: create(path)?,
            written: 0,
            half: (kept / 2).max(1),
        };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Pending(said) = &*state {
            files.append(said);
        }
        *state = State::Open(files);
        Ok(())
    }

    /// Adds to the log. What cannot be written is lost: a log never stops what it is about.
    pub fn append(&self, bytes: &[u8]) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Pending(said) => {
                let room = PENDING.saturating_sub(said.len());
                said.extend(bytes.iter().take(room));
            }
            State::Open(files) => files.append(bytes),
            State::Closed => {}
        }
    }

    /// Ends the log and removes its files.
    ///
    /// # Errors
    /// The file system's.
    pub fn close(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Closed) {
            State::Open(files) => remove(&files.path),
            _ => Ok(()),
        }
    }
}

impl Files {
    fn append(&mut self, bytes: &[u8]) {
        // Of what is longer than a file the end is kept.
        let bytes = bytes
            .get(bytes.len().saturating_sub(self.half)..)
            .unwrap_or_default();
        if self.written + bytes.len() > self.half {
            let turned = fs::rename(&self.path, older(&self.path)).and_then(|()| create(&self.path));
            let Ok(file) = turned else { return };
            self.file = file;
            self.written = 0;
        }
        if self.file.write_all(bytes).is_ok() {
            self.written += bytes.len();
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Removes a log's files. None there is fine.
///
/// # Errors
/// The file system's.
pub fn remove(path: &Path) -> io::Result<()> {
    for path in [path.to_owned(), older(path)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// What is kept of the log at `path`, and its newer file, read to its end.
///
/// # Errors
/// `NotFound` when there is none.
pub fn read(path: &Path) -> io::Result<(Vec<u8>, File)> {
    let (older, mut newer) = loop {
        let older = older(path);
        let newer = match File::open(path) {
            // Just now the newer one became the older one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => break (None, File::open(older)?),
            other => other?,
        };
        let older = File::open(older).ok();
        let is_newer =
            |older: &File| -> io::Result<bool> { Ok(older.metadata()?.ino() == newer.metadata()?.ino()) };
        match older {
            // They changed places meanwhile.
            Some(older) if is_newer(&older)? => continue,
            older => break (older, newer),
        }
    };
    let mut all = Vec::new();
    if let Some(older) = older {
        older.take(MAX_READ).read_to_end(&mut all)?;
    }
    (&mut newer).take(MAX_READ).read_to_end(&mut all)?;
    Ok((all, newer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_part_is_kept_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = RingLog::default();
        log.append(b"before\n");
        log.open(&path, 2000).unwrap();
        assert_eq!(read(&path).unwrap().0, b"before\n");
        for number in 0..1000 {
            log.clone().append(format!("line {number}\n").as_bytes());
        }
        let kept = read(&path).unwrap().0;
        assert!((900..=2000).contains(&kept.len()), "{}", kept.len());
        let kept = String::from_utf8(kept).unwrap();
        assert!(kept.ends_with("line 998\nline 999\n"));
        log.append(&vec![b'x'; 100_000]);
        assert!(read(&path).unwrap().0.len() <= 2000);
        log.close().unwrap();
        log.append(b"after");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        log.close().unwrap();
    }
}
