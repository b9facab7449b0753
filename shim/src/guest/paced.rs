//! A stream from the guest that cannot arrive faster than it can be worked off.
//!
//! ttrpc queues what arrives without bound. The agent has little to say; a guest that floods its connection is held
//! back by this, and its queue stays short.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// Bytes that may arrive at once.
const BURST: usize = 4 << 20;

/// Bytes that may arrive in a second, in the long run.
const PER_SECOND: usize = 1 << 20;

/// Bytes that are worth waiting for, so that a flood does not wake us for each.
const QUANTUM: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub struct Paced<S> {
    stream: S,
    credit: usize,
    counted: Instant,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<S> Paced<S> {
    /// Paces what is read from `stream`; what is written is not.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            credit: BURST,
            counted: Instant::now(),
            pause: None,
        }
    }

    fn count(&mut self) {
        let passed = self.counted.elapsed();
        let earned = passed.as_micros().saturating_mul(PER_SECOND as u128) / 1_000_000;
        self.credit = self
            .credit
            .saturating_add(usize::try_from(earned).unwrap_or(BURST))
            .min(BURST);
        self.counted = Instant::now();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            if self.credit == 0 {
                self.count();
            }
            if self.credit > 0 {
                break;
            }
            self.pause = Some(Box::pin(sleep(Duration::from_millis(
                (QUANTUM * 1000 / PER_SECOND) as u64,
            ))));
        }
        let allowed = self.credit.min(buffer.remaining());
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(allowed));
        let read = Pin::new(&mut self.stream).poll_read(context, &mut part);
        let length = part.filled().len();
        buffer.advance(length);
        self.credit = self.credit.saturating_sub(length);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_held_back_and_all_of_it_arrives() {
        let flood: Vec<u8> = (0..BURST + 3 * PER_SECOND).map(|at| (at % 251) as u8).collect();
        let mut paced = Paced::new(io::Cursor::new(flood.clone()));
        let start = Instant::now();
        let mut first = vec![0; BURST];
        paced.read_exact(&mut first).await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(100));
        let mut rest = Vec::new();
        paced.read_to_end(&mut rest).await.unwrap();
        assert!(first == flood[..BURST] && rest == flood[BURST..]);
        let took = start.elapsed();
        assert!(
            (Duration::from_secs(2)..Duration::from_secs(4)).contains(&took),
            "{took:?}"
        );
    }
}
