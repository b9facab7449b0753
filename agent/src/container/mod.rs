//! A container: what it shall be ([`plan`], refused in [`check`] if husk cannot do it), its cgroup, and how its init
//! process makes it between fork and exec ([`create`]).

pub mod cgroup;
pub mod changes;
pub mod check;
pub mod copy_up;
pub mod create;
pub mod device_rules;
pub mod devices;
pub mod freezer;
pub mod hooks;
pub mod mount_options;
pub mod mounts;
pub mod namespaces;
pub mod plan;
pub mod resources;
pub mod root;
pub mod seccomp;
pub mod set;
pub mod stage;
pub mod stats;
pub mod sysctl;
pub mod time;
pub mod user;
