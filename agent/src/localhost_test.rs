use std::{
    future::Future,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs in a network namespace of its own, with a host whose port 7 is the listener.
fn alone<F: Future<Output = ()>>(test: impl FnOnce(Dial, UnixListener) -> F + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.unwrap().success());
        let dir = tempfile::tempdir().unwrap();
        let host = UnixListener::bind(dir.path().join("7")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(Dial::unix(dir.path().to_owned()), host));
    };
    thread::spawn(run).join().unwrap();
}

fn request(tcp_port: u32, ipv6_first: bool) -> ConnectLocalhostRequest {
    ConnectLocalhostRequest {
        tcp_port,
        ipv6_first,
        stream_port: 7,
        ..Default::default()
    }
}

/// Has the server, which answers when it has heard all, and the host talk.
async fn talk(server: TcpListener, mut stream: UnixStream) {
    let serving = thread::spawn(move || {
        let (mut client, _) = server.accept().unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        client.write_all(&heard).unwrap();
    });
    let talking = tokio::task::spawn_blocking(move || {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        said
    });
    assert_eq!(talking.await.unwrap(), "hello");
    serving.join().unwrap();
}

#[test]
fn a_stream_is_joined_to_the_server_of_either_family() {
    alone(|dial, host| async move {
        for (server, ipv6_first) in [
            ("127.0.0.1:0", false),
            ("127.0.0.1:0", true),
            ("[::1]:0", true),
            ("[::1]:0", false),
            ("[::]:0", false),
        ] {
            let server = TcpListener::bind(server).unwrap();
            let port = server.local_addr().unwrap().port();
            connect(&dial, &request(port.into(), ipv6_first)).await.unwrap();
            talk(server, host.accept().unwrap().0).await;
        }
        // The one that was asked for, if both are there.
        let four = TcpListener::bind("127.0.0.1:8080").unwrap();
        let six = TcpListener::bind("[::1]:8080").unwrap();
        connect(&dial, &request(8080, true)).await.unwrap();
        talk(six, host.accept().unwrap().0).await;
        drop(four);
    });
}

#[test]
fn without_a_server_the_stream_is_closed_and_the_host_told() {
    alone(|dial, host| async move {
        let fault = connect(&dial, &request(80, false)).await.unwrap_err();
        assert_eq!(
            fault.message.to_lowercase(),
            "connect to port 80 of localhost: connection refused"
        );
        let (mut stream, _) = host.accept().unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        for port in [0, 65_536, u32::MAX] {
            let fault = connect(&dial, &request(port, false)).await.unwrap_err();
            assert_eq!(fault.message, format!("tcp_port: {port} is no port"));
        }
    });
}
