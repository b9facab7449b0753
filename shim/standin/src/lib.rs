//! The stand-in: a process on the host that stands for a container (or an exec) in its guest.
//!
//! It lives in the host's namespaces that the spec names; its pid is the container's pid to whoever asks on the host.
//! Signals that it is sent are told to husk's engine, which passes them on. When it is killed the container is; and
//! with the container it ends, with the same status. It opens nothing and starts nothing.
//!
//! [`wire`] is what it and the engine say to one another, over a `SOCK_SEQPACKET` at [`CHANNEL`]. Whoever starts it
//! puts there one end, and from [`NAMESPACES`] on, without a gap, a descriptor of each namespace that it is to join.
//! Its first argument is for those who look at it by `ps`. Nothing here depends on who its parent is: when the other
//! end of the channel is closed, it ends as if it were killed.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod lockdown;
pub mod namespaces;
pub mod stand;
pub mod wire;

/// Where it finds its end of the channel.
pub const CHANNEL: i32 = 3;

/// Where it finds the first of the namespaces to join.
pub const NAMESPACES: i32 = 4;
