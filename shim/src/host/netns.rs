//! Network namespaces: made, and entered for the time of a piece of work.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use husk_netlink::{Request, Socket, kind};
use nix::sched::{CloneFlags, setns, unshare};

use super::namespaces::{Id, Kind, Namespace};

/// Makes one with loopback up. It lasts as long as somebody is in it or has it open.
///
/// # Errors
/// The kernel's.
pub fn make() -> io::Result<Namespace> {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let mut header = [0; kind::LINK_HEADER];
        let up = (libc::IFF_UP as u32).to_ne_bytes();
        for (at, bytes) in [(4, 1_u32.to_ne_bytes()), (8, up), (12, up)] {
            if let Some(field) = header.get_mut(at..at + 4) {
                field.copy_from_slice(&bytes);
            }
        }
        Socket::new()?.request(&Request::new(libc::RTM_SETLINK, 0, &header))?;
        Namespace::open("/proc/thread-self/ns/net".as_ref(), Kind::Network)
    })
}

/// Whether it is this process's own: the host's.
pub fn is_hosts(id: Id) -> bool {
    Namespace::of(std::process::id(), Kind::Network).is_ok_and(|own| own.id == id)
}

/// Does `work` in a namespace, on a thread of its own. What it opens there (sockets, taps) stays there.
///
/// # Errors
/// When it cannot be entered, and those of the work.
pub fn within<T: Send + 'static>(
    namespace: &Namespace,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace: OwnedFd = namespace.fd.try_clone()?;
    on_a_thread(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let thread = std::thread::Builder::new()
        .name("husk-netns".into())
        .stack_size(256 << 10)
        .spawn(work)?;
    thread.join().map_err(|_| io::Error::other("a thread panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_one_has_loopback_up_and_nothing_else() {
        let made = make().unwrap();
        assert!(!is_hosts(made.id));
        let names = within(&made, || std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        assert_eq!(names.lines().count(), 3, "two lines of head and lo: {names}");
        let own = Namespace::of(std::process::id(), Kind::Network).unwrap();
        assert!(is_hosts(own.id));
        // Loopback answers.
        within(&made, || std::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    }
}
