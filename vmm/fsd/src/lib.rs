//! husk's file server: one sandbox's share, served over FUSE to its `husk-vmm`, and nothing outside the share.
//!
//! The process finds its descriptors at the numbers of [`husk_vmm_protocol::fds::fsd`], gives up all it does not
//! need ([`lockdown`]), and serves until the VMM is gone ([`serve`]). Every request was written by the guest and is
//! hostile: names are single path components resolved beneath a node's own descriptor, node and handle numbers are
//! never given out twice, and only regular files and directories are ever opened.
//!
//! [`passthrough`] carries requests out; [`fuse`] is the wire; [`node`] and [`handle`] are what the guest knows and
//! has open; [`credentials`] is on whose behalf.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod capabilities;
pub mod credentials;
pub mod fuse;
pub mod handle;
pub mod hold;
pub mod lockdown;
pub mod node;
pub mod passthrough;
pub mod seccomp;
pub mod serve;
pub mod sys;
