//! One field of config.json, tried under husk and under runc: what is expected of husk is what runc does, and a
//! test that expects something else of runc does not pass.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::census::Census;
use crate::command::{Finished, ok, run};
use crate::containerd;
use crate::host;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Husk,
    Runc,
}

impl Runtime {
    /// runc first: an expectation that is wrong fails there. HUSK_TEST_RUNTIME=husk or =runc leaves the other out.
    pub fn all() -> Vec<Self> {
        let only = std::env::var("HUSK_TEST_RUNTIME").ok();
        let asked = |runtime: &Self| {
            only.as_ref()
                .is_none_or(|only| format!("{runtime:?}").to_lowercase() == *only)
        };
        [Self::Runc, Self::Husk].into_iter().filter(asked).collect()
    }

    /// As containerd names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Husk => containerd::RUNTIME,
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    /// The program that containerd starts.
    pub fn shim(self) -> &'static str {
        match self {
            Self::Husk => "containerd-shim-husk-v2",
            Self::Runc => "containerd-shim-runc-v2",
        }
    }

    /// The version of runc, as (major, minor).
    pub fn runc_version() -> (u32, u32) {
        static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
        *VERSION.get_or_init(|| {
            let text = ok(&["runc", "--version"]);
            let version = text.split_whitespace().nth(2).unwrap();
            let mut numbers = version.split('.').map(|n| n.parse().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap())
        })
    }
}

type Prepare = Box<dyn Fn(Runtime, &mut Bundle)>;

/// A container that differs from the base (tests/e2e/bundle.rs) in some fields.
pub struct Case {
    name: String,
    prepare: Vec<Prepare>,
    code: i32,
    runc_since: (u32, u32),
    runc_before: (u32, u32),
}

impl Case {
    /// The base with `change` laid over it; the test's name names the container.
    pub fn of(change: Value) -> Self {
        let test = std::thread::current().name().unwrap_or("case").to_owned();
        let name = test.rsplit("::").next().unwrap_or("case").replace('_', "-");
        let case = Self {
            name,
            prepare: Vec::new(),
            code: 0,
            runc_since: (0, 0),
            runc_before: (u32::MAX, 0),
        };
        case.prepared(move |_, bundle| bundle.change(&change))
    }

    /// Does to the bundle what takes more than a change of the spec. Called once for each runtime.
    pub fn prepared(mut self, prepare: impl Fn(Runtime, &mut Bundle) + 'static) -> Self {
        self.prepare.push(Box::new(prepare));
        self
    }

    pub fn mount(self, mount: Value) -> Self {
        self.prepared(move |_, bundle| bundle.mount(mount.clone()))
    }

    /// Runs a script by the container's shell.
    pub fn sh(self, script: &str) -> Self {
        let args = json!(["sh", "-c", script]);
        self.prepared(move |_, bundle| bundle.spec["process"]["args"] = args.clone())
    }

    /// The exit code expected, 0 if not said.
    pub fn exits(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    /// runc applies the field only since this version; with an older one only husk is asked.
    pub fn runc_since(mut self, major: u32, minor: u32) -> Self {
        self.runc_since = (major, minor);
        self
    }

    /// runc has done otherwise since this version; with a newer one only husk is asked.
    pub fn runc_before(mut self, major: u32, minor: u32) -> Self {
        self.runc_before = (major, minor);
        self
    }

    fn runtimes(&self) -> Vec<Runtime> {
        let range = self.runc_since..self.runc_before;
        let knows = |runtime: &Runtime| *runtime == Runtime::Husk || range.contains(&Runtime::runc_version());
        Runtime::all().into_iter().filter(knows).collect()
    }

    fn bundle(&self, runtime: Runtime) -> (String, Bundle) {
        let id = format!("{}-{runtime:?}", self.name).to_lowercase();
        let mut bundle = Bundle::new(&id);
        for prepare in &self.prepare {
            prepare(runtime, &mut bundle);
        }
        (id, bundle)
    }

    /// Runs the container under each runtime and gives all to `check`.
    #[track_caller]
    pub fn each(self, check: impl Fn(Runtime, &Finished, &Bundle)) {
        for runtime in self.runtimes() {
            let (id, bundle) = self.bundle(runtime);
            let done = ctr_run_bundle(runtime, &id, &bundle);
            if done.code != self.code {
                host::print_logs();
            }
            assert_eq!(
                done.code,
                self.code,
                "exit code under {runtime:?}\nstdout: {}\nstderr: {}",
                done.out(),
                done.err()
            );
            check(runtime, &done, &bundle);
        }
    }

    /// Runs the container under each runtime and compares its standard output.
    #[track_caller]
    pub fn prints(self, expected: &str) {
        self.each(|runtime, done, _| {
            assert_eq!(done.out(), expected, "under {runtime:?}; stderr: {}", done.err());
        });
    }

    /// The container must not start: the error has all the words of `husk` under husk, which names the field, and
    /// `runc` under runc; nothing is left. An empty `runc` says that runc does not refuse this, and is not asked.
    #[track_caller]
    pub fn refused(self, husk: &[&str], runc: &[&str]) {
        for runtime in self.runtimes() {
            let words = if runtime == Runtime::Husk { husk } else { runc };
            if words.is_empty() {
                continue;
            }
            let census = Census::take();
            let (id, bundle) = self.bundle(runtime);
            let done = ctr_run_bundle(runtime, &id, &bundle);
            assert_ne!(done.code, 0, "{runtime:?} started it: {}", done.out());
            for word in words {
                assert!(
                    done.err().contains(word),
                    "the error under {runtime:?} does not say {word:?}: {}",
                    done.err()
                );
            }
            drop(bundle);
            if runtime == Runtime::Husk {
                census.assert_unchanged();
            }
        }
    }
}

/// `ctr run` of a bundle in the foreground; containerd forgets the container afterwards.
#[track_caller]
pub fn ctr_run_bundle(runtime: Runtime, id: &str, bundle: &Bundle) -> Finished {
    let config = bundle.write();
    let done = run(&[
        "ctr",
        "run",
        "--rm",
        "--runtime",
        runtime.name(),
        "--config",
        config.to_str().unwrap(),
        id,
    ]);
    if done.code != 0 && done.err().starts_with("ctr: ") {
        // ctr forgets some containers whose start failed late.
        run(&["ctr", "task", "rm", "-f", id]);
        run(&["ctr", "container", "rm", id]);
    }
    done
}
