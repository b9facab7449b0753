//! The host side of husk.
//!
//! [`front`] is what engines say, turned into calls of [`engine`], which owns a sandbox and knows nothing of
//! containerd. [`host`] holds one concept of the host each, [`guest`] the two things on the other side: the
//! machine and the agent in it. [`config`] is the operator's file. [`check`] tells whether this machine can run
//! husk.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod check;
pub mod config;
pub mod engine;
pub mod front;
pub mod guest;
pub mod host;

#[cfg(test)]
mod test_help;
