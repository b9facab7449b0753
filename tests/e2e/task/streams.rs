//! ResizePty, CloseIO, terminals and log URIs.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::{each, each_with};
use crate::command::eventually;

#[test]
fn console_size_and_resize() {
    each_with(
        &[
            "sh",
            "-c",
            "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done",
        ],
        |bundle| {
            bundle.change(&json!({"process": {"terminal": true, "consoleSize": {"height": 33, "width": 99}}}))
        },
        |shim| {
            let streams = shim.run();
            streams.wait_for("ready\r\n");
            assert_eq!(streams.out(), "33 99\r\nready\r\n");
            shim.resize("", 120, 40).unwrap();
            streams.wait_for("40 120");
            assert_eq!(shim.wait("").unwrap().exit_status, 3);
        },
    );
}

#[test]
fn resize_without_a_terminal() {
    each(&["sleep", "1000"], |shim| {
        let _streams = shim.run();
        shim.resize("", 80, 24).unwrap();
        let (_streams, added) = shim.exec("e", &["true"], json!({}));
        added.unwrap();
        shim.start_process("e").unwrap();
        shim.wait("e").unwrap();
        shim.resize("no-such-exec", 80, 24).unwrap_err();
    });
}

#[test]
fn close_io() {
    each(&["sh", "-c", "cat; echo end; exit 4"], |shim| {
        let (mut streams, created) = shim.create();
        created.unwrap();
        streams.open_stdin();
        shim.start_process("").unwrap();
        streams.write(b"typed\n");
        streams.wait_for("typed");
        // Others may keep the FIFO open; the call alone ends the process's input.
        shim.close_stdin("").unwrap();
        streams.close_stdin();
        streams.wait_for("end");
        assert_eq!(shim.wait("").unwrap().exit_status, 4);
        assert_eq!(streams.out(), "typed\nend\n");
    });
}

/// Standard output's FIFO is closed when the process has ended and all is read, not at Delete.
#[test]
fn output_ends_with_the_process() {
    each(&["sh", "-c", "seq 1 1000"], |shim| {
        let streams = shim.run();
        shim.wait("").unwrap();
        eventually("the output to end", || streams.ended().then_some(()));
        assert_eq!(streams.out().lines().count(), 1000);
        shim.delete("").unwrap();
    });
}

#[test]
fn a_log_file() {
    each(&["sh", "-c", "echo out; echo err >&2"], |shim| {
        let log = shim.bundle.path().join("logs/deep/file");
        shim.create_logged(&format!("file://{}", log.display())).unwrap();
        shim.start_process("").unwrap();
        shim.wait("").unwrap();
        shim.delete("").unwrap();
        let mut lines: Vec<String> = fs::read_to_string(&log)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort();
        assert_eq!(lines, ["err", "out"], "{:?}", shim.runtime);
    });
}

/// A logger gets stdout as 3, stderr as 4, and is ready when it closes 5; its arguments are the query's.
#[test]
fn a_logging_program() {
    each(&["sh", "-c", "echo out; echo err >&2"], |shim| {
        let program = shim.bundle.path().join("logger");
        let log = shim.bundle.path().join("logged");
        fs::write(
            &program,
            format!(
                "#!/bin/sh\ntrap '' TERM\nexec >> {0} 2>&1\necho \"args $* id $CONTAINER_ID ns $CONTAINER_NAMESPACE\"\nexec 5>&-\n\
                 sed 's/^/stdout /' <&3 > {0}.out &\nsed 's/^/stderr /' <&4 > {0}.err\nwait\necho over\n",
                log.display()
            ),
        )
        .unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        shim.create_logged(&format!("binary://{}?one=two", program.display()))
            .unwrap();
        shim.start_process("").unwrap();
        shim.wait("").unwrap();
        shim.delete("").unwrap();
        let read =
            |suffix: &str| fs::read_to_string(format!("{}{suffix}", log.display())).unwrap_or_default();
        eventually("the logger to end", || read("").contains("over").then_some(()));
        assert_eq!(
            read(""),
            format!("args one two id {} ns default\nover\n", shim.id),
            "{:?}",
            shim.runtime
        );
        assert_eq!(read(".out"), "stdout out\n");
        assert_eq!(read(".err"), "stderr err\n");
    });
}

#[test]
fn a_log_uri_of_no_known_kind() {
    each(&["true"], |shim| {
        shim.create_logged("pigeon:///somewhere").unwrap_err();
    });
}
