use proptest::prelude::*;
use protobuf::Message;

use super::*;

fn exit(container: &str, exec: &str, status: u32) -> wire::Event {
    let exit = wire::event::Exit {
        container_id: container.into(),
        exec_id: exec.into(),
        status,
        ..Default::default()
    };
    wire::Event {
        kind: Some(EventKind::Exit(exit)),
        ..Default::default()
    }
}

#[test]
fn events_that_cannot_be_are_refused() {
    let exited = |exec: Option<&str>, status| GuestEvent::Exited {
        container: "c".into(),
        exec: exec.map(str::to_owned),
        status,
    };
    assert_eq!(checked(exit("c", "", 7)), Some(exited(None, 7)));
    assert_eq!(checked(exit("c", "e", u32::MAX)), Some(exited(Some("e"), 255)));
    for event in [
        exit("", "", 0),
        exit("../c", "", 0),
        exit("c", "e/x", 0),
        wire::Event::default(),
    ] {
        assert_eq!(checked(event), None);
    }
}

#[test]
fn failures_become_errors_with_the_codes_that_users_know() {
    let code = |kind| {
        let failure = wire::Failure {
            kind,
            message: "m\u{1b}".into(),
            ..Default::default()
        };
        failed(Some(failure)).map_err(|error| (error.exit_code(), error.to_string()))
    };
    assert_eq!(code(FailureKind::NONE.into()), Ok(()));
    assert_eq!(
        code(FailureKind::COMMAND_NOT_FOUND.into()),
        Err((127, "m?".into()))
    );
    assert_eq!(
        code(FailureKind::COMMAND_NOT_EXECUTABLE.into()),
        Err((126, "m?".into()))
    );
    assert_eq!(code(FailureKind::INVALID_SPEC.into()), Err((125, "m?".into())));
    assert!(code(protobuf::EnumOrUnknown::from_i32(99)).is_err());
}

proptest! {
    #[test]
    fn any_event_is_checked_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        if let Ok(event) = wire::Event::parse_from_bytes(&bytes) {
            match checked(event) {
                Some(GuestEvent::Oom { container }) => prop_assert!(is_valid_id(&container)),
                Some(GuestEvent::Exited { container, exec, status }) => {
                    prop_assert!(is_valid_id(&container) && status <= MAX_STATUS);
                    prop_assert!(exec.is_none_or(|exec| is_valid_id(&exec)));
                }
                None => {}
            }
        }
    }

    #[test]
    fn any_ids_are_checked(container in ".{0,200}", exec in ".{0,200}", status: u32) {
        let event = checked(exit(&container, &exec, status));
        prop_assert_eq!(event.is_some(), is_valid_id(&container) && (exec.is_empty() || is_valid_id(&exec)));
    }

    #[test]
    fn shown_text_is_short_and_safe(message in "\\PC{0,50}[\\x00-\\x1f]{0,10}\\PC{0,50}", length in 0usize..200) {
        let shown = text(&message, length);
        prop_assert!(!shown.chars().any(|c| c.is_control() && c != '\n' && c != '\t'));
        prop_assert!(shown.chars().count() <= length);
    }
}
