//! `husk-fsd`: started by husk with its descriptors in place; serves until its VMM is gone.

use husk_fsd::node::Limits;
use husk_fsd::passthrough::Passthrough;
use husk_fsd::{lockdown, serve};
use husk_vmm_protocol::fds::fsd;
use std::error::Error;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

const HELP: &str = "\
husk-fsd: serves a sandbox's share to its husk-vmm.

It is started by husk with its descriptors at fixed numbers (2 log, 3 share, 4 channel) and takes no arguments
but --help and --version.";

fn main() -> ExitCode {
    #[cfg_attr(not(feature = "captured"), allow(unused_mut))]
    let mut arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    #[cfg(feature = "captured")]
    husk_lockdown::captured::take_over(&mut arguments);
    match arguments.first() {
        None => {}
        Some(a) if a == "--version" => {
            println!("husk-fsd {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(a) if a == "--help" || a == "-h" => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(a) => {
            eprintln!("husk-fsd: unknown argument {a:?}; see husk-fsd --help");
            return ExitCode::from(2);
        }
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut line = format!("husk-fsd: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                line.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    husk_lockdown::panics::end_the_process("husk-fsd");
    lockdown::check_descriptors(fsd::SHARE, fsd::CHANNEL)?;
    // SAFETY: both were found open; the table gives them to this process, and nothing else here uses them.
    let (share, channel) = unsafe {
        (
            OwnedFd::from_raw_fd(fsd::SHARE),
            OwnedFd::from_raw_fd(fsd::CHANNEL),
        )
    };
    serve::make_blocking(channel.as_fd())?;
    let jail = lockdown::enter(share, fsd::END)?;
    let share = Passthrough::new(jail.root, jail.proc_fds, Limits::of_process())?;
    serve::serve(share, channel)?;
    Ok(())
}
