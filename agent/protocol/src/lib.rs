//! The wire between the host and husk-agent, used by both sides: the ttrpc service `husk.agent.v1.Agent`
//! (generated from `proto/agent.proto`, which documents it), the limits that both sides hold to, the words that the
//! agent knows and the framing of DNS messages.

pub mod dns;
pub mod features;
pub mod limits;

/// Generated messages and service.
mod wire {
    #![allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::indexing_slicing)]
    include!(concat!(env!("OUT_DIR"), "/wire/mod.rs"));
}

pub use wire::agent as messages;
pub use wire::agent_ttrpc as service;
