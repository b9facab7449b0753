//! What hostile code gains that has taken over husk-vmm or husk-fsd: builds of them that try some 290 attacks as soon as
//! they are locked in (vmm/lockdown/src/captured), with their filters of system calls and with all but these. Each attack is
//! first shown to succeed without the lock-down.

mod judged;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::census::Census;
use crate::command::{DEADLINE, eventually, ok, run};
use crate::containerd::{Detached, ctr_run_script};
use crate::host::{self, ContainerdLog};
use crate::operator::{Config, DEFAULT};
use judged::{HARMLESS, HARMLESS_OF_A_FILE_SERVER, HARMLESS_OF_A_VMM, Judged, may_fail};

/// As many as there are at the least: a list that shrinks is a suite that passes by accident.
const MIN_ATTACKS: usize = 290;

/// What there is to attack, for the length of a test.
struct Ground {
    dir: PathBuf,
    victim: Child,
    port: u16,
    _neighbour: Detached,
    _listeners: (UnixListener, UnixListener, TcpListener, OwnedFd),
}

impl Ground {
    fn new() -> Self {
        // Of the root's file system: a name that is linked or moved stays in its own.
        let dir = PathBuf::from("/husk-attack");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("dir")).unwrap();
        fs::write(dir.join("secret"), "secret\n").unwrap();
        fs::write(dir.join("empty"), "").unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let name = SocketAddr::from_abstract_name(format!("husk-attack-{port}")).unwrap();
        let listeners = (
            UnixListener::bind(dir.join("socket")).unwrap(),
            UnixListener::bind_addr(&name).unwrap(),
            tcp,
            listen_for_packets(&dir.join("packets")),
        );
        Self {
            dir,
            victim: victim(),
            port,
            _neighbour: Detached::start("neighbour", &["sleep", "1000"]),
            _listeners: listeners,
        }
    }

    fn words(&self) -> String {
        let victims = [
            i32::try_from(self.victim.id()).unwrap(),
            // The neighbour's: before another sandbox is started.
            host::pid_of("containerd-shim-husk-v2"),
            host::pid_of("husk-vmm"),
        ];
        let victims = victims.map(|pid| format!("{pid}:{:x}", end_of_stack(pid)));
        format!("{},{},{}", self.dir.display(), self.port, victims.join(","))
    }

    /// The captured build of `program`, which attacks this in that way.
    fn capture(&self, program: &str, mode: &str) -> String {
        capture(&self.dir, program, &format!("{mode} {}", self.words()))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Somebody's process, with a number that none has in the pid namespace of a program that makes but one for each attack.
fn victim() -> Child {
    loop {
        let mut victim = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        if victim.id() > 1000 {
            // Its memory is laid out before its first instruction is due.
            eventually("the victim to run", || {
                let command = fs::read(format!("/proc/{}/cmdline", victim.id())).ok()?;
                command.starts_with(b"sleep\0").then_some(())
            });
            return victim;
        }
        victim.kill().unwrap();
        victim.wait().unwrap();
    }
}

/// Where its stack ends: eight bytes of nothing, which nobody changes.
fn end_of_stack(pid: i32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let end = maps
        .lines()
        .find(|line| line.ends_with("[stack]"))
        .and_then(|line| line.split(['-', ' ']).nth(1))
        .and_then(|end| u64::from_str_radix(end, 16).ok());
    end.unwrap() - 8
}

/// Puts the captured build of `program` into `dir`, with arguments of its own.
fn capture(dir: &Path, program: &str, arguments: &str) -> String {
    let path = dir.join(program);
    fs::copy(build(program), &path).unwrap();
    fs::write(dir.join(format!("{program}.captured")), arguments).unwrap();
    path.to_str().unwrap().to_owned()
}

fn build(program: &str) -> String {
    let suite = std::env::current_exe().unwrap();
    let path = suite.with_file_name(format!("{program}-captured"));
    assert!(
        path.exists(),
        "{} is not there; `make e2e-programs` makes it",
        path.display()
    );
    path.to_str().unwrap().to_owned()
}

/// How many attacks a line tells of, and which of them it names.
#[track_caller]
fn told<'a>(line: &'a str, named: &str) -> (usize, Vec<&'a str>) {
    let (head, names) = line
        .split_once(named)
        .unwrap_or_else(|| panic!("{named:?} is not in {line:?}"));
    let count = head
        .split_whitespace()
        .rev()
        .nth(1)
        .and_then(|count| count.parse().ok());
    let count = count.unwrap_or_else(|| panic!("no count in {line:?}"));
    let names = names.split('"').next().unwrap_or_default();
    (count, names.split_whitespace().collect())
}

