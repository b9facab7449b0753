//! End-to-end suites: what a user of husk sees. They run as root on a host with working KVM, containerd with
//! the images `localhost/busybox:1`, `localhost/debian:13` and `localhost/programs:13`, and husk installed; one at a time. Those of
//! `docker` also need dockerd, stopped, with the images.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod bad_input;
mod bundle;
mod captured;
mod case;
mod census;
mod command;
mod config;
mod containerd;
mod crash;
mod docker;
mod foreground;
mod host;
mod hostile;
mod network;
mod operator;
mod pods;
mod programs;
mod resources;
mod shim;
mod sizing;
mod snippets;
mod soak;
mod streams;
mod task;
mod task_api;
mod terminal;
mod violations;
mod volumes;
mod walls;
