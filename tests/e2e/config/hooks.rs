//! `hooks`: who is called, when, where, with which state, and what a failure means.

use std::fs;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::{Case, Runtime};

const KINDS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// A hook of the shell. `startContainer` finds its program in the container.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin", "MARK=of-the-hook"]})
}

/// Every kind writes its state to KIND.json and its name to `order`, both in the root file system's /hooks.
fn recording(bundle: &mut Bundle) {
    fs::create_dir(bundle.in_root("/hooks")).unwrap();
    for kind in KINDS {
        let directory = match kind {
            "startContainer" => "/hooks".to_owned(),
            _ => bundle.in_root("/hooks").to_str().unwrap().to_owned(),
        };
        bundle.spec["hooks"][kind] = json!([
            hook(&format!(
                "cat > {directory}/{kind}.json; echo {kind} $MARK $# >> {directory}/order"
            )),
            hook(&format!(
                "cat > /dev/null; echo {kind} again >> {directory}/order"
            )),
        ]);
    }
}

#[test]
fn all_kinds_in_their_order_with_the_state() {
    Case::of(json!({"annotations": {"org.example.colour": "green"}}))
        .prepared(|_, bundle| recording(bundle))
        // poststart runs beside the process; it waits for that one.
        .sh("echo process >> /hooks/order; until test -e /hooks/poststart.json; do sleep 0.1; done; sleep 1")
        .each(|runtime, _, bundle| {
            let read =
                |name: &str| fs::read_to_string(bundle.in_root("/hooks").join(name)).unwrap_or_default();
            let order = read("order");
            // runc calls poststart without waiting for startContainer, which runs in the container's first process.
            let raced = |line: &str| runtime == Runtime::Runc && line.starts_with("poststart");
            let lines: Vec<&str> = order
                .lines()
                .filter(|line| *line != "process" && !raced(line))
                .collect();
            let expected: Vec<String> = KINDS
                .iter()
                .flat_map(|kind| [format!("{kind} of-the-hook 0"), format!("{kind} again")])
                .filter(|line| !raced(line))
                .collect();
            assert_eq!(lines, expected, "{runtime:?}");
            assert!(order.contains("poststart again"), "{runtime:?}: {order}");
            let process = order.lines().position(|line| line == "process").unwrap();
            assert!(
                process >= 8,
                "{runtime:?}: the process began before its hooks: {order}"
            );
            for kind in KINDS {
                let text = read(&format!("{kind}.json"));
                let state: Value = serde_json::from_str(&text)
                    .unwrap_or_else(|e| panic!("{runtime:?} {kind}: {e}: {text:?}"));
                let status = state["status"].as_str().unwrap_or_default();
                let expected: &[&str] = match kind {
                    "poststop" => &["stopped"],
                    // runc calls it a moment before it looks.
                    "poststart" if runtime == Runtime::Runc => &["running", "created"],
                    "poststart" => &["running"],
                    "startContainer" => &["created", "creating"],
                    _ => &["creating", "created"],
                };
                assert!(expected.contains(&status), "{runtime:?} {kind}: {text}");
                assert!(state["ociVersion"].is_string(), "{runtime:?} {kind}: {text}");
                assert!(
                    state["id"]
                        .as_str()
                        .unwrap()
                        .starts_with("all-kinds-in-their-order"),
                    "{runtime:?} {kind}: {text}"
                );
                assert!(
                    state["bundle"].as_str().unwrap().starts_with('/'),
                    "{runtime:?} {kind}: {text}"
                );
                assert_eq!(
                    state["annotations"]["org.example.colour"], "green",
                    "{runtime:?} {kind}: {text}"
                );
                let pid = state["pid"].as_i64().unwrap_or(0);
                assert_eq!(pid > 0, kind != "poststop", "{runtime:?} {kind}: {text}");
            }
        });
}

