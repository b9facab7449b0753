//! A task's streams as containerd names them: FIFOs, files and logging programs.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use super::logger::{Binary, Logger, Loggers, Whose, path_of, without_fragment};
use crate::{engine::Stdio, host::child::Child};

/// What containerd names as a process's streams. An empty name: /dev/null.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The process has a terminal; `stderr` is then not used.
    pub terminal: bool,
    /// Read from.
    pub stdin: String,
    /// Written to.
    pub stdout: String,
    /// Written to.
    pub stderr: String,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A kind of destination that husk does not have.
    #[error("{scheme}:// as a container's output is not supported; use a FIFO, file:// or binary://")]
    Unsupported {
        /// The kind.
        scheme: String,
    },
    /// Not a name of a stream.
    #[error("{0:?} does not name a stream: it must be an absolute path, fifo://, file:// or binary://")]
    Malformed(String),
    /// The host refused.
    #[error("cannot open {path}", path = path.display())]
    Open {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A logging program does not run.
    #[error("cannot start the logging program {path}", path = path.display())]
    Logger {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A logging program did not say in time that it is ready.
    #[error("the logging program {path} was not ready within {} s: it must write to its descriptor 5 or close it",
        after.as_secs(), path = path.display())]
    NotReady {
        /// Which.
        path: PathBuf,
        /// The time it was given.
        after: Duration,
    },
    /// A process has one logging program.
    #[error("stderr cannot have a logging program of its own: it goes to that of stdout")]
    SecondLogger,
}

/// The other ends of a process's FIFOs, held open, and its logging program.
///
/// The read ends of the outputs: without them the container would be told that nobody listens, as soon as a client
/// goes away that may come back. The write end of the input: without it the container's input would end then.
#[derive(Debug, Default)]
pub struct Held {
    stdin: Option<File>,
    outputs: Vec<File>,
    logger: Option<Logger>,
}

impl Held {
    /// The logging program.
    pub fn logger(&self) -> Option<Child> {
        self.logger.as_ref().map(Logger::child)
    }

    /// Lets the input end as soon as the clients that have it open are done with it.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Lets go of all.
    pub fn close(&mut self) {
        *self = Self::default();
    }
}

/// Opens a process's streams. Never waits for a client: a FIFO is opened at both ends. A logging program is waited for
/// until it is ready.
///
/// # Errors
/// When one cannot be opened; none is open then.
pub async fn open(names: &Names, whose: Whose<'_>, loggers: &Loggers) -> Result<(Stdio, Held), IoError> {
    let mut held = Held::default();
    let stdin = match Place::parse(&names.stdin)? {
        Place::Null => None,
        Place::Binary(_) => {
            return Err(IoError::Malformed(names.stdin.clone()));
        }
        Place::Path(path) | Place::File(path) => {
            let file = opened(
                &path,
                OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK),
            )?;
            if is_fifo(&file, &path)? {
                held.stdin = Some(opened(
                    &path,
                    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK),
                )?);
            }
            Some(OwnedFd::from(file))
        }
    };
    let (stdout, stderr) = match (Place::parse(&names.stdout)?, Place::parse(&names.stderr)?) {
        (Place::Binary(binary), other) => {
            let own = match other {
                // As containerd: what is named for stdout has both.
                Place::Null => None,
                Place::Binary(other) if other == binary => None,
                _ if names.terminal => None,
                other => output(other, &mut held)?,
            };
            let (logger, inputs) = loggers.start(&binary, whose).await?;
            held.logger = Some(logger);
            let stderr = own.or(Some(inputs.stderr));
            (Some(inputs.stdout), stderr)
        }
        (stdout, stderr) => {
            let stderr = if names.terminal { Place::Null } else { stderr };
            (output(stdout, &mut held)?, output(stderr, &mut held)?)
        }
    };
    let stderr = stderr.filter(|_| !names.terminal);
    Ok((
        Stdio {
            terminal: names.terminal,
            stdin,
            stdout,
            stderr,
        },
        held,
    ))
}

enum Place {
    Null,
    /// A FIFO or a file that is there.
    Path(PathBuf),
    /// A file that may have to be made.
    File(PathBuf),
    /// A program that takes outputs.
    Binary(Binary),
}

impl Place {
    fn parse(name: &str) -> Result<Self, IoError> {
        if name.is_empty() {
            return Ok(Self::Null);
        }
        let malformed = || IoError::Malformed(name.to_owned());
        let path = |path: &str| {
            let path = PathBuf::from(path);
            if path.is_absolute() {
                Ok(path)
            } else {
                Err(malformed())
            }
        };
        match name.split_once("://") {
            None => path(name).map(Self::Path),
            Some(("fifo", rest)) => path(rest).map(Self::Path),
            Some(("file", rest)) => path_of(without_query(rest)).map(Self::File).ok_or_else(malformed),
            Some(("binary", rest)) => Binary::parse(rest).map(Self::Binary).ok_or_else(malformed),
            Some((scheme, _)) => Err(IoError::Unsupported {
                scheme: scheme.to_owned(),
            }),
        }
    }
}

/// The path in what follows `file://`.
fn without_query(rest: &str) -> &str {
    let rest = without_fragment(rest);
    rest.split_once('?').map_or(rest, |(path, _)| path)
}

fn output(place: Place, held: &mut Held) -> Result<Option<OwnedFd>, IoError> {
    let file = match place {
        Place::Null => return Ok(None),
        Place::Binary(_) => return Err(IoError::SecondLogger),
        Place::Path(path) => {
            let metadata = std::fs::metadata(&path).map_err(failed(&path))?;
            if metadata.file_type().is_fifo() {
                // The read end first: without one a write end cannot be opened without waiting.
                let reader = opened(
                    &path,
                    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK),
                )?;
                let writer = opened(
                    &path,
                    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK),
                )?;
                held.outputs.push(reader);
                writer
            } else {
                opened(
                    &path,
                    OpenOptions::new().append(true).custom_flags(libc::O_NONBLOCK),
                )?
            }
        }
        Place::File(path) => {
            if let Some(parent) = path.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(parent)
                    .map_err(failed(parent))?;
            }
            opened(&path, OpenOptions::new().append(true).create(true).mode(0o644))?
        }
    };
    Ok(Some(OwnedFd::from(file)))
}

fn is_fifo(file: &File, path: &Path) -> Result<bool, IoError> {
    Ok(file.metadata().map_err(failed(path))?.file_type().is_fifo())
}

fn opened(path: &Path, options: &OpenOptions) -> Result<File, IoError> {
    options.open(path).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> IoError {
    let path = path.to_owned();
    move |source| IoError::Open { path, source }
}

#[cfg(test)]
#[path = "io_test.rs"]
mod tests;
