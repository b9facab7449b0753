use std::{
    io::{Read, Write},
    net::{TcpListener as StdListener, UdpSocket as StdUdp},
    os::unix::net::{UnixListener, UnixStream},
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, unshare};

use super::*;

const SERVER: &str = "127.0.0.11:53";

/// The host's side of a stream, and frames on it.
struct Host(UnixStream);

impl Host {
    fn query(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::decode(header).unwrap();
        let mut message = vec![0; header.length.into()];
        self.0.read_exact(&mut message).unwrap();
        (header, message)
    }

    fn answer(&mut self, query: Header, message: &[u8]) {
        let header = Header {
            length: message.len().try_into().unwrap(),
            ..query
        };
        self.0.write_all(&header.encode()).unwrap();
        self.0.write_all(message).unwrap();
    }
}

/// Runs `clients` in a network namespace of its own, in which DNS at 127.0.0.11 is forwarded to the `Host`. Tells
/// whether the forwarder still ran when they had ended.
fn forwarding(clients: impl FnOnce(&mut Host) + Send + 'static) -> bool {
    let test = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.unwrap().success());
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("7")).unwrap();
        let dial = Dial::unix(dir.path().to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let front = Front::open(Ipv4Addr::new(127, 0, 0, 11)).await.unwrap();
            let stream = dial.connect(7).await.unwrap();
            let mut host = Host(listener.accept().unwrap().0);
            let clients = thread::spawn(move || {
                clients(&mut host);
                host
            });
            let wait = tokio::task::spawn_blocking(|| clients.join().unwrap());
            tokio::select! {
                error = front.run(stream) => {
                    println!("ended: {error}");
                    false
                }
                host = wait => {
                    host.unwrap();
                    true
                }
            }
        })
    };
    thread::spawn(test).join().unwrap()
}

fn client() -> StdUdp {
    let socket = StdUdp::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.connect(SERVER).unwrap();
    socket
}

fn ask(client: &mut std::net::TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap();
    client.write_all(&length.to_be_bytes()).unwrap();
    client.write_all(message).unwrap();
}

fn answer_of(client: &mut std::net::TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    client.read_exact(&mut length).unwrap();
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    client.read_exact(&mut message).unwrap();
    message
}

#[test]
fn datagrams_are_answered_from_the_address_that_was_asked_in_any_order() {
    assert!(forwarding(|host| {
        let (first, second) = (client(), client());
        first.send(b"first").unwrap();
        let (one, message) = host.query();
        assert_eq!(
            (one.transport, message.as_slice()),
            (Transport::Udp, &b"first"[..])
        );
        second.send(b"second").unwrap();
        let (two, message) = host.query();
        assert_eq!(message, b"second");
        // As large as a datagram can be; a client that is connected takes none that comes from elsewhere.
        let large = vec![7; 65_507];
        host.answer(two, &large);
        host.answer(one, b"one");
        let mut buffer = vec![0; 1 << 16];
        assert_eq!(second.recv(&mut buffer).unwrap(), large.len());
        assert_eq!(buffer[..large.len()], large);
        assert_eq!(first.recv(&mut buffer).unwrap(), 3);
        // Answers to nobody, and no answer, end nothing.
        let nobody = Header { number: 1000, ..one };
        host.answer(nobody, b"again");
        first.send(b"x").unwrap();
        let (none, _) = host.query();
        host.answer(none, b"");
        first.send(b"y").unwrap();
        let (query, _) = host.query();
        host.answer(query, b"yes");
        assert_eq!(first.recv(&mut buffer).unwrap(), 3);
    }));
}

#[test]
fn a_connection_carries_query_after_query() {
    assert!(forwarding(|host| {
        let mut client = std::net::TcpStream::connect(SERVER).unwrap();
        for size in [1_usize, 512, 65_535] {
            let message = vec![1; size];
            ask(&mut client, &message);
            let (query, received) = host.query();
            assert_eq!((query.transport, received), (Transport::Tcp, message.clone()));
            host.answer(query, &message);
            assert_eq!(answer_of(&mut client), message);
        }
        // No answer: the connection is closed.
        ask(&mut client, b"?");
        let (query, _) = host.query();
        host.answer(query, b"");
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        // A client that goes away in the middle of a query is no query.
        let mut rude = std::net::TcpStream::connect(SERVER).unwrap();
        rude.write_all(&[1, 0, 5]).unwrap();
        drop(rude);
        let mut client = std::net::TcpStream::connect(SERVER).unwrap();
        ask(&mut client, b"next");
        assert_eq!(host.query().1, b"next");
    }));
}

#[test]
fn a_server_of_the_containers_own_has_the_port_on_other_addresses() {
    assert!(forwarding(|host| {
        let server = StdUdp::bind("0.0.0.0:53").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let listener = StdListener::bind("0.0.0.0:53").unwrap();
        let client = client();
        client.send(b"to the host").unwrap();
        assert_eq!(host.query().1, b"to the host");
        client.connect("127.0.0.1:53").unwrap();
        client.send(b"local").unwrap();
        assert_eq!(server.recv(&mut [0; 64]).unwrap(), 5);
        std::net::TcpStream::connect("127.0.0.1:53").unwrap();
        listener.accept().unwrap();
    }));
}

#[test]
fn queries_beyond_the_bound_are_dropped_until_there_are_answers() {
    assert!(forwarding(|host| {
        let client = client();
        for number in 0..MAX_QUERIES {
            client.send(&[number as u8]).unwrap();
        }
        let queries: Vec<_> = (0..MAX_QUERIES).map(|_| host.query()).collect();
        client.send(b"too many").unwrap();
        // It was looked at before this one.
        let mut connection = std::net::TcpStream::connect(SERVER).unwrap();
        ask(&mut connection, b"too many");
        assert_eq!(connection.read(&mut [0]).unwrap(), 0);
        for (query, message) in queries {
            host.answer(query, &message);
            client.recv(&mut [0]).unwrap();
        }
        client.send(b"again").unwrap();
        assert_eq!(host.query().1, b"again");
    }));
}

#[test]
fn it_ends_with_the_stream() {
    assert!(!forwarding(|host| {
        host.0.shutdown(std::net::Shutdown::Both).unwrap();
        thread::sleep(Duration::from_secs(5));
    }));
    assert!(!forwarding(|host| {
        host.0.write_all(&[0, 0, 0, 0, 0, 0, 9, 9]).unwrap();
        thread::sleep(Duration::from_secs(5));
    }));
}

#[test]
fn only_loopback_is_forwarded() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for address in [&[8, 8, 8, 8][..], &[127, 0, 0], &[]] {
        let request = ForwardDnsRequest {
            address: address.to_vec(),
            ..Default::default()
        };
        let dial = Dial::unix("/nonexistent".into());
        let fault = runtime.block_on(forward(&dial, &request)).unwrap_err();
        assert_eq!(fault.message, "address: is not of 127.0.0.0/8");
    }
}
