//! Docker's terminals: run, exec and attach.

use std::time::Duration;

use super::{BUSYBOX, Container, MEGABYTE, begin, docker_ok};
use crate::command::{Input, run_with};
use crate::terminal::Terminal;

#[test]
fn run_exec_and_attach() {
    let census = begin();
    let run = [
        "docker",
        "run",
        "-it",
        "--name",
        "tty",
        "--runtime",
        "husk",
        BUSYBOX,
        "sh",
    ];
    let mut terminal = Terminal::start(&run, 31, 97);
    let container = Container { name: "tty".into() };
    // The size travels on its own; the shell asks until it has come.
    terminal.type_text("until stty size | grep '31 97'; do sleep 0.2; done; tty; echo is-a-$((1+1))-tty\n");
    terminal.wait_for("is-a-2-tty");
    assert!(terminal.seen().contains("/dev/"), "{:?}", terminal.seen());
    terminal.resize(42, 133);
    terminal.type_text("until stty size | grep '42 133'; do sleep 0.2; done; echo resized-$((1+2))\n");
    terminal.wait_for("resized-3");

    let mut exec = Terminal::start(&["docker", "exec", "-it", "tty", "sh"], 24, 80);
    exec.type_text("tty; echo one-$((1+1)); exit 3\n");
    exec.wait_for("one-2");
    let (code, seen) = exec.finish();
    assert_eq!(code, 3, "{seen:?}");

    // Left alone and found again.
    terminal.type_text("\u{10}\u{11}");
    let (code, seen) = terminal.finish();
    assert_eq!(code, 0, "{seen:?}");
    let mut terminal = Terminal::start(&["docker", "attach", "tty"], 24, 80);
    terminal.type_text("echo again-$((2+2))\n");
    terminal.wait_for("again-4");
    terminal.type_text("exit 6\n");
    let (code, seen) = terminal.finish();
    assert_eq!(code, 6, "{seen:?}");
    let logged = docker_ok(&["logs", "tty"]);
    assert!(
        logged.contains("resized-3") && logged.contains("again-4"),
        "{logged}"
    );
    drop(container);
    census.assert_unchanged();
}

#[test]
fn standard_input_without_a_terminal() {
    let census = begin();
    let script = "sha256sum; echo err >&2; exit 5";
    let argv = [
        "docker",
        "run",
        "--rm",
        "-i",
        "--runtime",
        "husk",
        BUSYBOX,
        "sh",
        "-c",
        script,
    ];
    let done = run_with(&argv, Input::Bytes(vec![b'x'; 1 << 20]), Duration::from_secs(120)).expect_code(5);
    assert_eq!(
        (done.out(), done.err()),
        (format!("{MEGABYTE}  -\n"), "err\n".to_owned())
    );
    census.assert_unchanged();
}