#[test]
fn each_attack_succeeds_without_the_lock_down() {
    let ground = Ground::new();
    let done = run(&[
        "sh",
        "-c",
        &format!("exec {} --attack-unlocked {}", build("husk-vmm"), ground.words()),
    ]);
    let out = done.out();
    let (count, failed) = told(&out, "failed:");
    let failed: Vec<_> = failed.iter().filter(|name| !may_fail(name)).collect();
    assert!(failed.is_empty(), "these attacks show nothing: {failed:?}");
    assert!(count >= MIN_ATTACKS, "{count} attacks only");
    assert_untouched(&ground.dir, 5);
}

/// Nothing was made, and nothing changed.
#[track_caller]
fn assert_untouched(dir: &Path, entries: usize) {
    assert_eq!(fs::read_to_string(dir.join("secret")).unwrap(), "secret\n");
    let left = fs::read_dir(dir).unwrap().count();
    assert_eq!(left, entries, "something was made in {}", dir.display());
    let made: Vec<_> = fs::read_dir("/")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("husk-attack-"))
        .collect();
    assert!(made.is_empty(), "{made:?} were made");
}

fn listen_for_packets(path: &Path) -> OwnedFd {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(16).unwrap()).unwrap();
    listener
}

/// Runs a container with a captured program, and gives what each line of its log says: a thread's name and which attacks
/// have succeeded.
#[track_caller]
fn attacks_of(program: &str, option: &str, mode: &str) -> Vec<(String, Vec<String>)> {
    let census = Census::take();
    let ground = Ground::new();
    let text = format!("[programs]\n{option} = \"{}\"\n", ground.capture(program, mode));
    let config = Config::at(DEFAULT, &text);
    let log = ContainerdLog::from_now();
    // The program goes on as usual: a container with it works.
    let done = ctr_run_script("captured", "echo x > /made && cat /made && echo end").finish(DEADLINE);
    let log = log.read();
    let done = done.expect_code(0);
    assert_eq!(done.out(), "x\nend\n");
    let mut all = Vec::new();
    for line in log.lines().filter(|line| line.contains("captured: ")) {
        let (count, succeeded) = told(line, "succeeded:");
        assert!(count >= MIN_ATTACKS, "{line}");
        let name = line
            .split("captured: ")
            .nth(1)
            .and_then(|rest| rest.split(':').next());
        let succeeded = succeeded.into_iter().map(str::to_owned).collect();
        all.push((name.unwrap().to_owned(), succeeded));
    }
    // Those of the ground, the program and its arguments.
    assert_untouched(&ground.dir, 7);
    drop((config, ground));
    census.assert_unchanged();
    all
}

/// Asserts that no attack of any thread has succeeded; gives the threads' names.
#[track_caller]
fn threads_that_do_nothing(program: &str, option: &str) -> Vec<String> {
    let mut threads = Vec::new();
    for (thread, succeeded) in attacks_of(program, option, "--attack") {
        assert!(succeeded.is_empty(), "{program}: {thread}: {succeeded:?}");
        threads.push(thread);
    }
    threads.sort();
    threads
}

#[test]
fn a_captured_vmm_can_do_nothing() {
    let threads = threads_that_do_nothing("husk-vmm", "vmm");
    for name in ["main", "vcpu0", "vsock", "fs", "console", "rng"] {
        assert!(
            threads.iter().any(|thread| thread.starts_with(name)),
            "thread {name} did not attack: {threads:?}"
        );
    }
}

#[test]
fn a_captured_file_server_has_the_share_and_nothing_else() {
    let threads = threads_that_do_nothing("husk-fsd", "fsd");
    assert_eq!(threads, ["fs-0", "fs-1", "fs-2", "fs-3", "main"]);
}

