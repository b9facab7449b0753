//! husk under containerd, by `ctr`: run, exec, signals, detached containers, a restart of containerd.

use std::time::Duration;

use crate::census::Census;
use crate::command::{DEADLINE, Finished, Input, Running, eventually, ok, run, run_with};
use crate::host;

pub const RUNTIME: &str = "io.containerd.husk.v2";
pub const BUSYBOX: &str = "localhost/busybox:1";

/// `ctr run` with husk, in the foreground, gone afterwards.
#[track_caller]
pub fn ctr_run(id: &str, image: &str, command: &[&str]) -> Finished {
    let mut argv = vec!["ctr", "run", "--rm", "--runtime", RUNTIME, image, id];
    argv.extend(command);
    run(&argv)
}

/// A shell script in busybox by `ctr run` with husk, in the foreground, gone afterwards; under way.
#[track_caller]
pub fn ctr_run_script(id: &str, script: &str) -> Running {
    let argv = [
        "ctr",
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        id,
        "sh",
        "-c",
        script,
    ];
    Running::start(&argv, Input::Nothing)
}

/// Listens to containerd's events, from now on.
#[track_caller]
pub fn events() -> Running {
    let mut events = Running::start(&["ctr", "events"], Input::Nothing);
    // It does not say when it has begun to listen; an event of one's own shows it.
    eventually("ctr events to listen", || {
        let label = format!("probe={}", events.id());
        run(&["ctr", "images", "label", BUSYBOX, &label]);
        events.has("/images/update").then_some(())
    });
    events
}

/// A detached container that is removed at the end of the test, whatever becomes of it.
pub struct Detached {
    pub id: String,
}

impl Detached {
    #[track_caller]
    pub fn start(id: &str, command: &[&str]) -> Self {
        Self::start_within(DEADLINE, id, command)
    }

    #[track_caller]
    pub fn start_within(deadline: Duration, id: &str, command: &[&str]) -> Self {
        Self::start_of(deadline, &[], BUSYBOX, id, command)
    }

    /// Of an image, with more options of `ctr run`.
    #[track_caller]
    pub fn start_with(options: &[&str], image: &str, id: &str, command: &[&str]) -> Self {
        Self::start_of(DEADLINE, options, image, id, command)
    }

    #[track_caller]
    fn start_of(deadline: Duration, options: &[&str], image: &str, id: &str, command: &[&str]) -> Self {
        let mut argv = vec!["ctr", "run", "-d", "--runtime", RUNTIME];
        argv.extend(options);
        argv.extend([image, id]);
        argv.extend(command);
        let this = Self { id: id.to_owned() };
        run_with(&argv, Input::Nothing, deadline).expect_code(0);
        this
    }

    #[track_caller]
    pub fn exec(&self, exec: &str, command: &[&str]) -> Finished {
        let mut argv = vec!["ctr", "task", "exec", "--exec-id", exec, &self.id];
        argv.extend(command);
        run(&argv)
    }

    /// The task's status as `ctr task ls` shows it.
    pub fn status(&self) -> Option<String> {
        let list = ok(&["ctr", "task", "ls"]);
        let line = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// Waits until it is that. (containerd says UNKNOWN when it has not been answered within two seconds.)
    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        eventually(&format!("the task to be {status}"), || {
            (self.status()? == status).then_some(())
        });
    }

    #[track_caller]
    pub fn remove(self) {
        run(&["ctr", "task", "rm", "-f", &self.id]).expect_code(0);
        run(&["ctr", "container", "rm", &self.id]).expect_code(0);
        std::mem::forget(self);
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        run(&["ctr", "task", "rm", "-f", &self.id]);
        run(&["ctr", "container", "rm", &self.id]);
    }
}

#[test]
fn run_carries_output_errors_and_exit_code() {
    let census = Census::take();
    let done = ctr_run("t1", BUSYBOX, &["sh", "-c", "uname -r; echo err >&2; exit 7"]).expect_code(7);
    let release = done.out();
    assert!(
        release.starts_with("6.12.") && release.ends_with("-husk\n"),
        "the guest's release: {release:?}"
    );
    assert_eq!(done.err(), "err\n");
    census.assert_unchanged();
}

