//! The socket device.
