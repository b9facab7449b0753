//! What keeps tests apart that run in one process: while one forks, the child has all descriptors of the others, too, until
//! its exec.

use std::{
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

/// How long a test waits for what has to happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes a shell script to be executed. Another process writes it: what somebody has open for writing cannot be executed.
pub fn script(path: &Path, text: &str) {
    let written = Command::new("sh")
        .args(["-ec", r#"printf '#!/bin/sh\n%s\n' "$1" >"$0"; chmod 755 "$0""#])
        .arg(path)
        .arg(text)
        .status();
    assert!(written.unwrap().success());
}

/// Looks until there is what is looked for. An error says what there is instead.
pub fn eventually<T>(mut look: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(other) => assert!(Instant::now() < end, "{other}"),
        }
        sleep(Duration::from_millis(10));
    }
}
