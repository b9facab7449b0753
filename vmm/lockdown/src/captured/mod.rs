//! A program that hostile code has taken over, for tests (feature `captured`): it tries all [`attacks`], and its log says
//! which of them succeeded.
//!
//! The file beside such a program that has its name and `.captured` at the end holds arguments that are put before its own.
//! The first of them tells what is done:
//!
//! - `--attack GROUND`: as soon as a thread has been limited it tries the attacks. Forbidden system calls do not end such a
//!   program, as they would not end one whose handler of SIGSYS was replaced. It goes on as usual.
//! - `--attack-unfiltered GROUND`: the attacks are tried once, by the main thread, before it is limited, each in a process
//!   of its own. What then fails does so by namespaces, rights and Landlock: where filters are, they alone answer.
//!   It goes on as usual.
//! - `--attack-deadly NAME`: the first vCPU's thread, or that of the file server, tries this one attack once it has been
//!   limited, which is to be its end.
//! - `--attack-deadly-unlocked NAME`: the same without a lock-down; the program ends.
//! - `--attack-unlocked GROUND`: it is not locked in at all; it tries the attacks, each in a process of its own, and ends.
//!   What fails there would show nothing by failing elsewhere.
//! - `--violate NUMBER`: it is locked in as usual, and a thread that gets SIGUSR1 makes that system call.
//! - `--free`: it is not locked in either, and runs as usual: what the lock-down costs is the difference.

mod attacks;
mod violate;

use attacks::{Ground, deadly};
use std::io::Write;
use std::sync::{Mutex, OnceLock, PoisonError};

/// What the program does besides its work.
enum Mode {
    Free,
    Violate,
    Attack(Ground),
    Unfiltered(Ground),
    Deadly(String),
}

static MODE: OnceLock<Mode> = OnceLock::new();

/// What takes over the program's arguments, which are without its name: removes its own. A program that is not locked in
/// ends here.
pub fn take_over(arguments: &mut Vec<String>) {
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let more = std::fs::read_to_string(format!("{}.captured", own.display())).unwrap_or_default();
    arguments.splice(0..0, more.split_whitespace().map(str::to_owned));
    let Some(mode) = arguments.first().cloned() else {
        return;
    };
    let word = arguments.get(1).cloned().unwrap_or_default();
    let (mode, words) = match mode.as_str() {
        "--free" => (Mode::Free, 1),
        "--violate" => {
            violate::on_signal(word.parse().unwrap_or(-1));
            (Mode::Violate, 2)
        }
        "--attack" => (Mode::Attack(Ground::parse(&word)), 2),
        "--attack-unfiltered" => (Mode::Unfiltered(Ground::parse(&word)), 2),
        "--attack-deadly" => (Mode::Deadly(word), 2),
        "--attack-unlocked" => attack_unlocked(&Ground::parse(&word)),
        "--attack-deadly-unlocked" => std::process::exit(i32::from(!deadly::attack(&word))),
        _ => return,
    };
    arguments.drain(..words.min(arguments.len()));
    let _ = MODE.set(mode);
}

fn attack_unlocked(ground: &Ground) -> ! {
    let failed: Vec<&str> = attacks::all()
        .filter(|(_, attack)| !in_a_process_of_its_own(ground, *attack))
        .map(|(name, _)| *name)
        .collect();
    println!(
        "captured: unlocked: {} attacks, failed: {}",
        attacks::all().count(),
        failed.join(" ")
    );
    std::process::exit(i32::from(!failed.is_empty()));
}

/// Whether the program is not to be locked in.
pub fn is_free() -> bool {
    matches!(MODE.get(), Some(Mode::Free))
}

/// Whether hostile code is at work that a violation does not end.
pub(crate) fn is_taken_over() -> bool {
    matches!(MODE.get(), Some(Mode::Attack(_)))
}

/// One thread at a time: what one opens, another could take for its own success.
static TURN: Mutex<()> = Mutex::new(());

/// Tries all attacks from the calling thread, called `name`, which has just been limited.
pub(crate) fn attack(name: &str) {
    match MODE.get() {
        Some(Mode::Attack(ground)) => {
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            tell(name, |attack| attack(ground));
        }
        Some(Mode::Deadly(attack)) if matches!(name, "vcpu0" | "fs-0") => {
            let outcome = if deadly::attack(attack) {
                "succeeded"
            } else {
                "failed"
            };
            let line = format!("captured: {name}: {attack} has {outcome}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
        _ => {}
    }
}

/// Tries all attacks from the main thread, the last to be limited, which is about to be: the process has what it runs with.
pub(crate) fn attack_unfiltered(name: &str) {
    if let (Some(Mode::Unfiltered(ground)), "main") = (MODE.get(), name) {
        tell("unfiltered", |attack| in_a_process_of_its_own(ground, attack));
    }
}

/// Names of attacks that a line of the log has room for.
const NAMES_IN_A_LINE: usize = 24;

/// Tries all attacks and logs, in one line or several of this form, which of them have succeeded.
fn tell(name: &str, succeeds: impl Fn(fn(&Ground) -> bool) -> bool) {
    let succeeded: Vec<&str> = attacks::all()
        .filter(|(_, attack)| succeeds(*attack))
        .map(|(name, _)| *name)
        .collect();
    let mut lines: Vec<_> = succeeded.chunks(NAMES_IN_A_LINE).collect();
    if lines.is_empty() {
        lines.push(&[]);
    }
    for names in lines {
        let line = format!(
            "captured: {name}: {} attacks, succeeded: {}\n",
            attacks::all().count(),
            names.join(" ")
        );
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
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
    // SAFETY: the child has one thread, and takes no lock but the allocator's, which a fork leaves in order.
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
