//! What the tests of the served share have in common: a husk-fsd of their own, a virtio-fs device before it, a
//! mount that carries this kernel's FUSE requests through both, and a client that says what no kernel would.
#![allow(dead_code)]

pub mod client;
pub mod driver;
pub mod mount;
pub mod posix;
pub mod server;