/// Asserts that what succeeds before any filter is there is what [`HARMLESS`] and the program's own list name.
#[track_caller]
fn assert_harmless(program: &str, option: &str, own: &[Judged]) {
    let lines = attacks_of(program, option, "--attack-unfiltered");
    assert!(!lines.is_empty(), "{program} did not attack");
    let succeeded: BTreeSet<_> = lines
        .into_iter()
        .flat_map(|(name, succeeded)| {
            assert_eq!(name, "unfiltered");
            succeeded
        })
        .collect();
    let harmless: BTreeSet<_> = HARMLESS
        .iter()
        .chain(own)
        .flat_map(|(_, names)| names.iter().map(|name| (*name).to_owned()))
        .collect();
    let more: Vec<_> = succeeded.difference(&harmless).collect();
    assert!(more.is_empty(), "{program} without filters: {more:?} succeeded");
    let fewer: Vec<_> = harmless
        .difference(&succeeded)
        .filter(|name| !may_fail(name))
        .collect();
    assert!(
        fewer.is_empty(),
        "{program} without filters: {fewer:?} fail by now"
    );
}

#[test]
fn without_filters_a_captured_vmm_has_itself() {
    assert_harmless("husk-vmm", "vmm", HARMLESS_OF_A_VMM);
}

#[test]
fn without_filters_a_captured_file_server_has_itself_and_the_share() {
    assert_harmless("husk-fsd", "fsd", HARMLESS_OF_A_FILE_SERVER);
}

/// A system call that ends a machine, made by its first vCPU once it is locked in; the engine tells so in these words.
#[track_caller]
fn end_by(attack: &str, words: &str) {
    // Shown to get through without the lock-down, if the host's kernel has such calls at all.
    let alone = run(&[&build("husk-vmm"), "--attack-deadly-unlocked", attack]);
    assert!(alone.code == 0 || attack == "x32", "{attack} shows nothing");
    let census = Census::take();
    let dir = PathBuf::from("/run/husk-attack-deadly");
    fs::create_dir_all(&dir).unwrap();
    let path = capture(&dir, "husk-vmm", &format!("--attack-deadly {attack}"));
    let config = Config::at(DEFAULT, &format!("[programs]\nvmm = \"{path}\"\n"));
    let log = ContainerdLog::from_now();
    let done = ctr_run_script("deadly", "echo alive").finish(DEADLINE);
    let said = format!("{}{}", done.err(), log.read());
    drop(config);
    fs::remove_dir_all(&dir).unwrap();
    run(&["ctr", "container", "rm", "deadly"]);
    assert_ne!(done.code, 0, "{attack}: {said}");
    assert!(!done.out().contains("alive"), "{attack}: the guest ran");
    assert!(!said.contains("captured: "), "{attack} went on: {said}");
    assert!(said.contains(words), "{attack}: {said}");
    if words.contains("system call") {
        census.assert_violated(words);
    } else {
        census.assert_unchanged();
    }
}

#[test]
fn a_forbidden_system_call_ends_the_machine_and_is_told() {
    end_by(
        "openat",
        "its thread vcpu0 made the system call openat (257), which is forbidden to it",
    );
    // No call of this architecture's table.
    end_by(
        "x32",
        "its thread vcpu0 made the system call 1073741934, which is forbidden to it",
    );
}

#[test]
fn a_32_bit_system_call_ends_the_machine_and_is_told() {
    end_by("int80", "husk-vmm was killed by SIGSYS");
}

/// The build that users have is not the one that is attacked.
#[test]
fn what_is_installed_has_no_attacks() {
    for program in ["husk-vmm", "husk-fsd"] {
        let path = format!("/usr/local/libexec/husk/{program}");
        let done = run(&["sh", "-c", &format!("{path} --attack x </dev/null")]);
        assert_eq!(done.code, 2, "{}", done.err());
        let found = ok(&["sh", "-c", &format!("grep -c husk-attack {path} || true")]);
        assert_eq!(found.trim(), "0");
    }
}
