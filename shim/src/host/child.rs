//! Starting husk's own programs: exact descriptors at exact numbers, nothing else inherited.
//!
//! Each child has a thread of this process that forked it and waits for it. The thread lives as long as the child,
//! so that the child's death signal (bound to the thread that forked, see prctl(2)) means the death of this process.

use std::{
    ffi::{CString, c_char},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{SigSet, SigmaskHow, Signal, pthread_sigmask},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::sync::{oneshot, watch};

use super::{
    cgroup::{self, Cgroup, Entry},
    pid::{Identity, pidfd_open, pidfd_signal},
};

/// Lowest number for descriptors on their way to a child: above every number of a descriptor table.
const STAGING: RawFd = 128;

/// The flag of clone3(2), whose constant in libc is too narrow.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// A program to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// The executable.
    pub path: &'a Path,
    /// What it finds at which number. 0 and 1 are /dev/null unless named; numbers are below [`STAGING`].
    pub fds: Vec<(RawFd, OwnedFd)>,
}

/// What a program finds besides its descriptors.
#[derive(Debug)]
pub struct Surroundings {
    /// Its arguments, without its own name.
    pub args: Vec<CString>,
    /// Its environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// The mode bits that files which it makes do not get.
    pub umask: libc::mode_t,
    /// It is killed when this process dies.
    pub dies_with_us: bool,
    /// It is the first process of a pid namespace of its own.
    pub own_pids: bool,
    /// Where it is born; `None`: where this process came from, see [`cgroup::move_in`].
    pub cgroup: Option<Arc<Cgroup>>,
}

impl Default for Surroundings {
    /// Those of husk's own programs.
    fn default() -> Self {
        Self {
            args: Vec::new(),
            env: Vec::new(),
            umask: 0o077,
            dies_with_us: true,
            own_pids: false,
            cgroup: None,
        }
    }
}

/// A running (or ended) child.
#[derive(Clone, Debug)]
pub struct Child {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<Option<End>>,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(Signal),
    /// It cannot be told.
    Lost(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with code {code}"),
            Self::Killed(signal) => write!(f, "was killed by {}", signal.as_str()),
            Self::Lost(why) => write!(f, "was lost ({why})"),
        }
    }
}

impl Child {
    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Its pid and start time.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Kills it. One that has ended is fine.
    pub fn kill(&self) {
        if let Err(error) = pidfd_signal(&self.pidfd, libc::SIGKILL) {
            tracing::error!(pid = self.pid(), %error, "cannot kill a child");
        }
    }

    /// Asks it to end. One that has ended is fine.
    pub fn terminate(&self) {
        if let Err(error) = pidfd_signal(&self.pidfd, libc::SIGTERM) {
            tracing::error!(pid = self.pid(), %error, "cannot signal a child");
        }
    }

    /// Waits for its end; tells how it ended.
    pub async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        let ended = ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|how| how.clone());
        ended.unwrap_or_else(|| End::Lost("its watcher is gone".into()))
    }
}

/// Starts a program with an empty environment, in `/`, in a session of its own, with default signal dispositions,
/// to be killed when this process dies.
///
/// # Errors
/// When it cannot be executed.
pub async fn spawn(program: Program<'_>) -> io::Result<Child> {
    spawn_in(program, Surroundings::default()).await
}

/// As [`spawn`], with `surroundings` of the caller's.
///
/// # Errors
/// As [`spawn`].
pub async fn spawn_in(program: Program<'_>, surroundings: Surroundings) -> io::Result<Child> {
    let plan = Plan::new(program, surroundings)?;
    let (started, child) = oneshot::channel();
    std::thread::Builder::new()
        .name("husk-child".into())
        .stack_size(128 << 10)
        .spawn(move || run(plan, started))?;
    child.await.map_err(io::Error::other)?
}

/// All that the forked child needs, made before the fork: after it only async-signal-safe calls are allowed.
struct Plan {
    path: CString,
    name: CString,
    fds: Vec<(RawFd, OwnedFd)>,
    end: u32,
    root: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    umask: libc::mode_t,
    dies_with_us: bool,
    own_pids: bool,
    cgroup: Option<Arc<Cgroup>>,
    failure: OwnedFd,
    result: OwnedFd,
}

