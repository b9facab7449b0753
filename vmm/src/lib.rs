//! husk's virtual machine monitor: one microVM on KVM.
//!
//! The process opens nothing. It finds its descriptors at the fixed numbers of [`husk_vmm_protocol::fds::vmm`],
//! reads one configuration message, makes the machine, gives up every right it still has, and runs the guest until
//! that ends or the engine at the other end of the control socket is gone.
//!
//! All that comes from the guest (memory, queues, registers) is hostile: code that it reaches does not panic,
//! bounds what it reads, and allocates nothing by a number of the guest's choosing.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod boot;
pub mod bus;
pub mod control;
pub mod cpu;
pub mod fds;
pub mod irq;
pub mod layout;
pub mod lockdown;
pub mod log;
pub mod machine;
pub mod memory;
pub mod virtio;
pub mod worker;
