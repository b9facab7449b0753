//! The `husk` command; see [`husk_shim::front::cli`].

fn main() -> std::process::ExitCode {
    husk_shim::front::cli::main(std::env::args_os().collect())
}
