//! The fuzzer: libFuzzer around the target that HUSK_FUZZ_TARGET names. Built without it (as by `cargo build`), it runs
//! a target on files: `husk-fuzz TARGET FILE…`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
mod fuzzer {
    use husk_fuzz::{TARGETS, Target, allocations, find};
    use std::sync::OnceLock;

    static TARGET: OnceLock<&Target> = OnceLock::new();

    /// Without a target: names and longest inputs of all.
    fn start() {
        let name = std::env::var("HUSK_FUZZ_TARGET").unwrap_or_default();
        let Some(target) = find(&name) else {
            for target in &TARGETS {
                println!("{} {}", target.name, target.longest);
            }
            std::process::exit(if name.is_empty() { 0 } else { 2 });
        };
        // As Rust's own start does, which is not there under libFuzzer's.
        // SAFETY: a signal that is ignored has no handler.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        allocations::limit(target.allocation);
        TARGET.get_or_init(|| target);
    }

    libfuzzer_sys::fuzz_target!(init: start(), |bytes: &[u8]| {
        if let Some(target) = TARGET.get() {
            (target.run)(bytes);
        }
    });
}

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    use husk_fuzz::{TARGETS, allocations, find};
    let mut arguments = std::env::args().skip(1);
    let target = arguments.next().unwrap_or_default();
    let Some(target) = find(&target) else {
        eprintln!("usage: husk-fuzz TARGET FILE…");
        eprintln!("targets: {}", TARGETS.map(|target| target.name).join(", "));
        return 2.into();
    };
    for file in arguments {
        match std::fs::read(&file) {
            Ok(bytes) => {
                println!("{} {file}", target.name);
                allocations::limit(target.allocation);
                (target.run)(&bytes);
                allocations::limit(usize::MAX);
            }
            Err(error) => {
                eprintln!("{file}: {error}");
                return 1.into();
            }
        }
    }
    0.into()
}
