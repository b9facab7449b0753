//! Many containers that come and go at once, some of them killed: all of them do as they were told, and nothing of them stays.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::census::Census;
use crate::command::{Finished, Input, Running, eventually, ok, run};
use crate::containerd::{Detached, ctr_run_script};
use crate::host::{self, ContainerdLog};
use crate::operator::{Config, DEFAULT};

/// How many containers there are at a time.
const AT_ONCE: usize = 8;

/// How long a container or exec may take from its start to its end.
const PATIENCE: Duration = Duration::from_secs(600);

/// HUSK_TEST_SOAK containers. A run is done again by its seed (HUSK_TEST_SEED), as far as time allows.
#[test]
fn containers_come_and_go() {
    let setting = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let count = setting("HUSK_TEST_SOAK").unwrap_or(20) as usize;
    let seed = setting("HUSK_TEST_SEED")
        .unwrap_or_else(|| u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos()));
    eprintln!("{count} containers, seed {seed}");
    // Eight machines that share an emulated host's processor take their time.
    let config = Config::at(DEFAULT, "[timeouts]\nboot_seconds = 500\ncall_seconds = 500\n");
    let census = Census::take();
    // What is opened once and kept is not what this is about.
    for (kind, life) in LIVES.iter().enumerate() {
        life(&format!("soak-first-{kind}"), &mut Dice(seed));
    }
    census.assert_unchanged();
    let (stock, log) = (Stock::take(), ContainerdLog::from_now());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let _stop = StopOthers { next: &next, count };
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    // A container's own dice: what becomes of it does not depend on the others'.
                    let mut dice = Dice(seed.wrapping_add(number as u64 + 1));
                    let kind = dice.roll(LIVES.len());
                    eprintln!("soak-{number} lives as {kind}");
                    LIVES[kind](&format!("soak-{number}"), &mut dice);
                }
            });
        }
    });
    drop(config);
    census.assert_unchanged();
    stock.assert_not_grown();
    let log = log.read();
    let ours: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" sandbox=soak-"))
        .collect();
    let error = |line: &&&str| line.contains(" level=error ");
    let warning = |line: &&&str| line.contains(" level=warning ");
    ours.iter().filter(warning).for_each(|line| eprintln!("{line}"));
    let errors: Vec<_> = ours.iter().filter(error).collect();
    assert!(errors.is_empty(), "husk's log has {errors:#?}");
    assert!(!log.contains("panicked at"), "a shim has panicked:\n{log}");
}

/// Lets no worker begin another container when one has failed.
struct StopOthers<'a> {
    next: &'a AtomicUsize,
    count: usize,
}

impl Drop for StopOthers<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.next.store(self.count, Ordering::Relaxed);
        }
    }
}

/// Numbers by a seed (splitmix64).
struct Dice(u64);

impl Dice {
    /// One below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut n = self.0;
        n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (n ^ (n >> 31)) as usize % sides
    }

    /// A pause of up to `most` milliseconds.
    fn pause(&mut self, most: usize) {
        thread::sleep(Duration::from_millis(self.roll(most) as u64));
    }
}

/// What can become of a container of that id.
const LIVES: [fn(&str, &mut Dice); 5] = [
    ends_by_itself,
    serves_execs,
    is_killed,
    is_killed_among_execs,
    is_killed_while_it_starts,
];

fn exec(id: &str, name: &str, script: &str) -> Running {
    let argv = ["ctr", "task", "exec", "--exec-id", name, id, "sh", "-c", script];
    Running::start(&argv, Input::Nothing)
}

fn ends_by_itself(id: &str, dice: &mut Dice) {
    let (code, lines) = (dice.roll(100), dice.roll(3000) + 1);
    let done = ctr_run_script(id, &format!("echo {id} >&2; seq {lines}; exit {code}"))
        .finish(PATIENCE)
        .expect_code(code as i32);
    assert_eq!(done.err(), format!("{id}\n"));
    assert_eq!(done.out().lines().count(), lines);
    assert!(done.out().ends_with(&format!("{lines}\n")), "{id}");
}

fn detached(id: &str) -> Detached {
    Detached::start_within(PATIENCE, id, &["sleep", "1000"])
}

fn serves_execs(id: &str, dice: &mut Dice) {
    let container = detached(id);
    for number in 0..=dice.roll(3) {
        let code = dice.roll(100);
        let done = exec(
            id,
            &format!("e{number}"),
            &format!("cat /proc/1/comm; exit {code}"),
        )
        .finish(PATIENCE)
        .expect_code(code as i32);
        assert_eq!(done.out(), "sleep\n");
    }
    container.remove();
}

