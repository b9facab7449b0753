//! A task's streams as containerd names them: FIFOs and files.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use crate::engine::Stdio;

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
    #[error("{scheme}:// as a container's output is not supported; use a FIFO or file://")]
    Unsupported {
        /// The kind.
        scheme: String,
    },
    /// Not a name of a stream.
    #[error("{0:?} does not name a stream: it must be an absolute path, fifo:// or file://")]
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
}

/// The other ends of a process's FIFOs, held open.
///
/// The read ends of the outputs: without them the container would be told that nobody listens, as soon as a client
/// goes away that may come back. The write end of the input: without it the container's input would end then.
#[derive(Debug, Default)]
pub struct Held {
    stdin: Option<File>,
    outputs: Vec<File>,
}

impl Held {
    /// Lets the input end as soon as the clients that have it open are done with it.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Lets go of all.
    pub fn close(&mut self) {
        self.stdin = None;
        self.outputs.clear();
    }
}

/// Opens a process's streams. Never waits for a client: a FIFO is opened at both ends.
///
/// # Errors
/// When one cannot be opened; none is open then.
pub fn open(names: &Names) -> Result<(Stdio, Held), IoError> {
    let mut held = Held::default();
    let stdin = match Place::parse(&names.stdin)? {
        Place::Null => None,
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
    let stdout = output(&names.stdout, &mut held)?;
    let stderr = if names.terminal {
        None
    } else {
        output(&names.stderr, &mut held)?
    };
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
}

impl Place {
    fn parse(name: &str) -> Result<Self, IoError> {
        if name.is_empty() {
            return Ok(Self::Null);
        }
        let path = |path: &str| {
            let path = PathBuf::from(path);
            if path.is_absolute() {
                Ok(path)
            } else {
                Err(IoError::Malformed(name.to_owned()))
            }
        };
        match name.split_once("://") {
            None => path(name).map(Self::Path),
            Some(("fifo", rest)) => path(rest).map(Self::Path),
            Some(("file", rest)) => path(rest).map(Self::File),
            Some((scheme, _)) => Err(IoError::Unsupported {
                scheme: scheme.to_owned(),
            }),
        }
    }
}

fn output(name: &str, held: &mut Held) -> Result<Option<OwnedFd>, IoError> {
    let file = match Place::parse(name)? {
        Place::Null => return Ok(None),
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
