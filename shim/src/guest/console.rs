//! The guest's console: its last part is kept, for the error that explains a guest's death.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver};

use crate::host::ringlog::RingLog;

/// Bytes kept.
pub const KEPT: usize = 64 << 10;

/// Bytes of a tail shown in an error.
pub const TAIL: usize = 4 << 10;

/// The last [`KEPT`] bytes of a console.
#[derive(Debug, Default)]
pub struct Console(Mutex<VecDeque<u8>>);

impl Console {
    /// Reads a console from a pipe until its end, in a task of its own, and adds it to `log`. The task's end is awaited
    /// by the handle.
    pub fn read(mut pipe: Receiver, log: RingLog) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let console = Arc::new(Self::default());
        let writer = Arc::clone(&console);
        let task = tokio::spawn(async move {
            // As much as a pipe holds: what nobody reads in time is lost to it, a panic's last words too.
            let mut buffer = vec![0; 64 << 10];
            loop {
                match pipe.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(length) => {
                        let bytes = buffer.get(..length).unwrap_or_default();
                        writer.append(bytes);
                        log.append(bytes);
                    }
                }
            }
        });
        (console, task)
    }

    fn append(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = bytes.get(bytes.len().saturating_sub(KEPT)..).unwrap_or_default();
        let over = (kept.len() + bytes.len()).saturating_sub(KEPT);
        let over = over.min(kept.len());
        kept.drain(..over);
        kept.extend(bytes);
    }

    /// The last `bytes` bytes from the start of a line on, as text that is safe to show: the guest wrote it.
    pub fn tail(&self, bytes: usize) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = kept.len().saturating_sub(bytes);
        let mut tail: Vec<u8> = kept.iter().skip(cut).copied().collect();
        drop(kept);
        if cut > 0 {
            let line = tail.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            tail.drain(..line);
        }
        printable(&String::from_utf8_lossy(&tail))
    }
}

/// Text from the guest without what a terminal would obey: control characters but line feed and tab become `?`, and
/// carriage returns are dropped.
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|character| *character != '\r')
        .map(|character| match character {
            '\n' | '\t' => character,
            _ if character.is_control() => '?',
            // Characters that turn the direction of writing can make a line say something else.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '?',
            _ => character,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tail_starts_with_a_line() {
        let console = Console::default();
        console.append(b"first\r\nsecond\r\nthird");
        assert_eq!(console.tail(100), "first\nsecond\nthird");
        assert_eq!(console.tail(10), "third");
    }

    #[test]
    fn a_terminal_finds_nothing_to_obey() {
        assert_eq!(printable("\u{1b}[2Ja\u{9b}b\u{202e}c\0"), "?[2Ja?b?c?");
    }

    proptest! {
        #[test]
        fn never_more_is_kept_than_was_said(chunks in proptest::collection::vec(0usize..100_000, 1..8)) {
            let console = Console::default();
            let mut all = Vec::new();
            for (number, length) in chunks.into_iter().enumerate() {
                let chunk = vec![number as u8; length];
                console.append(&chunk);
                all.extend(chunk);
            }
            let kept = console.0.lock().unwrap();
            prop_assert_eq!(kept.len(), all.len().min(KEPT));
            prop_assert!(kept.iter().eq(&all[all.len() - kept.len()..]));
        }
    }
}
