//! TCP and UDP traffic that can be checked byte by byte: a server in one place ([`serve`]), and who asks it in another.
//!
//! A TCP connection begins with an [`Order`]; datagrams are sent back as they came.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// How long nothing may happen on a connection before its test has failed: emulated hosts are slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How long a datagram is awaited before it counts as lost.
const DATAGRAM_PATIENCE: Duration = Duration::from_secs(15);

/// The largest datagram: 65,535 bytes less the headers of IPv4 and UDP.
pub const LARGEST_DATAGRAM: usize = 65_507;

const CHUNK: usize = 64 * 1024;

/// What a server does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// It sends back what it gets.
    Echo,
    /// It takes so many bytes of [`Noise`] and answers how many of them were right, as 8 bytes, little-endian.
    Take(u64),
    /// It sends so many bytes of [`Noise`].
    Give(u64),
    /// It takes so many bytes of any kind and answers their number: for measuring, where looking at them would take longer
    /// than their way.
    Swallow(u64),
    /// It sends so many bytes of any kind.
    Pour(u64),
}

impl Order {
    fn encode(self) -> [u8; 16] {
        let (verb, count) = match self {
            Self::Echo => (1_u64, 0),
            Self::Take(count) => (2, count),
            Self::Give(count) => (3, count),
            Self::Swallow(count) => (4, count),
            Self::Pour(count) => (5, count),
        };
        let mut bytes = [0; 16];
        for (to, from) in bytes.chunks_mut(8).zip([verb, count]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        match (number(from)?, number(from)?) {
            (1, _) => Ok(Self::Echo),
            (2, count) => Ok(Self::Take(count)),
            (3, count) => Ok(Self::Give(count)),
            (4, count) => Ok(Self::Swallow(count)),
            (5, count) => Ok(Self::Pour(count)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Bytes without a pattern that a lost, doubled or displaced block could hide in (splitmix64).
#[derive(Debug, Default)]
pub struct Noise(u64);

impl Noise {
    /// The next bytes. Other lengths than multiples of 8 are for the last ones.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            let mixed = mixed.to_le_bytes();
            word.copy_from_slice(mixed.get(..word.len()).unwrap_or(&mixed));
        }
    }

    /// So many bytes.
    pub fn bytes(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Self::default().fill(&mut bytes);
        bytes
    }
}

/// Sends so many bytes of noise.
fn give(to: &mut impl Write, count: u64) -> io::Result<()> {
    let mut noise = Noise::default();
    let mut chunk = vec![0; CHUNK];
    let mut left = count;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = chunk.get_mut(..length).unwrap_or_default();
        noise.fill(chunk);
        to.write_all(chunk)?;
        left = left.saturating_sub(length as u64);
    }
    Ok(())
}

/// Reads so many bytes of noise, and tells how many were right before the first that was not.
fn take(from: &mut impl Read, count: u64) -> io::Result<u64> {
    let mut noise = Noise::default();
    let (mut chunk, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut left, mut right, mut good) = (count, 0_u64, true);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = chunk.get_mut(..length).unwrap_or_default();
        let expected = expected.get_mut(..length).unwrap_or_default();
        from.read_exact(chunk)?;
        noise.fill(expected);
        if good {
            let same = chunk.iter().zip(&*expected).take_while(|(a, b)| a == b).count();
            right = right.saturating_add(same as u64);
            good = same == length;
        }
        left = left.saturating_sub(length as u64);
    }
    Ok(right)
}

/// Sends so many bytes, always the same.
fn pour(to: &mut impl Write, count: u64) -> io::Result<()> {
    let chunk = vec![b'x'; CHUNK];
    let mut left = count;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        to.write_all(chunk.get(..length).unwrap_or_default())?;
        left = left.saturating_sub(length as u64);
    }
    Ok(())
}

/// Reads so many bytes, and tells how many came.
fn swallow(from: &mut impl Read, count: u64) -> io::Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let mut came = 0_u64;
    while came < count {
        match from.read(&mut chunk)? {
            0 => break,
            length => came = came.saturating_add(length as u64),
        }
    }
    Ok(came)
}

/// Serves at a port of all addresses, by TCP and UDP, for ever.
///
/// # Errors
/// Those of the sockets.
pub fn serve(port: u16) -> io::Result<()> {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let datagrams = UdpSocket::bind(address)?;
    thread::spawn(move || {
        let mut datagram = vec![0; CHUNK];
        loop {
            // An error tells of an answer that nobody took.
            if let Ok((length, from)) = datagrams.recv_from(&mut datagram) {
                let _ = datagrams.send_to(datagram.get(..length).unwrap_or_default(), from);
            }
        }
    });
    for connection in TcpListener::bind(address)?.incoming() {
        let connection = connection?;
        thread::Builder::new()
            .stack_size(64 * 1024)
            .spawn(move || obey(connection))?;
    }
    Ok(())
}

