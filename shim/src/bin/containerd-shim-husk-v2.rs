//! containerd's shim; see [`husk_shim::front::serve`].

fn main() -> std::process::ExitCode {
    husk_shim::front::serve::main(std::env::args_os().skip(1).collect())
}
