//! The console device.
