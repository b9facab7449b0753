//! The shared file system device.
