//! The end of a program in which a thread makes a system call that is not its own: who started it is told which, and by
//! whom.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// The exit code then: as a shell tells of SIGSYS.
pub const EXIT_CODE: i32 = 128 + libc::SIGSYS;

/// Longest name of a thread, in bytes.
const MAX_NAME: usize = 15;

/// Longest report.
const MAX_REPORT: usize = 192;

/// Who tells, and where.
#[derive(Clone, Copy, Debug)]
pub struct Witness {
    /// The program's name.
    pub program: &'static str,
    /// Takes a line of text.
    pub log: RawFd,
    /// A packet socket that takes the report as JSON: `{"report":"violation","thread":NAME,"system_call":NUMBER}`.
    pub reports: Option<RawFd>,
}

static WITNESS: OnceLock<Witness> = OnceLock::new();

thread_local! {
    static NAME: Cell<([u8; MAX_NAME], usize)> = const { Cell::new(([0; MAX_NAME], 0)) };
}

/// What the calling thread is called in a report. Only letters, digits, dots and hyphens are kept.
pub(super) fn set_thread_name(name: &str) {
    let mut bytes = [0; MAX_NAME];
    let kept = name
        .bytes()
        .filter(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
    let mut length = 0usize;
    for (to, from) in bytes.iter_mut().zip(kept) {
        *to = from;
        length = length.saturating_add(1);
    }
    NAME.set((bytes, length));
}

/// Has violations end the process with a report by `witness`, the first that is given.
///
/// # Errors
/// The kernel's.
pub fn watch(witness: Witness) -> io::Result<()> {
    WITNESS.get_or_init(|| witness);
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler() as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the action is valid, and its handler does only what is allowed in one.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

fn handler() -> Handler {
    #[cfg(feature = "captured")]
    if crate::captured::is_taken_over() {
        return crate::captured::on_violation;
    }
    on_violation
}

/// `siginfo_t` of SIGSYS (sigaction(2)), up to the number of the system call.
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    error: i32,
    code: i32,
    _padding: i32,
    address: usize,
    system_call: u32,
}

/// Allocates nothing, takes no lock, and makes but system calls that every thread may make.
extern "C" fn on_violation(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole siginfo to a handler with SA_SIGINFO.
    let system_call = unsafe { (*info.cast::<SigsysInfo>()).system_call };
    let (name, length) = NAME.get();
    let name = name.get(..length).unwrap_or_default();
    let Some(witness) = WITNESS.get() else {
        end();
    };
    if let Some(reports) = witness.reports {
        let mut report = Text::new();
        report.push(br#"{"report":"violation","thread":""#);
        report.push(name);
        report.push(br#"","system_call":"#);
        report.push_number(system_call);
        report.push(b"}");
        write(reports, report.bytes());
    }
    let mut line = Text::new();
    line.push(witness.program.as_bytes());
    line.push(b": error: thread ");
    line.push(name);
    line.push(b" made the system call ");
    line.push_call(system_call);
    line.push(b", which is forbidden to it\n");
    write(witness.log, line.bytes());
    end();
}

fn end() -> ! {
    // SAFETY: it ends the process at once.
    unsafe { libc::_exit(EXIT_CODE) }
}

fn write(fd: i32, bytes: &[u8]) {
    // SAFETY: pointer and length belong together. Where nobody reads, nothing can be told.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// A short text on the stack.
struct Text {
    bytes: [u8; MAX_REPORT],
    length: usize,
}

impl Text {
    fn new() -> Self {
        Self {
            bytes: [0; MAX_REPORT],
            length: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        let room = self.bytes.iter_mut().skip(self.length);
        let count = room.zip(bytes).map(|(to, from)| *to = *from).count();
        self.length = self.length.saturating_add(count);
    }

    /// Its name, if it has one, and its number.
    fn push_call(&mut self, number: u32) {
        let Some(name) = husk_syscalls::name(number) else {
            return self.push_number(number);
        };
        self.push(name.as_bytes());
        self.push(b" (");
        self.push_number(number);
        self.push(b")");
    }

    fn push_number(&mut self, number: u32) {
        let mut digits = [0u8; 10];
        let (mut rest, mut first) = (number, digits.len());
        for (place, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0'.saturating_add((rest % 10) as u8);
            rest /= 10;
            first = place;
            if rest == 0 {
                break;
            }
        }
        self.push(digits.get(first..).unwrap_or_default());
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_put_together_within_their_room() {
        let mut text = Text::new();
        for number in [0, 7, 10, 257, u32::MAX] {
            text.push_number(number);
            text.push(b" ");
        }
        assert_eq!(text.bytes(), b"0 7 10 257 4294967295 ");
        text.push(&[b'x'; 200]);
        assert_eq!(text.bytes().len(), MAX_REPORT);
    }

    #[test]
    fn system_calls_have_their_names() {
        let mut text = Text::new();
        for number in [libc::SYS_openat as u32, 0, 9999] {
            text.push_call(number);
            text.push(b" ");
        }
        assert_eq!(text.bytes(), b"openat (257) read (0) 9999 ");
    }

    #[test]
    fn names_cannot_break_a_report() {
        set_thread_name("a\"b\\c\nnet0.1-and-much-more");
        let (name, length) = NAME.get();
        assert_eq!(&name[..length], b"abcnet0.1-and-m");
    }
}
