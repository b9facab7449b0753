//! The log of a child: its lines go into ours, bounded in length and number, for a child may be in a guest's hands.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, BufReader},
    net::unix::pipe::Receiver,
    time::Instant,
};

use super::console::printable;

/// Bytes of a line that are kept; the rest is cut off.
const MAX_LINE: usize = 1024;

/// Lines of one child in a [`WINDOW`]; more are counted, not shown.
const MAX_LINES: u32 = 100;

/// See [`MAX_LINES`].
const WINDOW: Duration = Duration::from_secs(1);

/// The last line that a child logged.
pub type LastLine = Arc<Mutex<String>>;

/// Carries a child's log into ours, in a task of its own, until its end.
pub fn carry(program: &'static str, pipe: Receiver) -> (LastLine, tokio::task::JoinHandle<()>) {
    let last = LastLine::default();
    let keeper = Arc::clone(&last);
    let task = tokio::spawn(async move {
        let mut reader = BufReader::with_capacity(4096, pipe);
        let (mut since, mut shown, mut suppressed) = (Instant::now(), 0u32, 0u64);
        while let Some(line) = line(&mut reader).await {
            if since.elapsed() >= WINDOW {
                if suppressed > 0 {
                    tracing::warn!(program, suppressed, "lines of the log were left out");
                }
                (since, shown, suppressed) = (Instant::now(), 0, 0);
            }
            if shown < MAX_LINES {
                shown += 1;
                tracing::info!(program, "{line}");
            } else {
                suppressed += 1;
            }
            *keeper.lock().unwrap_or_else(PoisonError::into_inner) = line;
        }
    });
    (last, task)
}

/// The next line without its end; `None` at the end of the log.
async fn line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let buffer = reader.fill_buf().await.ok()?;
        if buffer.is_empty() {
            return (!line.is_empty()).then(|| printable(&String::from_utf8_lossy(&line)));
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let piece = buffer.get(..end.unwrap_or(buffer.len())).unwrap_or_default();
        line.extend(piece.iter().take(MAX_LINE - line.len()));
        let used = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            return Some(printable(&String::from_utf8_lossy(&line)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_told_apart_and_cut() {
        let mut text = b"one\n\ntwo\x1b\n".to_vec();
        text.extend(vec![b'x'; 100_000]);
        text.extend(b"\nlast");
        let mut reader = BufReader::with_capacity(64, text.as_slice());
        let mut lines = Vec::new();
        while let Some(line) = line(&mut reader).await {
            lines.push(line);
        }
        assert_eq!(lines, ["one", "", "two?", &"x".repeat(MAX_LINE), "last"]);
    }
}
