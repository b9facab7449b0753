//! What a sandbox is doing, for whoever looks from outside: a small file in its directory, written anew when something
//! changes, beside the way of a start and never in it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use husk_agent_protocol::limits::is_valid_id;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{lock, record::Record, table::Table};
use crate::host::{
    pid::Identity,
    statedir::{RUN, StateDir},
};

/// Name of the file in the sandbox's directory.
const FILE: &str = "status.json";

/// Name under which it is written before it takes its place.
const NEW_FILE: &str = "status.json.new";

/// Name of the sandbox's own log in its directory.
pub const LOG: &str = "log";

/// Name of the guest's console in the sandbox's directory.
pub const CONSOLE: &str = "console";

/// Longest file that is read, in bytes.
const MAX_LEN: u64 = 16 << 20;

/// A sandbox, as its engine last described it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its machine's vCPUs.
    pub vcpus: u8,
    /// Its machine's memory in MiB.
    pub memory_mib: u32,
    /// When it was started, in seconds since 1970.
    pub created: u64,
    /// Its containers, by id.
    pub containers: Vec<ContainerStatus>,
}

/// A container, as its engine last described it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its id.
    pub id: String,
    /// The pid that stands for it on the host.
    pub pid: u32,
    /// `created`, `running`, `pausing`, `paused` or `stopped`, as runc says it.
    pub status: String,
    /// When it was created, in seconds since 1970.
    pub created: u64,
    /// How many further processes were started in it and run.
    pub execs: usize,
}

/// A sandbox that somebody looks at from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its namespace.
    pub namespace: String,
    /// Its id.
    pub id: String,
    /// Whether its engine lives. If not, nothing in it does.
    pub alive: bool,
    /// The VMM's pid; 0 before it is started.
    pub vmm: u32,
    /// What its engine said last.
    pub status: Status,
    /// Its processes on the host, as they were recorded: none need live any more.
    pub processes: Vec<(Role, Identity)>,
    /// Its directory.
    pub dir: PathBuf,
}

/// What a process on the host is to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The engine: containerd's shim, or the `husk` command.
    Engine,
    /// `husk-vmm`.
    Vmm,
    /// `husk-fsd`.
    Fsd,
    /// `husk-standin`, of a container or an exec.
    StandIn,
    /// Something else that the engine runs: a hook, a logger.
    Helper,
}

impl Seen {
    /// Where the share is made that the guest sees.
    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// Where the sandbox's log is kept; see [`crate::host::ringlog::read`].
    pub fn log(&self) -> PathBuf {
        self.dir.join(LOG)
    }

    /// Where the guest's console is kept; see [`crate::host::ringlog::read`].
    pub fn console(&self) -> PathBuf {
        self.dir.join(CONSOLE)
    }
}

/// Seconds since 1970.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The sandboxes of this machine, by namespace and id: those that run, and what is left of those whose engine died.
///
/// # Errors
/// When the directory of all of them cannot be read.
pub fn sandboxes() -> io::Result<Vec<Seen>> {
    sandboxes_in(Path::new(RUN))
}

pub(super) fn sandboxes_in(run: &Path) -> io::Result<Vec<Seen>> {
    let mut all = Vec::new();
    for namespace in names(run)? {
        // One that is removed meanwhile has no sandboxes.
        for id in names(&run.join(&namespace)).unwrap_or_default() {
            all.extend(look(run, &namespace, &id));
        }
    }
    Ok(all)
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_valid_id(name))
        .collect();
    names.sort();
    Ok(names)
}

/// A sandbox, unless it is on its way in or out.
fn look(run: &Path, namespace: &str, id: &str) -> Option<Seen> {
    let dir = StateDir::path_of(run, namespace, id);
    let record = Record::load(&dir).ok()??;
    let alive = record.engine.is_some_and(|engine| engine.lives());
    let status = load(&dir).unwrap_or_default();
    Some(Seen {
        namespace: namespace.to_owned(),
        id: id.to_owned(),
        alive,
        vmm: record.vmm.map_or(0, |vmm| vmm.pid),
        status,
        processes: processes(&record),
        dir,
    })
}

fn processes(record: &Record) -> Vec<(Role, Identity)> {
    let one = |role, identity: Option<Identity>| identity.map(|identity| (role, identity));
    let programs = [
        one(Role::Engine, record.engine),
        one(Role::Vmm, record.vmm),
        one(Role::Fsd, record.fsd),
    ];
    let standins = record.standins.iter().map(|identity| (Role::StandIn, *identity));
    programs.into_iter().flatten().chain(standins).collect()
}

fn load(dir: &Path) -> io::Result<Status> {
    let mut bytes = Vec::new();
    fs::File::open(dir.join(FILE))?
        .take(MAX_LEN)
        .read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Removes the file of a sandbox's directory. None there is fine.
///
/// # Errors
/// The file system's.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    for name in [NEW_FILE, FILE] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Keeps the file of one sandbox as things are, until it is closed.
#[derive(Debug)]
pub(super) struct Keeper {
    /// The directory; `None` once it is closed.
    dir: Mutex<Option<PathBuf>>,
    changed: Arc<Notify>,
}

impl Keeper {
    /// Begins. `sandbox` is what does not change; the rest is the table's.
    pub fn begin(dir: &Path, sandbox: Status, table: Arc<Mutex<Table>>) -> Arc<Self> {
        let changed = lock(&table).changed();
        let keeper = Arc::new(Self {
            dir: Mutex::new(Some(dir.to_owned())),
            changed: Arc::clone(&changed),
        });
        let this = Arc::clone(&keeper);
        tokio::spawn(async move {
            loop {
                let containers = lock(&table).describe();
                let status = Status {
                    containers,
                    ..sandbox.clone()
                };
                match this.write(&status) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => tracing::warn!(%error, "the sandbox's status is not written"),
                }
                changed.notified().await;
            }
        });
        keeper
    }

    /// Writes the file; false when there is none any more.
    fn write(&self, status: &Status) -> io::Result<bool> {
        let dir = self.dir.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(dir) = &*dir else { return Ok(false) };
        let new = dir.join(NEW_FILE);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(status)?)?;
        fs::rename(&new, dir.join(FILE))?;
        Ok(true)
    }

    /// Ends, and removes the file.
    ///
    /// # Errors
    /// The file system's.
    pub fn close(&self) -> io::Result<()> {
        let dir = self.dir.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.changed.notify_one();
        dir.map_or(Ok(()), |dir| remove(&dir))
    }
}
