//! What the host's processes say to one another: the engine to `husk-vmm`, and `husk-vmm` to `husk-fsd`.
//!
//! Neither the VMM nor the file server opens anything: each finds its descriptors at the fixed numbers of
//! [`fds`]. Everything here is plain data; nothing here touches a descriptor.

pub mod config;
pub mod control;
pub mod fds;
pub mod fs;
pub mod vsock;
