//! `docker run` that fails: at once, with what went wrong and the code that Docker's users know; nothing is left.

use std::fs;

use super::daemon::BROKEN;
use super::{BUSYBOX, begin, docker, foreground};
use crate::command::Finished;

/// All that is said is one message, and no container is left.
#[track_caller]
fn failed(done: Finished, code: i32, words: &[&str]) {
    let done = done.expect_code(code);
    assert_eq!(done.out(), "");
    for word in words {
        assert!(done.err().contains(word), "no {word:?} in {}", done.err());
    }
    assert_eq!(docker(&["ps", "-aq"]).out(), "");
}

#[test]
fn commands_that_cannot_be_run() {
    let census = begin();
    let done = foreground(&[], BUSYBOX, &["no-such-command"]);
    failed(
        done,
        127,
        &["no-such-command", "executable file not found in $PATH"],
    );
    let done = foreground(&[], BUSYBOX, &["/no/such/command"]);
    failed(done, 127, &["/no/such/command", "no such file or directory"]);
    let done = foreground(&[], BUSYBOX, &["/etc/passwd"]);
    failed(done, 126, &["/etc/passwd", "permission denied"]);
    census.assert_unchanged();
}

#[test]
fn mounts_and_machines_that_cannot_be() {
    let census = begin();
    // A directory of the container, and a file of the host.
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "x").unwrap();
    let volume = format!("{}:/etc", file.path().display());
    let words = [
        "mounts[",
        "(/etc)",
        "not a directory",
        "Are you trying to mount a directory onto a file",
    ];
    failed(foreground(&["-v", &volume], BUSYBOX, &["true"]), 125, &words);
    let missing = "type=bind,src=/no/such/directory,dst=/d";
    failed(
        foreground(&["--mount", missing], BUSYBOX, &["true"]),
        125,
        &["/no/such/directory", "does not exist"],
    );
    let done = docker(&["run", "--rm", "--runtime", BROKEN, BUSYBOX, "true"]);
    failed(done, 125, &["guest.kernel", "/no/such/kernel"]);
    let done = docker(&["run", "--rm", "--runtime", "no-such-runtime", BUSYBOX, "true"]);
    failed(done, 125, &["no-such-runtime"]);
    census.assert_unchanged();
}
