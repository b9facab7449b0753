//! husk-agent: PID 1 of the guest. It dials the host, serves `husk.agent.v1.Agent` on that connection, and makes
//! containers of OCI documents.
//!
//! The path of a container: [`service`] takes the call, [`sandbox`] registers what is forked by
//! [`process::launch`], [`container::create`] makes the container from the inside, [`process::enter`] execs its
//! command; [`stdio`] copies what it says, [`reaper`] sees its end, [`events`] tells it.
//!
//! The agent has one thread. A forked child goes on in a copy of the agent and does all its work before its exec in
//! plain Rust; no lock can be held by a thread that the child does not have.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

mod container;
mod device_filter;
mod dial;
mod dns;
mod document;
mod events;
mod fault;
mod init;
mod localhost;
mod log;
mod mirror;
mod network;
mod process;
mod reaper;
mod sandbox;
mod secret;
mod serve;
mod service;
mod setup;
mod stdio;
mod sys;

pub use dial::Dial;
pub use init::{prepare_process, run_machine, run_outside};
pub use sandbox::Config;
