//! DNS queries of the guest, put to one server in a sandbox's network namespace on the host.
//!
//! The guest chooses what it asks, not whom: each stream is for one address, and the port is DNS's.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use husk_agent_protocol::dns::{HEADER_LEN, Header, MAX_QUERIES, Transport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, UdpSocket, UnixStream, unix::OwnedReadHalf},
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{namespaces::Namespace, netns::within};

/// DNS's port.
pub const PORT: u16 = 53;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Largest message, in bytes.
const LARGEST: usize = u16::MAX as usize;

/// Most nameservers of a resolv.conf that count (`MAXNS`).
const MAX_NAMESERVERS: usize = 3;

/// The nameservers of a resolv.conf that are in the network namespace on the host: loopback ones, but for 127.0.0.1,
/// where one of the pod's own containers may serve.
pub fn loopback_nameservers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    let nameservers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = words
            .next()
            .filter(|word| *word == "nameserver")
            .and(words.next())?;
        Some(address.parse::<Ipv4Addr>())
    });
    let mut servers = Vec::new();
    for server in nameservers.take(MAX_NAMESERVERS).flatten() {
        if server.is_loopback() && server != Ipv4Addr::LOCALHOST && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// Puts the queries that come over `stream` to `server`, until the stream ends.
///
/// # Errors
/// When the stream carries nonsense or breaks.
pub async fn serve(stream: UnixStream, server: SocketAddr, namespace: Arc<Namespace>) -> io::Result<()> {
    let (from_guest, mut to_guest) = stream.into_split();
    let (sender, mut queries) = mpsc::channel(1);
    let mut reader = JoinSet::new();
    reader.spawn(read(from_guest, sender));
    let mut under_way = JoinSet::new();
    loop {
        let (header, answer) = tokio::select! {
            query = queries.recv() => {
                let Some((header, query)) = query else { break };
                if under_way.len() < MAX_QUERIES {
                    let namespace = Arc::clone(&namespace);
                    under_way.spawn(async move {
                        let answer = timeout(PATIENCE, ask(server, header.transport, query, &namespace)).await;
                        let answer = answer.map_err(io::Error::from).and_then(|answer| answer);
                        (header, answer)
                    });
                    continue;
                }
                (header, Err(io::Error::other("there are too many queries under way")))
            }
            Some(done) = under_way.join_next() => done.map_err(io::Error::other)?,
        };
        let answer = answer.unwrap_or_else(|error| {
            tracing::debug!(%error, %server, "a DNS query has no answer");
            Vec::new()
        });
        let header = Header {
            length: u16::try_from(answer.len()).unwrap_or(0),
            ..header
        };
        to_guest.write_all(&header.encode()).await?;
        if header.length > 0 {
            to_guest.write_all(&answer).await?;
        }
    }
    match reader.join_next().await {
        Some(Ok(read)) => read,
        _ => Ok(()),
    }
}

/// Reads queries until the stream's end.
async fn read(mut from_guest: OwnedReadHalf, queries: mpsc::Sender<(Header, Vec<u8>)>) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER_LEN];
        match from_guest.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => drop(read?),
        }
        let header = Header::decode(header)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the guest sent no DNS query"))?;
        let mut query = vec![0; header.length.into()];
        from_guest.read_exact(&mut query).await?;
        if queries.send((header, query)).await.is_err() {
            return Ok(());
        }
    }
}

/// Puts one query to the server.
async fn ask(
    server: SocketAddr,
    transport: Transport,
    query: Vec<u8>,
    namespace: &Arc<Namespace>,
) -> io::Result<Vec<u8>> {
    match transport {
        Transport::Udp => {
            let socket = inside(namespace, || {
                let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            });
            let socket = UdpSocket::from_std(socket.await?)?;
            socket.connect(server).await?;
            socket.send(&query).await?;
            let mut answer = vec![0; LARGEST];
            let length = socket.recv(&mut answer).await?;
            answer.truncate(length);
            answer.shrink_to_fit();
            Ok(answer)
        }
        Transport::Tcp => {
            let socket = inside(namespace, tcp_socket).await?;
            let socket = TcpSocket::from_std_stream(socket);
            let mut stream = socket.connect(server).await?;
            let length = u16::try_from(query.len()).map_err(io::Error::other)?;
            let frame = [length.to_be_bytes().as_slice(), &query].concat();
            stream.write_all(&frame).await?;
            let length = stream.read_u16().await?;
            let mut answer = vec![0; length.into()];
            stream.read_exact(&mut answer).await?;
            Ok(answer)
        }
    }
}

fn tcp_socket() -> io::Result<std::net::TcpStream> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC | nix::sys::socket::SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    Ok(socket.into())
}

/// Makes a socket in the namespace.
async fn inside<T: Send + 'static>(
    namespace: &Arc<Namespace>,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = Arc::clone(namespace);
    spawn_blocking(move || within(&namespace, make))
        .await
        .map_err(io::Error::other)?
}

#[cfg(test)]
#[path = "dns_test.rs"]
mod tests;
