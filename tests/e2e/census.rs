//! What husk may leave on a host: taken before and after, both must be the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::command::run;
use crate::{host, violations};

/// Everything on the host that a container could leave, with its count.
#[derive(PartialEq, Eq)]
pub struct Census(BTreeMap<String, usize>);

impl Census {
    /// What is there once it stands still: what the test before left may take a moment to go.
    pub fn take() -> Self {
        violations::watch();
        let end = Instant::now() + Duration::from_secs(30);
        let mut last = Self::count();
        loop {
            thread::sleep(Duration::from_millis(100));
            let now = Self::count();
            if now == last || Instant::now() >= end {
                return now;
            }
            last = now;
        }
    }

    fn count() -> Self {
        let mut found = BTreeMap::new();
        let mut add = |what: String| *found.entry(what).or_insert(0) += 1;
        for process in host::processes() {
            if process.name.contains("husk") || process.name == "ctr" {
                add(format!("process {}", process.name));
            }
            for namespace in ["net", "mnt", "pid"] {
                if let Ok(link) = fs::read_link(format!("/proc/{}/ns/{namespace}", process.pid)) {
                    found_once(&mut add, &link.to_string_lossy());
                }
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap().lines() {
            let place = line.split(' ').nth(4).unwrap_or("?");
            // Docker keeps the host's own from the first container on that asks for it; `ip netns` makes a mount of the
            // directory for the first name, and leaves it.
            if !["/run/docker/netns/default", "/run/netns"].contains(&place) {
                add(format!("mount {place}"));
            }
        }
        for line in fs::read_to_string("/proc/net/unix").unwrap().lines() {
            if let Some(path) = line.split_whitespace().nth(7) {
                if path.contains("husk") || path.contains("/containerd/s/") {
                    add(format!("socket {path}"));
                }
            }
        }
        walk(Path::new("/sys/fs/cgroup"), 6, &mut |path| {
            // The parent that the tests' bundles name stays, as any parent.
            if path != "/sys/fs/cgroup/husk-e2e" {
                add(format!("cgroup {path}"));
            }
        });
        for directory in [
            "/run/husk",
            "/run/containerd/s",
            "/run/containerd/io.containerd.runtime.v2.task",
        ] {
            walk(Path::new(directory), 2, &mut |path| {
                add(format!("directory {path}"))
            });
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                add(format!("entry {}", entry.path().display()));
            }
        }
        network(&mut add);
        // A namespace's number says nothing; how many there are does.
        let namespaces = found.keys().filter(|key| key.starts_with("namespace")).count();
        found.retain(|key, _| !key.starts_with("namespace"));
        found.insert("namespaces".into(), namespaces);
        Self(found)
    }

    /// Asserts that the host is as it was, and that no program made a system call that is forbidden to it.
    #[track_caller]
    pub fn assert_unchanged(&self) {
        self.assert_same();
        let told = violations::take();
        assert!(told.is_empty(), "there was a violation:\n{}", told.join("\n"));
    }

    /// As [`Self::assert_unchanged`], but for violations that the test has provoked, of which one is told in these words.
    #[track_caller]
    pub fn assert_violated(&self, words: &str) {
        self.assert_same();
        violations::expect(words);
    }

    /// The last of what a container left may take a moment to go.
    #[track_caller]
    fn assert_same(&self) {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let now = Self::count();
            if now == *self {
                return;
            }
            if Instant::now() >= end {
                host::print_logs();
                let mut report = String::new();
                for key in self.0.keys().chain(now.0.keys()) {
                    let (before, after) = (self.0.get(key).unwrap_or(&0), now.0.get(key).unwrap_or(&0));
                    if before != after && !report.contains(key.as_str()) {
                        report += &format!("  {key}: {before} before, {after} after\n");
                    }
                }
                panic!("something was left behind, or taken away:\n{report}");
            }
            thread::sleep(Duration::from_millis(300));
        }
    }
}

fn found_once(add: &mut impl FnMut(String), namespace: &str) {
    add(format!("namespace {namespace}"));
}

/// The links and queueing disciplines of the host's network namespace and of those that have a name.
fn network(add: &mut impl FnMut(String)) {
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // A namespace of the name "" is the host's.
    for name in names.chain([String::new()]) {
        let within = |words: &str| {
            let enter = match name.as_str() {
                "" => String::new(),
                name => format!("ip netns exec {name} "),
            };
            // One that is just being removed cannot be entered any more.
            run(&["sh", "-c", &(enter + words)]).out()
        };
        add(format!("netns {name}"));
        for line in within("ip -o link show").lines() {
            // `2: eth0@if3: <…`
            let link = line.split(['@', ' ', ':']).filter(|word| !word.is_empty()).nth(1);
            add(format!("netns {name} link {}", link.unwrap_or("?")));
        }
        for line in within("tc qdisc show").lines() {
            // `qdisc KIND HANDLE dev NAME …`
            let words: Vec<_> = line.split(' ').collect();
            let word = |at: usize| words.get(at).copied().unwrap_or("?");
            add(format!("netns {name} qdisc {} of {}", word(1), word(4)));
        }
    }
}

fn walk(directory: &Path, depth: usize, add: &mut impl FnMut(String)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            add(entry.path().display().to_string());
            if depth > 1 {
                walk(&entry.path(), depth - 1, add);
            }
        }
    }
}
