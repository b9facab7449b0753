//! One concept of the host each.

pub mod cgroup;
pub mod child;
pub mod dns;
pub mod hooks;
pub mod idmap;
pub mod localhost;
pub mod memory;
pub mod mirror;
pub mod mount;
pub mod namespaces;
pub mod netns;
pub mod network;
pub mod pid;
pub mod ringlog;
pub mod rootfs;
pub mod seqpacket;
pub mod share;
pub mod standin;
pub mod statedir;
pub mod stdio;
pub mod volume;
