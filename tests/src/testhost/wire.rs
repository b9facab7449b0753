//! What the client and the runner inside the host say to each other: one TCP connection per command.
//!
//! A frame is a type byte, a length (u32, little endian, at most [`MAX_PAYLOAD`]) and that many bytes. The client
//! opens with [`Frame::Request`]. Standard input is paid for with credit, so that the runner always reads its
//! connection and sees signals and a lost client even while the command does not read.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// How many bytes of standard input may be on the way or unread, before any [`Frame::Credit`].
pub const STDIN_WINDOW: usize = 256 << 10;

/// One message, in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Client: what to do; always first.
    Request(Request),
    /// Client: bytes for the command's standard input. Empty: end of input.
    Stdin(Vec<u8>),
    /// Client: the terminal has this size now, as rows and columns.
    Resize(u16, u16),
    /// Runner: so many bytes of input were taken by the command.
    Credit(u32),
    /// Runner: bytes from the command's standard output, or from its terminal.
    Stdout(Vec<u8>),
    /// Runner: bytes from the command's standard error.
    Stderr(Vec<u8>),
    /// Runner: the end, always last.
    Outcome(Outcome),
}

/// What the client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// First after a restore: from now on only who knows the token is served.
    Wake(Wake),
    /// Run a command.
    Run(Run),
}

/// What the frozen host cannot know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// The secret every later [`Run`] must name: any user of the machine can reach the port.
    pub token: String,
    /// The time, in nanoseconds since 1970.
    pub unix_nanos: u64,
    /// 9p shares to mount read-only: tag and path.
    pub shares: BTreeMap<String, String>,
}

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The token of the host's [`Wake`]; empty before it.
    pub token: String,
    /// Program and arguments; no shell in between.
    pub argv: Vec<String>,
    /// Variables on top of the host's own.
    pub env: BTreeMap<String, String>,
    /// Directory to run in; none is root's home.
    pub cwd: Option<String>,
    /// Rows and columns of a terminal to run on; none gives pipes.
    pub tty: Option<(u16, u16)>,
    /// Seconds after which the command is killed; none waits for ever.
    pub timeout: Option<u64>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command exited with this code, or the wake succeeded (0).
    Exited(i32),
    /// The command died of this signal.
    Signaled(i32),
    /// The command outlived its time and was killed.
    TimedOut,
    /// The command could not be started: exit code as a shell gives it (126, 127) and the reason.
    NotStarted(i32, String),
    /// The request was refused.
    Refused(String),
}

const REQUEST: u8 = 1;
const STDIN: u8 = 2;
const RESIZE: u8 = 3;
const CREDIT: u8 = 4;
const STDOUT: u8 = 5;
const STDERR: u8 = 6;
const OUTCOME: u8 = 7;

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("bad frame: {what}"))
}

impl Frame {
    /// Writes the frame as one piece.
    ///
    /// # Errors
    /// The connection's, and `InvalidData` for a payload over [`MAX_PAYLOAD`].
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Self::Request(request) => (REQUEST, serde_json::to_vec(request)?),
            Self::Stdin(bytes) => (STDIN, bytes.clone()),
            Self::Resize(rows, columns) => (RESIZE, [rows.to_le_bytes(), columns.to_le_bytes()].concat()),
            Self::Credit(bytes) => (CREDIT, bytes.to_le_bytes().to_vec()),
            Self::Stdout(bytes) => (STDOUT, bytes.clone()),
            Self::Stderr(bytes) => (STDERR, bytes.clone()),
            Self::Outcome(outcome) => (OUTCOME, serde_json::to_vec(outcome)?),
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(invalid("too long"));
        }
        let length = u32::try_from(payload.len()).map_err(|_| invalid("too long"))?;
        let mut bytes = Vec::with_capacity(payload.len().saturating_add(5));
        bytes.push(kind);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&payload);
        to.write_all(&bytes)
    }

    /// Reads the next frame; none at the end of the connection.
    ///
    /// # Errors
    /// The connection's, and `InvalidData` for what is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0; 1];
        if from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = usize::try_from(u32::from_le_bytes(length)).map_err(|_| invalid("too long"))?;
        if length > MAX_PAYLOAD {
            return Err(invalid("too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        let [kind] = kind;
        Ok(Some(match kind {
            REQUEST => Self::Request(serde_json::from_slice(&payload)?),
            STDIN => Self::Stdin(payload),
            RESIZE => match payload.as_slice() {
                &[a, b, c, d] => Self::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
                _ => return Err(invalid("resize")),
            },
            CREDIT => Self::Credit(u32::from_le_bytes(
                payload.try_into().map_err(|_| invalid("credit"))?,
            )),
            STDOUT => Self::Stdout(payload),
            STDERR => Self::Stderr(payload),
            OUTCOME => Self::Outcome(serde_json::from_slice(&payload)?),
            _ => return Err(invalid("type")),
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_wire() {
        let frames = [
            Frame::Request(Request::Run(Run {
                argv: vec!["a".into(), "b c".into()],
                tty: Some((24, 80)),
                ..Run::default()
            })),
            Frame::Request(Request::Wake(Wake {
                token: "t".into(),
                unix_nanos: u64::MAX,
                shares: BTreeMap::new(),
            })),
            Frame::Stdin(vec![]),
            Frame::Stdin(vec![0, 255]),
            Frame::Resize(50, 132),
            Frame::Credit(u32::MAX),
            Frame::Stdout(vec![7; MAX_PAYLOAD]),
            Frame::Stderr(b"e".to_vec()),
            Frame::Outcome(Outcome::NotStarted(127, "no such file".into())),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut rest).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused_before_it_is_read() {
        let mut bytes = vec![STDIN];
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        let error = Frame::read(&mut bytes.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_torn_frame_is_an_error_not_an_end() {
        let mut bytes = Vec::new();
        Frame::Stdout(vec![1, 2, 3]).write(&mut bytes).unwrap();
        bytes.pop();
        assert_eq!(
            Frame::read(&mut bytes.as_slice()).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
