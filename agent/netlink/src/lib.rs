//! rtnetlink, as far as a sandbox's network needs it, for the host and for the guest.
//!
//! The host reads the addresses, routes, neighbours and rules of a network namespace as the kernel's own messages and
//! the guest hands these to its kernel, as `ip route save` and `ip route restore` do: so no attribute is lost, and
//! nobody here has to know them all.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod kind;
pub mod message;
pub mod socket;

pub use message::{Attribute, Message, Request, attributes};
pub use socket::{Error, Socket};
