//! What has to be true of a sandbox's processes: each fault is one sentence about a fact that is missing.

use std::path::Path;

use husk_vmm_protocol::fds::{fsd, vmm};

use super::process::{Capabilities, Descriptor, FILTERED, Process, Set, Thread};
use super::sandbox::Landlock;

/// What `husk-fsd` keeps (it acts for all users of the guest, with files only): chown, dac_override, dac_read_search,
/// fowner, fsetid, setgid, setuid, mknod and setfcap by their numbers.
pub const FSD: Set = Set(1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31);

/// Namespaces that the VMM has for itself.
const VMM_NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Namespaces that the file server has for itself. Not that of users: it acts for all of them.
const FSD_NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Limits that a program has set itself: (name, the most that the hard one may be).
type Limits = [(&'static str, u64); 3];

/// The VMM's: a descriptor for each file that the guest has open, and its threads.
pub const VMM_LIMITS: Limits = [("nofile", 1 << 20), ("nproc", 1024), ("core", 0)];

/// The file server's: it starts no thread once it serves. (Neither has a limit to a file's size but the one that the
/// engine was started with: both write to the files of the share.)
pub const FSD_LIMITS: Limits = [("nofile", 1 << 20), ("nproc", 0), ("core", 0)];

/// What a VMM makes for itself and is handed for its guest, besides the files of the share.
const VMM_OWN: [&str; 7] = [
    "anon_inode:kvm-vm",
    "anon_inode:kvm-vcpu:",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[timerfd]",
    "socket:[",
    "pipe:[",
];

/// What is wrong with a VMM. `neighbours`: processes of other sandboxes, and of the host, that have its user.
pub fn of_vmm(process: &Process, engine: Option<&Process>, neighbours: &[u32]) -> Vec<String> {
    let mut faults = namespaces(process, engine, &VMM_NAMESPACES);
    for thread in &process.threads {
        let who = Who(process, thread);
        faults.extend(no_capabilities(thread).map(|fault| who.says(&fault)));
        faults.extend(locked(thread).map(|fault| who.says(&fault)));
        if thread.uids.iter().chain(&thread.gids).any(|id| *id == 0) {
            faults.push(who.says("is root's: it has user or group 0"));
        } else if !all_same(&thread.uids) {
            faults.push(who.says("can change between several users"));
        }
    }
    if let Some(neighbour) = neighbours.first() {
        faults.push(format!(
            "its user is not its own: process {neighbour} has it, too"
        ));
    }
    match process.root {
        None => faults.push("its root directory cannot be seen".into()),
        Some(root) if root.hosts => faults.push("its root directory is the host's".into()),
        Some(root) if !root.empty => faults.push("its root directory is not empty".into()),
        Some(root) if !root.read_only => faults.push("its root directory can be written to".into()),
        Some(_) => {}
    }
    faults.extend(common(process, &VMM_LIMITS));
    let foreign = |fd: &&Descriptor| !is_table_of_vmm(fd) && !is_own_of_vmm(fd, engine);
    faults.extend(process.descriptors.iter().filter(foreign).map(stray));
    faults
}

/// What is wrong with a file server.
pub fn of_fsd(process: &Process, engine: Option<&Process>) -> Vec<String> {
    let mut faults = namespaces(process, engine, &FSD_NAMESPACES);
    for thread in &process.threads {
        let who = Who(process, thread);
        faults.extend(only_file_capabilities(&thread.capabilities).map(|fault| who.says(&fault)));
        faults.extend(locked(thread).map(|fault| who.says(&fault)));
    }
    match process.root {
        None => faults.push("its root directory cannot be seen".into()),
        Some(root) if !root.share => faults.push("its root directory is not the share".into()),
        Some(_) => {}
    }
    faults.extend(common(process, &FSD_LIMITS));
    let foreign = |fd: &&Descriptor| !is_table_of_fsd(fd) && opened_by(fd, engine);
    faults.extend(process.descriptors.iter().filter(foreign).map(stray));
    faults
}

/// What is wrong with a stand-in. Its namespaces and its user are those that hold the container's place.
pub fn of_standin(process: &Process) -> Vec<String> {
    let mut faults = Vec::new();
    for thread in &process.threads {
        let who = Who(process, thread);
        faults.extend(no_capabilities(thread).map(|fault| who.says(&fault)));
        faults.extend(locked(thread).map(|fault| who.says(&fault)));
    }
    faults.extend(common(process, &[("core", 0)]));
    faults
}

/// What is wrong with what Landlock denies a process, of all that `kernel`, an ABI, could deny it.
pub fn of_landlock(has: Landlock, kernel: u32) -> Option<String> {
    let abi = match has {
        Landlock::Abi(abi) => abi,
        // The file server takes none before 2.
        Landlock::Missing if kernel >= 2 => 0,
        Landlock::Missing | Landlock::Unknown => return None,
    };
    (abi < kernel).then(|| {
        format!("Landlock denies it only what ABI {abi} can (as it logged); this kernel has ABI {kernel}")
    })
}

/// Whom a fault is about: the process, or one of its threads that differs from the first.
struct Who<'a>(&'a Process, &'a Thread);

impl Who<'_> {
    fn says(&self, what: &str) -> String {
        let first = self
            .0
            .threads
            .first()
            .is_some_and(|first| first.tid == self.1.tid);
        match (first, self.0.threads.len()) {
            (true, 1) => format!("it {what}"),
            _ => format!("thread {} ({}) {what}", self.1.tid, self.1.name),
        }
    }
}

fn all_same(ids: &[u32]) -> bool {
    ids.windows(2).all(|pair| pair.first() == pair.last())
}

fn namespaces(process: &Process, engine: Option<&Process>, wanted: &[&str]) -> Vec<String> {
    let shared = |kind: &&&str| {
        let of = |process: &Process| process.namespaces.iter().find(|own| own.kind == **kind).cloned();
        let own = of(process);
        own.is_none() || own.as_ref().is_some_and(|own| own.hosts) || own == engine.and_then(of)
    };
    let shared: Vec<&str> = wanted.iter().filter(shared).copied().collect();
    match shared.as_slice() {
        [] => vec![],
        shared => vec![format!(
            "it has no namespace of its own of: {}",
            shared.join(", ")
        )],
    }
}

fn no_capabilities(thread: &Thread) -> impl Iterator<Item = String> {
    let has = |(name, set): (&str, Set)| {
        (set != Set::default()).then(|| format!("has {name} capabilities: {}", set.names().join(", ")))
    };
    thread.capabilities.sets().into_iter().filter_map(has)
}

/// The effective ones come and go with the requests: the server acts as the guest's user does.
fn only_file_capabilities(has: &Capabilities) -> impl Iterator<Item = String> {
    let none = Set::default();
    let wanted = [
        ("permitted", has.permitted, FSD),
        ("bounding", has.bounding, FSD),
        ("inheritable", has.inheritable, none),
        ("ambient", has.ambient, none),
        ("effective", Set(has.effective.0 & !FSD.0), none),
    ];
    wanted.into_iter().flat_map(move |(name, has, wanted)| {
        let differ = move |what: &str, set: Set| {
            (set != none).then(|| format!("{what} {name} capabilities: {}", set.names().join(", ")))
        };
        let more = differ("has needless", Set(has.0 & !wanted.0));
        let less = differ("lacks", Set(wanted.0 & !has.0));
        [more, less].into_iter().flatten()
    })
}

fn locked(thread: &Thread) -> impl Iterator<Item = String> {
    let privileges =
        (!thread.no_new_privs).then(|| "may gain privileges (no_new_privs is not set)".to_owned());
    let calls = (thread.seccomp != FILTERED && !thread.of_kernel)
        .then(|| "may make all system calls (no seccomp filter)".to_owned());
    [privileges, calls].into_iter().flatten()
}

/// What holds for all of them; `limits`: the hard ones that they must not exceed.
fn common(process: &Process, limits: &[(&str, u64)]) -> Vec<String> {
    let mut faults = Vec::new();
    if process.dumpable == Some(true) {
        faults.push("it can be dumped and traced by its user".to_owned());
    }
    for (name, most) in limits {
        let has = process.limits.iter().find(|limit| limit.name == *name);
        let has = has.map_or("unknown", |limit| limit.hard.as_str());
        if has.parse::<u64>().is_ok_and(|has| has <= *most) {
            continue;
        }
        faults.push(format!("its limit {name} is {has}, not {most} or less"));
    }
    faults
}

fn stray(fd: &Descriptor) -> String {
    format!("descriptor {} is none of its own: {}", fd.number, fd.target)
}

/// What the engine has put at a number. /dev/kvm, the kernel and the initramfs are closed before the guest runs; their
/// numbers may be taken by what is the VMM's own.
fn is_table_of_vmm(fd: &Descriptor) -> bool {
    match fd.number {
        0 | 1 => fd.target == "/dev/null",
        vmm::LOG | vmm::CONSOLE => fd.target.starts_with("pipe:["),
        vmm::CONTROL | vmm::FS | vmm::VSOCK => fd.target.starts_with("socket:["),
        vmm::MEMORY => fd.target.starts_with("/memfd:"),
        vmm::TAPS..vmm::VHOST => fd.target == "/dev/net/tun",
        vmm::VHOST..vmm::END => fd.target == "/dev/vhost-net",
        _ => false,
    }
}

/// What the VMM makes for itself, a stream of the guest's, or an opened file of the share.
fn is_own_of_vmm(fd: &Descriptor, engine: Option<&Process>) -> bool {
    if VMM_OWN.iter().any(|own| fd.target.starts_with(own)) {
        return true;
    }
    let place = fd.flags & (libc::O_DIRECTORY | libc::O_PATH) != 0;
    let path = Path::new(&fd.target).is_absolute() && !fd.target.starts_with("/memfd:");
    path && !place && fd.mount.is_some() && !opened_by(fd, engine)
}

fn is_table_of_fsd(fd: &Descriptor) -> bool {
    match fd.number {
        0 | 1 => fd.target == "/dev/null",
        fsd::LOG => fd.target.starts_with("pipe:["),
        fsd::CHANNEL => fd.target.starts_with("socket:["),
        _ => false,
    }
}

/// Whether it was opened by a path of the engine's, which is the host's: what the file server opens in its own mount
/// namespace is on other mounts.
fn opened_by(fd: &Descriptor, engine: Option<&Process>) -> bool {
    let Some(engine) = engine else { return false };
    fd.mount.is_some_and(|mount| engine.mounts.contains(&mount))
}