impl Plan {
    fn new(program: Program<'_>, surroundings: Surroundings) -> io::Result<Self> {
        let name = program.path.file_name().unwrap_or(program.path.as_os_str());
        let mut fds = Vec::with_capacity(program.fds.len() + 2);
        for (number, fd) in program.fds {
            fds.push((number, stage(&fd)?));
        }
        for number in [0, 1] {
            if !fds.iter().any(|(n, _)| *n == number) {
                let null = std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/null")?;
                fds.push((number, stage(&null.into())?));
            }
        }
        let (result, failure) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let end = fds
            .iter()
            .map(|(number, _)| *number)
            .max()
            .unwrap_or(0)
            .saturating_add(1);
        Ok(Self {
            path: CString::new(program.path.as_os_str().as_bytes())?,
            name: CString::new(name.as_bytes())?,
            fds,
            end: u32::try_from(end).map_err(io::Error::other)?,
            root: c"/".into(),
            args: surroundings.args,
            env: surroundings.env,
            umask: surroundings.umask,
            dies_with_us: surroundings.dies_with_us,
            own_pids: surroundings.own_pids,
            cgroup: surroundings.cgroup,
            failure: stage(&failure)?,
            result,
        })
    }
}

fn stage(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(STAGING))?;
    // SAFETY: fcntl just returned this new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The child's thread: forks, tells of it, waits for the child's end.
fn run(plan: Plan, started: oneshot::Sender<io::Result<Child>>) {
    // No handler of this process may run in the child before its exec.
    if let Err(error) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None) {
        let _ = started.send(Err(error.into()));
        return;
    }
    let null = std::iter::once(std::ptr::null());
    let own_name = std::iter::once(plan.name.as_ptr());
    let args = plan.args.iter().map(|arg| arg.as_ptr());
    let argv: Vec<*const c_char> = own_name.chain(args).chain(null.clone()).collect();
    let envp: Vec<*const c_char> = plan.env.iter().map(|name| name.as_ptr()).chain(null).collect();
    let home = plan
        .cgroup
        .as_deref()
        .map(Cgroup::entry)
        .or_else(|| cgroup::origin());
    // SAFETY: the child calls only async-signal-safe functions (see `child`) and never returns.
    let pid = match unsafe { fork(home, plan.own_pids) } {
        (-1, _) => {
            let _ = started.send(Err(io::Error::last_os_error()));
            return;
        }
        // SAFETY: this is the child of a fork, with the plan and the arrays built before it.
        (0, born) => unsafe { child(&plan, &argv, &envp, home.map(|home| (home, born))) },
        (pid, _) => pid,
    };
    let Plan {
        failure, mut result, ..
    } = {
        let mut plan = plan;
        plan.fds.clear();
        plan
    };
    drop(failure);
    let made = executed(&mut result)
        .and_then(|()| Ok((Identity::of(pid as u32)?, Arc::new(pidfd_open(pid as u32)?))));
    let (ended, receiver) = watch::channel(None);
    let made = made.map(|(identity, pidfd)| Child {
        identity,
        pidfd,
        ended: receiver,
    });
    if made.is_err() {
        // SAFETY: the child was not waited for, so the pid is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let lost = started.send(made).is_err();
    if lost {
        // SAFETY: as above.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let how = loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => break End::Exited(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => break End::Killed(signal),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => break End::Lost(error.to_string()),
        }
    };
    let _ = ended.send(Some(how));
}

/// Reads the child's word: nothing when it has executed its program, otherwise the errno.
fn executed(result: &mut OwnedFd) -> io::Result<()> {
    let mut word = Vec::with_capacity(4);
    std::fs::File::from(result.try_clone()?)
        .take(4)
        .read_to_end(&mut word)?;
    match <[u8; 4]>::try_from(word.as_slice()) {
        Ok(errno) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
        Err(_) => Ok(()),
    }
}

/// As fork(2), with the child in the directory of `home` in version 2's hierarchy at once, if the kernel can do that:
/// then the second value is true.
///
/// # Safety
/// As for fork(2) in a process with threads: the child may call only async-signal-safe functions.
unsafe fn fork(home: Option<&Entry>, own_pids: bool) -> (libc::pid_t, bool) {
    // SAFETY: all zeros are a valid value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    if own_pids {
        args.flags = libc::CLONE_NEWPID as u64;
    }
    // SAFETY: the arguments live through the call. Without CLONE_VM the child has its own copy of the memory.
    let clone = |args: &libc::clone_args| unsafe {
        libc::syscall(libc::SYS_clone3, &raw const *args, size_of_val(args)) as libc::pid_t
    };
    if let Some(dir) = home.and_then(Entry::unified) {
        let mut there = args;
        there.flags |= CLONE_INTO_CGROUP;
        there.cgroup = dir.as_raw_fd() as u64;
        let pid = clone(&there);
        if pid >= 0 {
            return (pid, true);
        }
    }
    (clone(&args), false)
}

