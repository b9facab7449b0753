//! The test host: a Debian machine in QEMU, with emulated hardware virtualization, in which husk runs for real.
//!
//! One binary, `testhost`, has both halves: [`agentd`] runs inside the host and executes commands; everything
//! else runs outside. A host is booted once per set of inputs and its memory written to a file ([`freeze`]);
//! each use restores that file ([`instance`]), which takes about a second.

pub mod agentd;
pub mod client;
pub mod command;
pub mod freeze;
pub mod instance;
pub mod qemu;
pub mod qmp;
pub mod wire;
