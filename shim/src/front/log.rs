//! The log of this process: to its engine, to the journal, and to the sandbox's own file.
//!
//! None of the three is waited for: a line that its reader does not take in time is lost to that reader.

mod journal;
mod line;

use std::{
    fs::File,
    io::{self, Write},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use tracing::{Event, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt};

use self::{journal::Journal, line::Line};
use crate::{config, host::ringlog::RingLog};

/// Who logs.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// The program.
    pub program: &'static str,
    /// The namespace; empty: none.
    pub namespace: String,
    /// The sandbox; empty: none.
    pub sandbox: String,
}

/// This process's log.
#[derive(Debug)]
struct Log {
    file: Lossy,
    /// The least urgent that goes to `file`, as [`number`] has it.
    file_level: AtomicU8,
    /// The least urgent that is kept and that the journal gets.
    kept_level: AtomicU8,
    /// What was asked for on the command line: the configuration can only add to it.
    asked: LevelFilter,
    /// The file's level is the configuration's.
    follows: bool,
    kept: RingLog,
    journal: Mutex<Option<Journal>>,
    identity: Identity,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// The shim's log: all of it goes to `file` (which should be non-blocking), the journal and the sandbox's own.
pub fn of_shim(file: File, level: LevelFilter, identity: Identity) {
    begin(Log {
        file: Lossy::new(file),
        file_level: AtomicU8::new(number(level)),
        kept_level: AtomicU8::new(number(level)),
        asked: level,
        follows: true,
        kept: RingLog::default(),
        journal: Mutex::new(Journal::open(journal::SOCKET)),
        identity,
    });
}

/// A command's log: to `file`, which is the user's, goes only what was asked for; the sandbox's own is as the shim's.
pub fn of_command(file: File, level: LevelFilter) {
    begin(Log {
        file: Lossy::new(file),
        file_level: AtomicU8::new(number(level)),
        kept_level: AtomicU8::new(number(LevelFilter::INFO)),
        asked: level,
        follows: false,
        kept: RingLog::default(),
        journal: Mutex::new(None),
        identity: Identity::default(),
    });
}

/// Only the first call counts: its choice stands.
fn begin(log: Log) {
    if LOG.set(log).is_ok() {
        if let Some(log) = LOG.get() {
            // It fails only where tests have set another.
            let _ =
                tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Carrier(log)));
        }
    }
}

