//! End-to-end suites: what a user of husk sees. They run as root on a host with working KVM, containerd with
//! the images `localhost/busybox:1` and `localhost/debian:13`, and husk installed; one at a time.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod bad_input;
mod census;
mod command;
mod containerd;
mod crash;
mod foreground;
mod host;
mod programs;
mod streams;
mod terminal;