/// prestart and createRuntime run in the runtime's namespaces and are told of a process in the container's network
/// namespace; createContainer runs in the container's own, startContainer in all of it.
#[test]
fn where_they_run() {
    let tell = |directory: &str, kind: &str| {
        hook(&format!(
            "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); \
             {{ readlink /proc/self/ns/net; readlink /proc/$pid/ns/net; pwd; readlink /proc/1/exe; }} > {directory}/{kind}"
        ))
    };
    Case::of(json!({}))
        .prepared(move |_, bundle| {
            fs::create_dir(bundle.in_root("/hooks")).unwrap();
            let directory = bundle.in_root("/hooks").to_str().unwrap().to_owned();
            for kind in ["prestart", "createRuntime", "createContainer"] {
                bundle.spec["hooks"][kind] = json!([tell(&directory, kind)]);
            }
            bundle.spec["hooks"]["startContainer"] = json!([hook(
                "cat > /dev/null; { pwd; hostname; id -u; } > /hooks/startContainer"
            )]);
        })
        .sh("true")
        .each(|runtime, _, bundle| {
            let read =
                |name: &str| fs::read_to_string(bundle.in_root("/hooks").join(name)).unwrap_or_default();
            let ours = fs::read_link("/proc/self/ns/net").unwrap();
            for kind in ["prestart", "createRuntime"] {
                let text = read(kind);
                let lines: Vec<&str> = text.lines().collect();
                assert_eq!(
                    lines.first().copied(),
                    ours.to_str(),
                    "{runtime:?} {kind}: {text}"
                );
                assert!(
                    lines[1].starts_with("net:[") && lines[1] != lines[0],
                    "{runtime:?} {kind}: {text}"
                );
            }
            let text = read("createContainer");
            let runtime_net = read("createRuntime")
                .lines()
                .nth(1)
                .unwrap_or_default()
                .to_owned();
            assert_eq!(
                text.lines().next(),
                Some(runtime_net.as_str()),
                "{runtime:?} createContainer: {text}"
            );
            assert_eq!(read("startContainer"), "/\nhusk-e2e\n0\n", "{runtime:?}");
        });
}

fn failing(kind: &'static str, hook: Value) -> Case {
    Case::of(json!({}))
        .prepared(move |_, bundle| bundle.spec["hooks"][kind] = json!([hook]))
        .sh("echo started")
}

#[test]
fn one_that_fails_before_the_start() {
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        failing(kind, hook("echo why >&2; exit 3")).refused(&["hooks.", kind, "3"], &["hook", "3"]);
    }
}

#[test]
fn one_that_is_not_there() {
    failing("createRuntime", json!({"path": "/no/such/hook"}))
        .refused(&["hooks.createRuntime", "/no/such/hook"], &["/no/such/hook"]);
}

#[test]
fn one_that_hangs() {
    let mut hanging = hook("exec sleep 1000");
    hanging["timeout"] = 1.into();
    failing("prestart", hanging.clone()).refused(&["hooks.prestart", "1 s"], &["hook"]);
    failing("startContainer", hanging).refused(&["hooks.startContainer"], &["hook"]);
}

#[test]
fn one_without_an_absolute_path() {
    failing("prestart", json!({"path": "sh"})).refused(&["hooks.prestart", "path"], &[]);
}

/// The process has begun: a failure of poststart ends it under runc. husk does the same.
#[test]
fn one_that_fails_after_the_start() {
    failing("poststart", hook("exit 4")).refused(&["hooks.poststart", "4"], &["hook", "4"]);
}

/// Nothing is left to refuse then: the exit code stays the process's, as the spec has it. runc's Delete fails since 1.2.
#[test]
fn one_that_fails_after_the_end() {
    Case::of(json!({}))
        .prepared(|_: Runtime, bundle| {
            let order = bundle.path().join("order").to_str().unwrap().to_owned();
            bundle.spec["hooks"]["poststop"] =
                json!([hook("exit 5"), hook(&format!("echo second > {order}"))]);
        })
        .runc_before(1, 2)
        .sh("exit 6")
        .exits(6)
        .each(|runtime, _, bundle| {
            if runtime == Runtime::Husk {
                // The spec lets the others run; runc stops at the first.
                assert_eq!(
                    fs::read_to_string(bundle.path().join("order")).unwrap_or_default(),
                    "second\n"
                );
            }
        });
}