/// Kills a running container: by its engine, or its process on the host as anybody may.
fn kill_by_chance(id: &str, dice: &mut Dice) {
    if dice.roll(2) == 0 {
        ok(&["ctr", "task", "kill", "-s", "SIGKILL", id]);
    } else {
        // An engine that has waited too long for an answer lists none, or 0, which would be the suite itself.
        let pid = eventually("the task's pid", || {
            let list = ok(&["ctr", "task", "ls"]);
            let mut rows = list
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>());
            let row = rows.find(|row| row.first() == Some(&id))?;
            row.get(1)?.parse::<i32>().ok().filter(|pid| *pid > 0)
        });
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
}

fn is_killed(id: &str, dice: &mut Dice) {
    let mut running = ctr_run_script(
        id,
        "echo ready; while :; do echo x > /tmp/file; sleep 0.1; rm /tmp/file; done",
    );
    running.wait_for_within(PATIENCE, "ready");
    dice.pause(2000);
    kill_by_chance(id, dice);
    running.finish(PATIENCE).expect_code(137);
}

fn is_killed_among_execs(id: &str, dice: &mut Dice) {
    // Removed when the execs' clients are done: ctr leaves an exec's FIFOs if its task is gone before.
    let container = detached(id);
    let mut execs: Vec<Running> = (0..=dice.roll(3))
        .map(|number| exec(id, &format!("e{number}"), "echo ready; exec sleep 1000"))
        .collect();
    // Sometimes before the last of them runs.
    let ready = dice.roll(execs.len() + 1);
    execs
        .iter_mut()
        .take(ready)
        .for_each(|exec| exec.wait_for_within(PATIENCE, "ready"));
    dice.pause(500);
    kill_by_chance(id, dice);
    for (number, exec) in execs.into_iter().enumerate() {
        let done: Finished = exec.finish(PATIENCE);
        let expected = if number < ready {
            done.code == 137
        } else {
            done.code != 0
        };
        assert!(
            expected,
            "exec {number} of {id} ended with {}: {}",
            done.code,
            done.err()
        );
    }
    eventually("the task to stop", || {
        (container.status()? == "STOPPED").then_some(())
    });
    container.remove();
}

fn is_killed_while_it_starts(id: &str, dice: &mut Dice) {
    let running = ctr_run_script(id, "exec sleep 1000");
    // Whenever it is that the task takes it.
    let end = Instant::now() + PATIENCE;
    loop {
        dice.pause(1000);
        if run(&["ctr", "task", "kill", "-s", "SIGKILL", id]).code == 0 {
            break;
        }
        assert!(Instant::now() < end, "{id} was never there to be killed");
    }
    let done = running.finish(PATIENCE);
    assert_ne!(done.code, 0, "{}", done.out());
    // Killed before its start, it is an error to ctr, which then forgets to remove it.
    run(&["ctr", "task", "rm", "-f", id]);
    run(&["ctr", "container", "rm", id]);
}

/// What else of a host a container could use up: counts of things that have no names.
struct Stock(BTreeMap<String, usize>);

impl Stock {
    fn take() -> Self {
        let mut counts = BTreeMap::new();
        // Threads of the kernel and zombies have no command line; the latter count.
        for process in host::processes() {
            let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
            if !status.contains("\nKthread:\t1") && !status.contains("\nPPid:\t2\n") {
                *counts.entry(format!("processes {}", process.name)).or_insert(0) += 1;
            }
        }
        let containerd = format!("/proc/{}/fd", host::pid_of("containerd"));
        counts.insert(
            "descriptors of containerd".into(),
            fs::read_dir(containerd).unwrap().count(),
        );
        for directory in ["/run", "/var/run", "/tmp", "/dev/shm"] {
            counts.insert(format!("files under {directory}"), files(Path::new(directory)));
        }
        for listing in ["containers", "snapshots", "leases", "task"] {
            counts.insert(
                format!("containerd's {listing}"),
                ok(&["ctr", listing, "ls"]).lines().count(),
            );
        }
        Self(counts)
    }

    /// Asserts that nothing has grown, once containerd has closed what its clients left.
    #[track_caller]
    fn assert_not_grown(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let now = Self::take().0;
            let before = |what: &String| self.0.get(what).copied().unwrap_or(0);
            let grown: Vec<String> = now
                .iter()
                .filter(|(what, count)| **count > before(what))
                .map(|(what, count)| format!("{what}: {} before, {count} after", before(what)))
                .collect();
            if grown.is_empty() {
                return;
            }
            if Instant::now() >= end {
                host::print_logs();
                panic!("something was used up:\n{}", grown.join("\n"));
            }
            thread::sleep(Duration::from_millis(500));
        }
    }
}

/// The files and directories below, of the same file system.
fn files(directory: &Path) -> usize {
    let Ok(device) = fs::metadata(directory).map(|metadata| metadata.dev()) else {
        return 0;
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let count = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() && metadata.dev() == device => 1 + files(&entry.path()),
        Ok(_) => 1,
        Err(_) => 0,
    };
    entries.map(count).sum()
}
