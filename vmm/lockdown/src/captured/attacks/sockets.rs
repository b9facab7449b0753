//! Sockets: of every family that the kernel has, and to those that others listen on.

use super::{Attack, kept, last_error, made};
use std::mem::{size_of_val, zeroed};

fn socket(family: i32, kind: i32, protocol: i32) -> bool {
    opens!(SYS_socket, family, kind, protocol)
}

fn connected(family: i32, address: *const u8, length: usize) -> bool {
    unsafe {
        let fd = libc::socket(family, libc::SOCK_STREAM, 0);
        fd >= 0 && libc::connect(fd, address.cast(), length as u32) == 0 && libc::close(fd) == 0
    }
}

fn unix_address(name: &[u8], is_abstract: bool) -> (libc::sockaddr_un, usize) {
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    let start = usize::from(is_abstract);
    for (to, from) in address.sun_path.iter_mut().skip(start).zip(name) {
        *to = *from as libc::c_char;
    }
    (address, 2 + start + name.len() + usize::from(!is_abstract))
}

fn loopback(port: u16) -> libc::sockaddr_in {
    let mut address: libc::sockaddr_in = unsafe { zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_port = port.to_be();
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    address
}

/// All of them.
pub(super) const ALL: &[Attack] = &[
    ("socket-unix", |_| socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
    ("socket-unix-packets", |_| {
        socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)
    }),
    ("socket-unix-datagrams", |_| {
        socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)
    }),
    ("socket-inet", |_| socket(libc::AF_INET, libc::SOCK_STREAM, 0)),
    ("socket-inet-udp", |_| socket(libc::AF_INET, libc::SOCK_DGRAM, 0)),
    ("socket-raw", |_| {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    ("socket-inet-mptcp", |_| {
        socket(libc::AF_INET, libc::SOCK_STREAM, 262)
    }),
    ("socket-inet-sctp", |_| {
        socket(libc::AF_INET, libc::SOCK_SEQPACKET, 132)
    }),
    ("socket-inet-udplite", |_| {
        socket(libc::AF_INET, libc::SOCK_DGRAM, 136)
    }),
    ("socket-inet6", |_| socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)),
    ("socket-inet6-tcp", |_| {
        socket(libc::AF_INET6, libc::SOCK_STREAM, 0)
    }),
    ("socket-inet6-raw", |_| socket(libc::AF_INET6, libc::SOCK_RAW, 58)),
    ("socket-packet", |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("socket-packet-datagrams", |_| {
        socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)
    }),
    ("socket-netlink", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
    }),
    ("socket-events", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_KOBJECT_UEVENT)
    }),
    ("socket-audit", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_AUDIT)
    }),
    ("socket-diagnosis", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)
    }),
    ("socket-netfilter", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER)
    }),
    ("socket-generic", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_GENERIC)
    }),
    ("socket-xfrm", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_XFRM)
    }),
    ("socket-crypto", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_CRYPTO)
    }),
    ("socket-vsock", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    ("socket-alg", |_| socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
    ("socket-bluetooth", |_| {
        socket(libc::AF_BLUETOOTH, libc::SOCK_RAW, 1)
    }),
    ("socket-can", |_| socket(libc::AF_CAN, libc::SOCK_RAW, 1)),
    ("socket-xdp", |_| socket(libc::AF_XDP, libc::SOCK_RAW, 0)),
    ("socket-tipc", |_| socket(libc::AF_TIPC, libc::SOCK_STREAM, 0)),
    ("socket-smc", |_| socket(43, libc::SOCK_STREAM, 0)),
    ("socket-rds", |_| socket(libc::AF_RDS, libc::SOCK_SEQPACKET, 0)),
    ("socket-key", |_| socket(libc::AF_KEY, libc::SOCK_RAW, 2)),
    ("socket-kcm", |_| socket(41, libc::SOCK_DGRAM, 0)),
    ("socket-phonet", |_| socket(libc::AF_PHONET, libc::SOCK_DGRAM, 0)),
    ("socket-qrtr", |_| socket(42, libc::SOCK_DGRAM, 0)),
    ("socket-mctp", |_| socket(45, libc::SOCK_DGRAM, 0)),
    ("socket-nfc", |_| socket(39, libc::SOCK_SEQPACKET, 0)),
    ("socket-l2tp", |_| socket(libc::AF_INET, libc::SOCK_DGRAM, 115)),
    ("socket-ppp", |_| socket(libc::AF_PPPOX, libc::SOCK_STREAM, 0)),
    ("socketpair", |_| {
        let mut pair = [0i32; 2];
        call!(
            SYS_socketpair,
            libc::AF_UNIX,
            libc::SOCK_STREAM,
            0,
            pair.as_mut_ptr()
        )
    }),
    ("connect-tcp", |g| {
        let address = loopback(g.port);
        connected(libc::AF_INET, (&raw const address).cast(), size_of_val(&address))
    }),
    ("connect-by-a-path", |g| {
        let (address, length) = unix_address(g.path("socket").as_bytes(), false);
        connected(libc::AF_UNIX, (&raw const address).cast(), length)
    }),
    ("connect-abstract", |g| {
        let (address, length) = unix_address(format!("husk-attack-{}", g.port).as_bytes(), true);
        connected(libc::AF_UNIX, (&raw const address).cast(), length)
    }),
    ("connect-with-what-is-open", |g| {
        // Its own channels, turned to somebody else.
        let (address, length) = unix_address(g.path("packets").as_bytes(), false);
        unsafe {
            let own = made(libc::syscall(
                libc::SYS_socket,
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET,
                0,
            ));
            let mut fds = kept(own).into_iter();
            fds.any(|fd| libc::connect(fd, (&raw const address).cast(), length as u32) == 0)
        }
    }),
    ("bind", |_| unsafe {
        let address = loopback(0);
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) == 0
    }),
    ("send-to-a-path", |g| {
        let (address, length) = unix_address(g.path("socket").as_bytes(), false);
        let own = made(unsafe { libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_DGRAM, 0) });
        // Who listens there takes connections: an error that is told to who has found it. By no socket of the program's,
        // whose other end would take it for a message.
        own.is_some_and(|fd| {
            !call!(
                SYS_sendto,
                fd,
                c"x".as_ptr(),
                1,
                libc::MSG_DONTWAIT,
                &raw const address,
                length
            ) && last_error() == libc::EPROTOTYPE
        })
    }),
];
