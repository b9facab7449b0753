//! `husk ps`: what runs on this machine, of all engines.

use std::{
    io::{self, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    cli::{Format, PsArgs},
    run::Failure,
};
use crate::engine::{Seen, sandboxes};

/// Exit code of a command that looked and failed.
pub const FAILURE: u8 = 1;

/// One line of the table: a container, or a sandbox that has none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row<'a> {
    sandbox: &'a Seen,
    /// The container's id; `None`: the sandbox has no container.
    id: Option<&'a str>,
    pid: u32,
    status: &'a str,
    created: u64,
}

/// Looks, and prints. Returns the exit code.
///
/// # Errors
/// When it cannot look or print.
pub fn ps(args: &PsArgs) -> Result<u8, Failure> {
    let failed = |what: &str, error: io::Error| Failure {
        code: FAILURE,
        message: format!("{what}: {error}"),
    };
    let mut seen = sandboxes().map_err(|error| failed("cannot see what runs (root may)", error))?;
    if let Some(namespace) = &args.namespace {
        seen.retain(|sandbox| sandbox.namespace == *namespace);
    }
    let rows = rows(&seen);
    let text = if args.quiet {
        rows.iter()
            .map(|row| format!("{}\n", row.id.unwrap_or(&row.sandbox.id)))
            .collect()
    } else {
        match if args.json { Format::Json } else { args.format } {
            Format::Json => format!("{:#}\n", Value::from_iter(rows.iter().map(document))),
            Format::Table => table(&rows, SystemTime::now()),
        }
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(failed("cannot print", error)),
        _ => Ok(0),
    }
}

fn rows(seen: &[Seen]) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for sandbox in seen {
        // What an engine said before it died is over.
        let status = |said| if sandbox.alive { said } else { "dead" };
        if sandbox.status.containers.is_empty() {
            rows.push(Row {
                sandbox,
                id: None,
                pid: sandbox.vmm,
                status: status("empty"),
                created: sandbox.status.created,
            });
        }
        for container in &sandbox.status.containers {
            rows.push(Row {
                sandbox,
                id: Some(&container.id),
                pid: container.pid,
                status: status(&container.status),
                created: container.created,
            });
        }
    }
    rows
}

fn document(row: &Row<'_>) -> Value {
    let sandbox = row.sandbox;
    json!({
        "namespace": sandbox.namespace,
        "sandbox": sandbox.id,
        "id": row.id,
        "pid": row.pid,
        "status": row.status,
        "vcpus": sandbox.status.vcpus,
        "memory_mib": sandbox.status.memory_mib,
        "created": row.created,
    })
}

fn table(rows: &[Row<'_>], now: SystemTime) -> String {
    let heads = [
        "NAMESPACE",
        "SANDBOX",
        "ID",
        "PID",
        "STATUS",
        "VCPUS",
        "MEMORY",
        "CREATED",
    ]
    .map(str::to_owned);
    let mut lines = vec![heads];
    for row in rows {
        let sandbox = row.sandbox;
        let known = sandbox.status.vcpus > 0;
        let or_dash = |text: String| if known { text } else { "-".into() };
        lines.push([
            sandbox.namespace.clone(),
            sandbox.id.clone(),
            row.id.unwrap_or("-").to_owned(),
            row.pid.to_string(),
            row.status.to_owned(),
            or_dash(sandbox.status.vcpus.to_string()),
            or_dash(format!("{} MiB", sandbox.status.memory_mib)),
            or_dash(ago(row.created, now)),
        ]);
    }
    let mut widths = [0; 8];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.len());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    text
}

/// How long ago, as Docker says it.
fn ago(then: u64, now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let seconds = now.saturating_sub(then);
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{ContainerStatus, Status};

    fn seen() -> Vec<Seen> {
        let container = |id: &str, status: &str| ContainerStatus {
            id: id.into(),
            pid: 42,
            status: status.into(),
            created: 1000,
            execs: 0,
        };
        let sandbox = |id: &str, alive, containers| Seen {
            namespace: "default".into(),
            id: id.into(),
            alive,
            vmm: 41,
            status: Status {
                vcpus: 2,
                memory_mib: 256,
                created: 900,
                containers,
            },
            processes: Vec::new(),
            dir: "/run/husk/default".into(),
        };
        vec![
            sandbox(
                "pod",
                true,
                vec![container("a", "running"), container("b", "stopped")],
            ),
            sandbox("crashed", false, vec![container("c", "running")]),
            Seen {
                status: Status::default(),
                ..sandbox("fresh", true, vec![])
            },
        ]
    }

    #[test]
    fn people_get_a_table() {
        let now = UNIX_EPOCH + Duration::from_secs(1030);
        assert_eq!(
            table(&rows(&seen()), now),
            "NAMESPACE   SANDBOX   ID   PID   STATUS    VCPUS   MEMORY    CREATED\n\
             default     pod       a    42    running   2       256 MiB   30 seconds ago\n\
             default     pod       b    42    stopped   2       256 MiB   30 seconds ago\n\
             default     crashed   c    42    dead      2       256 MiB   30 seconds ago\n\
             default     fresh     -    41    empty     -       -         -\n"
        );
    }

    #[test]
    fn programs_get_documents() {
        let seen = seen();
        let rows = rows(&seen);
        assert_eq!(
            document(&rows[0]),
            json!({
                "namespace": "default", "sandbox": "pod", "id": "a", "pid": 42, "status": "running",
                "vcpus": 2, "memory_mib": 256, "created": 1000,
            })
        );
        assert_eq!(document(&rows[3])["id"], Value::Null);
    }

    #[test]
    fn ages_are_rounded_down() {
        let age = |seconds| ago(0, UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(age(1), "1 second ago");
        assert_eq!(age(119), "119 seconds ago");
        assert_eq!(age(7199), "119 minutes ago");
        assert_eq!(age(90_000), "25 hours ago");
        assert_eq!(age(200_000), "2 days ago");
    }
}
