//! An agent that lies, hangs or ends at each step of a container's life, under `husk run`.

use std::fs;
use std::time::Duration;

use serde_json::json;

use super::{Watch, assert_printable, assert_says, config, husk_run, program};
use crate::census::Census;
use crate::command::{Finished, Input, run_with};
use crate::foreground::Bundle;
use crate::operator::Config;

/// What one lie may take: more than all deadlines of [`hostile`].
const DEADLINE: Duration = Duration::from_secs(240);

/// A configuration that boots the hostile agent for a lie; the machine may take `boot` seconds to start, a call `call`.
pub fn hostile(word: &str, boot: u32, call: u32) -> Config {
    config(word, &lying(word, boot, call))
}

/// The text of such a configuration.
pub fn lying(word: &str, boot: u32, call: u32) -> String {
    let initramfs = program("hostile-agent.cpio");
    format!(
        "[machine]\nmemory_mib = 96\nvcpus = 1\n[guest]\ninitramfs = \"{initramfs}\"\nkernel_params = \"hostile={word}\"\n\
         [timeouts]\nboot_seconds = {boot}\ncall_seconds = {call}\nshutdown_seconds = 1\n"
    )
}

/// Seconds for what comes in time.
const LONG: u32 = 120;

/// Runs a container with an agent that lies so, which fails with an error that has these words.
#[track_caller]
fn fails(word: &str, said: &[&str]) {
    ends(word, &[125], said);
}

/// Runs a container with an agent that lies so. It ends with one of these codes.
#[track_caller]
fn ends(word: &str, codes: &[i32], said: &[&str]) {
    ends_with(&hostile(word, LONG, 30), word, codes, said);
}

#[track_caller]
fn ends_with(config: &Config, word: &str, codes: &[i32], said: &[&str]) -> Finished {
    ends_as(config, &Bundle::busybox(&["true"]), word, codes, said)
}

#[track_caller]
fn ends_as(config: &Config, bundle: &Bundle, word: &str, codes: &[i32], said: &[&str]) -> Finished {
    let done = husk_run(config, bundle, &format!("lie-{word}"), DEADLINE);
    eprintln!("{word}: {} {}", done.code, done.err());
    assert!(codes.contains(&done.code), "{word}: {} {}", done.code, done.err());
    assert_says(&done.err(), said);
    assert!(
        done.err().len() < 16_384,
        "{word}: {} bytes of error",
        done.err().len()
    );
    done
}

#[test]
fn an_agent_that_ends_fails_the_container() {
    let census = Census::take();
    for word in ["exit-at-once", "exit-setup", "exit-create", "exit-start"] {
        fails(word, &["the guest's kernel panicked"]);
    }
    // The container may have been started by then; its end is the machine's.
    ends("exit-started", &[125, 137], &[]);
    census.assert_unchanged();
}

/// Some machines boot in less than this, where the agent is heard and then waited for; slow ones do not, and the end is
/// the same.
#[test]
fn an_agent_that_is_silent_is_waited_for_no_longer_than_configured() {
    let census = Census::take();
    for word in ["silent", "slow-frame", "wrong-streams"] {
        ends_with(&hostile(word, 12, 30), word, &[125], &["silent for 12 s"]);
    }
    for (word, call) in [
        ("silent-create", "CreateContainer"),
        ("silent-start", "StartContainer"),
    ] {
        ends_with(&hostile(word, LONG, 10), word, &[125], &[call]);
    }
    census.assert_unchanged();
}

#[test]
fn frames_that_are_none_end_the_start_and_frames_of_nobody_do_not() {
    let census = Census::take();
    fails("hang-up", &["failed at Setup"]);
    ends_with(&hostile("garbage", 20, 30), "garbage", &[125], &[]);
    ends_with(&hostile("huge-frame", 20, 30), "huge-frame", &[125], &[]);
    let done = ends_with(&hostile("noise", LONG, 30), "noise", &[7], &[]);
    assert_eq!(done.out(), "", "a stream without proof");
    census.assert_unchanged();
}

