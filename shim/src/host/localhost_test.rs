use std::{
    io::{Read, Write},
    net::{TcpListener as StdListener, TcpStream as StdStream, UdpSocket},
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::spawn_blocking,
};

use super::*;
use crate::{
    host::{netns, stdio::stream_pair},
    test_help::eventually,
};

/// A guest in which all ports but the first ten have a server. It tells the address, echoes what comes and says
/// good-bye at its end.
#[derive(Default)]
struct Echo {
    most: Arc<AtomicUsize>,
}

impl Guest for Echo {
    async fn connect(&self, to: SocketAddr) -> io::Result<UnixStream> {
        if to.port() < 10 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (own, theirs) = stream_pair()?;
        let theirs = std::os::unix::net::UnixStream::from(theirs);
        theirs.set_nonblocking(true)?;
        let mut server = UnixStream::from_std(theirs)?;
        let most = Arc::clone(&self.most);
        tokio::spawn(async move {
            most.fetch_add(1, Ordering::SeqCst);
            server.write_all(format!("{to}\n").as_bytes()).await.unwrap();
            let (mut from, mut to) = server.split();
            if tokio::io::copy(&mut from, &mut to).await.is_ok() {
                let _ = to.write_all(b"bye").await;
                let _ = to.shutdown().await;
            }
            most.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(own)
    }
}

/// Runs `clients` in a network namespace whose localhost is carried to a guest.
async fn carried<T: Send + 'static>(clients: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = netns::make().unwrap();
    let taken = Localhost::take(&namespace).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let carrying = tokio::spawn(taken.carry(Echo::default(), stopped));
    let own = namespace.try_clone().unwrap();
    let done = spawn_blocking(move || within(&own, || Ok(clients())).unwrap())
        .await
        .unwrap();
    stop.send(()).unwrap();
    carrying.await.unwrap();
    // It is as it was, once no child that another test forks has copies of its descriptors.
    let look = || {
        let to = SocketAddr::from(([127, 0, 0, 1], 80));
        let connected = StdStream::connect_timeout(&to, Duration::from_secs(1));
        let left = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        match connected {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && !left.contains(" 0A ") => {
                Ok(())
            }
            other => Err(format!("somebody listens: {other:?}, {left}")),
        }
    };
    let looked = spawn_blocking(move || {
        within(&namespace, move || {
            eventually(look);
            Ok(())
        })
    });
    looked.await.unwrap().unwrap();
    done
}

/// What a server says after the client has said `words` and that it is done.
fn talk(to: &str, words: &[u8]) -> Vec<u8> {
    let mut client = StdStream::connect(to).unwrap();
    client.write_all(words).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_reach_the_guest_with_their_port_and_half_close() {
    carried(|| {
        for to in ["127.0.0.1:80", "[::1]:80", "127.0.0.1:65535", "[::1]:10"] {
            assert_eq!(talk(to, b"hello "), format!("{to}\nhello bye").as_bytes());
        }
        // More than all buffers on the way hold.
        let words = vec![b'x'; 4 << 20];
        let mut client = StdStream::connect("127.0.0.1:80").unwrap();
        let mut writer = client.try_clone().unwrap();
        let sent = words.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        writing.join().unwrap();
        assert_eq!(said.len(), words.len() + "127.0.0.1:80\nbye".len());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_without_a_server_is_a_reset() {
    carried(|| {
        for to in ["127.0.0.1:9", "[::1]:1"] {
            let mut client = StdStream::connect(to).unwrap();
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{to}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_else_goes_on_in_the_namespace_goes_on() {
    carried(|| {
        let others = StdListener::bind("127.0.0.11:53").unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:80").unwrap();
        let mut client = StdStream::connect("127.0.0.11:53").unwrap();
        let (mut server, _) = others.accept().unwrap();
        server.write_all(b"own").unwrap();
        drop(server);
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"own");
        let refused = StdStream::connect("127.0.0.11:80").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"datagram", "127.0.0.1:80").unwrap();
        assert_eq!(datagrams.recv(&mut [0; 64]).unwrap(), 8);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_beyond_the_bound_waits_for_a_place() {
    carried(|| {
        let open = |_| {
            let mut client = StdStream::connect("127.0.0.1:80").unwrap();
            client.read_exact(&mut [0; 13]).unwrap();
            client
        };
        let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(open).collect();
        let mut waiting = StdStream::connect("[::1]:80").unwrap();
        waiting
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let error = waiting.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        waiting.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        clients.truncate(MAX_CONNECTIONS / 2);
        waiting.read_exact(&mut [0; 9]).unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_gone_is_gone_in_the_guest() {
    let (own, theirs) = stream_pair().unwrap();
    struct Once(std::sync::Mutex<Option<UnixStream>>);
    impl Guest for Once {
        async fn connect(&self, _: SocketAddr) -> io::Result<UnixStream> {
            Ok(self.0.lock().unwrap().take().unwrap())
        }
    }
    let namespace = netns::make().unwrap();
    let taken = Localhost::take(&namespace).unwrap();
    let carrying = tokio::spawn(taken.carry(
        Once(std::sync::Mutex::new(Some(own))),
        std::future::pending::<()>(),
    ));
    let client = spawn_blocking(move || within(&namespace, || StdStream::connect("127.0.0.1:80")));
    let client = client.await.unwrap().unwrap();
    let theirs = std::os::unix::net::UnixStream::from(theirs);
    theirs.set_nonblocking(true).unwrap();
    let mut server = UnixStream::from_std(theirs).unwrap();
    server.write_all(b"x").await.unwrap();
    // It has something unread, and so resets the connection.
    (&client).read_exact(&mut []).unwrap();
    while client.peek(&mut [0]).unwrap() == 0 {}
    drop(client);
    assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
    carrying.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_may_come_up_later_and_the_hosts_own_is_never_taken() {
    let own = Namespace::of(std::process::id(), Kind::Network).unwrap();
    let error = Localhost::take(&own).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);

    let link = |namespace: &Namespace, state: &'static str| {
        let done = within(namespace, move || {
            std::process::Command::new("ip")
                .args(["link", "set", "lo", state])
                .status()
        });
        assert!(done.unwrap().success());
    };
    let namespace = netns::make().unwrap();
    link(&namespace, "down");
    let taken = Localhost::take(&namespace).unwrap();
    link(&namespace, "up");
    let carrying = tokio::spawn(taken.carry(Echo::default(), std::future::pending::<()>()));
    let said = spawn_blocking(move || within(&namespace, || Ok(talk("[::1]:80", b"")))).await;
    assert_eq!(said.unwrap().unwrap(), b"[::1]:80\nbye");
    carrying.abort();
}
