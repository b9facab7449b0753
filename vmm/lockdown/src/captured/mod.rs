//! A program that hostile code has taken over, for tests (feature `captured`): as soon as a thread has been limited it
//! tries all [`attacks`], and the log says which of them succeeded. Forbidden system calls do not end such a program, as
//! they would not end one whose handler of SIGSYS was replaced.
//!
//! The file beside such a program that has its name and `.captured` at the end holds arguments that are put before its own.
//! With `--attack GROUND` as the first ones a program is captured, and goes on as usual. With `--attack-unlocked GROUND` it is not locked in at all: it tries the attacks, each in a process of its own, and ends. What fails there
//! would show nothing by failing elsewhere. With `--free` it is not locked in either, and runs as usual: what the lock-down
//! costs is the difference. With `--violate NUMBER` it is locked in as usual, and a thread that gets SIGUSR1 makes that
//! system call.

mod attacks;
mod violate;

use attacks::{ATTACKS, Ground};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What takes over the program's arguments, which are without its name: removes its own. A program that is not locked in
/// ends here.
pub fn take_over(arguments: &mut Vec<String>) {
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let more = std::fs::read_to_string(format!("{}.captured", own.display())).unwrap_or_default();
    arguments.splice(0..0, more.split_whitespace().map(str::to_owned));
    let Some(mode) = arguments.first().cloned() else {
        return;
    };
    if mode == "--free" {
        FREE.store(true, Ordering::Relaxed);
        arguments.remove(0);
        return;
    }
    if mode == "--violate" {
        violate::on_signal(
            arguments
                .get(1)
                .and_then(|number| number.parse().ok())
                .unwrap_or(-1),
        );
        arguments.drain(..2.min(arguments.len()));
        return;
    }
    if mode != "--attack" && mode != "--attack-unlocked" {
        return;
    }
    let ground = Ground::parse(arguments.get(1).map(String::as_str).unwrap_or_default());
    arguments.drain(..2.min(arguments.len()));
    if mode == "--attack-unlocked" {
        let failed: Vec<&str> = ATTACKS
            .iter()
            .filter(|(_, attack)| !in_a_process_of_its_own(&ground, *attack))
            .map(|(name, _)| *name)
            .collect();
        println!(
            "captured: unlocked: {} attacks, failed: {}",
            ATTACKS.len(),
            failed.join(" ")
        );
        std::process::exit(i32::from(!failed.is_empty()));
    }
    let _ = GROUND.set(ground);
}

static GROUND: OnceLock<Ground> = OnceLock::new();

static FREE: AtomicBool = AtomicBool::new(false);

/// Whether the program is not to be locked in.
pub(crate) fn is_free() -> bool {
    FREE.load(Ordering::Relaxed)
}

/// Whether hostile code is at work.
pub(crate) fn is_taken_over() -> bool {
    GROUND.get().is_some()
}

/// One thread at a time: what one opens, another could take for its own success.
static TURN: Mutex<()> = Mutex::new(());

/// Tries all attacks from the calling thread, called `name`, which has just been limited.
pub(crate) fn attack(name: &str) {
    let Some(ground) = GROUND.get() else { return };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let succeeded: Vec<&str> = ATTACKS
        .iter()
        .filter(|(_, attack)| attack(ground))
        .map(|(name, _)| *name)
        .collect();
    let line = format!(
        "captured: {name}: {} attacks, succeeded: {}\n",
        ATTACKS.len(),
        succeeded.join(" ")
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Makes a forbidden system call fail, instead of what [`crate::violation`] does.
pub(crate) extern "C" fn on_violation(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO the context that it returns to.
    let result = unsafe {
        (*context.cast::<libc::ucontext_t>())
            .uc_mcontext
            .gregs
            .get_mut(libc::REG_RAX as usize)
    };
    if let Some(result) = result {
        *result = -i64::from(libc::EPERM);
    }
}

/// Whether an attack succeeds in a child: what it does to its process is gone with that.
fn in_a_process_of_its_own(ground: &Ground, attack: fn(&Ground) -> bool) -> bool {
    // SAFETY: this process has one thread, so the child may do what it likes.
    unsafe {
        match libc::fork() {
            0 => {
                libc::alarm(20);
                let succeeded = attack(ground);
                libc::_exit(if succeeded { 0 } else { 1 })
            }
            child => {
                let mut status = 0;
                libc::waitpid(child, &raw mut status, 0) == child
                    && libc::WIFEXITED(status)
                    && libc::WEXITSTATUS(status) == 0
            }
        }
    }
}
