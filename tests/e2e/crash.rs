//! What happens when one of husk's processes is killed: the task ends, and nothing is left.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::census::Census;
use crate::command::{Input, Running, run};
use crate::containerd::{BUSYBOX, Detached, RUNTIME, events};
use crate::host;

/// Kills the process of that name while a container runs and expects the task to end with 137.
#[track_caller]
fn kill_while_running(victim: &str, id: &str) {
    let census = Census::take();
    let argv = [
        "ctr",
        "run",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        id,
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ];
    let mut running = Running::start(&argv, Input::Nothing);
    running.wait_for("ready");
    kill(Pid::from_raw(host::pid_of(victim)), Signal::SIGKILL).unwrap();
    running.finish(Duration::from_secs(40)).expect_code(137);
    run(&["ctr", "task", "rm", "-f", id]);
    run(&["ctr", "container", "rm", id]).expect_code(0);
    census.assert_unchanged();
}

/// A client that waits is cut off with the shim, with any runtime; containerd itself tells the end in an event.
#[test]
fn the_shim_is_killed() {
    let census = Census::take();
    let mut events = events();
    let container = Detached::start("kill-shim", &["sleep", "1000"]);
    events.wait_for("/tasks/start");
    kill(
        Pid::from_raw(host::pid_of("containerd-shim-husk-v2")),
        Signal::SIGKILL,
    )
    .unwrap();
    events.wait_for("/tasks/exit");
    events.wait_for("\"exit_status\":137");
    drop(events);
    run(&["ctr", "task", "rm", "-f", &container.id]);
    run(&["ctr", "container", "rm", &container.id]).expect_code(0);
    std::mem::forget(container);
    census.assert_unchanged();
}

#[test]
fn the_vmm_is_killed() {
    kill_while_running("husk-vmm", "kill-vmm");
}

#[test]
fn the_file_server_is_killed() {
    kill_while_running("husk-fsd", "kill-fsd");
}

#[test]
fn the_stand_in_is_killed() {
    kill_while_running("husk-standin", "kill-standin");
}

#[test]
fn husk_run_is_killed() {
    let census = Census::take();
    let bundle = crate::foreground::Bundle::busybox(&["sh", "-c", "echo ready; exec sleep 1000"]);
    let mut running = Running::start(
        &["husk", "run", "--bundle", bundle.path(), "kill-run"],
        Input::Nothing,
    );
    running.wait_for("ready");
    kill(Pid::from_raw(running.id() as i32), Signal::SIGKILL).unwrap();
    running.finish(Duration::from_secs(10)).expect_code(137);
    // Nobody is left to clean up; the next of that id finds the remains and removes them.
    let next = crate::foreground::Bundle::busybox(&["echo", "again"]);
    let done = run(&["husk", "run", "--bundle", next.path(), "kill-run"]).expect_code(0);
    assert_eq!(done.out(), "again\n");
    drop((bundle, next));
    census.assert_unchanged();
}
