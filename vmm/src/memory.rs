//! Guest memory.

/// The guest's physical memory as every part of the VMM sees it; clones share the mappings.
pub type Memory = vm_memory::GuestMemoryMmap;
