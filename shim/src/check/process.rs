//! What /proc tells of a process's rights: proc(5), capabilities(7), namespaces(7).

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The kinds of namespaces, as `/proc/PID/ns` names them.
pub const NAMESPACES: [&str; 8] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"];

/// The resource limits that are looked at: (our name, the kernel's in `/proc/PID/limits`).
pub const LIMITS: [(&str, &str); 4] = [
    ("nofile", "Max open files"),
    ("nproc", "Max processes"),
    ("core", "Max core file size"),
    ("fsize", "Max file size"),
];

/// Mode of seccomp(2) in which filters decide.
pub const FILTERED: u8 = 2;

/// `PF_USER_WORKER` of the kernel's linux/sched.h, in the flags of `/proc/PID/task/TID/stat`.
const USER_WORKER: u64 = 0x4000;

/// Names of the capabilities by number, without `CAP_`.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// A set of capabilities, one bit for each number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set(pub u64);

impl Set {
    /// The names of its members, those without a name by number.
    pub fn names(self) -> Vec<String> {
        let has = |number: &u32| self.0 >> number & 1 == 1;
        let name = |number: u32| {
            let name = CAPABILITIES.get(usize::try_from(number).ok()?)?;
            Some((*name).to_owned())
        };
        (0..u64::BITS)
            .filter(has)
            .map(|number| name(number).unwrap_or_else(|| number.to_string()))
            .collect()
    }
}

/// A thread's five sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What it may do now.
    pub effective: Set,
    /// What it may take up.
    pub permitted: Set,
    /// What survives exec.
    pub inheritable: Set,
    /// What it could ever have.
    pub bounding: Set,
    /// What it gives to programs without file capabilities.
    pub ambient: Set,
}

impl Capabilities {
    /// The sets with their names.
    pub fn sets(&self) -> [(&'static str, Set); 5] {
        [
            ("effective", self.effective),
            ("permitted", self.permitted),
            ("inheritable", self.inheritable),
            ("bounding", self.bounding),
            ("ambient", self.ambient),
        ]
    }
}

/// A thread and what is its own: `/proc/PID/task/TID/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// Its number; of a process's first thread the process's.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// Real, effective, saved and file system user id, as the host sees them.
    pub uids: Vec<u32>,
    /// The same of the group.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// Exec gives it no right.
    pub no_new_privs: bool,
    /// 0 no seccomp, 1 strict, [`FILTERED`].
    pub seccomp: u8,
    /// Number of its filters, where the kernel (5.9 or later) tells.
    pub filters: Option<u32>,
    /// It is the kernel's own work on the process's account (KVM's, vhost's) and never runs the process's code.
    pub of_kernel: bool,
}

/// A namespace of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Of [`NAMESPACES`].
    pub kind: &'static str,
    /// Its number.
    pub id: String,
    /// It is that of the host's first process.
    pub hosts: bool,
}

/// What is at `/` for a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// It is the host's.
    pub hosts: bool,
    /// It is the sandbox's share.
    pub share: bool,
    /// There is nothing in it.
    pub empty: bool,
    /// Nothing can be written there.
    pub read_only: bool,
}

/// An open descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What it is, as the kernel names it: a path, `socket:[…]`, `anon_inode:kvm-vm`, …
    pub target: String,
    /// The flags that it was opened with.
    pub flags: i32,
    /// The mount that it was opened on.
    pub mount: Option<u32>,
}

/// A limit of `/proc/PID/limits`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Of [`LIMITS`].
    pub name: &'static str,
    /// In effect: a number or `unlimited`.
    pub soft: String,
    /// The highest to which it may be raised.
    pub hard: String,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Its pid on the host.
    pub pid: u32,
    /// Its threads: the first one, then the others by number.
    pub threads: Vec<Thread>,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
    /// Whether it may be looked into and dumped; `None` if that cannot be seen (of root's processes it cannot).
    pub dumpable: Option<bool>,
    /// Its root directory; `None` if it cannot be seen.
    pub root: Option<Root>,
    /// Its limits.
    pub limits: Vec<Limit>,
    /// Its descriptors, by number.
    pub descriptors: Vec<Descriptor>,
    /// Numbers of the mounts that it can reach by path.
    pub mounts: BTreeSet<u32>,
    /// Its cgroups, as `/proc/PID/cgroup` has them.
    pub cgroups: Vec<String>,
}

