//! `husk check`: what the engine found on this machine, for people and for programs.

use std::{
    io::{self, Write},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    cli::{CheckArgs, FAILURE, Format},
    run::Failure,
};
use crate::{
    check::{Fault, Options, Report},
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
    let text = match args.form() {
        _ if args.quiet => String::new(),
        Format::Json => format!("{:#}\n", document(&report)),
        Format::Table => plain(&report),
    };
    io::stdout().write_all(text.as_bytes()).map_err(|error| Failure {
        code: FAILURE,
        message: format!("cannot print what was found: {error}"),
    })?;
    Ok(u8::from(!report.ok()))
}

fn plain(report: &Report) -> String {
    let items = report.items.iter().map(|item| match &item.found {
        Ok(found) => ("ok  ", item.name, found, None),
        Err(fault) => ("FAIL", item.name, &fault.problem, Some(&fault.remedy)),
    });
    let advice = report.advice.iter().map(|advice| {
        let Fault { problem, remedy } = &advice.fault;
        ("warn", advice.name, problem, Some(remedy))
    });
    let lines: Vec<_> = items.chain(advice).collect();
    let width = lines.iter().map(|(_, name, ..)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (mark, name, found, remedy) in lines {
        let found = found.replace('\n', &format!("\n      {:width$}  ", ""));
        text.push_str(&format!("{mark}  {name:width$}  {found}\n"));
        if let Some(remedy) = remedy {
            text.push_str(&format!("      {:width$}  -> {remedy}\n", ""));
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
    let warnings = report.advice.iter().map(|advice| {
        let Fault { problem, remedy } = &advice.fault;
        json!({ "name": advice.name, "problem": problem, "remedy": remedy })
    });
    let warnings: Vec<Value> = warnings.collect();
    json!({ "ok": report.ok(), "boot_ms": boot_ms, "items": items, "warnings": warnings })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Item, settings::Advice};

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
        report.advice.push(Advice {
            name: "KSM",
            fault: Fault {
                problem: "it runs".into(),
                remedy: "stop it".into(),
            },
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
             warn  KSM       it runs\n\
             \u{20}               -> stop it\n\
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
        assert_eq!(
            document["warnings"],
            json!([{ "name": "KSM", "problem": "it runs", "remedy": "stop it" }])
        );
    }
}
