//! DNS queries that containers make to a loopback address, sent to the host: the server is in the network namespace
//! there (Docker's is, at 127.0.0.11).
//!
//! Port 53 of the address is taken by a program in the kernel, not bound: a container can have a DNS server of its own
//! on port 53 of all addresses, as it can elsewhere. A reply to a datagram has to come from port 53 all the same, so a
//! raw socket sends it.

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use husk_agent_protocol::{
    dns::{HEADER_LEN, Header, MAX_QUERIES, Transport},
    messages::ForwardDnsRequest,
};
use husk_sk_lookup::{Lookup, Protocol, Rule};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    dial::{Dial, Stream},
    fault::Fault,
    log,
};

/// DNS's port.
const PORT: u16 = 53;

/// Most connections of clients; more wait.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may be silent on a connection.
const IDLE: Duration = Duration::from_secs(10);

/// Forwards the queries made to the address that `request` names, from now on until the stream ends.
///
/// # Errors
///
/// The address is not to be had, or the stream.
pub async fn forward(dial: &Dial, request: &ForwardDnsRequest) -> Result<(), Fault> {
    let address = <[u8; 4]>::try_from(request.address.as_slice())
        .ok()
        .map(Ipv4Addr::from)
        .filter(Ipv4Addr::is_loopback)
        .ok_or_else(|| Fault::spec("address", "is not of 127.0.0.0/8"))?;
    let front = Front::open(address)
        .await
        .map_err(|error| Fault::system(format_args!("take DNS at {address}"), error))?;
    let stream = dial.connect(request.stream_port).await.map_err(|error| {
        Fault::system(
            format_args!("connect a stream to port {}", request.stream_port),
            error,
        )
    })?;
    tokio::spawn(async move {
        let error = front.run(stream).await;
        log::warning!("DNS at {address} is not forwarded any more: {error}");
    });
    Ok(())
}

/// What clients talk to.
struct Front {
    address: Ipv4Addr,
    datagrams: UdpSocket,
    connections: TcpListener,
    replies: OwnedFd,
    _lookup: Lookup,
}

impl Front {
    async fn open(address: Ipv4Addr) -> io::Result<Self> {
        // On ports that nobody asks for.
        let datagrams = UdpSocket::bind((address, 0)).await?;
        let connections = TcpListener::bind((address, 0)).await?;
        let replies = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::Raw,
        )?;
        let rule = |protocol, socket| Rule {
            protocol,
            address: address.into(),
            port: Some(PORT),
            socket,
        };
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let lookup = Lookup::attach(
            namespace.as_fd(),
            &[
                rule(Protocol::Udp, datagrams.as_fd()),
                rule(Protocol::Tcp, connections.as_fd()),
            ],
        )?;
        Ok(Self {
            address,
            datagrams,
            connections,
            replies,
            _lookup: lookup,
        })
    }

    /// Forwards until the stream ends; tells how it ended.
    async fn run(self, stream: Stream) -> io::Error {
        let (from_host, to_host) = tokio::io::split(stream);
        let (sender, queries) = mpsc::channel(1);
        let waiting = Waiting {
            clients: Arc::default(),
            queries: sender,
        };
        let result = tokio::select! {
            result = send(queries, to_host) => result,
            result = self.deliver(from_host, &waiting) => result,
            result = self.take_datagrams(&waiting) => result,
            result = self.take_connections(&waiting) => result,
        };
        result
            .err()
            .unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    async fn take_datagrams(&self, waiting: &Waiting) -> io::Result<()> {
        let mut message = vec![0; 1 << 16];
        loop {
            let (length, client) = match self.datagrams.recv_from(&mut message).await {
                Ok(received) => received,
                // An ICMP message about an earlier one.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            if let (SocketAddr::V4(client), Some(query)) = (client, message.get(..length)) {
                waiting.ask(Client::Datagram(client), query).await?;
            }
        }
    }

    async fn take_connections(&self, waiting: &Waiting) -> io::Result<()> {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut clients = JoinSet::new();
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let place = place.map_err(io::Error::other)?;
            match self.connections.accept().await {
                Ok((client, _)) => {
                    let waiting = waiting.clone();
                    clients.spawn(async move {
                        let _place = place;
                        // The client knows of its own mistakes, and of the connection's end.
                        let _ = serve(client, &waiting).await;
                    });
                }
                // It has gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
            while clients.try_join_next().is_some() {}
        }
    }

    /// Delivers the host's answers.
    async fn deliver(&self, mut from_host: impl AsyncRead + Unpin, waiting: &Waiting) -> io::Result<()> {
        loop {
            let mut header = [0; HEADER_LEN];
            from_host.read_exact(&mut header).await?;
            let header = Header::decode(header).ok_or(io::ErrorKind::InvalidData)?;
            let mut answer = vec![0; header.length.into()];
            from_host.read_exact(&mut answer).await?;
            match waiting.clients().remove(&header.number) {
                Some(Client::Datagram(client)) if !answer.is_empty() => {
                    let packet = packet(self.address, client, &answer);
                    let to = SockaddrIn::from(SocketAddrV4::new(*client.ip(), 0));
                    if let Err(error) = sendto(self.replies.as_raw_fd(), &packet, &to, MsgFlags::empty()) {
                        // As lost as any datagram can be.
                        log::warning!("a DNS answer of {} bytes was not sent: {error}", answer.len());
                    }
                }
                // It may have hung up.
                Some(Client::Connection(client)) => drop(client.send(answer)),
                Some(Client::Datagram(_)) | None => {}
            }
        }
    }
}

