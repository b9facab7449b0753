//! Guests that attack: a kernel that brings the machine every malformed input that it knows (tests/hostile-guest), an
//! agent that lies to the engine (tests/hostile-agent). The machine may end, and a container fail to start;
//! but within a bound, with an error that says why, without harm to others, and nothing is left.

mod agent;
mod agent_calls;
mod agent_task;
mod guest;
mod guest_ends;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::command::{Finished, Input, run_with};
use crate::foreground::Bundle;
use crate::host;
use crate::operator::Config;

/// The most that each program may have of memory of its own while it is attacked, in KiB: several times what it has in
/// peace, and far less than what a flood brings.
const LIMITS: [(&str, u64); 4] = [
    ("husk-vmm", 24 << 10),
    ("husk-fsd", 24 << 10),
    ("husk", 64 << 10),
    ("containerd-shim-husk-v2", 64 << 10),
];

/// Those that every machine has: a watch that never saw one has watched nothing.
const SEEN: [&str; 2] = ["husk-vmm", "husk-fsd"];

/// A program of the tests beside this one, by its absolute path.
fn program(name: &str) -> String {
    let path = std::env::current_exe().unwrap().with_file_name(name);
    path.to_str().unwrap().to_owned()
}

/// Samples the memory of husk's programs until it is asked.
struct Watch {
    end: Arc<AtomicBool>,
    thread: thread::JoinHandle<BTreeMap<&'static str, u64>>,
}

impl Watch {
    fn start() -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            let mut peaks = BTreeMap::new();
            while !ended.load(Ordering::Relaxed) {
                for process in host::processes() {
                    if let Some((name, _)) = LIMITS.iter().find(|(name, _)| *name == process.name) {
                        let peak = peaks.entry(*name).or_insert(0);
                        *peak = host::anonymous_kib(process.pid).max(*peak);
                    }
                }
                thread::sleep(Duration::from_millis(100));
            }
            peaks
        });
        Self { end, thread }
    }

    /// Asserts that a machine's programs were seen, and that no program had more than it may.
    #[track_caller]
    fn assert_bounded(self) {
        self.end.store(true, Ordering::Relaxed);
        let peaks = self.thread.join().unwrap();
        eprintln!("most memory, in KiB: {peaks:?}");
        for name in SEEN {
            assert!(
                peaks.get(name).is_some_and(|peak| *peak > 0),
                "{name} was never seen: {peaks:?}"
            );
        }
        for (name, most) in LIMITS {
            let peak = peaks.get(name).copied().unwrap_or(0);
            assert!(peak <= most, "{name} had {peak} KiB, at most {most} are expected");
        }
    }
}

/// A configuration of this text, under a name of its own.
fn config(name: &str, text: &str) -> Config {
    Config::at(&format!("/run/husk-test-{name}/husk.toml"), text)
}

/// `husk run` of a bundle with a configuration, watched.
#[track_caller]
fn husk_run(config: &Config, bundle: &Bundle, id: &str, deadline: Duration) -> Finished {
    let watch = Watch::start();
    let argv = [
        "husk",
        "--config",
        config.path(),
        "run",
        "--bundle",
        bundle.path(),
        id,
    ];
    let done = run_with(&argv, Input::Nothing, deadline);
    watch.assert_bounded();
    assert_printable(&done.err());
    done
}

/// What husk says of a guest's words obeys nobody: no control characters but line ends and tabs.
#[track_caller]
fn assert_printable(text: &str) {
    let odd = text.chars().find(|c| c.is_control() && !['\n', '\t'].contains(c));
    assert_eq!(odd, None, "in {text:?}");
}

/// Asserts that a text has all these words, and that no filter of system calls was violated.
#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not said in {text}");
    }
    assert!(!text.contains("system call"), "a violation: {text}");
}
