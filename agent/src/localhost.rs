//! Connections that the host makes to loopback: port-forwarding.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use husk_agent_protocol::messages::ConnectLocalhostRequest;
use tokio::{io::copy_bidirectional, net::TcpStream, time::timeout};

use crate::{dial::Dial, fault::Fault};

/// How long a server whose queue is full may take to accept.
const PATIENCE: Duration = Duration::from_secs(10);

/// Joins a stream to the port that `request` names, until both directions have ended.
///
/// # Errors
///
/// Nobody listens on the port, or the stream is not to be had.
pub async fn connect(dial: &Dial, request: &ConnectLocalhostRequest) -> Result<(), Fault> {
    let port = u16::try_from(request.tcp_port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Fault::spec("tcp_port", format_args!("{} is no port", request.tcp_port)))?;
    // The stream is taken in any case: the host has it on offer, and sees by its end that there is no server.
    let (server, stream) = tokio::join!(
        server(port, request.ipv6_first),
        dial.connect(request.stream_port)
    );
    let mut stream = stream.map_err(|error| {
        Fault::system(
            format_args!("connect a stream to port {}", request.stream_port),
            error,
        )
    })?;
    let mut server =
        server.map_err(|error| Fault::system(format_args!("connect to port {port} of localhost"), error))?;
    tokio::spawn(async move {
        // Either side going away in the middle is how many connections end; the other side learns of it.
        let _ = copy_bidirectional(&mut server, &mut stream).await;
    });
    Ok(())
}

/// Connects to the first of the loopback addresses that has a listener.
async fn server(port: u16, ipv6_first: bool) -> io::Result<TcpStream> {
    let mut addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    if ipv6_first {
        addresses.reverse();
    }
    let mut refused = None;
    for address in addresses {
        match timeout(PATIENCE, TcpStream::connect((address, port))).await {
            Ok(Ok(server)) => {
                server.set_nodelay(true)?;
                return Ok(server);
            }
            Ok(Err(error)) => drop(refused.get_or_insert(error)),
            Err(late) => drop(refused.get_or_insert(late.into())),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()))
}

#[cfg(test)]
#[path = "localhost_test.rs"]
mod tests;
