//! What the engine's errors are called on containerd's wire.

use ttrpc::{Code, error::get_rpc_status};

use super::{bundle::BundleError, io::IoError, settings::SettingsError};
use crate::config::ConfigError;
use crate::engine::{EngineError, StartError, last_words};

/// An error with its causes, in one line: `what: why: why`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let why = error.to_string();
        // Some errors say their cause themselves.
        if !text.contains(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = error.source();
    }
    text
}

/// An answer of `code`.
pub fn answer(code: Code, message: impl Into<String>) -> ttrpc::Error {
    get_rpc_status(code, message.into())
}

/// Not in this version.
pub fn unimplemented(what: &str) -> ttrpc::Error {
    answer(Code::UNIMPLEMENTED, format!("husk does not support {what} yet"))
}

/// An engine's error.
pub fn engine(error: &EngineError) -> ttrpc::Error {
    let code = match error {
        EngineError::NotFound(_) => Code::NOT_FOUND,
        EngineError::AlreadyExists(_) => Code::ALREADY_EXISTS,
        // Not NOT_FOUND for a missing command: that would tell containerd that the task is gone.
        EngineError::InvalidArgument(_)
        | EngineError::CommandNotFound(_)
        | EngineError::CommandNotExecutable(_)
        | EngineError::InvalidSpec(_) => Code::INVALID_ARGUMENT,
        EngineError::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        EngineError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        EngineError::SandboxEnded(_) => Code::UNAVAILABLE,
        EngineError::Guest(_) | EngineError::Agent { .. } | EngineError::Host { .. } => Code::INTERNAL,
    };
    answer(code, chain(error))
}

/// An error of a sandbox's start.
pub fn start(error: &StartError) -> ttrpc::Error {
    let code = match error {
        StartError::InvalidArgument(_) => Code::INVALID_ARGUMENT,
        StartError::AlreadyExists(_) => Code::ALREADY_EXISTS,
        StartError::Locate(_) => Code::FAILED_PRECONDITION,
        StartError::Host { .. } | StartError::Guest { .. } => Code::INTERNAL,
    };
    let mut text = chain(error);
    if let StartError::Guest { console_tail, .. } = error {
        text.push_str(&last_words(console_tail));
    }
    answer(code, text)
}

/// An error of a sandbox's settings.
pub fn settings(error: &SettingsError) -> ttrpc::Error {
    let code = match error {
        SettingsError::Config(ConfigError::Unreadable { .. }) => Code::FAILED_PRECONDITION,
        _ => Code::INVALID_ARGUMENT,
    };
    answer(code, chain(error))
}

/// An error of a bundle.
pub fn bundle(error: &BundleError) -> ttrpc::Error {
    let code = match error {
        BundleError::Unreadable { .. } => Code::INTERNAL,
        _ => Code::INVALID_ARGUMENT,
    };
    answer(code, chain(error))
}

/// An error of a stream.
pub fn io(error: &IoError) -> ttrpc::Error {
    let code = match error {
        IoError::Unsupported { .. } => Code::UNIMPLEMENTED,
        IoError::Malformed(_) | IoError::SecondLogger => Code::INVALID_ARGUMENT,
        IoError::Open { .. } | IoError::Logger { .. } => Code::INTERNAL,
        IoError::NotReady { .. } => Code::DEADLINE_EXCEEDED,
    };
    answer(code, chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: ttrpc::Error) -> Code {
        match error {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_missing_command_is_not_a_missing_task() {
        let text = r#"exec: "nope": executable file not found in $PATH"#;
        let error = engine(&EngineError::CommandNotFound(text.into()));
        assert!(format!("{error:?}").contains("executable file not found in $PATH"));
        assert_eq!(code(error), Code::INVALID_ARGUMENT);
        assert_eq!(code(engine(&EngineError::NotFound("c".into()))), Code::NOT_FOUND);
    }

    #[test]
    fn causes_are_told_once() {
        let error = EngineError::Host {
            what: "cannot open /dev/kvm".into(),
            source: std::io::Error::from_raw_os_error(libc::ENOENT),
        };
        assert_eq!(
            chain(&error),
            "cannot open /dev/kvm: No such file or directory (os error 2)"
        );
    }
}
