//! Virtio devices and their transport.

pub mod buffers;
pub mod console;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod requests;
pub mod rng;
pub mod vsock;
