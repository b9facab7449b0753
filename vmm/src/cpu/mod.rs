//! The guest's processors.

pub mod cpuid;
pub mod start;
pub mod vcpu;
