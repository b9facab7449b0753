//! Connections made to localhost in a sandbox's network namespace on the host: taken, whatever their port, and carried
//! into the guest, where the port is. Port-forwarding is such a connection.
//!
//! Only 127.0.0.1 and ::1 are taken. The rest of 127.0.0.0/8 stays with those who listen there in the namespace itself,
//! as Docker's DNS server does at 127.0.0.11.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use futures::future::select_all;
use husk_sk_lookup::{Lookup, Protocol, Rule};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use super::{
    namespaces::{Kind, Namespace},
    netns::within,
};

/// Most connections at a time; more wait to be accepted. The VMM has room for twice as many streams, and processes
/// need some of them.
pub const MAX_CONNECTIONS: usize = 512;

/// Connections that wait to be accepted, for each address.
const BACKLOG: libc::c_int = 1024;

/// Bytes held of a connection, each way.
const BUFFER: usize = 16 << 10;

/// How long nothing is accepted after the host ran out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(200);

/// Where connections are carried.
pub trait Guest: Send + Sync + 'static {
    /// A stream to the port of `to` on the guest's loopback. An error resets the connection that asked for it.
    fn connect(&self, to: SocketAddr) -> impl Future<Output = io::Result<UnixStream>> + Send;
}

/// Localhost of a namespace, taken. Dropped, it is as it was, and new connections are refused there.
#[derive(Debug)]
pub struct Localhost {
    // First: it refers to the listeners.
    _lookup: Lookup,
    listeners: Vec<TcpListener>,
}

impl Localhost {
    /// Takes localhost of `namespace`. To be called in a runtime; blocks for a moment.
    ///
    /// # Errors
    /// `Unsupported` for this process's own namespace; the kernel's: `EPERM` without CAP_BPF or CAP_NET_ADMIN,
    /// `EINVAL` before Linux 5.9.
    pub fn take(namespace: &Namespace) -> io::Result<Self> {
        if Namespace::of(std::process::id(), Kind::Network)?.id == namespace.id {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "it is the host's own network namespace",
            ));
        }
        let listeners = within(namespace, || {
            let mut listeners = Vec::new();
            for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
                match listen(SocketAddr::new(address, 0)) {
                    Ok(listener) => listeners.push(listener),
                    // There is no IPv6.
                    Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                    Err(error) => return Err(error),
                }
            }
            if listeners.is_empty() {
                return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
            }
            Ok(listeners)
        })?;
        let mut rules = Vec::new();
        for listener in &listeners {
            rules.push(Rule {
                protocol: Protocol::Tcp,
                address: listener.local_addr()?.ip(),
                port: None,
                socket: listener.as_fd(),
            });
        }
        let lookup = Lookup::attach(namespace.fd.as_fd(), &rules)?;
        let listeners = listeners.into_iter().map(TcpListener::from_std);
        Ok(Self {
            _lookup: lookup,
            listeners: listeners.collect::<io::Result<_>>()?,
        })
    }

    /// Carries connections to `guest` until `stop` is ready. When this returns, all of it is gone from the namespace.
    /// Dropped, it goes too, but later.
    pub async fn carry(self, guest: impl Guest, stop: impl Future) {
        let Self { _lookup, listeners } = self;
        let guest = Arc::new(guest);
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        let accepting = async {
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                match accept(&listeners).await {
                    Ok(client) => {
                        let guest = Arc::clone(&guest);
                        connections.spawn(async move {
                            let _place = place;
                            carry(client, guest).await;
                        });
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "a connection to localhost cannot be accepted");
                        sleep(PAUSE).await;
                    }
                }
                while connections.try_join_next().is_some() {}
            }
        };
        tokio::select! {
            _ = stop => {}
            () = accepting => {}
        }
        drop((_lookup, listeners));
        connections.shutdown().await;
    }
}

/// The next connection of any listener.
async fn accept(listeners: &[TcpListener]) -> io::Result<TcpStream> {
    let accepted = listeners.iter().map(|listener| Box::pin(listener.accept()));
    let (accepted, _, _) = select_all(accepted).await;
    accepted.map(|(client, _)| client)
}

/// A socket that listens, also where loopback is not up yet: an engine may bring it up later.
fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let (family, level, option) = match address {
        SocketAddr::V4(_) => (libc::AF_INET, libc::SOL_IP, libc::IP_FREEBIND),
        SocketAddr::V6(_) => (libc::AF_INET6, libc::SOL_IPV6, libc::IPV6_FREEBIND),
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: integers only.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket(2) has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the option reads one int of the size given.
    let set = unsafe { libc::setsockopt(fd, level, option, (&raw const on).cast(), length) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    match address {
        SocketAddr::V4(address) => {
            nix::sys::socket::bind(fd, &nix::sys::socket::SockaddrIn::from(address))?;
        }
        SocketAddr::V6(address) => {
            nix::sys::socket::bind(fd, &nix::sys::socket::SockaddrIn6::from(address))?;
        }
    }
    // SAFETY: integers only.
    if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket.into())
}

/// Carries one connection to its end.
async fn carry(mut client: TcpStream, guest: Arc<impl Guest>) {
    let connected = async {
        // What it was made to: the listener takes all ports.
        let to = client.local_addr()?;
        client.set_nodelay(true)?;
        Ok((to, guest.connect(to).await?))
    };
    let (to, mut stream) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            let error: io::Error = error;
            tracing::debug!(%error, "a connection to localhost is reset");
            return reset(&client);
        }
    };
    if let Err(error) = copy_bidirectional_with_sizes(&mut client, &mut stream, BUFFER, BUFFER).await {
        tracing::debug!(%error, %to, "a connection to localhost was cut off");
        reset(&client);
    }
}

/// Has the connection end with a reset when it is closed, not as if all had been said.
fn reset(client: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    if let Err(error) = nix::sys::socket::setsockopt(client, nix::sys::socket::sockopt::Linger, &linger) {
        tracing::debug!(%error, "a connection to localhost is closed, not reset");
    }
}

#[cfg(test)]
#[path = "localhost_test.rs"]
mod tests;