fn obey(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    match Order::read(&mut connection)? {
        Order::Echo => {
            io::copy(&mut connection.try_clone()?, &mut connection)?;
        }
        Order::Take(count) => {
            let right = take(&mut connection, count)?;
            connection.write_all(&right.to_le_bytes())?;
        }
        Order::Give(count) => give(&mut connection, count)?,
        Order::Swallow(count) => {
            let swallowed = swallow(&mut connection, count)?;
            connection.write_all(&swallowed.to_le_bytes())?;
        }
        Order::Pour(count) => pour(&mut connection, count)?,
    }
    Ok(())
}

/// A connection to a server, with its order given. The server may still be starting.
///
/// # Errors
/// Those of connect(2), when it does not come to be in time.
pub fn connect(to: SocketAddr, order: Order) -> io::Result<TcpStream> {
    let end = Instant::now().checked_add(PATIENCE);
    let mut connection = loop {
        match TcpStream::connect_timeout(&to, PATIENCE) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && end.is_some_and(|end| Instant::now() < end) =>
            {
                thread::sleep(Duration::from_millis(200));
            }
            done => break done?,
        }
    };
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    connection.write_all(&order.encode())?;
    Ok(connection)
}

/// Sends so many bytes to a server, and tells how many of them were right there.
///
/// # Errors
/// Those of the connection.
pub fn send(to: SocketAddr, count: u64) -> io::Result<u64> {
    let mut connection = connect(to, Order::Take(count))?;
    give(&mut connection, count)?;
    number(&mut connection)
}

/// Has so many bytes sent by a server, and tells how many of them were right here.
///
/// # Errors
/// Those of the connection.
pub fn fetch(from: SocketAddr, count: u64) -> io::Result<u64> {
    take(&mut connect(from, Order::Give(count))?, count)
}

/// As [`send`], without a look at the bytes.
///
/// # Errors
/// Those of the connection.
pub fn send_any(to: SocketAddr, count: u64) -> io::Result<u64> {
    let mut connection = connect(to, Order::Swallow(count))?;
    pour(&mut connection, count)?;
    number(&mut connection)
}

/// As [`fetch`], without a look at the bytes.
///
/// # Errors
/// Those of the connection.
pub fn fetch_any(from: SocketAddr, count: u64) -> io::Result<u64> {
    swallow(&mut connect(from, Order::Pour(count))?, count)
}

/// Sends bytes on a connection with [`Order::Echo`], and tells whether they came back.
///
/// # Errors
/// Those of the connection.
pub fn echo(connection: &mut TcpStream, bytes: &[u8]) -> io::Result<bool> {
    connection.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    connection.read_exact(&mut answer)?;
    Ok(answer == bytes)
}

/// Sends a datagram until it comes back, and tells how often it was sent, and whether it came back as it was.
///
/// # Errors
/// Those of the socket, when it does not come back at all.
pub fn echo_datagram(to: SocketAddr, bytes: &[u8]) -> io::Result<(u32, bool)> {
    let any = match to {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(DATAGRAM_PATIENCE))?;
    let mut answer = vec![0; CHUNK];
    let mut result = Err(io::ErrorKind::TimedOut.into());
    for times in 1..=4 {
        socket.send(bytes)?;
        result = socket.recv(&mut answer);
        if let Ok(length) = result {
            return Ok((times, answer.get(..length) == Some(bytes)));
        }
    }
    result.map(|_| (0, false))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn what_is_wrong_is_found() {
        let bytes = Noise::bytes(200_003);
        assert_eq!(take(&mut bytes.as_slice(), 200_003).unwrap(), 200_003);
        let mut changed = bytes.clone();
        changed[70_001] ^= 1;
        assert_eq!(take(&mut changed.as_slice(), 200_003).unwrap(), 70_001);
        // A block of another place.
        let mut displaced = bytes.clone();
        displaced.copy_within(0..CHUNK, CHUNK);
        assert_eq!(take(&mut displaced.as_slice(), 200_003).unwrap(), CHUNK as u64);
        assert!(take(&mut &bytes[..100], 200_003).is_err());
        let mut given = Vec::new();
        give(&mut given, 200_003).unwrap();
        assert_eq!(given, bytes);
    }

    #[test]
    fn orders_are_obeyed() {
        // A port that is free now is so a moment later.
        let port = TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
        thread::spawn(move || serve(port));
        let to: SocketAddr = ([127, 0, 0, 1], port).into();
        assert_eq!(send(to, 100_001).unwrap(), 100_001);
        assert_eq!(fetch(to, 100_001).unwrap(), 100_001);
        assert_eq!(send_any(to, 100_001).unwrap(), 100_001);
        assert_eq!(fetch_any(to, 100_001).unwrap(), 100_001);
        assert!(echo(&mut connect(to, Order::Echo).unwrap(), b"hello").unwrap());
        assert_eq!(
            echo_datagram(to, &Noise::bytes(LARGEST_DATAGRAM)).unwrap(),
            (1, true)
        );
    }
}
