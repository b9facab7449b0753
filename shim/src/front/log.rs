//! The log of a process that must never wait for its log's reader.

use std::{
    fs::File,
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
};

use tracing_subscriber::{filter::LevelFilter, fmt::MakeWriter};

/// Writes whole lines to a non-blocking descriptor; a line that does not fit is dropped and counted, and the count
/// is told with the next line that does.
#[derive(Debug)]
pub struct Lossy {
    file: File,
    dropped: AtomicU64,
}

impl Lossy {
    /// `file` should be non-blocking; what is written is at most one `write(2)` a line.
    pub fn new(file: File) -> Self {
        Self {
            file,
            dropped: AtomicU64::new(0),
        }
    }
}

impl Write for &Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let written = if dropped == 0 {
            (&self.file).write(line)
        } else {
            let mut told =
                format!("({dropped} lines of the log were lost: its reader is too slow)\n").into_bytes();
            told.extend_from_slice(line);
            (&self.file).write(&told)
        };
        // A part of a line is as good as the line: there is no going back.
        if written.is_err() {
            self.dropped
                .fetch_add(dropped.saturating_add(1), Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lossy {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// Sends this process's log to `file`. The first call counts.
pub fn to_file(file: File, level: LevelFilter) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(Lossy::new(file))
        .finish();
    // Only a second call fails, and the first one's choice stands.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd};

    use nix::fcntl::OFlag;

    use super::*;

    #[test]
    fn a_full_pipe_loses_lines_and_says_how_many() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let (mut reader, log) = (File::from(reader), Lossy::new(File::from(writer)));
        let line = [b'x'; 4096];
        let mut lines = 0;
        while log.dropped.load(Ordering::Relaxed) == 0 {
            (&log).write_all(&line).unwrap();
            lines += 1;
            assert!(lines < 10_000);
        }
        (&log).write_all(&line).unwrap();
        let mut all = vec![0; 1 << 20];
        while reader.read(&mut all).is_ok_and(|n| n > 0) {}
        (&log).write_all(b"after\n").unwrap();
        let n = reader.read(&mut all).unwrap();
        let text = String::from_utf8_lossy(&all[..n]).into_owned();
        assert_eq!(
            text,
            "(2 lines of the log were lost: its reader is too slow)\nafter\n"
        );
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        drop::<OwnedFd>(reader);
        let log = Lossy::new(File::from(writer));
        (&log).write_all(b"line\n").unwrap();
        assert_eq!(log.dropped.load(Ordering::Relaxed), 1);
    }
}
