//! Virtio devices and their transport.

pub mod buffers;
pub mod console;
pub mod device;
pub mod fs;
#[cfg(test)]
pub mod guest_queue;
pub mod mmio;
pub mod net;
pub mod registers;
pub mod requests;
pub mod rng;
pub mod vsock;
