//! `husk check --sandbox`: what is true of a running sandbox's processes, for people and for programs.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use serde_json::{Value, json};

use super::{
    cli::{CheckArgs, Format},
    peek::find,
    ps::FAILURE,
    run::Failure,
};
use crate::{
    check::{
        process::{Descriptor, Proc, Process, Root, Set},
        sandbox::{Member, landlock_of_kernel, look},
    },
    engine::{Seen, sandboxes},
};

/// Descriptors that are shown to people; a file server may have very many.
const SHOWN: usize = 48;

/// Looks at the sandbox of `id`, and prints. Returns the exit code: 1 when a fact is missing.
///
/// # Errors
/// When there is no such sandbox, it does not run, or nothing can be printed.
pub fn check(args: &CheckArgs, id: &str) -> Result<u8, Failure> {
    let failed = |message: String| Failure {
        code: FAILURE,
        message,
    };
    let seen = sandboxes().map_err(|error| failed(format!("cannot see what runs (root may): {error}")))?;
    let sandbox = find(&seen, id, args.namespace.as_deref()).map_err(failed)?;
    if !sandbox.alive {
        return Err(failed(format!(
            "the engine of sandbox {} has died, and with it all of its processes; there is nothing to look at",
            sandbox.id
        )));
    }
    let members = look(sandbox, &Proc::default(), landlock_of_kernel());
    let text = match args.form() {
        _ if args.quiet => String::new(),
        Format::Json => format!("{:#}\n", document(sandbox, &members)),
        Format::Table => table(sandbox, &members),
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(failed(format!("cannot print what was found: {error}")))
        }
        _ => Ok(u8::from(!ok(&members))),
    }
}

fn ok(members: &[Member]) -> bool {
    members.iter().all(|member| member.faults.is_empty())
}

fn table(sandbox: &Seen, members: &[Member]) -> String {
    let mut text = format!("sandbox {} in namespace {}\n", sandbox.id, sandbox.namespace);
    for member in members {
        text.push_str(&format!("\n{} (pid {})\n", member.name(), member.pid));
        for (name, value) in member.facts.iter().flat_map(rows) {
            text.push_str(&format!("  {name:14}  {value}\n"));
        }
        if let Some(landlock) = &member.landlock {
            text.push_str(&format!("  {:14}  {landlock}\n", "Landlock"));
        }
        let verdict = match member.faults.as_slice() {
            [] if member.is_judged() => "ok: all that is expected holds".to_owned(),
            [] => "not judged: it is not meant to be locked in".to_owned(),
            faults => format!("FAIL: {}", faults.join(&format!("\n  {:14}  FAIL: ", ""))),
        };
        text.push_str(&format!("  {:14}  {verdict}\n", "verdict"));
    }
    text.push_str(if ok(members) {
        "\nThe sandbox is locked in as it has to be.\n"
    } else {
        "\nThe sandbox is not locked in as it has to be.\n"
    });
    text
}

/// (name, value) of the facts, in order.
fn rows(process: &Process) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(main) = process.threads.first() {
        rows.push(("user, group", format!("{}, {}", ids(&main.uids), ids(&main.gids))));
        rows.push(("groups", or_none(&main.groups, ", ")));
        for (name, set) in main.capabilities.sets() {
            rows.push((cap_row(name), set_text(set)));
        }
        rows.push(("no_new_privs", yes(main.no_new_privs).into()));
    }
    let of = |hosts: bool| {
        let kinds: Vec<&str> = process
            .namespaces
            .iter()
            .filter(|namespace| namespace.hosts == hosts)
            .map(|namespace| namespace.kind)
            .collect();
        or_none(&kinds, " ")
    };
    rows.push((
        "namespaces",
        format!("own: {}; the host's: {}", of(false), of(true)),
    ));
    let dumpable = match process.dumpable {
        Some(dumpable) => yes(dumpable),
        None => "cannot be seen from outside",
    };
    rows.push(("dumpable", dumpable.into()));
    rows.push((
        "root directory",
        process.root.map_or("cannot be seen".into(), root),
    ));
    let limits: Vec<String> = process
        .limits
        .iter()
        .map(|limit| format!("{} {}", limit.name, limit_text(&limit.soft, &limit.hard)))
        .collect();
    rows.push(("limits", or_none(&limits, ", ")));
    rows.push(("cgroup", or_none(&process.cgroups, ", ")));
    for thread in &process.threads {
        let filters = thread
            .filters
            .map_or(String::new(), |count| format!(", filters: {count}"));
        rows.push((
            "seccomp",
            format!(
                "mode {}{filters}: {} ({}{})",
                thread.seccomp,
                thread.tid,
                thread.name,
                if thread.of_kernel {
                    ", the kernel's own"
                } else {
                    ""
                }
            ),
        ));
    }
    for fd in process.descriptors.iter().take(SHOWN) {
        rows.push(("descriptor", format!("{:3} {}", fd.number, fd.target)));
    }
    match process.descriptors.len().saturating_sub(SHOWN) {
        0 => {}
        more => rows.push((
            "descriptor",
            format!("    and {more} more (--format json shows all)"),
        )),
    }
    rows
}

