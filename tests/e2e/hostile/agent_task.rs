//! An agent that lies about a container that runs, under containerd.

use std::time::Duration;

use super::{Watch, agent::hostile, assert_printable};
use crate::census::Census;
use crate::command::{Finished, Input, run, run_with};
use crate::containerd::{BUSYBOX, RUNTIME};

/// What one command may take: the start of a machine, or some calls of the agent's of which none is answered.
const DEADLINE: Duration = Duration::from_secs(200);

#[track_caller]
fn ctr(argv: &[&str]) -> Finished {
    let argv: Vec<&str> = ["ctr"].iter().chain(argv).copied().collect();
    let done = run_with(&argv, Input::Nothing, DEADLINE);
    eprintln!("{argv:?}: {} {}", done.code, done.err());
    assert_printable(&done.err());
    assert!(done.err().len() < 16_384, "{} bytes of error", done.err().len());
    done
}

/// A container whose agent lies so, and may take `call` seconds for an answer. What it is asked fails, by these words,
/// and it can be removed.
#[track_caller]
fn lies(word: &str, call: u32, questions: &[&[&str]], said: &str) {
    let census = Census::take();
    let config = hostile(word, 120, call);
    let watch = Watch::start();
    let id = format!("lie-{word}");
    ctr(&[
        "run",
        "-d",
        "--runtime",
        RUNTIME,
        "--runtime-config-path",
        config.path(),
        BUSYBOX,
        &id,
        "true",
    ])
    .expect_code(0);
    // A process of the host's stands for it, which the agent is not asked about.
    ctr(&["task", "ps", &id]).expect_code(0);
    let ask = |question: &&[&str]| {
        let words = question.iter().map(|word| if *word == ID { &id } else { *word });
        ctr(&words.collect::<Vec<_>>())
    };
    let answers: Vec<_> = questions.iter().map(ask).collect();
    ctr(&["task", "kill", "-s", "KILL", &id]);
    ctr(&["task", "rm", "-f", &id]);
    run(&["ctr", "container", "rm", &id]).expect_code(0);
    for (question, done) in questions.iter().zip(answers) {
        assert_ne!(done.code, 0, "{question:?}: {}", done.out());
        assert!(
            // containerd keeps to itself why there are no metrics.
            done.err().contains(said) || done.err().contains("no metrics received"),
            "{question:?} does not say {said:?}: {}",
            done.err()
        );
    }
    watch.assert_bounded();
    drop(config);
    census.assert_unchanged();
}

/// Stands for the container's id.
const ID: &str = "ID";

const METRICS: &[&str] = &["task", "metrics", ID];
const EXEC: &[&str] = &["task", "exec", "--exec-id", "x", ID, "true"];
const PAUSE: &[&str] = &["task", "pause", ID];

#[test]
fn absurd_answers_about_a_container_are_refused() {
    lies("absurd", 20, &[METRICS, EXEC], "agent");
}

#[test]
fn a_container_whose_agent_is_stuck_can_be_removed() {
    lies("stuck", 10, &[METRICS, EXEC], "agent");
}

#[test]
fn a_pause_that_is_not_answered_is_given_up_and_the_container_can_be_removed() {
    lies("stuck", 10, &[PAUSE], "did not answer PauseContainer within 10 s");
}
