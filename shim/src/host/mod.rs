//! One concept of the host each.

pub mod rootfs;