/// Who waits for an answer.
enum Client {
    Datagram(SocketAddrV4),
    Connection(oneshot::Sender<Vec<u8>>),
}

/// Those who wait for answers, by their queries' numbers.
#[derive(Clone)]
struct Waiting {
    clients: Arc<Mutex<HashMap<u32, Client>>>,
    queries: mpsc::Sender<Vec<u8>>,
}

impl Waiting {
    fn clients(&self) -> MutexGuard<'_, HashMap<u32, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a query to the host. When there are too many the client is forgotten.
    async fn ask(&self, client: Client, query: &[u8]) -> io::Result<()> {
        let Ok(length @ 1..) = u16::try_from(query.len()) else {
            return Ok(());
        };
        let transport = match client {
            Client::Datagram(_) => Transport::Udp,
            Client::Connection(_) => Transport::Tcp,
        };
        let number = {
            let mut clients = self.clients();
            let free = (0..MAX_QUERIES as u32).find(|number| !clients.contains_key(number));
            let Some(number) = free else { return Ok(()) };
            clients.insert(number, client);
            number
        };
        let header = Header {
            number,
            length,
            transport,
        };
        let frame = [header.encode().as_slice(), query].concat();
        let sent = self.queries.send(frame).await;
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Writes queries to the host.
async fn send(mut queries: mpsc::Receiver<Vec<u8>>, mut to_host: impl AsyncWrite + Unpin) -> io::Result<()> {
    while let Some(query) = queries.recv().await {
        to_host.write_all(&query).await?;
    }
    Ok(())
}

/// Serves a client on a connection: messages with their lengths before them (RFC 1035, 4.2.2), one at a time.
async fn serve(mut client: TcpStream, waiting: &Waiting) -> io::Result<()> {
    loop {
        let query = async {
            let length = client.read_u16().await?;
            let mut query = vec![0; length.into()];
            client.read_exact(&mut query).await?;
            io::Result::Ok(query)
        };
        let query = timeout(IDLE, query).await??;
        let (sender, answer) = oneshot::channel();
        waiting.ask(Client::Connection(sender), &query).await?;
        let Ok(answer) = answer.await else { return Ok(()) };
        let Ok(length @ 1..) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let frame = [length.to_be_bytes().as_slice(), &answer].concat();
        timeout(IDLE, client.write_all(&frame)).await??;
    }
}

/// An IPv4 packet with a datagram from DNS's port of `from`. The kernel fills in its length, number and checksum; the
/// datagram has no checksum, as it may over IPv4.
fn packet(from: Ipv4Addr, to: SocketAddrV4, message: &[u8]) -> Vec<u8> {
    const IP_HEADER: usize = 20;
    const UDP_HEADER: usize = 8;
    const VERSION_AND_WORDS: u8 = 0x45;
    const TIME_TO_LIVE: u8 = 64;
    let length = u16::try_from(UDP_HEADER + message.len()).unwrap_or(u16::MAX);
    let mut packet = Vec::with_capacity(IP_HEADER + UDP_HEADER + message.len());
    packet.extend([VERSION_AND_WORDS, 0, 0, 0, 0, 0, 0, 0]);
    packet.extend([TIME_TO_LIVE, libc::IPPROTO_UDP as u8, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.ip().octets());
    packet.extend(PORT.to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(message);
    packet
}

#[cfg(test)]
#[path = "dns_test.rs"]
mod tests;
