//! What a container's init process does between fork and exec: it makes the container around itself, top to bottom.
//! It runs in its new namespaces and cgroup. Whatever fails, its exit takes all of it along: the mounts are in a
//! namespace that nobody else is in.

use std::{
    collections::HashMap,
    convert::Infallible,
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use husk_agent_protocol::limits::MAX_SUBMOUNTS;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, fstat, major, minor},
};

use super::{
    devices,
    namespaces::Namespaces,
    plan::ContainerPlan,
    root::{Kind, Root},
    stage::{Handed, Stage},
    user,
};
use crate::{
    fault::Fault,
    process::{enter, launch::Reporter},
    stdio::ProcessEnd,
    sys,
};

/// Goes to each of the host's mounts that the container will have, so that they are mounted in the agent's own
/// namespace before the container's is made from it.
///
/// The guest's kernel mounts the share's submounts where they are first walked into. One that only the container's
/// namespace had would go with its last process, while requests of files just closed may still be under way. That is
/// thought to be behind a BUG of 6.12 seen once, as a container ended: "Busy inodes after unmount of virtiofs".
///
/// One that is met only later has the flags of the mount above it, also those that are not for what is below.
/// `submounts` are the paths in `share` of those that the host knows to be there.
pub fn visit_mounts(plan: &ContainerPlan, share: &Path, submounts: &[Vec<u8>]) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let volumes = plan.mounts.iter().filter_map(|mount| mount.volume());
    for path in std::iter::once(plan.rootfs.as_path()).chain(volumes) {
        // What is not there, or is no directory, is the business of whoever uses it.
        drop(open(path, flags, Mode::empty()));
    }
    let Ok(share) = open(share, flags, Mode::empty()) else {
        return;
    };
    for path in submounts.iter().take(MAX_SUBMOUNTS) {
        if let Ok(path) = CString::new(path.as_slice()) {
            let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            drop(sys::openat2(share.as_fd(), &path, flags, 0, resolve));
        }
    }
}

/// Makes the container that `plan` says and execs its command when the agent says go. `stage` is what has been entered
/// before, with what was made there; `peers` are mounts of volumes, made already, by their index.
pub fn run(
    id: &str,
    plan: &ContainerPlan,
    stage: Option<(&Stage, Handed)>,
    peers: &HashMap<usize, OwnedFd>,
    stdio: &ProcessEnd,
    reporter: &Reporter,
) -> Result<Infallible, Fault> {
    let mut handed = Handed::default();
    let mut in_user_namespace = false;
    match stage {
        None => enter::prepare(&plan.process)?,
        Some((stage, made)) => {
            handed = made;
            in_user_namespace = stage.user.is_some();
            if in_user_namespace {
                user::become_root()?;
            }
            stage.join_cgroup()?;
        }
    }
    let keyring = CString::new(format!("_ses.{id}")).unwrap_or_default();
    sys::join_session_keyring(&keyring).map_err(|error| Fault::system("session keyring", error))?;
    if plan.namespaces.cgroup.is_new() {
        unshare(CloneFlags::CLONE_NEWCGROUP).map_err(|error| Fault::system("cgroup namespace", error))?;
    }
    if let Some(hostname) = &plan.hostname {
        nix::unistd::sethostname(hostname).map_err(|error| Fault::system("set hostname", error))?;
    }
    if let Some(domainname) = &plan.domainname {
        set_domainname(domainname).map_err(|error| Fault::system("set domainname", error))?;
    }
    // While the guest's own /proc is still there; a container need not have one.
    for sysctl in &plan.sysctls {
        if !(in_user_namespace && sysctl.is_of_network()) {
            sysctl.apply()?;
        }
    }

    let root = attach_root(&plan.rootfs)?;
    for (index, mount) in plan.mounts.iter().enumerate() {
        let made = handed.mounts.get(&index).or_else(|| peers.get(&index));
        mount.apply(&root, made)?;
    }
    if !plan.mounts.iter().any(|mount| mount.is_host_dev()) {
        devices::make(&plan.devices, &handed.devices, &root)?;
    }
    drop(handed);
    let cwd = Path::new(plan.process.cwd.to_str().unwrap_or("/"));
    if cwd != Path::new("/") {
        root.ensure(cwd, Kind::Directory)
            .map_err(|error| Fault::system("make process.cwd", error))?;
    }
    enter_root(&root)?;

    let terminal = enter::connect(&plan.process, stdio)?;
    if let Some(terminal) = &terminal {
        devices::console(terminal.slave.as_fd(), &root)?;
    }
    protect_paths(plan)?;
    if plan.read_only {
        sys::set_mount_attributes(root.directory(), libc::MOUNT_ATTR_RDONLY, 0, 0, false)
            .map_err(|error| Fault::system("make the root read-only", error))?;
    }
    if let Some((propagation, recursive)) = plan.propagation {
        sys::set_mount_attributes(root.directory(), 0, 0, propagation, recursive)
            .map_err(|error| Fault::system("set linux.rootfsPropagation", error))?;
    }
    drop(root);
    enter::exec(&plan.process, terminal, reporter, Some((&plan.start_hooks, id)))
}