fn cap_row(set: &str) -> &'static str {
    match set {
        "effective" => "caps effective",
        "permitted" => "     permitted",
        "inheritable" => "   inheritable",
        "bounding" => "      bounding",
        _ => "       ambient",
    }
}

fn set_text(set: Set) -> String {
    match set.names() {
        // The kernel's all.
        names if names.len() > 36 => format!("{} of them: nearly all", names.len()),
        names => or_none(&names, ", "),
    }
}

fn or_none<T: ToString>(words: &[T], between: &str) -> String {
    if words.is_empty() {
        return "none".into();
    }
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    words.join(between)
}

/// Four ids as one where they are the same.
fn ids(ids: &[u32]) -> String {
    match ids {
        [real, effective, saved, files] if [effective, saved, files] == [real; 3] => real.to_string(),
        ids => or_none(ids, "/"),
    }
}

fn limit_text(soft: &str, hard: &str) -> String {
    if soft == hard {
        soft.to_owned()
    } else {
        format!("{soft} (at most {hard})")
    }
}

fn yes(true_: bool) -> &'static str {
    if true_ { "yes" } else { "no" }
}

fn root(root: Root) -> String {
    let place = match root {
        Root { hosts: true, .. } => "the host's",
        Root { share: true, .. } => "the share",
        Root { empty: true, .. } => "an empty directory",
        _ => "another",
    };
    let access = if root.read_only { "read-only" } else { "writable" };
    format!("{place}, {access}")
}

fn document(sandbox: &Seen, members: &[Member]) -> Value {
    json!({
        "ok": ok(members),
        "namespace": sandbox.namespace,
        "sandbox": sandbox.id,
        "processes": members.iter().map(member).collect::<Vec<_>>(),
    })
}

fn member(member: &Member) -> Value {
    json!({
        "name": member.name(),
        "pid": member.pid,
        "expected": member.is_judged(),
        "ok": member.faults.is_empty(),
        "faults": member.faults,
        "landlock": member.landlock.map(|landlock| landlock.to_string()),
        "facts": member.facts.as_ref().map(facts),
    })
}

fn facts(process: &Process) -> Value {
    let map = |pairs: Vec<(&str, Value)>| -> BTreeMap<String, Value> {
        pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    };
    let threads: Vec<Value> = process
        .threads
        .iter()
        .map(|thread| {
            let sets = thread.capabilities.sets();
            json!({
                "tid": thread.tid,
                "name": thread.name,
                "uids": thread.uids,
                "gids": thread.gids,
                "groups": thread.groups,
                "capabilities": map(sets.map(|(name, set)| (name, json!(set.names()))).to_vec()),
                "no_new_privs": thread.no_new_privs,
                "seccomp": thread.seccomp,
                "filters": thread.filters,
                "of_kernel": thread.of_kernel,
            })
        })
        .collect();
    let namespaces = process.namespaces.iter().map(|namespace| {
        let of = if namespace.hosts { "host" } else { "own" };
        (namespace.kind, json!({ "id": namespace.id, "of": of }))
    });
    let limits = process
        .limits
        .iter()
        .map(|limit| (limit.name, json!({ "soft": limit.soft, "hard": limit.hard })));
    let root = process.root.map(|root| {
        json!({ "host": root.hosts, "share": root.share, "empty": root.empty, "read_only": root.read_only })
    });
    json!({
        "threads": threads,
        "namespaces": map(namespaces.collect()),
        "dumpable": process.dumpable,
        "root": root,
        "limits": map(limits.collect()),
        "descriptors": process.descriptors.iter().map(descriptor).collect::<Vec<_>>(),
        "cgroups": process.cgroups,
    })
}

