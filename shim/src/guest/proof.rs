//! Raw streams of the guest's that are not known to be the agent's yet.
//!
//! Linux gives every process of a guest the right to dial the host's vsock ports, and no way to tell them apart. So the
//! agent is told a secret at Setup, before there is any container, with which each of its streams begins. Nothing is
//! said or believed on a stream before that. Ports are taken in an order that nobody can foresee, so that a container
//! does not come before the agent either, which would be the end of that stream.

use std::{
    hash::{BuildHasher, RandomState},
    io,
    sync::atomic::{AtomicU32, Ordering},
};

use husk_agent_protocol::limits::{FIRST_STDIO_PORT, SECRET_LEN};
use tokio::{io::AsyncReadExt, net::UnixStream};

/// Bits of the numbers that ports are made of.
const PORT_BITS: u32 = 28;

/// Half of them.
const HALF: u32 = PORT_BITS / 2;

/// What proves the agent's streams in one guest.
#[derive(Clone)]
pub struct Secret([u8; SECRET_LEN]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new() -> io::Result<Self> {
        let mut bytes = [0; SECRET_LEN];
        super::agent::getrandom(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// As it is told to the agent.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Compares without telling by the time that it takes where the difference is.
    fn is(&self, bytes: &[u8; SECRET_LEN]) -> bool {
        let differences = self
            .0
            .iter()
            .zip(bytes)
            .fold(0, |all, (own, told)| all | (own ^ told));
        std::hint::black_box(differences) == 0
    }
}

/// A stream that was offered to the guest.
#[derive(Debug)]
pub struct Unproven {
    stream: UnixStream,
    secret: Secret,
}

impl Unproven {
    /// `stream` will have to begin with `secret`.
    pub fn new(stream: UnixStream, secret: Secret) -> Self {
        Self { stream, secret }
    }

    /// Waits until somebody has dialled the stream and said the secret.
    ///
    /// # Errors
    /// `PermissionDenied` when it was not the secret, `UnexpectedEof` when nobody dialled.
    pub async fn proven(mut self) -> io::Result<UnixStream> {
        let mut told = [0; SECRET_LEN];
        self.stream.read_exact(&mut told).await?;
        if self.secret.is(&told) {
            return Ok(self.stream);
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "a process of the guest that is not husk's agent has dialled a stream of the agent's; it was closed",
        ))
    }
}

/// The host's ports for raw streams: all different, in an order of this sandbox's own.
#[derive(Debug, Default)]
pub struct Ports {
    taken: AtomicU32,
    keys: RandomState,
}

impl Ports {
    /// A port that was never given out before.
    ///
    /// # Errors
    /// When all of them were.
    pub fn fresh(&self) -> io::Result<u32> {
        let next = |taken: u32| taken.checked_add(1).filter(|taken| *taken <= 1 << PORT_BITS);
        let number = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        let number =
            number.map_err(|_| io::Error::other("the sandbox has used up its vsock ports; start another"))?;
        Ok(FIRST_STDIO_PORT + self.shuffled(number))
    }

    /// A Feistel network: different numbers stay different.
    fn shuffled(&self, number: u32) -> u32 {
        let mask = (1 << HALF) - 1;
        let (mut left, mut right) = (number >> HALF & mask, number & mask);
        for round in 0u32..4 {
            let mixed = self.keys.hash_one((round, right)) as u32 & mask;
            (left, right) = (right, left ^ mixed);
        }
        left << HALF | right
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn only_who_knows_the_secret_is_heard() {
        let secret = Secret::new().unwrap();
        let mut other = secret.0;
        other[SECRET_LEN - 1] ^= 1;
        for (said, expected) in [
            (&secret.0[..], None),
            (&other[..], Some(io::ErrorKind::PermissionDenied)),
            (&secret.0[..31], Some(io::ErrorKind::UnexpectedEof)),
            (&[], Some(io::ErrorKind::UnexpectedEof)),
        ] {
            let (own, mut guest) = UnixStream::pair().unwrap();
            guest.write_all(said).await.unwrap();
            if expected.is_none() {
                guest.write_all(b"behind").await.unwrap();
            }
            guest.shutdown().await.unwrap();
            let proven = Unproven::new(own, secret.clone()).proven().await;
            match expected {
                Some(kind) => assert_eq!(proven.unwrap_err().kind(), kind),
                None => {
                    let mut rest = String::new();
                    proven.unwrap().read_to_string(&mut rest).await.unwrap();
                    assert_eq!(rest, "behind");
                }
            }
        }
    }

    #[test]
    fn ports_are_different_within_range_and_not_in_order() {
        let ports = Ports::default();
        let first: Vec<u32> = (0..20_000).map(|_| ports.fresh().unwrap()).collect();
        let range = FIRST_STDIO_PORT..FIRST_STDIO_PORT + (1 << PORT_BITS);
        assert!(first.iter().all(|port| range.contains(port)));
        assert_eq!(first.iter().collect::<HashSet<_>>().len(), first.len());
        assert!(!first.is_sorted());
        let others: Vec<u32> = (0..20).map(|_| Ports::default().fresh().unwrap()).collect();
        assert!(others.iter().collect::<HashSet<_>>().len() > 1, "{others:?}");
        ports.taken.store(1 << PORT_BITS, Ordering::Relaxed);
        assert!(ports.fresh().is_err());
    }
}
