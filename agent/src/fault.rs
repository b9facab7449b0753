//! Why a container or a process could not be made: what `Failure` carries on the wire, and what a forked child
//! reports to the agent before its exec.

use std::{fmt, io};

use husk_agent_protocol::{
    limits::MAX_MESSAGE_LEN,
    messages::{Failure, failure},
};

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command is not there (127 to users).
    CommandNotFound,
    /// The command cannot be executed (126).
    CommandNotExecutable,
    /// A field of the OCI document is wrong or cannot be applied.
    Spec,
    /// A system call failed.
    System,
}

impl Kind {
    /// The exit code of a process that ended by this fault before its exec.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::CommandNotFound => 127,
            Self::CommandNotExecutable => 126,
            Self::Spec | Self::System => 125,
        }
    }
}

/// A fault with its message in full.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Its kind.
    pub kind: Kind,
    /// What to tell the user.
    pub message: String,
}

impl Fault {
    /// `field` of the document is wrong or cannot be applied.
    pub fn spec(field: impl fmt::Display, problem: impl fmt::Display) -> Self {
        Self {
            kind: Kind::Spec,
            message: format!("{field}: {problem}"),
        }
    }

    /// The system refused `what`.
    pub fn system(what: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        Self {
            kind: Kind::System,
            message: format!("{what}: {}", describe(&error.into())),
        }
    }

    /// As a packet for the pipe between child and agent: the kind's byte, then the message, cut to fit.
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::CommandNotFound => b'n',
            Kind::CommandNotExecutable => b'x',
            Kind::Spec => b's',
            Kind::System => b'e',
        };
        let mut packet = vec![kind];
        packet.extend_from_slice(cut(&self.message, MAX_MESSAGE_LEN).as_bytes());
        packet
    }

    /// The fault in `packet`, if it is one.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let (kind, message) = packet.split_first()?;
        let kind = match kind {
            b'n' => Kind::CommandNotFound,
            b'x' => Kind::CommandNotExecutable,
            b's' => Kind::Spec,
            b'e' => Kind::System,
            _ => return None,
        };
        Some(Self {
            kind,
            message: String::from_utf8_lossy(message).into_owned(),
        })
    }

    /// As the wire's message.
    pub fn to_wire(&self) -> Failure {
        let kind = match self.kind {
            Kind::CommandNotFound => failure::Kind::COMMAND_NOT_FOUND,
            Kind::CommandNotExecutable => failure::Kind::COMMAND_NOT_EXECUTABLE,
            Kind::Spec => failure::Kind::INVALID_SPEC,
            Kind::System => failure::Kind::SYSTEM,
        };
        let message = cut(&self.message, MAX_MESSAGE_LEN).to_owned();
        Failure {
            kind: kind.into(),
            message,
            ..Default::default()
        }
    }
}

/// An error number in the C library's words alone ("No such file or directory" in lower case, as Go has it),
/// without Rust's "(os error 2)".
pub fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => {
            let text = nix::errno::Errno::from_raw(number).desc();
            let mut chars = text.chars();
            chars
                .next()
                .map(|c| c.to_ascii_lowercase())
                .into_iter()
                .chain(chars)
                .collect()
        }
        None => error.to_string(),
    }
}

/// At most `max` bytes of `text`, cut between characters.
pub fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn system_errors_read_as_runc_writes_them() {
        let fault = Fault::system("stat ./x", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(fault.message, "stat ./x: no such file or directory");
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut("aü", 2), "a");
        assert_eq!(cut("aü", 3), "aü");
    }

    proptest! {
        #[test]
        fn a_fault_survives_its_packet(message in ".{0,200}") {
            for kind in [Kind::CommandNotFound, Kind::CommandNotExecutable, Kind::Spec, Kind::System] {
                let fault = Fault { kind, message: message.clone() };
                prop_assert_eq!(Fault::decode(&fault.encode()), Some(fault));
            }
        }

        #[test]
        fn any_packet_decodes_or_not(packet in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Fault::decode(&packet);
        }
    }
}
