//! What the tests of the served share have in common: a husk-fsd of their own, a virtio-fs device before it, and a
//! mount that carries this kernel's FUSE requests through both.
#![allow(dead_code)]

pub mod driver;
pub mod mount;
pub mod posix;
pub mod server;