#[test]
fn answers_that_make_no_sense_are_refused_and_obey_nobody() {
    let census = Census::take();
    fails("setup-error", &["red"]);
    fails("setup-no-message", &[]);
    fails("create-no-pid", &["it told no pid"]);
    fails("create-failed", &["red"]);
    fails("start-refused", &["red"]);
    census.assert_unchanged();
}

#[test]
fn a_container_that_has_ended_before_it_is_there_is_not_started() {
    let census = Census::take();
    fails("ended-before-create", &["has already ended"]);
    // It may have been started by then.
    ends("ended-at-create", &[9, 125], &[]);
    fails(
        "swap-CreateContainer",
        &["failed at CreateContainer", "it told no pid"],
    );
    fails("garbage-StartContainer", &["failed at StartContainer"]);
    census.assert_unchanged();
}

/// Gives a bundle a hook that runs a script of the host's, with the container's pid in `$pid`.
fn hook(bundle: &Bundle, kind: &str, script: &str) {
    let script = format!("pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); {script}");
    bundle.edit(|spec| {
        spec["hooks"][kind] = json!([{"path": "/bin/sh", "args": ["sh", "-ec", script],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]);
    });
}

/// The network is another than at Setup, which the guest has to be told before the container is made.
#[test]
fn a_network_that_the_guest_does_not_take_fails_the_container() {
    let census = Census::take();
    for (word, said) in [
        ("mute-SetNetwork", &["did not answer SetNetwork within 10 s"][..]),
        ("swap-SetNetwork", &["in the guest", "red"]),
    ] {
        let bundle = Bundle::busybox(&["true"]);
        hook(
            &bundle,
            "createRuntime",
            "nsenter --net=/proc/$pid/ns/net ip addr add 10.66.0.1/32 dev lo",
        );
        ends_as(&hostile(word, LONG, 10), &bundle, word, &[125], said);
    }
    census.assert_unchanged();
}

/// Neither is needed for a container to run.
#[test]
fn queries_and_mirrors_that_the_guest_does_not_take_fail_no_container() {
    let census = Census::take();
    for word in [
        "mute-ForwardDns.mute-UpdateMirror.mute-RemoveMirror",
        // Who says that it has dialled a stream for queries, and has not.
        "refuse-UpdateMirror.garbage-RemoveMirror",
    ] {
        let bundle = Bundle::busybox(&["true"]);
        let (resolv_conf, volume) = (bundle.join("resolv.conf"), bundle.join("volume"));
        fs::write(
            &resolv_conf,
            "nameserver 127.0.0.11\nnameserver 127.0.0.12\nnameserver 127.0.0.13\n",
        )
        .unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("first"), "first").unwrap();
        let more = format!("echo second > {}", volume.join("second").display());
        hook(&bundle, "createContainer", &more);
        bundle.edit(|spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            for (destination, source) in [("/etc/resolv.conf", &resolv_conf), ("/volume", &volume)] {
                mounts.push(json!({
                    "destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"],
                }));
            }
        });
        let watched = format!("[volumes]\nwatched = [\"{}\"]\n", volume.display());
        let config = config("mirrors", &(lying(word, LONG, 10) + &watched));
        ends_as(&config, &bundle, word, &[7], &[]);
    }
    census.assert_unchanged();
}

#[test]
fn events_of_nobody_and_floods_of_them_change_nothing() {
    let census = Census::take();
    ends("events-flood", &[255], &[]);
    // The container may have been started by then; the machine is ended.
    for word in ["events-end", "event-nonsense", "event-bad-id"] {
        ends(word, &[125, 137], &[]);
    }
    census.assert_unchanged();
}

/// Nobody reads for a while; what was written waits in the guest, and then all of it comes.
#[test]
fn a_flood_of_output_waits_in_the_guest() {
    let census = Census::take();
    let config = hostile("output-flood", LONG, 30);
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
    assert_eq!(done.out().trim(), (2 * (8 << 20)).to_string());
    drop((config, bundle));
    census.assert_unchanged();
}