fn set_domainname(name: &str) -> io::Result<()> {
    // SAFETY: a pointer and its length.
    let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Cuts this mount namespace off from the agent's, and makes the root file system a mount of its own.
fn attach_root(rootfs: &Path) -> Result<Root, Fault> {
    let failed = |error: io::Error| Fault::system("mount the root file system", error);
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|error| failed(error.into()))?;
    let directory = open(
        rootfs,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| Fault::system(format_args!("rootfs {} in the guest", rootfs.display()), error))?;
    let tree = sys::clone_tree(directory.as_fd(), true).map_err(failed)?;
    // Nothing that is mounted in the container shall show up at another copy of this mount.
    sys::set_mount_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, true).map_err(failed)?;
    sys::attach_tree(tree.as_fd(), directory.as_fd()).map_err(failed)?;
    Ok(Root::new(tree))
}

/// Makes `root` this process's root, and lets go of the old one.
fn enter_root(root: &Root) -> Result<(), Fault> {
    let failed = |error: io::Error| Fault::system("pivot_root", error);
    nix::unistd::fchdir(root.directory()).map_err(|error| failed(error.into()))?;
    sys::pivot_root_here().map_err(failed)?;
    // The old root is on top of the new one now. It was made a slave of the agent's, whom its unmounting does not reach.
    // (A change of propagation here would be one of the new root: only umount2(2) looks for what is on top of ".".)
    umount2(".", MntFlags::MNT_DETACH).map_err(|error| failed(error.into()))?;
    nix::unistd::chdir("/").map_err(|error| failed(error.into()))
}

/// `linux.readonlyPaths` and `linux.maskedPaths`; those that do not exist need no protection.
fn protect_paths(plan: &ContainerPlan) -> Result<(), Fault> {
    for path in &plan.read_only_paths {
        let failed = |error| Fault::system(format_args!("make {} read-only", path.to_string_lossy()), error);
        if let Some(place) = existing(path).map_err(failed)? {
            let tree = sys::clone_tree(place.as_fd(), true).map_err(failed)?;
            sys::set_mount_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, 0, true).map_err(failed)?;
            sys::attach_tree(tree.as_fd(), place.as_fd()).map_err(failed)?;
        }
    }
    for path in &plan.masked_paths {
        let failed = |error| Fault::system(format_args!("mask {}", path.to_string_lossy()), error);
        if let Some(place) = existing(path).map_err(failed)? {
            let stat = fstat(&place).map_err(|error| failed(error.into()))?;
            let tree = if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
                let empty = sys::FileSystem::open(c"tmpfs").map_err(failed)?;
                empty.mount(libc::MOUNT_ATTR_RDONLY).map_err(failed)?
            } else {
                let null = existing(c"/dev/null").map_err(failed)?;
                let null = null.ok_or_else(|| failed(Errno::ENOENT.into()))?;
                let stat = fstat(&null).map_err(|error| failed(error.into()))?;
                // What the image calls so may be a file of its own, which would be no mask.
                if (major(stat.st_rdev), minor(stat.st_rdev)) != (1, 3) {
                    return Err(Fault::spec(
                        "linux.maskedPaths",
                        "the container's /dev/null is another file",
                    ));
                }
                sys::clone_tree(null.as_fd(), false).map_err(failed)?
            };
            sys::attach_tree(tree.as_fd(), place.as_fd()).map_err(failed)?;
        }
    }
    Ok(())
}

fn existing(path: &CStr) -> io::Result<Option<OwnedFd>> {
    match open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What the process in between does for one that joins a running container: it enters the container's namespaces but
/// for those of users and cgroups, and has its children in that of pids. The container does not see it. It sees its
/// child, and may have the right to trace it (`CAP_SYS_PTRACE`), so the child must not be in the agent's namespaces any
/// more, where the agent itself could be traced. `init` is a pidfd of the container's init process, `namespaces` what
/// the container has.
pub fn approach(
    plan: &crate::process::plan::ProcessPlan,
    init: &OwnedFd,
    namespaces: &Namespaces,
) -> Result<(), Fault> {
    enter::prepare(plan)?;
    // Who is in the container's namespace of cgroups, but in a cgroup outside of it, can have no child be born into one
    // inside (nsdelegate).
    let later = libc::CLONE_NEWUSER | libc::CLONE_NEWCGROUP;
    let kinds = namespaces.enter_flags() & !later | libc::CLONE_NEWPID;
    sys::enter_namespaces(init.as_fd(), kinds).map_err(|error| Fault::system("join the container", error))
}

/// What a process that joins a running container does between fork and exec. It is in the container's namespaces, but
/// for those of users and cgroups, and in its cgroup already; see [`approach`].
pub fn join(
    plan: &crate::process::plan::ProcessPlan,
    init: &OwnedFd,
    namespaces: &Namespaces,
    stdio: &ProcessEnd,
    reporter: &Reporter,
) -> Result<Infallible, Fault> {
    let join = |kind| {
        sys::enter_namespaces(init.as_fd(), kind).map_err(|error| Fault::system("join the container", error))
    };
    let cgroups = namespaces.enter_flags() & libc::CLONE_NEWCGROUP;
    if cgroups != 0 {
        join(cgroups)?;
    }
    if namespaces.user.is_separate() {
        join(libc::CLONE_NEWUSER)?;
        user::become_root()?;
    }
    let terminal = enter::connect(plan, stdio)?;
    enter::exec(plan, terminal, reporter, None)
}
