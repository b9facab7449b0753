//! husk-agent: `/init` of the guest. With `--outside`, the same agent where there is no guest, for tests:
//! `husk-agent --outside SOCKETS SHARE CGROUPS` takes the unix socket `SOCKETS/N` for port N of the host, and makes
//! containers of `SHARE` with cgroups in `CGROUPS`.

use std::process::ExitCode;

use husk_agent::{Config, Dial, run_machine, run_outside};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [option, sockets, share, cgroups] if option == "--outside" => {
            let config = Config {
                dial: Dial::Unix(sockets.into()),
                share: share.into(),
                cgroups: cgroups.into(),
                machine: false,
            };
            match run_outside(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("husk-agent: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        // The kernel hands its unknown parameters on; they mean nothing here.
        _ if std::process::id() == 1 => run_machine(),
        _ => {
            eprintln!("husk-agent is the init process of husk's guests and is not run by hand");
            ExitCode::FAILURE
        }
    }
}
