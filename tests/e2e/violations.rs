//! System calls that are forbidden to the thread that makes them. No test's container brings husk-vmm or husk-fsd to one: every
//! census looks (`Census::assert_unchanged`). Here they are provoked, in builds of the programs that make one on a signal
//! (vmm/lockdown/src/captured/violate.rs), to see how users are told.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::census::Census;
use crate::command::{Finished, Input, Running, eventually, run};
use crate::containerd::{BUSYBOX, RUNTIME};
use crate::foreground::Bundle;
use crate::host::{self, ContainerdLog};
use crate::operator::{Config, DEFAULT};

/// What is said of each: by the program in its log, by the engine in its error.
const SENTENCE: &str = "which is forbidden to it";

/// Where dockerd logs, if it is not to the journal.
const DOCKER_LOG: &str = "/var/log/docker.log";

/// What is told of violations: what commands have said, and where the engines' logs are read on from.
struct Told {
    lines: Vec<String>,
    containerd: ContainerdLog,
    docker: u64,
}

static TOLD: Mutex<Option<Told>> = Mutex::new(None);

impl Told {
    fn from_now() -> Self {
        Self {
            lines: Vec::new(),
            containerd: ContainerdLog::from_now(),
            docker: fs::metadata(DOCKER_LOG).map_or(0, |file| file.len()),
        }
    }

    fn note(&mut self, text: &str) {
        let lines = text.lines().filter(|line| line.contains(SENTENCE));
        self.lines.extend(lines.map(str::to_owned));
    }
}

fn with<T>(use_it: impl FnOnce(&mut Told) -> T) -> T {
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    use_it(told.get_or_insert_with(Told::from_now))
}

/// From the first call on violations are noted.
pub fn watch() {
    with(|_| ());
}

/// Notes what a command has said, which may be an engine itself.
pub fn note(text: &str) {
    with(|told| told.note(text));
}

/// What was told since this was last asked.
pub fn take() -> Vec<String> {
    let (containerd, from) = with(|told| {
        let containerd = std::mem::replace(&mut told.containerd, ContainerdLog::from_now());
        (containerd, told.docker)
    });
    // To read a journal takes a command, which is noted as any.
    note(&containerd.read());
    let mut docker = Vec::new();
    if let Ok(mut file) = fs::File::open(DOCKER_LOG) {
        file.seek(SeekFrom::Start(from)).unwrap();
        file.read_to_end(&mut docker).unwrap();
    }
    note(&String::from_utf8_lossy(&docker));
    with(|told| {
        told.docker = from + docker.len() as u64;
        std::mem::take(&mut told.lines)
    })
}

/// Waits until a violation is told with these words, and forgets it.
#[track_caller]
pub fn expect(words: &str) {
    let mut told = Vec::new();
    eventually(&format!("{words:?} in what is told of violations"), || {
        told.extend(take());
        told.iter().any(|line| line.contains(words)).then_some(())
    });
    // It is told in several places. A journal is read on by the second.
    thread::sleep(Duration::from_secs(1));
    take();
}

/// A build of a program that makes a system call when a thread of it gets SIGUSR1, for the length of a test.
struct Violator {
    dir: PathBuf,
    program: &'static str,
}

impl Violator {
    fn new(program: &'static str, call: libc::c_long) -> Self {
        let build = std::env::current_exe().unwrap();
        let build = build.with_file_name(format!("{program}-captured"));
        let dir = PathBuf::from("/run/husk-violator");
        fs::create_dir_all(&dir).unwrap();
        fs::copy(&build, dir.join(program))
            .unwrap_or_else(|e| panic!("{}: {e}; `make e2e-programs` makes it", build.display()));
        let arguments = format!("--violate {call}");
        fs::write(dir.join(format!("{program}.captured")), arguments).unwrap();
        Self { dir, program }
    }

    /// A configuration that has it in the program's place.
    fn config(&self, path: &str) -> Config {
        let option = self.program.trim_start_matches("husk-");
        let program = self.dir.join(self.program);
        Config::at(
            path,
            &format!("[programs]\n{option} = \"{}\"\n", program.display()),
        )
    }

