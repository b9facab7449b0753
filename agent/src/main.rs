//! husk-agent: `/init` of the guest. With `--outside`, the same agent where there is no guest, for tests:
//! `husk-agent --outside SOCKETS SHARE CGROUPS` takes the unix socket `SOCKETS/N` for port N of the host, and makes
//! containers of `SHARE` with cgroups in `CGROUPS`.

#![no_main]

use std::ffi::{c_char, c_int};

use husk_agent::{Config, Dial, prepare_process, run_machine, run_outside};

/// The C library's entry. Rust's own would abort: it wants standard descriptors, or a `/dev/null` to stand in for
/// them, and the initial ramfs has neither when no console is ready yet.
// SAFETY: no other symbol of this name is in the program, since Rust makes none of its own under no_main.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    prepare_process();
    run()
}

fn run() -> c_int {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [option, sockets, share, cgroups] if option == "--outside" => {
            let config = Config {
                dial: Dial::unix(sockets.into()),
                share: share.into(),
                cgroups: cgroups.into(),
                machine: false,
            };
            match run_outside(config) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("husk-agent: {error}");
                    1
                }
            }
        }
        // The kernel hands its unknown parameters on; they mean nothing here.
        _ if std::process::id() == 1 => run_machine(),
        _ => {
            eprintln!("husk-agent is the init process of husk's guests and is not run by hand");
            1
        }
    }
}
