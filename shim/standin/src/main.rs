//! `husk-standin`: started by husk with its descriptors in place; stands for a container until it ends.

use std::{io, process::ExitCode};

use husk_standin::{
    CHANNEL, lockdown, namespaces,
    stand::{self, say},
    wire::{Order, Step, Word},
};

const HELP: &str = "\
husk-standin: stands for a container of husk on the host: its pid is the container's pid.

It is started by husk with its descriptors at fixed numbers (3 channel, 4 and up namespaces) and one argument,
the container's id, which is for you to read.";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(a) if a == "--version" => {
            println!("husk-standin {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some(a) if a == "--help" || a == "-h" => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        _ => run(),
    }
}

fn run() -> ExitCode {
    let Some(Order::Stand { unshare }) = stand::next_order(CHANNEL) else {
        return ExitCode::FAILURE;
    };
    match begin(unshare) {
        Ok(signals) => {
            say(CHANNEL, Word::Ready);
            stand::stand(CHANNEL, signals)
        }
        Err((step, error)) => {
            let errno = error.raw_os_error().unwrap_or(0);
            say(CHANNEL, Word::Failed { step, errno });
            ExitCode::FAILURE
        }
    }
}

/// Everything before it stands; gives the descriptor of its signals.
fn begin(unshare: i32) -> Result<i32, (Step, io::Error)> {
    let at = |step| move |error| (step, error);
    stand::block_signals().map_err(at(Step::Signals))?;
    namespaces::enter(unshare)?;
    let signals = stand::signals().map_err(at(Step::Signals))?;
    lockdown::enter().map_err(at(Step::Lockdown))?;
    Ok(signals)
}