fn descriptor(fd: &Descriptor) -> Value {
    json!({ "number": fd.number, "what": fd.target, "flags": format!("{:#o}", fd.flags), "mount": fd.mount })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::process::{Capabilities, Limit, Namespace, Thread},
        engine::{Role, Status},
    };

    fn members() -> Vec<Member> {
        let facts = Process {
            pid: 7,
            threads: vec![Thread {
                tid: 7,
                name: "husk-vmm".into(),
                uids: vec![9; 4],
                gids: vec![9, 8, 9, 9],
                capabilities: Capabilities {
                    bounding: Set(3),
                    effective: Set(u64::MAX >> 23),
                    ..Capabilities::default()
                },
                no_new_privs: true,
                seccomp: 2,
                filters: Some(1),
                ..Thread::default()
            }],
            namespaces: vec![
                Namespace {
                    kind: "user",
                    id: "1".into(),
                    hosts: false,
                },
                Namespace {
                    kind: "net",
                    id: "2".into(),
                    hosts: true,
                },
            ],
            root: Some(Root {
                empty: true,
                ..Root::default()
            }),
            limits: vec![Limit {
                name: "core",
                soft: "0".into(),
                hard: "1".into(),
            }],
            descriptors: (0..50)
                .map(|number| Descriptor {
                    number,
                    target: "socket:[1]".into(),
                    flags: 0o100_000,
                    mount: Some(3),
                })
                .collect(),
            cgroups: vec!["0::/pod".into()],
            ..Process::default()
        };
        let member = |role, facts, faults: &[&str]| Member {
            role,
            pid: 7,
            facts,
            landlock: None,
            faults: faults.iter().map(ToString::to_string).collect(),
        };
        vec![
            member(Role::Vmm, Some(facts), &["it is open", "it is root's"]),
            member(Role::Fsd, None, &[]),
        ]
    }

    fn sandbox() -> Seen {
        Seen {
            namespace: "default".into(),
            id: "pod".into(),
            alive: true,
            vmm: 7,
            status: Status::default(),
            processes: Vec::new(),
            dir: "/nonexistent".into(),
        }
    }

    #[test]
    fn people_get_a_table_with_a_verdict() {
        let text = table(&sandbox(), &members());
        for line in [
            "sandbox pod in namespace default\n",
            "\nhusk-vmm (pid 7)\n",
            "  user, group     9, 9/8/9/9\n",
            "  caps effective  41 of them: nearly all\n",
            "        bounding  chown, dac_override\n",
            "         ambient  none\n",
            "  namespaces      own: user; the host's: net\n",
            "  dumpable        cannot be seen from outside\n",
            "  root directory  an empty directory, writable\n",
            "  limits          core 0 (at most 1)\n",
            "  seccomp         mode 2, filters: 1: 7 (husk-vmm)\n",
            "  descriptor       47 socket:[1]\n  descriptor          and 2 more (--format json shows all)\n",
            "  verdict         FAIL: it is open\n                  FAIL: it is root's\n",
            "\nhusk-fsd (pid 7)\n  verdict         ok: all that is expected holds\n",
            "\nThe sandbox is not locked in as it has to be.\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in {text}");
        }
    }

    #[test]
    fn programs_get_a_document() {
        let document = document(&sandbox(), &members());
        assert_eq!(document["ok"], false);
        let vmm = &document["processes"][0];
        assert_eq!(vmm["faults"][1], "it is root's");
        assert_eq!(
            vmm["facts"]["namespaces"]["net"],
            json!({ "id": "2", "of": "host" })
        );
        assert_eq!(vmm["facts"]["descriptors"].as_array().unwrap().len(), 50);
        assert_eq!(
            vmm["facts"]["threads"][0]["capabilities"]["bounding"],
            json!(["chown", "dac_override"])
        );
        assert_eq!(document["processes"][1]["facts"], Value::Null);
    }
}
