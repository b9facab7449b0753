//! A process of a container: what it shall be ([`plan`]), how it becomes that between fork and exec ([`enter`]),
//! and how the agent and its forked child talk until then ([`launch`]).

pub mod affinity;
pub mod command;
pub mod credentials;
pub mod enter;
pub mod launch;
pub mod oom;
pub mod plan;
pub mod scheduler;
pub mod terminal;
