use std::{
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    process::Command,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs in a network namespace of its own, with loopback up.
fn alone(test: impl FnOnce(BorrowedFd<'_>) + Send) {
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.unwrap().success());
            test(File::open("/proc/thread-self/ns/net").unwrap().as_fd());
        };
        scope.spawn(run).join().unwrap();
    });
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn tcp<'a>(listener: &'a TcpListener, address: &str, port: Option<u16>) -> Rule<'a> {
    Rule {
        protocol: Protocol::Tcp,
        address: address.parse().unwrap(),
        port,
        socket: listener.as_fd(),
    }
}

fn refused(to: &str) {
    let error = TcpStream::connect(to).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
}

/// What this test has closed, children of other tests' threads have still, until they exec.
fn comes_to_be_refused(to: &str) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        // Nobody accepts: without a timeout the one that no queue has room for would wait for minutes.
        match TcpStream::connect_timeout(&address(to), Duration::from_secs(1)) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return,
            other => assert!(Instant::now() < end, "{to}: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn every_port_of_an_address_is_the_listeners_and_nothing_else_is() {
    alone(|namespace| {
        let four = TcpListener::bind("127.0.0.1:0").unwrap();
        let six = TcpListener::bind("[::1]:0").unwrap();
        let other = TcpListener::bind("127.0.0.11:5000").unwrap();
        let any = TcpListener::bind("0.0.0.0:6000").unwrap();
        refused("127.0.0.1:5000");
        let rules = [tcp(&four, "127.0.0.1", None), tcp(&six, "::1", None)];
        let lookup = Lookup::attach(namespace, &rules).unwrap();
        for (to, listener) in [
            ("127.0.0.1:5000", &four),
            ("127.0.0.1:6000", &four),
            ("127.0.0.1:65535", &four),
            ("[::1]:1", &six),
            ("[::1]:6000", &six),
            ("127.0.0.11:5000", &other),
            ("127.0.0.2:6000", &any),
        ] {
            let mut client = TcpStream::connect(to).unwrap();
            let (mut server, peer) = listener.accept().unwrap();
            assert_eq!(server.local_addr().unwrap(), address(to));
            assert_eq!(peer, client.local_addr().unwrap());
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
        }
        refused("127.0.0.2:5000");
        drop(lookup);
        comes_to_be_refused("127.0.0.1:5000");
        comes_to_be_refused("[::1]:1");
    });
}

#[test]
fn a_rule_is_for_one_protocol_and_port_and_a_closed_socket_for_none() {
    alone(|namespace| {
        let tcp_listener = TcpListener::bind("127.0.0.11:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.11:0").unwrap();
        let plain = UdpSocket::bind("0.0.0.0:53").unwrap();
        for socket in [&udp, &plain] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        let datagrams = Rule {
            protocol: Protocol::Udp,
            address: "127.0.0.11".parse().unwrap(),
            port: Some(53),
            socket: udp.as_fd(),
        };
        let rules = [tcp(&tcp_listener, "127.0.0.11", Some(53)), datagrams];
        let _lookup = Lookup::attach(namespace, &rules).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"to the lookup's", "127.0.0.11:53").unwrap();
        client.send_to(b"to another's", "127.0.0.1:53").unwrap();
        let mut buffer = [0; 64];
        assert_eq!(udp.recv_from(&mut buffer).unwrap().0, 15);
        assert_eq!(plain.recv_from(&mut buffer).unwrap().0, 12);
        TcpStream::connect("127.0.0.11:53").unwrap();
        refused("127.0.0.11:54");
        drop(tcp_listener);
        comes_to_be_refused("127.0.0.11:53");
    });
}

#[test]
fn too_many_rules_are_refused() {
    alone(|namespace| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let rules = vec![tcp(&listener, "::1", Some(1)); MAX_RULES];
        Lookup::attach(namespace, &rules).unwrap();
        let rules = vec![tcp(&listener, "::1", Some(1)); MAX_RULES + 1];
        let error = Lookup::attach(namespace, &rules).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::E2BIG));
    });
}
