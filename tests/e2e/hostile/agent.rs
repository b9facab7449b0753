//! An agent that lies, hangs or ends at each step of a container's life, under `husk run`.

use std::time::Duration;

use super::{Watch, assert_printable, assert_says, config, husk_run, program};
use crate::census::Census;
use crate::command::{Input, run_with};
use crate::foreground::Bundle;
use crate::operator::Config;

/// What one lie may take: the longest deadline of [`hostile`], and as much work as there is to do.
const DEADLINE: Duration = Duration::from_secs(120);

/// A configuration that boots the hostile agent for a lie, with deadlines to see.
pub fn hostile(word: &str) -> Config {
    let initramfs = program("hostile-agent.cpio");
    config(
        word,
        &format!(
            "[machine]\nmemory_mib = 96\nvcpus = 1\n[guest]\ninitramfs = \"{initramfs}\"\nkernel_params = \"hostile={word}\"\n\
             [timeouts]\nboot_seconds = 25\ncall_seconds = 6\nshutdown_seconds = 1\n"
        ),
    )
}

/// Runs a container with an agent that lies so, which fails with an error that has these words.
#[track_caller]
fn fails(word: &str, said: &[&str]) {
    ends(word, 125, said);
}

/// Runs a container with an agent that lies so.
#[track_caller]
fn ends(word: &str, code: i32, said: &[&str]) {
    let config = hostile(word);
    let bundle = Bundle::busybox(&["true"]);
    let done = husk_run(&config, &bundle, &format!("lie-{word}"), DEADLINE);
    eprintln!("{word}: {} {}", done.code, done.err());
    assert_eq!(done.code, code, "{word}: {}", done.err());
    assert_says(&done.err(), said);
    assert!(
        done.err().len() < 16_384,
        "{word}: {} bytes of error",
        done.err().len()
    );
}

#[test]
fn an_agent_that_ends_fails_the_container() {
    let census = Census::take();
    for word in [
        "exit-at-once",
        "exit-connected",
        "exit-setup",
        "exit-create",
        "exit-start",
    ] {
        fails(word, &["the guest's kernel panicked"]);
    }
    // The container has been started by then; its end is the machine's.
    ends("exit-started", 137, &[]);
    census.assert_unchanged();
}

#[test]
fn an_agent_that_is_silent_is_waited_for_no_longer_than_configured() {
    let census = Census::take();
    fails("no-call", &["silent for 25 s"]);
    fails("silent", &["silent for 25 s"]);
    fails("slow-frame", &["silent for 25 s"]);
    fails("silent-create", &["CreateContainer"]);
    fails("silent-start", &["StartContainer"]);
    fails("wrong-streams", &["silent for 25 s"]);
    census.assert_unchanged();
}

#[test]
fn frames_that_are_none_end_the_start_or_are_passed_over() {
    let census = Census::take();
    fails("hang-up", &["hung up"]);
    fails("garbage", &[]);
    fails("huge-frame", &[]);
    ends("frames-of-all-kinds", 7, &[]);
    ends("answers-to-nobody", 7, &[]);
    ends("twice", 7, &[]);
    ends("connections", 7, &[]);
    census.assert_unchanged();
}

#[test]
fn answers_that_make_no_sense_are_refused_and_obey_nobody() {
    let census = Census::take();
    fails("setup-error", &["red"]);
    fails("setup-no-message", &[]);
    ends("setup-version", 7, &[]);
    fails("create-refused", &["red"]);
    fails("create-no-pid", &["it told no pid"]);
    fails("create-failed", &["red"]);
    fails("start-refused", &["red"]);
    census.assert_unchanged();
}

#[test]
fn events_of_nobody_and_floods_of_them_change_nothing() {
    let census = Census::take();
    ends("events-flood", 255, &[]);
    ends("oom-flood", 7, &[]);
    fails("events-refused", &[]);
    fails("events-end", &[]);
    for word in ["event-nonsense", "event-bad-id", "event-no-message"] {
        ends(word, 137, &[]);
    }
    ends("streams-taken-twice", 7, &[]);
    census.assert_unchanged();
}

/// Nobody reads for a while; what was written waits in the guest, and then all of it comes.
#[test]
fn a_flood_of_output_waits_in_the_guest() {
    let census = Census::take();
    let config = hostile("output-flood");
    let bundle = Bundle::busybox(&["true"]);
    let watch = Watch::start();
    let script = format!(
        "husk --config {} run --bundle {} lie-output-flood 2>&1 | (sleep 15; wc -c)",
        config.path(),
        bundle.path()
    );
    let done = run_with(&["sh", "-c", &script], Input::Nothing, DEADLINE).expect_code(0);
    watch.assert_bounded();
    assert_printable(&done.out());
    assert_eq!(done.out().trim(), (2 * (32 << 20)).to_string());
    drop((config, bundle));
    census.assert_unchanged();
}