    /// Has a thread make the call.
    #[track_caller]
    fn violate(&self, thread: &str) {
        let process = host::pid_of(self.program);
        let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
        let tasks = tasks.filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok());
        let name = |task: i32| match task {
            // It has the program's.
            _ if task == process => "main".to_owned(),
            _ => fs::read_to_string(format!("/proc/{task}/comm")).unwrap_or_default(),
        };
        let found = tasks.into_iter().find(|task| name(*task).trim() == thread);
        let task = found.unwrap_or_else(|| panic!("{} has no thread {thread}", self.program));
        // SAFETY: no pointers are involved.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, task, libc::SIGUSR1) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Violator {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Has a thread of `program` make `call` while a container of `husk run` runs; what husk then says.
#[track_caller]
fn violated(program: &'static str, thread: &str, call: libc::c_long) -> Finished {
    let violator = Violator::new(program, call);
    let config = violator.config("/run/husk-test-violate/husk.toml");
    let bundle = Bundle::busybox(&["sh", "-c", "echo ready; exec sleep 1000"]);
    let argv = [
        "husk",
        "--config",
        config.path(),
        "run",
        "--bundle",
        bundle.path(),
        "violate",
    ];
    let mut running = Running::start(&argv, Input::Nothing);
    running.wait_for("ready");
    violator.violate(thread);
    running.finish(Duration::from_secs(60)).expect_code(137)
}

#[track_caller]
fn assert_told(done: &Finished, words: &str) {
    assert!(
        done.err().contains(words),
        "{words:?} is not said in {}",
        done.err()
    );
}

#[test]
fn the_error_names_the_vmms_thread_and_its_call() {
    let census = Census::take();
    for (thread, call, name) in [
        ("vcpu0", libc::SYS_openat, "openat (257)"),
        ("console", libc::SYS_socket, "socket (41)"),
    ] {
        let words = format!(
            "husk-vmm was ended: its thread {thread} made the system call {name}, which is forbidden to it"
        );
        assert_told(&violated("husk-vmm", thread, call), &words);
        census.assert_violated(&words);
    }
}

#[test]
fn the_error_names_the_file_servers_thread_and_its_call() {
    let census = Census::take();
    // Of the threads that open files, and of that which does not.
    for (thread, call, name) in [
        ("fs-0", libc::SYS_socket, "socket (41)"),
        ("main", libc::SYS_openat, "openat (257)"),
    ] {
        let words =
            format!("husk-fsd: error: thread {thread} made the system call {name}, which is forbidden to it");
        assert_told(&violated("husk-fsd", thread, call), &words);
        census.assert_violated(&words);
    }
}

/// A client that waits is told the end alone, as of any container; why, the shim logs.
#[test]
fn containerds_log_names_the_thread_and_its_call() {
    let census = Census::take();
    for (program, thread, words) in [
        (
            "husk-vmm",
            "vsock",
            "husk-vmm was ended: its thread vsock made the system call execve (59), which is forbidden to it",
        ),
        (
            "husk-fsd",
            "fs-1",
            "husk-fsd: error: thread fs-1 made the system call execve (59), which is forbidden to it",
        ),
    ] {
        let violator = Violator::new(program, libc::SYS_execve);
        let config = violator.config(DEFAULT);
        let script = "echo ready; exec sleep 1000";
        let argv = [
            "ctr",
            "run",
            "--runtime",
            RUNTIME,
            BUSYBOX,
            "violate",
            "sh",
            "-c",
            script,
        ];
        let mut running = Running::start(&argv, Input::Nothing);
        running.wait_for("ready");
        violator.violate(thread);
        running.finish(Duration::from_secs(60)).expect_code(137);
        run(&["ctr", "task", "rm", "-f", "violate"]);
        run(&["ctr", "container", "rm", "violate"]).expect_code(0);
        drop((config, violator));
        census.assert_violated(words);
    }
}
