//! config.json, field by field: each container runs under runc and under husk and must look the same from inside.

mod hooks;
mod linux;
mod mounts;
mod process;
mod refused;
mod resources;
mod seccomp;
