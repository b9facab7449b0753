//! A kernel that does not end as it should, or not at all.

use std::time::Duration;

use super::{assert_says, config, husk_run, program};
use crate::census::Census;
use crate::foreground::Bundle;

/// Boots the hostile kernel, which ends in this way, with these words of husk's.
#[track_caller]
fn ends(word: &str, said: &[&str]) {
    let config = config(
        word,
        &format!(
            "[machine]\nmemory_mib = 96\n[guest]\nkernel = \"{}\"\nkernel_params = \"hostile={word}\"\n[timeouts]\nboot_seconds = 30\n",
            program("hostile-guest")
        ),
    );
    let bundle = Bundle::busybox(&["true"]);
    let id = format!("hostile-{word}");
    let done = husk_run(&config, &bundle, &id, Duration::from_secs(100)).expect_code(125);
    assert_says(&done.err(), &[&format!("hostile: {word}: now")]);
    assert_says(&done.err(), said);
}

#[test]
fn every_way_to_end_or_not_to_is_told() {
    let census = Census::take();
    ends("triple-fault", &["triple fault"]);
    ends("halt", &["silent for 30 s"]);
    ends("loop", &["silent for 30 s"]);
    ends("smi", &["system management mode"]);
    ends("run-registers", &["KVM"]);
    ends("run-nothing", &["KVM"]);
    census.assert_unchanged();
}

/// A connection in place of the agent's that sends what is no frame, without regard to credit.
#[test]
fn a_forged_agent_gets_no_further_than_its_connection() {
    let census = Census::take();
    let config = config(
        "vsock-agent",
        &format!(
            "[machine]\nmemory_mib = 96\n[guest]\nkernel = \"{}\"\nkernel_params = \"hostile=vsock-agent\"\n",
            program("hostile-guest")
        ),
    );
    let bundle = Bundle::busybox(&["true"]);
    let done = husk_run(&config, &bundle, "hostile-vsock-agent", Duration::from_secs(200)).expect_code(125);
    assert_says(&done.err(), &["hostile: vsock-agent: connected"]);
    assert!(!done.err().contains("WRONG"), "{}", done.err());
    census.assert_unchanged();
}
