//! cgroups of the host: made for a sandbox and its containers, entered by their processes, and removed without a trace.
//!
//! A process is born in its cgroup: version 2's by CLONE_INTO_CGROUP, version 1's by a step before its program is
//! executed. On kernels older than 6.13 KVM_CREATE_VM then takes some milliseconds more (a thread of KVM's is moved); the
//! VMM is limited from its first page on all the same.

mod cpulist;
mod hierarchy;
mod limits;
mod path;
mod removal;
mod systemd;

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::{Deserialize, Serialize};

pub use cpulist::CpuList;
pub use hierarchy::{Hierarchies, Hierarchy};
pub use limits::Limits;
pub use path::{Driver, PathError, Unit, Wanted};
pub use systemd::runs as systemd_runs;

/// What a directory that husk made carries, so that only such are removed.
const MARK: &std::ffi::CStr = c"trusted.husk";

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Its path makes no sense.
    #[error("linux.cgroupsPath: {0}")]
    Path(#[from] PathError),
    /// Others live there.
    #[error("linux.cgroupsPath: the container's cgroup {} is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// The kernel or systemd refused.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError + use<> {
    let what = format!("{what} {}", path.display());
    move |source| CgroupError::Host { what, source }
}

/// What a cgroup leaves on the host: for the record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Its directory in each hierarchy.
    pub dirs: Vec<PathBuf>,
    /// Its unit, if it is systemd's.
    pub unit: Option<String>,
}

/// A cgroup to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    places: Vec<(Hierarchy, PathBuf)>,
    unit: Option<Unit>,
}

impl Plan {
    /// For the cgroup `wanted` in `hierarchies`.
    pub fn new(hierarchies: &Hierarchies, wanted: &Wanted) -> Self {
        let (path, unit) = match wanted {
            Wanted::Path(path) => (path.clone(), None),
            Wanted::Unit(unit) => (unit.path(), Some(unit.clone())),
        };
        let places = hierarchies.0.iter().cloned().zip(hierarchies.resolve(&path));
        Self {
            places: places.collect(),
            unit,
        }
    }

    /// What it will leave.
    pub fn trace(&self) -> Trace {
        Trace {
            dirs: self.places.iter().map(|(_, path)| path.clone()).collect(),
            unit: self.unit.as_ref().map(|unit| unit.name.clone()),
        }
    }

    /// Makes it, for `first` to be in: systemd makes none without a process. May block.
    ///
    /// # Errors
    /// Then what was made is to be removed by the trace.
    pub fn make(self, first: u32, limits: &Limits) -> Result<Cgroup, CgroupError> {
        if let Some(unit) = &self.unit {
            systemd::start(unit, first, limits).map_err(|source| CgroupError::Host {
                what: format!("have systemd make {}", unit.name),
                source,
            })?;
        } else {
            for (_, path) in &self.places {
                if holds_others(path) {
                    return Err(CgroupError::NotEmpty(path.clone()));
                }
            }
        }
        for (hierarchy, path) in &self.places {
            make_dir(hierarchy, path).map_err(failed("make the cgroup", path))?;
        }
        let cgroup = Cgroup {
            entry: Entry::open(self.places.iter().map(|(hierarchy, path)| (hierarchy, path)))?,
            places: self.places,
            unit: self.unit,
        };
        cgroup.set(limits);
        Ok(cgroup)
    }
}

/// Whether processes live in a cgroup.
fn holds_others(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|pids| !pids.trim().is_empty())
}

/// Makes a directory of a hierarchy with those above it.
fn make_dir(hierarchy: &Hierarchy, path: &Path) -> io::Result<()> {
    let below: Vec<&Path> = path
        .ancestors()
        .take_while(|dir| *dir != hierarchy.mount && dir.starts_with(&hierarchy.mount))
        .collect();
    // Another sandbox that ends may remove one above ours just now: then from the top again.
    const ATTEMPTS: usize = 10;
    for attempt in 1.. {
        match make_each(hierarchy, &below) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {}
            other => return other,
        }
    }
    Ok(())
}