/// Does from now on what the configuration says.
pub fn apply(config: &config::Log) {
    let Some(log) = LOG.get() else { return };
    let level = config.level.max(log.asked);
    log.kept_level.store(number(level), Ordering::Relaxed);
    if log.follows {
        log.file_level.store(number(level), Ordering::Relaxed);
    }
    if !config.journald {
        *log.journal.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    tracing::callsite::rebuild_interest_cache();
}

/// What a sandbox keeps of this process's log.
pub fn kept() -> RingLog {
    LOG.get().map(|log| log.kept.clone()).unwrap_or_default()
}

/// A level as a number: 0 is off, 5 is all.
fn number(level: LevelFilter) -> u8 {
    [
        LevelFilter::OFF,
        LevelFilter::ERROR,
        LevelFilter::WARN,
        LevelFilter::INFO,
        LevelFilter::DEBUG,
    ]
    .iter()
    .position(|known| *known == level)
    .and_then(|at| u8::try_from(at).ok())
    .unwrap_or(5)
}

/// Carries events to the log.
struct Carrier(&'static Log);

impl<S: Subscriber> Layer<S> for Carrier {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        let wanted = self.0.file_level.load(Ordering::Relaxed);
        let wanted = wanted.max(self.0.kept_level.load(Ordering::Relaxed));
        number(LevelFilter::from_level(*metadata.level())) <= wanted
    }

    fn register_callsite(&self, _: &'static tracing::Metadata<'static>) -> tracing::subscriber::Interest {
        // The level may be changed at any time.
        tracing::subscriber::Interest::sometimes()
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let log = self.0;
        let level = number(LevelFilter::from_level(*event.metadata().level()));
        let line = Line::of(event);
        let text = line.text(&log.identity);
        if level <= log.file_level.load(Ordering::Relaxed) {
            // It loses lines rather than failing.
            let _ = (&log.file).write(text.as_bytes());
        }
        if level <= log.kept_level.load(Ordering::Relaxed) {
            log.kept.append(text.as_bytes());
            let journal = log.journal.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(journal) = &*journal {
                journal.send(&line, &log.identity);
            }
        }
    }
}

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

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::Shutdown,
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use nix::fcntl::OFlag;

    use super::*;

    #[test]
    fn a_full_pipe_loses_lines_and_says_how_many() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
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
        // Not a pipe: a child that another test forks would have its reader, too.
        let (reader, writer) = UnixStream::pair().unwrap();
        reader.shutdown(Shutdown::Both).unwrap();
        let log = Lossy::new(File::from(OwnedFd::from(writer)));
        (&log).write_all(b"line\n").unwrap();
        assert_eq!(log.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn levels_are_ordered_as_their_numbers() {
        let levels = [
            LevelFilter::OFF,
            LevelFilter::ERROR,
            LevelFilter::WARN,
            LevelFilter::INFO,
            LevelFilter::DEBUG,
            LevelFilter::TRACE,
        ];
        assert_eq!(levels.map(number), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn an_event_reaches_the_engine_the_journal_and_the_sandbox_each_by_its_level() {
        let dir = tempfile::tempdir().unwrap();
        let socket = std::os::unix::net::UnixDatagram::bind(dir.path().join("journal")).unwrap();
        socket.set_nonblocking(true).unwrap();
        let file = dir.path().join("file");
        let kept = RingLog::default();
        kept.open(&dir.path().join("kept"), 4096).unwrap();
        let log: &'static Log = Box::leak(Box::new(Log {
            file: Lossy::new(File::create(&file).unwrap()),
            file_level: AtomicU8::new(number(LevelFilter::ERROR)),
            kept_level: AtomicU8::new(number(LevelFilter::INFO)),
            asked: LevelFilter::ERROR,
            follows: false,
            kept,
            journal: Mutex::new(Journal::open(dir.path().join("journal"))),
            identity: Identity {
                program: "shim",
                namespace: "ns".into(),
                sandbox: "pod".into(),
            },
        }));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(Carrier(log)), || {
            tracing::debug!("little");
            tracing::info!(container = "c", count = 3, "much");
            tracing::error!(error = %io::Error::other("why\n!"), "all");
        });
        let text = std::fs::read_to_string(file).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(
            text.ends_with("level=error msg=all namespace=ns sandbox=pod error=\"why\\n!\"\n"),
            "{text}"
        );
        let kept = std::fs::read_to_string(dir.path().join("kept")).unwrap();
        assert_eq!(kept.lines().count(), 2);
        assert!(kept.starts_with("time=\"20"), "{kept}");
        assert!(
            kept.contains("level=info msg=much namespace=ns sandbox=pod container=c count=3\n"),
            "{kept}"
        );
        let mut datagram = vec![0; 4096];
        let n = socket.recv(&mut datagram).unwrap();
        let first = String::from_utf8_lossy(&datagram[..n]).into_owned();
        for field in [
            "MESSAGE=much\n",
            "PRIORITY=6\n",
            "SYSLOG_IDENTIFIER=shim\n",
            "HUSK_NAMESPACE=ns\n",
            "HUSK_SANDBOX=pod\n",
            "HUSK_CONTAINER=c\n",
            "HUSK_COUNT=3\n",
        ] {
            assert!(first.contains(field), "{first}");
        }
        let n = socket.recv(&mut datagram).unwrap();
        let second = &datagram[..n];
        assert!(second.windows(11).any(|part| part == b"PRIORITY=3\n"));
        // A value of several lines has its length before it.
        let value = b"HUSK_ERROR\n\x05\0\0\0\0\0\0\0why\n!\n";
        assert!(second.windows(value.len()).any(|part| part == value));
        assert!(socket.recv(&mut datagram).is_err());
    }
}