/// A procfs: the host's own, or a test's tree.
#[derive(Clone, Debug)]
pub struct Proc(PathBuf);

impl Default for Proc {
    fn default() -> Self {
        Self("/proc".into())
    }
}

impl Proc {
    /// The tree at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    fn of(&self, pid: u32) -> PathBuf {
        self.0.join(pid.to_string())
    }

    /// Looks at a process. `share`: the sandbox's.
    ///
    /// # Errors
    /// When it has ended, or may not be looked at.
    pub fn look(&self, pid: u32, share: &Path) -> io::Result<Process> {
        let dir = self.of(pid);
        let threads = threads(&dir, pid)?;
        let euid = threads.first().and_then(|thread| thread.uids.get(1).copied());
        Ok(Process {
            pid,
            namespaces: self.namespaces(&dir)?,
            dumpable: euid.and_then(|euid| dumpable(&dir, euid)),
            root: self.root(&dir, share),
            limits: limits(&fs::read_to_string(dir.join("limits"))?),
            descriptors: descriptors(&dir)?,
            mounts: mounts(&fs::read_to_string(dir.join("mountinfo"))?),
            cgroups: fs::read_to_string(dir.join("cgroup"))?
                .lines()
                .map(str::to_owned)
                .collect(),
            threads,
        })
    }

    /// The namespaces; those that the kernel does not have are left out.
    fn namespaces(&self, dir: &Path) -> io::Result<Vec<Namespace>> {
        let mut namespaces = Vec::new();
        // Where even root may not look at the first process, as in some containers, this one's stand for the host's.
        let first = self.of(1);
        let host = match fs::read_link(first.join("ns").join("mnt")) {
            Ok(_) => first,
            Err(_) => self.0.join("self"),
        };
        for kind in NAMESPACES {
            let link = |dir: &Path| fs::read_link(dir.join("ns").join(kind));
            let own = match link(dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && dir.join("ns").exists() => continue,
                other => other?,
            };
            let id = own.to_string_lossy();
            namespaces.push(Namespace {
                kind,
                id: id.split(['[', ']']).nth(1).unwrap_or(&id).to_owned(),
                hosts: link(&host).is_ok_and(|hosts| hosts == own),
            });
        }
        Ok(namespaces)
    }

    fn root(&self, dir: &Path, share: &Path) -> Option<Root> {
        let root = dir.join("root").join(".");
        let place = |path: &Path| {
            let found = fs::metadata(path).ok()?;
            Some((found.dev(), found.ino()))
        };
        let own = place(&root)?;
        let flags = nix::sys::statvfs::statvfs(&root).ok()?.flags();
        Some(Root {
            hosts: place(&self.of(1).join("root").join(".")) == Some(own),
            share: place(share) == Some(own),
            empty: fs::read_dir(&root).ok()?.next().is_none(),
            read_only: flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY),
        })
    }

    /// The processes whose parent is `pid`, with their names.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn children(&self, pid: u32) -> io::Result<Vec<(u32, String)>> {
        let mut children = Vec::new();
        for child in numbers(&self.0)? {
            // One that ends meanwhile is none.
            let Ok(status) = fs::read_to_string(self.of(child).join("status")) else {
                continue;
            };
            if number(&status, "PPid:") == Some(pid) {
                children.push((child, text(&status, "Name:").to_owned()));
            }
        }
        Ok(children)
    }

    /// The processes of which a user is the real one.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn of_user(&self, uid: u32) -> io::Result<Vec<u32>> {
        let is = |pid: &u32| {
            let status = fs::read_to_string(self.of(*pid).join("status"));
            status.is_ok_and(|status| number(&status, "Uid:") == Some(uid))
        };
        Ok(numbers(&self.0)?.into_iter().filter(is).collect())
    }
}

