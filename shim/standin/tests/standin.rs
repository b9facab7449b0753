//! The real program, started as the engine starts it. As root.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use husk_shim::host::{
    child::End,
    namespaces::{Kind, Namespace},
    standin::{Happening, Role, StandIn},
};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap()
}

fn role<'a>() -> Role<'a> {
    Role {
        program: Path::new(env!("CARGO_BIN_EXE_husk-standin")),
        name: "a-container",
        join: vec![],
        unshare: 0,
        cgroup: None,
    }
}

async fn start(role: Role<'_>) -> StandIn {
    soon(StandIn::start(role)).await.unwrap()
}

fn proc(standin: &StandIn, file: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{file}", standin.pid())).unwrap()
}

fn send(standin: &StandIn, signal: i32) {
    // SAFETY: kill takes two numbers.
    assert_eq!(unsafe { libc::kill(standin.pid() as i32, signal) }, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_has_nothing_and_tells_who_it_is() {
    let standin = start(role()).await;
    assert_eq!(proc(&standin, "comm"), "husk-standin\n");
    assert_eq!(proc(&standin, "cmdline"), "husk-standin\0a-container\0");
    let status = proc(&standin, "status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
    assert_eq!(field("Threads:"), "1");
    let own: u64 = field("RssAnon:").parse().unwrap();
    assert!(own < 500, "it has {own} kB of its own memory");
    let files: BTreeSet<String> = fs::read_dir(format!("/proc/{}/fd", standin.pid()))
        .unwrap()
        .map(|fd| {
            let target = fs::read_link(fd.unwrap().path()).unwrap();
            let target = target.display().to_string();
            target.split(':').next().unwrap().to_owned()
        })
        .collect();
    let expected = ["/dev/null", "anon_inode", "socket"].map(str::to_owned);
    assert_eq!(files, BTreeSet::from(expected));
    let cwd = fs::read_link(format!("/proc/{}/cwd", standin.pid())).unwrap();
    assert_eq!(cwd, Path::new("/"));
    assert!(proc(&standin, "limits").lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.starts_with(&["Max", "core", "file", "size", "0", "0"])
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stands_in_the_namespaces_it_is_told() {
    let kinds = [Kind::Network, Kind::Ipc, Kind::Uts];
    let flags = kinds.iter().fold(0, |flags, kind| flags | kind.flag());
    let first = start(Role {
        unshare: flags,
        ..role()
    })
    .await;
    let own = |kind| Namespace::of(std::process::id(), kind).unwrap().id;
    let join = kinds.map(|kind| first.namespace(kind).unwrap().fd).into();
    let second = start(Role { join, ..role() }).await;
    for kind in kinds {
        let theirs = first.namespace(kind).unwrap().id;
        assert_ne!(theirs, own(kind), "{}", kind.name());
        assert_eq!(theirs, second.namespace(kind).unwrap().id, "{}", kind.name());
    }
    assert_eq!(first.namespace(Kind::Mount).unwrap().id, own(Kind::Mount));
    let log = fs::File::open("/dev/null").unwrap();
    let error = StandIn::start(Role {
        join: vec![log.into()],
        ..role()
    });
    let error = soon(error).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("join the namespace of its descriptor 0"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_are_told_and_do_nothing_to_it() {
    let standin = start(role()).await;
    let catchable = (1..=64).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal));
    for signal in catchable {
        send(&standin, signal);
        assert_eq!(soon(standin.next()).await, Happening::Signal(signal));
    }
    send(&standin, libc::SIGSTOP);
    send(&standin, libc::SIGCONT);
    assert_eq!(soon(standin.next()).await, Happening::Signal(libc::SIGCONT));
    soon(standin.end(7)).await;
    assert_eq!(soon(standin.ended()).await, End::Exited(7));
}

#[tokio::test(flavor = "multi_thread")]
async fn its_death_is_told_and_it_is_reaped() {
    let standin = start(role()).await;
    send(&standin, libc::SIGKILL);
    assert_eq!(soon(standin.next()).await, Happening::Killed(libc::SIGKILL));
    assert!(!Path::new(&format!("/proc/{}", standin.pid())).exists());
    // To tell it anything now is fine.
    soon(standin.end(0)).await;
    assert!(standin.namespace(Kind::Network).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_as_it_is_told_or_with_the_engine() {
    for (status, end) in [
        (0, End::Exited(0)),
        (137, End::Exited(137)),
        (255, End::Exited(255)),
    ] {
        let standin = start(role()).await;
        soon(standin.end(status)).await;
        assert_eq!(soon(standin.ended()).await, end);
    }
    let standin = start(role()).await;
    let identity = standin.identity();
    drop(standin);
    let gone = tokio::task::spawn_blocking(move || {
        let end = std::time::Instant::now() + PATIENCE;
        while identity.open().unwrap().is_some() {
            assert!(std::time::Instant::now() < end, "it lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    gone.await.unwrap();
}

#[test]
fn it_dies_by_the_signal_it_is_told() {
    use husk_standin::{CHANNEL, wire::Order};
    use std::os::{
        fd::AsRawFd,
        unix::process::{CommandExt, ExitStatusExt},
    };
    for signal in [libc::SIGTERM, libc::SIGSEGV, libc::SIGKILL] {
        let (own, theirs) = seqpacket();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_husk-standin"));
        let raw = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe.
        unsafe {
            command.pre_exec(move || match libc::dup2(raw, CHANNEL) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let mut child = command.spawn().unwrap();
        drop(theirs);
        for order in [Order::Stand { unshare: 0 }, Order::Die(signal)] {
            let packet = order.encode();
            // SAFETY: the packet is valid for its length.
            let sent = unsafe { libc::send(own.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0) };
            assert_eq!(sent, packet.len() as isize);
        }
        let status = child.wait().unwrap();
        assert_eq!((status.signal(), status.core_dumped()), (Some(signal), false));
    }
}

fn seqpacket() -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    use std::os::fd::{FromRawFd, OwnedFd};
    let mut fds = [0; 2];
    // SAFETY: the array has room for two; both are new and owned by nobody else.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}