fn make_each(hierarchy: &Hierarchy, below: &[&Path]) -> io::Result<()> {
    if hierarchy.controllers.is_none() {
        pass_controllers(&hierarchy.mount);
    }
    for (index, dir) in below.iter().enumerate().rev() {
        match fs::create_dir(dir) {
            Ok(()) => mark(dir)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        if hierarchy.controllers.is_none() {
            if index > 0 {
                pass_controllers(dir);
            }
        } else if hierarchy.has("cpuset") {
            inherit_cpuset(dir)?;
        }
    }
    Ok(())
}

/// Lets those beneath a cgroup of version 2 have the controllers that it has. One that has processes cannot: what is
/// not there is missed when limits are set.
fn pass_controllers(dir: &Path) {
    let read = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let passed = read("cgroup.subtree_control");
    for controller in read("cgroup.controllers").split_whitespace() {
        if !passed.split_whitespace().any(|known| known == controller) {
            let written = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            if let Err(error) = written {
                tracing::debug!(%error, controller, dir = %dir.display(), "a controller is not passed on");
            }
        }
    }
}

/// A new cgroup of version 1's cpuset takes no process until it has CPUs and memory nodes: its parent's.
fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(dir.join(name))?.trim().is_empty() {
            fs::write(dir.join(name), fs::read_to_string(parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

fn mark(dir: &Path) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: three pointers to memory that lives through the call, the last with its length.
    match unsafe { libc::lsetxattr(path.as_ptr(), MARK.as_ptr(), b"1".as_ptr().cast(), 1, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_marked(dir: &Path) -> bool {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else {
        return false;
    };
    let mut value = [0_u8; 8];
    // SAFETY: the first two live through the call; the third is as long as is said.
    let length = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            MARK.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    length > 0
}

/// A cgroup that was made, in all hierarchies.
#[derive(Debug)]
pub struct Cgroup {
    places: Vec<(Hierarchy, PathBuf)>,
    unit: Option<Unit>,
    entry: Entry,
}

impl Cgroup {
    /// The way in.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Whether it is the one that `plan` would make.
    pub fn is(&self, plan: &Plan) -> bool {
        self.places
            .iter()
            .map(|(_, path)| path)
            .eq(plan.places.iter().map(|(_, path)| path))
    }

    /// Sets limits, as far as the host's controllers go: those for a container's sake hold in the guest in any case.
    pub fn set(&self, limits: &Limits) {
        for (hierarchy, path) in &self.places {
            for (file, value) in limits.files(hierarchy) {
                let path = path.join(file);
                if let Err(error) = fs::write(&path, &value) {
                    tracing::warn!(%error, value, "the limit {} is not set", path.display());
                }
            }
        }
        if let Some(unit) = &self.unit {
            // So that systemd does not take them back when it reads its units anew.
            if let Err(error) = systemd::set(&unit.name, limits) {
                tracing::debug!(%error, unit = unit.name, "systemd was not told of limits");
            }
        }
    }

    /// How many processes of it the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let count = |(hierarchy, path): &(Hierarchy, PathBuf)| {
            let file = match hierarchy.controllers {
                None => "memory.events",
                Some(_) if hierarchy.has("memory") => "memory.oom_control",
                Some(_) => return None,
            };
            let text = fs::read_to_string(path.join(file)).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
            line.trim().parse().ok()
        };
        self.places.iter().filter_map(count).max().unwrap_or(0)
    }

    /// Its path where memory is counted, for people.
    pub fn path(&self) -> PathBuf {
        let memory = self
            .places
            .iter()
            .find(|(hierarchy, _)| hierarchy.has("memory"))
            .or_else(|| self.places.first());
        memory.map(|(_, path)| path.clone()).unwrap_or_default()
    }
}

/// The way into a cgroup: its files, opened for a process that will enter.
#[derive(Debug, Default)]
pub struct Entry {
    /// The directory of version 2, for CLONE_INTO_CGROUP.
    unified: Option<File>,
    /// The `cgroup.procs` of all hierarchies; version 2's is the first if there is one.
    procs: Vec<File>,
}

impl Entry {
    fn open<'a>(places: impl Iterator<Item = (&'a Hierarchy, &'a PathBuf)>) -> Result<Self, CgroupError> {
        let mut entry = Self::default();
        for (hierarchy, path) in places {
            let procs = path.join("cgroup.procs");
            let file = File::options()
                .write(true)
                .open(&procs)
                .map_err(failed("open", &procs))?;
            if hierarchy.controllers.is_none() {
                entry.unified = Some(File::open(path).map_err(failed("open", path))?);
                entry.procs.insert(0, file);
            } else {
                entry.procs.push(file);
            }
        }
        Ok(entry)
    }

    /// Moves a process in, with all its threads.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(&self, pid: u32) -> io::Result<()> {
        for procs in &self.procs {
            (&*procs).write_all(pid.to_string().as_bytes())?;
        }
        Ok(())
    }

    /// The directory of version 2, if there is one.
    pub fn unified(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(AsFd::as_fd)
    }

    /// Brings the calling process in; one that was born in version 2's directory only into the others. False: refused,
    /// and errno tells why. Only async-signal-safe calls.
    pub fn enter(&self, born: bool) -> bool {
        let skipped = usize::from(born && self.unified.is_some());
        self.procs.iter().skip(skipped).all(|procs| {
            // SAFETY: a byte that lives through the call, and a descriptor that is ours.
            unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) == 1 }
        })
    }
}

/// Where this process was before it moved into a sandbox's cgroup.
static ORIGIN: OnceLock<Entry> = OnceLock::new();

/// Moves this process into a cgroup. What it starts from now on is born where it came from unless told otherwise.
///
/// # Errors
/// When the kernel refuses.
pub fn move_in(hierarchies: &Hierarchies, cgroup: &Cgroup) -> Result<(), CgroupError> {
    let home = |hierarchy: &Hierarchy| {
        let own = hierarchy.mount.join(&hierarchy.own);
        // It may have been removed under us.
        if own.is_dir() {
            own
        } else {
            hierarchy.mount.clone()
        }
    };
    let places: Vec<(&Hierarchy, PathBuf)> = hierarchies
        .0
        .iter()
        .map(|hierarchy| (hierarchy, home(hierarchy)))
        .collect();
    let origin = Entry::open(places.iter().map(|(hierarchy, path)| (*hierarchy, path)))?;
    // The first of this process, if it ever has several.
    let _ = ORIGIN.set(origin);
    // By systemd it was moved already, where systemd has a cgroup; the rest is ours.
    let path = cgroup.path();
    cgroup
        .entry
        .take(std::process::id())
        .map_err(failed("move husk's own process into", &path))
}

/// Where what this process starts is born; `None`: where it is itself.
pub fn origin() -> Option<&'static Entry> {
    ORIGIN.get()
}

/// Moves this process back to where it came from.
///
/// # Errors
/// When that cgroup is gone.
pub fn move_back() -> io::Result<()> {
    origin().map_or(Ok(()), |origin| origin.take(std::process::id()))
}

#[cfg(test)]
#[path = "cgroup_test.rs"]
mod tests;
