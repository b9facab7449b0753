//! `husk-vmm`: one microVM. Started by husk with the descriptors of its table.

use husk_vmm::control::Control;
use husk_vmm::machine::End;
use husk_vmm::{error, fds, log, machine};
use husk_vmm_protocol::control::Report;
use std::process::ExitCode;

const USAGE: &str =
    "husk-vmm runs one microVM of husk. husk starts it, with open descriptors at fixed numbers; it is not
meant to be started by hand.

Usage: husk-vmm [--user UID | --help | --version]

  --user UID  the user and group that it becomes, its own alone";

/// The arguments are wrong.
const EXIT_USAGE: u8 = 2;
/// The engine went away.
const EXIT_ENGINE_GONE: u8 = 3;

fn main() -> ExitCode {
    #[cfg_attr(not(feature = "captured"), allow(unused_mut))]
    let mut arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    #[cfg(feature = "captured")]
    husk_lockdown::captured::take_over(&mut arguments);
    let mut arguments = arguments.iter().map(String::as_str);
    match (arguments.next(), arguments.next()) {
        (None, None) => run(None),
        (Some("--help" | "-h"), None) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        (Some("--version" | "-V"), None) => {
            println!("husk-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        (Some("--user"), Some(user)) if user.parse::<u32>().is_ok_and(|user| user != 0) => {
            run(user.parse().ok())
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// 0 when the guest ended, whichever way.
fn run(user: Option<u32>) -> ExitCode {
    husk_lockdown::panics::end_the_process("husk-vmm");
    // SAFETY: this is the start of the process; nothing has made a descriptor before.
    let control = match unsafe { fds::take_control() } {
        Ok(socket) => Control::new(socket),
        Err(e) => {
            error!("{}", log::chain(&e));
            return ExitCode::FAILURE;
        }
    };
    // SAFETY: likewise; the control socket is not taken again.
    let outcome = match unsafe { fds::take_rest() } {
        Ok(fds) => machine::run(fds, &control, user).map_err(|e| log::chain(&e)),
        Err(e) => Err(log::chain(&e)),
    };
    match outcome {
        Ok(End::Guest(_)) => ExitCode::SUCCESS,
        Ok(End::EngineGone) => ExitCode::from(EXIT_ENGINE_GONE),
        Err(message) => {
            error!("{message}");
            if let Err(e) = control.report(&Report::Failed { message }) {
                error!("the engine could not be told: {}", log::chain(&e));
            }
            ExitCode::FAILURE
        }
    }
}
