//! The ruler: husk and runc in turn, in one run, on a host whose clock counts instructions.
//!
//! Run as root where husk is installed and containerd has `localhost/busybox:1`. Prints a table, or JSON with
//! `--json`; `--table` prints the table of a JSON read from stdin. Names of parts leave the others out. Times are medians over the rounds after the first, with the spread between the least and the most.
//! In an emulated host times mean something only beside one another.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod docker;
mod memory;
mod network;
mod sizes;
mod start;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// One line of the table.
pub struct Figure {
    /// What is measured.
    pub name: String,
    /// `ms`, `kB`, `MB/s`, …
    pub unit: &'static str,
    /// One value per round, the first round dropped; a single one where rounds make no sense.
    pub values: Vec<f64>,
}

impl Figure {
    fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        }
    }

    fn range(&self) -> (f64, f64) {
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        (
            least,
            self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        )
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let as_json = arguments.iter().any(|a| a == "--json");
    let rounds = arguments
        .iter()
        .find_map(|a| a.strip_prefix("--rounds="))
        .map_or(6, |n| n.parse().unwrap());
    const PARTS: [&str; 5] = ["start", "docker", "network", "memory", "sizes"];
    let known =
        |a: &str| ["--json", "--table"].contains(&a) || PARTS.contains(&a) || a.starts_with("--rounds=");
    if let Some(unknown) = arguments.iter().find(|a| !known(a)) {
        eprintln!(
            "bench: unknown argument {unknown}; usage: bench [--json|--table] [--rounds=N] [{}]…",
            PARTS.join("|")
        );
        std::process::exit(2);
    }

    if arguments.iter().any(|a| a == "--table") {
        print_table(&serde_json::from_reader(std::io::stdin()).unwrap());
        return;
    }
    let asked: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let all = !asked.iter().any(|part| PARTS.contains(part));
    let mut figures = Vec::new();
    for part in PARTS.into_iter().filter(|part| all || asked.contains(part)) {
        figures.extend(match part {
            "start" => start::measure(rounds),
            "docker" => docker::measure(rounds),
            "network" => network::measure(rounds),
            "memory" => memory::measure(),
            _ => sizes::measure(),
        });
    }
    let rows: Vec<Value> = figures.iter().map(row).collect();
    let report = json!({ "rounds": rounds - 1, "figures": rows });
    if as_json {
        println!("{}", serde_json::to_string_pretty(&report).unwrap());
    } else {
        print_table(&report);
    }
}

/// The first process of that name.
fn pid_of(name: &str) -> u32 {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let program =
            String::from_utf8_lossy(command_line.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
        if Path::new(&program).file_name().is_some_and(|n| n == name) {
            return entry.file_name().to_str().unwrap().parse().unwrap();
        }
    }
    panic!("no process named {name}");
}

fn print_table(report: &Value) {
    println!(
        "{:<46} {:>10} {:>10} {:>10}  unit",
        "figure", "median", "least", "most"
    );
    for row in report["figures"].as_array().unwrap() {
        let number = |key: &str| row[key].as_f64().unwrap();
        println!(
            "{:<46} {:>10.1} {:>10.1} {:>10.1}  {}",
            row["name"].as_str().unwrap(),
            number("median"),
            number("least"),
            number("most"),
            row["unit"].as_str().unwrap()
        );
    }
}

fn row(figure: &Figure) -> Value {
    let (least, most) = figure.range();
    json!({
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.median(),
        "least": least,
        "most": most,
        "values": figure.values,
    })
}
