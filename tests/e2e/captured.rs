//! What hostile code gains that has taken over husk-vmm or husk-fsd: builds of them that try some 150 attacks as soon as
//! they are locked in (vmm/lockdown/src/captured). Each attack is first shown to succeed without the lock-down.

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::census::Census;
use crate::command::{eventually, ok, run};
use crate::containerd::ctr_run_script;
use crate::host::ContainerdLog;
use crate::operator::{Config, DEFAULT};

/// As many as there are at the least: a list that shrinks is a suite that passes by accident.
const MIN_ATTACKS: usize = 140;

/// Attacks that no kernel of today lets anybody make, or none with a secure boot, and those that a machine lacks what they
/// are for: they may fail without a lock-down.
const MAY_FAIL: &[&str] = &["hosts-memory", "io-ports"];

/// What there is to attack, for the length of a test.
struct Ground {
    dir: PathBuf,
    victim: Child,
    port: u16,
    _listeners: (UnixListener, UnixListener, TcpListener),
}

impl Ground {
    fn new() -> Self {
        let dir = PathBuf::from("/run/husk-attack");
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
        );
        let victim = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // Its memory is laid out after its first instruction is due.
        eventually("the victim to run", || {
            let command = fs::read(format!("/proc/{}/cmdline", victim.id())).ok()?;
            command.starts_with(b"sleep\0").then_some(())
        });
        Self {
            dir,
            victim,
            port,
            _listeners: listeners,
        }
    }

    fn words(&self) -> String {
        format!("{},{},{}", self.dir.display(), self.victim.id(), self.port)
    }

    /// The captured build of `program`, with what it is to attack.
    fn capture(&self, program: &str) -> String {
        let path = self.dir.join(program);
        fs::copy(build(program), &path).unwrap();
        let arguments = format!("--attack {}", self.words());
        fs::write(self.dir.join(format!("{program}.captured")), arguments).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
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
    let packets = ground.dir.join("packets");
    // Nothing in the standard library listens for packets.
    let _packets = listen_for_packets(&packets);
    let done = run(&[
        "sh",
        "-c",
        &format!("exec {} --attack-unlocked {}", build("husk-vmm"), ground.words()),
    ]);
    let out = done.out();
    let (count, failed) = told(&out, "failed:");
    let failed: Vec<_> = failed.iter().filter(|name| !MAY_FAIL.contains(name)).collect();
    assert!(failed.is_empty(), "these attacks show nothing: {failed:?}");
    assert!(count >= MIN_ATTACKS, "{count} attacks only");
}

fn listen_for_packets(path: &std::path::Path) -> std::os::fd::OwnedFd {
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

/// Runs a container with a captured program and asserts that no attack of any of its threads has succeeded; gives the
/// threads' names.
#[track_caller]
fn attacks_of(program: &str, option: &str) -> Vec<String> {
    let census = Census::take();
    let ground = Ground::new();
    let packets = listen_for_packets(&ground.dir.join("packets"));
    let text = format!("[programs]\n{option} = \"{}\"\n", ground.capture(program));
    let config = Config::at(DEFAULT, &text);
    let log = ContainerdLog::from_now();
    // The program goes on as usual: a container with it works.
    let done = ctr_run_script("captured", "echo x > /made && cat /made && echo end")
        .finish(Duration::from_secs(120));
    let log = log.read();
    let done = done.expect_code(0);
    assert_eq!(done.out(), "x\nend\n");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("captured: ")).collect();
    let mut threads = Vec::new();
    for line in &lines {
        let (count, succeeded) = told(line, "succeeded:");
        assert!(count >= MIN_ATTACKS, "{line}");
        assert!(succeeded.is_empty(), "{program}: {line}");
        let name = line
            .split("captured: ")
            .nth(1)
            .and_then(|rest| rest.split(':').next());
        threads.push(name.unwrap().to_owned());
    }
    assert_eq!(fs::read_to_string(ground.dir.join("secret")).unwrap(), "secret\n");
    let left = fs::read_dir(&ground.dir).unwrap().count();
    assert_eq!(left, 7, "something was made in {}", ground.dir.display());
    drop((config, ground, packets));
    census.assert_unchanged();
    threads.sort();
    threads
}

#[test]
fn a_captured_vmm_can_do_nothing() {
    let threads = attacks_of("husk-vmm", "vmm");
    for name in ["main", "vcpu0", "vsock", "fs", "console", "rng"] {
        assert!(
            threads.iter().any(|thread| thread.starts_with(name)),
            "thread {name} did not attack: {threads:?}"
        );
    }
}

#[test]
fn a_captured_file_server_has_the_share_and_nothing_else() {
    let threads = attacks_of("husk-fsd", "fsd");
    assert_eq!(threads, ["fs-0", "fs-1", "fs-2", "fs-3", "main"]);
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