#[test]
fn a_container_sees_itself_as_in_any_runtime() {
    let script = "id -u; pwd; echo $PATH; cat /proc/1/comm; set -- /proc/[0-9]*; echo $# processes; \
                  test -c /dev/null && test -e /dev/pts && echo devices; \
                  grep CapEff /proc/self/status; touch /made && echo writable; \
                  echo x > /proc/sys/kernel/hostname 2>/dev/null || echo readonly-sys";
    let husk = ctr_run("seen-husk", BUSYBOX, &["sh", "-c", script]).expect_code(0);
    let mut argv = vec![
        "ctr",
        "run",
        "--rm",
        "--runtime",
        "io.containerd.runc.v2",
        BUSYBOX,
        "seen-runc",
    ];
    argv.extend(["sh", "-c", script]);
    let runc = run(&argv).expect_code(0);
    assert_eq!(husk.out(), runc.out());
}

#[test]
fn exec_carries_output_errors_and_exit_code() {
    let census = Census::take();
    let container = Detached::start("exec", &["sleep", "1000"]);
    let done = container
        .exec("e1", &["sh", "-c", "echo out; echo err >&2; exit 3"])
        .expect_code(3);
    assert_eq!((done.out().as_str(), done.err().as_str()), ("out\n", "err\n"));
    let done = container.exec("e2", &["cat", "/proc/1/cmdline"]).expect_code(0);
    assert_eq!(
        done.out(),
        "sleep\u{0}1000\u{0}",
        "exec sees the container's processes"
    );
    let done = container.exec("e3", &["no-such-command"]);
    assert_ne!(done.code, 0);
    assert!(
        done.err().contains("no-such-command") && done.err().contains("not found"),
        "{}",
        done.err()
    );
    container.remove();
    census.assert_unchanged();
}

#[test]
fn a_signal_reaches_the_container() {
    let script = "trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = ctr_run_script("signal", script);
    running.wait_for("ready");
    run(&["ctr", "task", "kill", "-s", "SIGTERM", "signal"]).expect_code(0);
    let done = running.finish(Duration::from_secs(60)).expect_code(5);
    assert_eq!(done.out(), "ready\nterminated\n");
}

#[test]
fn a_killed_container_exits_137() {
    let mut running = ctr_run_script("killed", "echo ready; exec sleep 1000");
    running.wait_for("ready");
    run(&["ctr", "task", "kill", "-s", "SIGKILL", "killed"]).expect_code(0);
    running.finish(Duration::from_secs(60)).expect_code(137);
}

#[test]
fn a_detached_container_outlives_a_restart_of_containerd() {
    let census = Census::take();
    let container = Detached::start("detached", &["sleep", "1000"]);
    container.wait_for_status("RUNNING");
    let listed = ok(&["ctr", "task", "ps", "detached"]);
    assert!(
        listed.lines().count() >= 2,
        "ctr task ps shows no process: {listed}"
    );
    host::restart_containerd();
    container.wait_for_status("RUNNING");
    let done = container.exec("after", &["echo", "still here"]).expect_code(0);
    assert_eq!(done.out(), "still here\n");
    container.remove();
    census.assert_unchanged();
}

#[test]
fn a_container_that_ended_can_be_seen_and_removed() {
    let census = Census::take();
    let container = Detached::start("ended", &["sh", "-c", "exit 9"]);
    eventually("the task to stop", || {
        (container.status()? == "STOPPED").then_some(())
    });
    // ctr tells the exit code in a warning, and newer ones exit with it too.
    let done = run(&["ctr", "task", "rm", "ended"]);
    assert!(done.err().contains("non-zero exit code 9"), "{}", done.err());
    run(&["ctr", "container", "rm", "ended"]).expect_code(0);
    std::mem::forget(container);
    census.assert_unchanged();
}
