//! Virtio devices and their transport.

pub mod console;
pub mod device;
pub mod fs;
pub mod rng;
pub mod vsock;
