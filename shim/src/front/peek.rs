//! `husk console` and `husk logs`: what a running sandbox's kernel and its engine have said.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::{cli::PeekArgs, ps::FAILURE, run::Failure};
use crate::{
    engine::{Seen, sandboxes},
    guest::console::printable,
    host::ringlog,
};

/// Longest line that is waited for; more is shown without its end.
const MAX_LINE: usize = 16 << 10;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// What of a sandbox is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The guest's console: its kernel's log, and the agent's.
    Console,
    /// The log of the engine.
    Log,
}

/// Shows it. Returns the exit code.
///
/// # Errors
/// When there is no such sandbox or nothing can be printed.
pub fn peek(args: &PeekArgs, what: What) -> Result<u8, Failure> {
    let failed = |message: String| Failure {
        code: FAILURE,
        message,
    };
    let seen = sandboxes().map_err(|error| failed(format!("cannot see what runs (root may): {error}")))?;
    let sandbox = find(&seen, &args.id, args.namespace.as_deref()).map_err(failed)?;
    let path = match what {
        What::Console => sandbox.console(),
        What::Log => sandbox.log(),
    };
    let mut out = Out {
        to: io::stdout().lock(),
        line: Vec::new(),
    };
    let shown = if args.follow {
        follow(&path, args.tail, &mut out)
    } else {
        ringlog::read(&path).and_then(|(kept, _)| {
            out.show(last_lines(&kept, args.tail))?;
            out.end()
        })
    };
    match shown {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(failed(format!("cannot show {}: {error}", path.display())))
        }
        _ => Ok(0),
    }
}

/// The sandbox that a name means: its own, or a container's in it.
pub(super) fn find<'a>(seen: &'a [Seen], id: &str, namespace: Option<&str>) -> Result<&'a Seen, String> {
    let named = |sandbox: &&Seen| {
        namespace.is_none_or(|namespace| sandbox.namespace == namespace)
            && (sandbox.id == id
                || sandbox
                    .status
                    .containers
                    .iter()
                    .any(|container| container.id == id))
    };
    let found: Vec<&Seen> = seen.iter().filter(named).collect();
    match found.as_slice() {
        [one] => Ok(one),
        [] => {
            let place = namespace.map_or(String::new(), |namespace| format!(" in namespace {namespace}"));
            Err(format!(
                "container {id} does not exist{place}; `husk ps` lists those that do. What was logged about one that has \
                 ended is in the engine's log and, with systemd, in the journal (journalctl HUSK_SANDBOX={id})"
            ))
        }
        several => {
            let mut namespaces: Vec<&str> =
                several.iter().map(|sandbox| sandbox.namespace.as_str()).collect();
            namespaces.dedup();
            Err(format!(
                "{id} is in several namespaces ({}); choose one with --namespace",
                namespaces.join(", ")
            ))
        }
    }
}

/// The last lines; `None`: all, but the first only if it is whole.
fn last_lines(kept: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return kept };
    let body = kept.strip_suffix(b"\n").unwrap_or(kept);
    if count == 0 {
        return &[];
    }
    let before = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(count - 1);
    let start = before.map_or(0, |(at, _)| at + 1);
    kept.get(start..).unwrap_or_default()
}

/// Prints what others wrote as text that a terminal may be shown, in whole lines.
struct Out<W: Write> {
    to: W,
    line: Vec<u8>,
}

impl<W: Write> Out<W> {
    fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.line.extend(bytes);
        let whole = match self.line.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if self.line.len() > MAX_LINE => self.line.len(),
            None => return Ok(()),
        };
        let rest = self.line.split_off(whole);
        let lines = std::mem::replace(&mut self.line, rest);
        self.to
            .write_all(printable(&String::from_utf8_lossy(&lines)).as_bytes())?;
        self.to.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        if !self.line.is_empty() {
            self.show(b"\n")?;
        }
        Ok(())
    }
}

