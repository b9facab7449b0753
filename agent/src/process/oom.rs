//! Whom the kernel kills when memory runs out: a container's process, never the agent, without which the guest is of no use.
//!
//! The agent's own score is the lowest there is. A child must not have it, not even for its first steps: the kernel,
//! finding nobody in the container's cgroup that it may kill, would let a child that is short of memory fault for ever.
//! So the agent takes the child's score on just before it forks, and lays it down behind. It needs no protection from
//! reclaim: without swap, its memory cannot be reclaimed.

use std::{fs, io};

use crate::{init, log};

const FILE: &str = "/proc/self/oom_score_adj";

/// The score of what is never killed.
const NEVER: i32 = -1000;

/// Makes this process one that is never killed.
///
/// # Errors
///
/// It may not.
pub fn protect() -> io::Result<()> {
    write(NEVER)
}

fn write(score: i32) -> io::Result<()> {
    fs::write(FILE, score.to_string())
}

/// The agent's own score while it has another.
#[derive(Debug)]
#[must_use]
pub struct Own(Option<String>);

/// Gives this process `score` (-1000 to 1000), which its next child inherits.
///
/// # Errors
///
/// It may not have it.
pub fn lend(score: i32) -> io::Result<Own> {
    let own = fs::read_to_string(FILE)?;
    if own.trim().parse() == Ok(score) {
        return Ok(Own(None));
    }
    write(score)?;
    Ok(Own(Some(own)))
}

impl Own {
    /// Gives it its own score back.
    pub fn restore(self) {
        let Some(own) = self.0 else { return };
        if let Err(error) = fs::write(FILE, own.trim()) {
            if own.trim().parse() == Ok(NEVER) {
                init::die(format_args!(
                    "cannot protect the agent from a lack of memory: {error}"
                ));
            }
            log::error!("set {FILE} back: {error}");
        }
    }
}
