//! The last steps of a forked child before its exec, shared by a container's init and by what joins it later.
//! The caller has brought the process into the container's namespaces and root.

use std::{
    convert::Infallible,
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::stat::{Mode, umask},
    unistd::execve,
};

use super::{command, credentials, launch::Reporter, plan::ProcessPlan, terminal::Terminal};
use crate::{
    container::hooks::StartHooks,
    fault::{Fault, Kind},
    stdio::ProcessEnd,
    sys,
};

/// As with runc, if `process.user.umask` does not say.
const DEFAULT_UMASK: u32 = 0o022;

/// What needs the guest's own `/proc`, and root: to be called before the container's root is entered.
pub fn prepare(plan: &ProcessPlan) -> Result<(), Fault> {
    if let Some((class, level)) = plan.shared.io_priority {
        sys::set_io_priority(class, level).map_err(|error| Fault::system("set process.ioPriority", error))?;
    }
    // The root of a user namespace could not raise them later.
    for (resource, _, hard) in &plan.shared.rlimits {
        sys::allow_rlimit(*resource, *hard).map_err(|error| {
            Fault::system(format_args!("set process.rlimits: resource {resource}"), error)
        })?;
    }
    Ok(())
}

/// Late, since they bind this process too, but as root, who may raise them.
fn set_rlimits(plan: &ProcessPlan) -> Result<(), Fault> {
    let set = |resource: u32, soft: u64, hard: u64| {
        sys::set_rlimit(resource, soft, hard)
            .map_err(|error| Fault::system(format_args!("set process.rlimits: resource {resource}"), error))
    };
    let limits = &plan.shared.rlimits;
    if limits
        .iter()
        .all(|(resource, ..)| *resource != libc::RLIMIT_NOFILE)
    {
        // The agent's own soft limit is high; programs that use select(2) or close all descriptors expect this one.
        let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_err(|error| Fault::system("getrlimit", error))?;
        set(libc::RLIMIT_NOFILE, hard.min(1024), hard)?;
    }
    limits
        .iter()
        .try_for_each(|(resource, soft, hard)| set(*resource, *soft, *hard))
}

/// Descriptors 0, 1 and 2.
pub fn connect(plan: &ProcessPlan, stdio: &ProcessEnd) -> Result<Option<Terminal>, Fault> {
    let put = |fd: BorrowedFd<'_>, number: i32| {
        // SAFETY: integers only. Nobody owns 0, 1 and 2 in this process as Rust values.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(Fault::system("set up stdio", Errno::last()));
        }
        Ok(())
    };
    match stdio {
        ProcessEnd::Files(files) => {
            for (number, file) in (0..).zip(files) {
                put(file.as_fd(), number)?;
            }
            Ok(None)
        }
        ProcessEnd::Terminal => {
            let terminal = Terminal::open(plan.terminal.unwrap_or_default(), plan.uid)?;
            terminal.control()?;
            for number in 0..=2 {
                put(terminal.slave.as_fd(), number)?;
            }
            Ok(Some(terminal))
        }
    }
}

/// Becomes the user, finds the command, reports to the agent, and execs. With `hooks`, the process is a container's
/// init: it waits for the agent's go and runs them before.
///
/// The filter for system calls is loaded when runc loads it: without noNewPrivileges while there is the capability that
/// this takes, else last of all. What comes after must be allowed by every filter under which runc would come through:
/// capset, prctl, read, write, execve. So all else is done before.
pub fn exec(
    plan: &ProcessPlan,
    terminal: Option<Terminal>,
    reporter: &Reporter,
    hooks: Option<(&StartHooks, &str)>,
) -> Result<Infallible, Fault> {
    let is_init = hooks.is_some();
    let hooks = match hooks {
        Some((hooks, id)) => hooks.prepare(id)?,
        None => None,
    };
    let (late_filter, early_filter) = match plan.shared.seccomp.as_deref() {
        filter if plan.no_new_privileges => (filter, None),
        filter => (None, filter),
    };
    let mut env = plan.env.clone();
    if plan.env_value("HOME").is_none() {
        let home = credentials::home_of(plan.uid, "/etc/passwd").unwrap_or_else(|| "/".to_owned());
        env.extend(CString::new(format!("HOME={home}")));
    }
    umask(Mode::from_bits_truncate(
        plan.shared.umask.unwrap_or(DEFAULT_UMASK),
    ));
    if let Some(scheduler) = &plan.shared.scheduler {
        scheduler.apply()?;
    }
    if let (false, Some(affinity)) = (is_init, &plan.shared.exec_affinity) {
        affinity.finish()?;
    }
    if let Some(personality) = plan.shared.personality {
        // SAFETY: integers only.
        if unsafe { libc::personality(personality) } < 0 {
            return Err(Fault::system("set linux.personality", Errno::last()));
        }
    }
    // Once as root, for a directory that only root can reach; and again as the user, who must see it in what
    // follows. Only one of them has to work.
    let as_root = nix::unistd::chdir(plan.cwd.as_c_str());
    set_rlimits(plan)?;
    credentials::become_user(plan, early_filter.is_some())?;
    if let (Err(_), Err(error)) = (as_root, nix::unistd::chdir(plan.cwd.as_c_str())) {
        return Err(Fault {
            kind: Kind::Spec,
            message: format!(
                "chdir to cwd ({:?}) set in config.json failed: {}",
                plan.cwd.to_string_lossy(),
                crate::fault::describe(&error.into())
            ),
        });
    }
    if plan.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
            .map_err(|error| Fault::system("set process.noNewPrivileges", error))?;
    }
    let name = plan
        .args
        .first()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    let file = command::find(&name, plan.env_value("PATH"))?;
    if let Some(terminal) = terminal {
        reporter.terminal(terminal.master.as_fd())?;
    }
    credentials::settle(plan, early_filter)?;
    reporter.ready()?;
    if is_init && !reporter.wait() {
        return Err(Fault::system("start", Errno::ECANCELED));
    }
    if let Some(hooks) = hooks {
        hooks.run(&env, late_filter)?;
    }
    if let Some(filter) = late_filter {
        filter.load()?;
    }
    match execve(&file, &plan.args, &env) {
        Ok(never) => Ok(never),
        Err(error) => Err(command::exec_fault(&file.to_string_lossy(), error)),
    }
}