/// Prints what is kept, and what is added, until the sandbox is removed.
fn follow<W: Write>(path: &Path, tail: Option<usize>, out: &mut Out<W>) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    let watch = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF;
    watch.add_watch(directory, flags)?;
    let (kept, mut file) = ringlog::read(path)?;
    out.show(last_lines(&kept, tail))?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let more = file.read(&mut buffer)?;
        if more > 0 {
            out.show(buffer.get(..more).unwrap_or_default())?;
            continue;
        }
        match fs::metadata(path) {
            Ok(now) if now.ino() == file.metadata()?.ino() => {
                // Nothing more for now. Sleeps until something happens in the directory.
                watch.read_events()?;
            }
            // It was full. What was added to it until then is read, and then what is new.
            Ok(_) => {
                let rest = io::copy(&mut file, &mut Shown(out))?;
                if rest == 0 {
                    file = File::open(path)?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if directory.exists() && ringlog::older(path).exists() {
                    // Between the two steps of a change of files.
                    watch.read_events()?;
                    continue;
                }
                return out.end();
            }
            Err(error) => return Err(error),
        }
    }
}

struct Shown<'a, W: Write>(&'a mut Out<W>);

impl<W: Write> Write for Shown<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.show(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        engine::{ContainerStatus, Status},
        host::ringlog::RingLog,
    };

    fn sandbox(namespace: &str, id: &str, container: &str) -> Seen {
        Seen {
            namespace: namespace.into(),
            id: id.into(),
            alive: true,
            vmm: 1,
            status: Status {
                containers: vec![ContainerStatus {
                    id: container.into(),
                    pid: 1,
                    status: "running".into(),
                    created: 0,
                    execs: 0,
                }],
                ..Status::default()
            },
            processes: Vec::new(),
            dir: "/".into(),
        }
    }

    #[test]
    fn a_sandbox_is_found_by_its_name_and_its_containers() {
        let seen = [sandbox("a", "pod", "web"), sandbox("b", "other", "web")];
        assert_eq!(find(&seen, "pod", None).unwrap().id, "pod");
        assert_eq!(find(&seen, "web", Some("b")).unwrap().id, "other");
        let told = find(&seen, "web", None).unwrap_err();
        assert!(told.contains("a, b") && told.contains("--namespace"), "{told}");
        let told = find(&seen, "pod", Some("b")).unwrap_err();
        assert!(told.contains("pod does not exist in namespace b"), "{told}");
    }

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        let kept = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(kept, None), kept);
        assert_eq!(last_lines(kept, Some(0)), b"");
        assert_eq!(last_lines(kept, Some(1)), b"three\n");
        assert_eq!(last_lines(kept, Some(2)), b"two\nthree\n");
        assert_eq!(last_lines(kept, Some(9)), kept);
        assert_eq!(last_lines(b"one\ntw", Some(1)), b"tw");
    }

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_added_is_followed_over_changes_of_files_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let log = RingLog::default();
        log.open(&path, 400).unwrap();
        log.append(b"early\nfirst\x1b[2J\n");
        let screen = Screen::default();
        let (place, shown) = (path.clone(), screen.clone());
        let follower = thread::spawn(move || {
            let mut out = Out {
                to: shown,
                line: Vec::new(),
            };
            follow(&place, Some(1), &mut out)
        });
        let shows = |text: &str| {
            let end = Instant::now() + Duration::from_secs(20);
            while !String::from_utf8_lossy(&screen.0.lock().unwrap()).ends_with(text) {
                assert!(Instant::now() < end, "{text:?} is not shown");
                thread::sleep(Duration::from_millis(1));
            }
        };
        shows("first?[2J\n");
        let mut all = "first?[2J\n".to_owned();
        for number in 0..200 {
            let line = format!("line {number}\n");
            log.append(line.as_bytes());
            shows(&line);
            all.push_str(&line);
        }
        log.append(b"no end");
        log.close().unwrap();
        follower.join().unwrap().unwrap();
        let screen = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
        assert_eq!(screen, all + "no end\n");
    }
}
