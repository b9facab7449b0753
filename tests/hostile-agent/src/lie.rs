//! Lies that can be told of any request.

use std::io;

use husk_agent_protocol::messages::{
    Failure, ListProcessesResponse, UpdateContainerResponse, failure, list_processes_response::Process,
};
use protobuf::EnumOrUnknown;
use ttrpc::proto::Code;

use crate::wire::{Wire, encode};

/// What no terminal may see.
pub const ESCAPES: &str =
    "\u{1b}]0;owned\u{7}\u{1b}[2J\u{1b}[31mred\u{0}\u{8}\u{9b}5n\r\nFAKE: all is well\u{202e}";

#[derive(Clone, Copy)]
pub enum Lie {
    /// It is never answered.
    Mute,
    /// It is refused, with as much text as goes into a frame.
    Refuse,
    /// What was asked about is not there.
    Unknown,
    /// It fails, in a way that nobody knows, with as much text as goes into a frame.
    Fail,
    /// It gets the answer of another request.
    Swap,
    /// It gets what is no answer.
    Garbage,
}

impl Lie {
    /// The lie about a request in a word `HOW-REQUEST`, of which there may be several with `.` between them.
    pub fn of(word: &str, request: &str) -> Option<Self> {
        let mut lies = word.split('.').filter_map(|lie| lie.split_once('-'));
        let (how, _) = lies.find(|(_, about)| *about == request)?;
        Some(match how {
            "mute" => Self::Mute,
            "refuse" => Self::Refuse,
            "unknown" => Self::Unknown,
            "fail" => Self::Fail,
            "swap" => Self::Swap,
            "garbage" => Self::Garbage,
            _ => return None,
        })
    }

    pub fn tell(self, wire: &mut Wire, stream: u32) -> io::Result<()> {
        match self {
            Self::Mute => Ok(()),
            Self::Refuse => wire.refuse(stream, Code::INTERNAL, ESCAPES.repeat(40_000)),
            Self::Unknown => wire.refuse(stream, Code::NOT_FOUND, ESCAPES.repeat(40_000)),
            Self::Fail => {
                // All answers that can have a failure have it in the same field, but for those that have a pid.
                let answer = UpdateContainerResponse {
                    failure: Some(strange_failure()).into(),
                    ..Default::default()
                };
                wire.answer(stream, encode(&answer)?)
            }
            Self::Swap => {
                let process = Process {
                    pid: i32::MAX,
                    exec_id: ESCAPES.repeat(40_000),
                    ..Default::default()
                };
                let answer = ListProcessesResponse {
                    processes: vec![process],
                    ..Default::default()
                };
                wire.answer(stream, encode(&answer)?)
            }
            Self::Garbage => wire.answer(stream, vec![0xff; 1000]),
        }
    }
}

/// A failure of no known kind.
pub fn strange_failure() -> Failure {
    Failure {
        kind: EnumOrUnknown::<failure::Kind>::from_i32(99),
        message: ESCAPES.repeat(40_000),
        ..Default::default()
    }
}