/// # Safety
/// Only in the child of a fork, with the signals blocked.
unsafe fn child(
    plan: &Plan,
    argv: &[*const c_char],
    envp: &[*const c_char],
    home: Option<(&Entry, bool)>,
) -> ! {
    // SAFETY: only async-signal-safe calls, on memory that was made before the fork.
    unsafe {
        let fail = || -> ! {
            let errno = (*libc::__errno_location()).to_ne_bytes();
            libc::write(plan.failure.as_raw_fd(), errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        };
        if home.is_some_and(|(home, born)| !home.enter(born)) {
            fail();
        }
        if libc::setsid() < 0
            || (plan.dies_with_us && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0)
            || libc::chdir(plan.root.as_ptr()) != 0
        {
            fail();
        }
        // The parent may have died before the death signal was asked for: then nobody can be told of a failure.
        let mut told = libc::pollfd {
            fd: plan.failure.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        libc::close(plan.result.as_raw_fd());
        if libc::poll(&raw mut told, 1, 0) != 0 {
            libc::_exit(127);
        }
        libc::umask(plan.umask);
        for (number, fd) in &plan.fds {
            if libc::dup2(fd.as_raw_fd(), *number) < 0 {
                fail();
            }
        }
        if libc::syscall(
            libc::SYS_close_range,
            plan.end,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) != 0
        {
            fail();
        }
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        libc::execve(plan.path.as_ptr(), argv.as_ptr(), envp.as_ptr());
        fail()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_help;
    use std::{fs, path::PathBuf};

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("program");
        test_help::script(&path, text);
        path
    }

    fn read_all(fd: OwnedFd) -> String {
        let mut text = String::new();
        fs::File::from(fd).read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn a_child_finds_its_descriptors_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        // Descriptors of this process that are not marked to be closed at exec.
        let stray = fs::File::open("/dev/null").unwrap();
        fcntl(&stray, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let path = script(
            dir.path(),
            "for n in 0 1 2 3 4 5 6 7 8 9 63 64 65 66 67 68 69; do [ -e /proc/$$/fd/$n ] && echo $n >&3; done
             env >&3; pwd -P >&3",
        );
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let log = fs::File::options().write(true).open("/dev/null").unwrap();
        let child = spawn(Program {
            path: &path,
            fds: vec![(3, write), (2, log.into())],
        })
        .await
        .unwrap();
        let text = tokio::task::spawn_blocking(|| read_all(read)).await.unwrap();
        assert_eq!(
            text.lines()
                .filter(|line| !line.contains('='))
                .collect::<Vec<_>>(),
            ["0", "1", "2", "3", "/"]
        );
        assert!(!text.contains("HOME="), "{text}");
        assert_eq!(child.ended().await, End::Exited(0));
    }

    #[tokio::test]
    async fn a_child_may_have_pids_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "echo $$ $1 >&3; exec sleep 1000");
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let program = Program {
            path: &path,
            fds: vec![(3, write)],
        };
        let surroundings = Surroundings {
            args: vec![c"argument".into()],
            own_pids: true,
            ..Surroundings::default()
        };
        let child = spawn_in(program, surroundings).await.unwrap();
        let mut told = [0; 11];
        fs::File::from(read).read_exact(&mut told).unwrap();
        assert_eq!(&told, b"1 argument\n");
        child.kill();
        assert_eq!(child.ended().await.to_string(), "was killed by SIGKILL");
    }

    #[tokio::test]
    async fn descriptors_may_trade_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "echo three >&3; echo four >&4");
        let (read3, write3) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let (read4, write4) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let child = spawn(Program {
            path: &path,
            fds: vec![(4, write4), (3, write3)],
        })
        .await
        .unwrap();
        child.ended().await;
        assert_eq!(
            (read_all(read3), read_all(read4)),
            ("three\n".into(), "four\n".into())
        );
    }

    #[tokio::test]
    async fn what_cannot_be_executed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = spawn(Program {
            path: &missing,
            fds: vec![],
        })
        .await
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_killed_child_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "exec sleep 1000");
        let child = spawn(Program {
            path: &path,
            fds: vec![],
        })
        .await
        .unwrap();
        child.kill();
        assert_eq!(child.ended().await.to_string(), "was killed by SIGKILL");
        assert!(child.identity().open().unwrap().is_none());
        child.kill();
    }
}
