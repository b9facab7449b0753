//! An agent that lies about what is asked of a container that runs, call by call.

use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{Empty, Status};
use serde_json::json;

use super::{Watch, agent::lying, assert_printable};
use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::census::Census;
use crate::command::{Input, Running, eventually};
use crate::operator::{Config, DEFAULT};
use crate::shim::{Answer, Shim};

/// Has a container whose agent lies so, with `call` seconds for a call, and leaves nothing of it.
#[track_caller]
fn with(word: &str, call: u32, test: impl FnOnce(&Shim)) {
    let census = Census::take();
    let config = Config::at(DEFAULT, &lying(word, 120, call));
    let watch = Watch::start();
    let id = "lie-calls";
    let mut bundle = Bundle::new(id);
    bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
    let shim = Shim::start(Runtime::Husk, id, bundle);
    let streams = shim.run();
    test(&shim);
    shim.delete("").unwrap();
    let _ = shim.shutdown();
    watch.assert_bounded();
    drop((shim, streams, config));
    census.assert_unchanged();
}

#[track_caller]
fn assert_refused(answer: Answer<Empty>, words: &[&str]) {
    let (code, text) = answer.unwrap_err();
    eprintln!("{code:?}: {text}");
    assert_printable(&text);
    assert!(text.len() < 16_384, "{} bytes of error", text.len());
    for word in words {
        assert!(text.contains(word), "{word:?} is not said in {text}");
    }
}

/// A connection to the container's localhost, made on the host.
fn connection(shim: &Shim) -> Running {
    let pid = shim.state("").unwrap().pid.to_string();
    let argv = [
        "nsenter",
        "-t",
        &pid,
        "-n",
        "socat",
        "-u",
        "TCP4:127.0.0.1:8080",
        "-",
    ];
    Running::start(&argv, Input::Nothing)
}

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn what_the_agent_refuses_is_told_and_a_kill_it_cannot_refuse() {
    let word = "refuse-PauseContainer.swap-UpdateContainer.refuse-ConnectLocalhost.unknown-SignalProcess";
    with(word, 20, |shim| {
        assert_refused(shim.pause(), &["failed at PauseContainer", "red"]);
        assert_eq!(shim.status(""), Status::RUNNING);
        assert_refused(
            shim.update(&json!({"pids": {"limit": 40}})),
            &["in the guest", "red"],
        );
        assert_ne!(connection(shim).finish(LIMIT).code, 0);
        assert_refused(shim.kill("", 15, false), &["does not exist", "red"]);
        // It ends with its machine.
        assert_refused(shim.kill("", 9, true), &["does not exist", "red"]);
        assert_eq!(shim.wait("").unwrap().exit_status, 137);
    });
}

#[test]
fn what_the_agent_does_not_answer_has_a_deadline() {
    let word = "mute-ResumeContainer.mute-UpdateContainer.mute-ConnectLocalhost";
    with(word, 10, |shim| {
        shim.pause().unwrap();
        assert_eq!(shim.status(""), Status::PAUSED);
        assert_refused(
            shim.update(&json!({"pids": {"limit": 40}})),
            &["did not answer UpdateContainer within 10 s"],
        );
        assert_refused(shim.resume(), &["did not answer ResumeContainer within 10 s"]);
        assert_eq!(shim.status(""), Status::PAUSED);
        let connection = connection(shim);
        shim.kill("", 9, true).unwrap();
        assert_eq!(shim.wait("").unwrap().exit_status, 137);
        assert_ne!(connection.finish(LIMIT).code, 0);
    });
}

#[test]
fn a_kill_waits_for_no_pause() {
    let call = Duration::from_secs(20);
    with("mute-PauseContainer", 20, |shim| {
        thread::scope(|scope| {
            let pause = scope.spawn(|| shim.pause());
            eventually("the pause to be under way", || {
                (shim.status("") == Status::PAUSING).then_some(())
            });
            let begun = Instant::now();
            shim.kill("", 9, true).unwrap();
            assert_eq!(shim.wait("").unwrap().exit_status, 137);
            assert!(begun.elapsed() < call, "{:?}", begun.elapsed());
            assert_refused(pause.join().unwrap(), &["did not answer PauseContainer"]);
        });
    });
}
