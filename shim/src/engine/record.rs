//! The record: what must survive a crash of the engine so that its sandbox can be removed without it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{hooks::Poststop, network::Wired};
use crate::host::{cgroup::Trace, pid::Identity};

/// Name of the record in the sandbox's directory.
pub const FILE: &str = "state.json";

/// Name under which it is written before it takes its place.
const NEW_FILE: &str = "state.json.new";

/// Largest record that is read, in bytes.
const MAX_LEN: u64 = 4 << 20;

/// See the module. Mounts beneath the sandbox's own directory need no record: they are found there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this file's form.
    pub version: u32,
    /// The engine.
    pub engine: Option<Identity>,
    /// `husk-vmm`.
    pub vmm: Option<Identity>,
    /// `husk-fsd`.
    pub fsd: Option<Identity>,
    /// The stand-ins of the containers. Those of execs end with the engine, as these do; what is here is certain to.
    #[serde(default)]
    pub standins: Vec<Identity>,
    /// What is still to be run for containers.
    #[serde(default)]
    pub poststop: Vec<Poststop>,
    /// The network namespace whose NICs are wired, if it is not the sandbox's own.
    #[serde(default)]
    pub network: Option<Wired>,
    /// The cgroups, those above others last.
    #[serde(default)]
    pub cgroups: Vec<Trace>,
    /// Mount points outside of the sandbox's directory, in the order of mounting; one that was mounted on twice is
    /// here twice.
    pub mounts: Vec<PathBuf>,
}

/// Version of the form written here.
pub const VERSION: u32 = 1;

impl Record {
    /// Writes the record: a reader finds the old one or the new one, whole. Where the directory was removed by
    /// somebody who cleaned up, nothing is left to record.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        let new = dir.join(NEW_FILE);
        if !dir.exists() {
            return Ok(());
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, dir.join(FILE))
    }

    /// Reads the record of a sandbox's directory; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn load(dir: &Path) -> io::Result<Option<Self>> {
        use io::Read;
        let file = match fs::File::open(dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_LEN).read_to_end(&mut bytes)?;
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// Removes the record. None there is fine.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(dir: &Path) -> io::Result<()> {
        for name in [NEW_FILE, FILE] {
            match fs::remove_file(dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        let record = Record {
            version: VERSION,
            vmm: Some(Identity { pid: 7, started: 8 }),
            mounts: vec!["/a b".into()],
            ..Record::default()
        };
        record.save(dir.path()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), Some(record));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        Record::remove(dir.path()).unwrap();
        Record::remove(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Record::load(dir.path()).is_err());
    }
}