/// The entries of a directory that are numbers, in order.
fn numbers<N: FromStr + Ord>(dir: &Path) -> io::Result<Vec<N>> {
    let entries = fs::read_dir(dir)?;
    let mut numbers: Vec<N> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort();
    Ok(numbers)
}

/// The text of a field of a status file.
fn text<'a>(status: &'a str, field: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap_or_default()
        .trim()
}

/// The first number of a field.
fn number<N: FromStr>(status: &str, field: &str) -> Option<N> {
    text(status, field).split_ascii_whitespace().next()?.parse().ok()
}

fn threads(dir: &Path, pid: u32) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    let mut tids = numbers::<u32>(&dir.join("task"))?;
    // The kernel begins anew with low numbers when it has run out of high ones, so the first thread may have the highest.
    tids.sort_by_key(|tid| *tid != pid);
    for tid in tids {
        let task = dir.join("task").join(tid.to_string());
        match fs::read_to_string(task.join("status")) {
            Ok(status) => threads.push(Thread {
                of_kernel: fs::read_to_string(task.join("stat")).is_ok_and(|stat| is_of_kernel(&stat)),
                ..thread(tid, &status)?
            }),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    if threads.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it has ended"));
    }
    Ok(threads)
}

/// By field 9 of the stat file. The second field, the name, may hold blanks and parentheses.
fn is_of_kernel(stat: &str) -> bool {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let flags = fields
        .split_ascii_whitespace()
        .nth(6)
        .and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & USER_WORKER != 0)
}

/// Whether what was to be read ended meanwhile.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
}

fn thread(tid: u32, status: &str) -> io::Result<Thread> {
    let missing =
        |field: &str| io::Error::new(io::ErrorKind::InvalidData, format!("its status has no {field}"));
    let ids = |field: &str| -> Vec<u32> {
        text(status, field)
            .split_ascii_whitespace()
            .filter_map(|id| id.parse().ok())
            .collect()
    };
    let set = |field: &str| {
        let set = u64::from_str_radix(text(status, field), 16);
        set.map(Set).map_err(|_| missing(field))
    };
    Ok(Thread {
        tid,
        name: text(status, "Name:").to_owned(),
        uids: ids("Uid:"),
        gids: ids("Gid:"),
        groups: ids("Groups:"),
        capabilities: Capabilities {
            effective: set("CapEff:")?,
            permitted: set("CapPrm:")?,
            inheritable: set("CapInh:")?,
            bounding: set("CapBnd:")?,
            ambient: set("CapAmb:")?,
        },
        no_new_privs: number::<u8>(status, "NoNewPrivs:").ok_or_else(|| missing("NoNewPrivs"))? == 1,
        seccomp: number(status, "Seccomp:").ok_or_else(|| missing("Seccomp"))?,
        filters: number(status, "Seccomp_filters:"),
        of_kernel: false,
    })
}

/// The kernel gives the files of a process that must not be looked into to root, and those of others to its user.
fn dumpable(dir: &Path, euid: u32) -> Option<bool> {
    let owner = fs::metadata(dir.join("status")).ok()?.uid();
    match owner == euid {
        _ if euid == 0 => None,
        same => Some(same),
    }
}

fn limits(table: &str) -> Vec<Limit> {
    let find = |(name, kernels): &(&'static str, &str)| {
        let line = table.lines().find_map(|line| line.strip_prefix(kernels))?;
        let mut words = line.split_ascii_whitespace();
        Some(Limit {
            name,
            soft: words.next()?.to_owned(),
            hard: words.next()?.to_owned(),
        })
    };
    LIMITS.iter().filter_map(find).collect()
}

