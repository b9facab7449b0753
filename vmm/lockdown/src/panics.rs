//! The end of a program that finds itself wrong. Rust's own way of it asks for the thread's number and raises a signal,
//! which no thread may do that is limited in its system calls: what was wrong would not be told.

/// The exit code then: as Rust programs end.
pub const EXIT_CODE: i32 = 101;

/// From now on a panic of any thread is told on stderr in the name of `program`, and ends the process.
pub fn end_the_process(program: &'static str) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        eprintln!(
            "{program}: error: thread {}: {panic}",
            thread.name().unwrap_or("without name")
        );
        // SAFETY: it ends the process at once.
        unsafe { libc::_exit(EXIT_CODE) }
    }));
}
