//! Standing: telling signals, until the end.

use std::{io, mem, ptr};

use crate::wire::{MAX_LEN, Order, Word};

/// Every signal there is, those that the C library keeps for itself included.
static ALL: u64 = u64::MAX;

/// How the C library's signal sets begin for the kernel: 64 bits.
const SET_LEN: usize = 8;

/// Holds every signal back that can be held back, and gives those that Rust's runtime handles (SIGSEGV, SIGBUS) or
/// ignores (SIGPIPE) their default effect again, for [`die`].
///
/// # Errors
/// The system's.
pub fn block_signals() -> io::Result<()> {
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGPIPE] {
        // SAFETY: the default action has no handler that would have to be sound.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    mask(libc::SIG_SETMASK, ALL)
}

/// A descriptor to read signals from.
///
/// # Errors
/// The system's.
pub fn signals() -> io::Result<i32> {
    // SAFETY: the kernel reads SET_LEN bytes of the set, which lives for the length of the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &ALL as *const u64,
            SET_LEN,
            libc::SFD_CLOEXEC,
        )
    };
    i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// The engine's next order; `None` when there will be none.
pub fn next_order(channel: i32) -> Option<Order> {
    let mut packet = [0u8; MAX_LEN];
    loop {
        // SAFETY: the buffer is valid for its length.
        let length = unsafe { libc::recv(channel, packet.as_mut_ptr().cast(), packet.len(), 0) };
        match usize::try_from(length) {
            Ok(length) => return Order::decode(packet.get(..length)?),
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Says something. An engine that does not listen is not waited for: it either ends or is stuck.
pub fn say(channel: i32, word: Word) {
    let packet = word.encode();
    // SAFETY: the packet is valid for its length.
    unsafe {
        libc::send(
            channel,
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
}

/// Stands until it is told to end, or nobody is left to tell.
pub fn stand(channel: i32, signals: i32) -> ! {
    let watched = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut watched = [watched(channel), watched(signals)];
    loop {
        // SAFETY: the array is valid for its length.
        if unsafe { libc::poll(watched.as_mut_ptr(), 2, -1) } < 0 {
            // Only EINTR is possible, after having been stopped and continued.
            continue;
        }
        let [order, signal] = watched;
        if signal.revents != 0 {
            if let Some(signal) = next_signal(signals) {
                say(channel, Word::Signal(signal));
            }
        }
        if order.revents != 0 {
            match next_order(channel) {
                // SAFETY: nothing is left to be done at the end of this process.
                Some(Order::Exit(code)) => unsafe { libc::_exit(code) },
                Some(Order::Die(signal)) => die(signal),
                Some(Order::Stand { .. }) => {}
                None => die(libc::SIGKILL),
            }
        }
    }
}

fn next_signal(signals: i32) -> Option<i32> {
    // SAFETY: all zeroes is a signalfd_siginfo: it has only numbers.
    let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
    let length = mem::size_of_val(&info);
    // SAFETY: the kernel writes at most `length` bytes into the record.
    let read = unsafe { libc::read(signals, (&raw mut info).cast(), length) };
    if usize::try_from(read) != Ok(length) {
        return None;
    }
    i32::try_from(info.ssi_signo).ok()
}

/// Dies of a signal. [`block_signals`] left each its default effect; one that is not deadly ends it by SIGKILL.
pub fn die(signal: i32) -> ! {
    let _ = mask(libc::SIG_UNBLOCK, ALL);
    // SAFETY: this process signals itself, and is then at its end.
    unsafe {
        let own = libc::getpid();
        libc::kill(own, signal);
        libc::kill(own, libc::SIGKILL);
        libc::_exit(255)
    }
}

fn mask(how: i32, set: u64) -> io::Result<()> {
    // SAFETY: the kernel reads SET_LEN bytes of the set; no old set is asked for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            ptr::null_mut::<u64>(),
            SET_LEN,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