fn descriptors(dir: &Path) -> io::Result<Vec<Descriptor>> {
    let mut descriptors = Vec::new();
    for number in numbers::<i32>(&dir.join("fd"))? {
        let target = match fs::read_link(dir.join("fd").join(number.to_string())) {
            Err(error) if is_gone(&error) => continue,
            other => other?.to_string_lossy().into_owned(),
        };
        let info = match fs::read_to_string(dir.join("fdinfo").join(number.to_string())) {
            Err(error) if is_gone(&error) => continue,
            other => other?,
        };
        descriptors.push(Descriptor {
            number,
            target,
            flags: i32::from_str_radix(text(&info, "flags:"), 8).unwrap_or(0),
            mount: self::number(&info, "mnt_id:"),
        });
    }
    Ok(descriptors)
}

fn mounts(mountinfo: &str) -> BTreeSet<u32> {
    let id = |line: &str| line.split_ascii_whitespace().next()?.parse().ok();
    mountinfo.lines().filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\\nNoNewPrivs:\\t1\nUid:\t5\t6\t7\t8\nGid:\t1 1 1 1\nGroups:\t \nCapInh:\t0\n\
                          CapPrm:\t1\nCapEff:\t2\nCapBnd:\t3\nCapAmb:\t4\nNoNewPrivs:\t0\nSeccomp:\t2\n\
                          Seccomp_filters:\t3\n";

    #[test]
    fn capabilities_have_names() {
        assert_eq!(Set(0).names(), [""; 0]);
        assert_eq!(
            Set(1 << 27 | 1 << 40 | 1 << 63 | 1).names(),
            ["chown", "mknod", "checkpoint_restore", "63"]
        );
    }

    #[test]
    fn a_hostile_name_is_no_field() {
        let thread = thread(9, STATUS).unwrap();
        assert!(!thread.no_new_privs);
        assert_eq!((thread.uids, thread.groups), (vec![5, 6, 7, 8], vec![]));
        assert_eq!((thread.seccomp, thread.filters), (2, Some(3)));
        assert_eq!(thread.capabilities.ambient, Set(4));
    }

    #[test]
    fn the_first_thread_is_first_whatever_its_number() {
        let dir = tempfile::tempdir().unwrap();
        for tid in [9, 42, 100] {
            let task = dir.path().join("task").join(tid.to_string());
            fs::create_dir_all(&task).unwrap();
            fs::write(task.join("status"), STATUS).unwrap();
        }
        let threads = threads(dir.path(), 42).unwrap();
        let tids: Vec<u32> = threads.iter().map(|thread| thread.tid).collect();
        assert_eq!(tids, [42, 9, 100]);
    }

    #[test]
    fn the_kernels_own_threads_are_told_by_their_flags() {
        assert!(!is_of_kernel(
            "42 (a) 1 1 1 1 1 1 16384) S 1 42 42 0 -1 4194368 1 2"
        ));
        assert!(is_of_kernel("42 (vhost-41) S 1 42 42 0 -1 4210752 1 2"));
        assert!(!is_of_kernel("42 (x"));
    }

    #[test]
    fn what_the_kernel_does_not_tell_is_an_error() {
        assert!(super::thread(1, "Name:\tx\n").is_err());
        assert_eq!(limits("Limit  Soft Limit\n"), []);
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let seen = Proc::default()
            .look(std::process::id(), Path::new("/nonexistent"))
            .unwrap();
        assert_eq!(seen.threads[0].tid, std::process::id());
        assert!(seen.descriptors.iter().any(|fd| fd.number == 2));
        assert_eq!(seen.limits.len(), LIMITS.len());
        assert!(seen.namespaces.iter().any(|namespace| namespace.kind == "user"));
        assert!(!seen.mounts.is_empty());
        assert!(seen.root.is_some_and(|root| !root.share && !root.empty));
        let parent = std::os::unix::process::parent_id();
        let children = Proc::default().children(parent).unwrap();
        assert!(children.iter().any(|(pid, _)| *pid == std::process::id()));
        let user = nix::unistd::getuid().as_raw();
        assert!(
            Proc::default()
                .of_user(user)
                .unwrap()
                .contains(&std::process::id())
        );
    }
}
