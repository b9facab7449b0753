//! The guest's processors.

pub mod cpuid;
pub mod vcpu;
