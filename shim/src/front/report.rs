//! `husk check`: what the engine found on this machine, for people and for programs.

use std::{
    io::{self, Write},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    cli::{CheckArgs, FAILURE},
    run::Failure,
};
use crate::{
    check::{Options, Report},
    config::Source,
};

/// Looks, and prints. Returns the exit code.
///
/// # Errors
/// When nothing can be printed.
pub async fn check(args: &CheckArgs, config: Source) -> Result<u8, Failure> {
    let options = Options {
        boot: (args.timeout > 0).then(|| Duration::from_secs(args.timeout)),
        config,
    };
    let report = crate::check::check(options).await;
    let text = if args.quiet {
        String::new()
    } else if args.json {
        format!("{:#}\n", document(&report))
    } else {
        plain(&report)
    };
    io::stdout().write_all(text.as_bytes()).map_err(|error| Failure {
        code: FAILURE,
        message: format!("cannot print what was found: {error}"),
    })?;
    Ok(u8::from(!report.ok()))
}

fn plain(report: &Report) -> String {
    let width = report.items.iter().map(|item| item.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for item in &report.items {
        let (mark, found) = match &item.found {
            Ok(found) => ("ok  ", found),
            Err(fault) => ("FAIL", &fault.problem),
        };
        let found = found.replace('\n', &format!("\n      {:width$}  ", ""));
        text.push_str(&format!("{mark}  {:width$}  {found}\n", item.name));
        if let Err(fault) = &item.found {
            text.push_str(&format!("      {:width$}  -> {}\n", "", fault.remedy));
        }
    }
    text.push_str(if report.ok() {
        "This machine can run husk.\n"
    } else {
        "This machine cannot run husk as it is.\n"
    });
    text
}

fn document(report: &Report) -> Value {
    let items: Vec<Value> = report
        .items
        .iter()
        .map(|item| match &item.found {
            Ok(found) => json!({ "name": item.name, "ok": true, "found": found }),
            Err(fault) => {
                json!({ "name": item.name, "ok": false, "problem": fault.problem, "remedy": fault.remedy })
            }
        })
        .collect();
    let boot_ms = report.boot.map(|boot| boot.as_secs_f64() * 1e3);
    json!({ "ok": report.ok(), "boot_ms": boot_ms, "items": items })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Fault, Item};

    fn report() -> Report {
        let mut report = Report {
            boot: Some(Duration::from_micros(12_500)),
            ..Report::default()
        };
        report.items.push(Item {
            name: "root",
            found: Ok("yes".into()),
        });
        report.items.push(Item {
            name: "/dev/kvm",
            found: Err(Fault {
                problem: "no such device".into(),
                remedy: "load kvm_amd or kvm_intel".into(),
            }),
        });
        report
    }

    #[test]
    fn people_are_told_what_to_do() {
        assert_eq!(
            plain(&report()),
            "ok    root      yes\n\
             FAIL  /dev/kvm  no such device\n\
             \u{20}               -> load kvm_amd or kvm_intel\n\
             This machine cannot run husk as it is.\n"
        );
    }

    #[test]
    fn programs_get_a_document() {
        let document = document(&report());
        assert_eq!(
            (&document["ok"], &document["boot_ms"]),
            (&json!(false), &json!(12.5))
        );
        assert_eq!(document["items"][0]["found"], "yes");
        assert_eq!(document["items"][1]["remedy"], "load kvm_amd or kvm_intel");
    }
}
