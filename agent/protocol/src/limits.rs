//! Limits of the wire. Whoever receives checks them; whoever sends may rely on them.

/// Host vsock port which the agent dials to serve its ttrpc service.
pub const AGENT_PORT: u32 = 1024;

/// First host vsock port used for raw streams; the engine takes those from here up in an order that the guest cannot
/// foresee, and never reuses one.
pub const FIRST_STDIO_PORT: u32 = 0x1_0000;

/// Longest container or exec id, in bytes. Ids are of `[A-Za-z0-9_.+-]`, start with a letter or digit
/// (see [`is_valid_id`]).
pub const MAX_ID_LEN: usize = 128;

/// Largest OCI document on the wire, in bytes. (ttrpc itself bounds a message at 4 MiB.)
pub const MAX_SPEC_LEN: usize = 3 << 20;

/// Bytes of the secret that a Setup has, and with which each raw stream that the agent dials begins.
pub const SECRET_LEN: usize = 32;

/// Most bytes of entropy in a Setup.
pub const MAX_ENTROPY_LEN: usize = 64;

/// Longest error text sent by the agent, in bytes; the host cuts what is longer.
pub const MAX_MESSAGE_LEN: usize = 4096;

/// Most processes that ListProcesses reports.
pub const MAX_PROCESSES: usize = 32_768;

/// Most bytes of cgroup files, names included, in the answer to ContainerStats.
pub const MAX_STATS_LEN: usize = 256 << 10;

/// Most NICs of a sandbox.
pub const MAX_NICS: usize = 8;

/// Most bytes of the addresses, routes, neighbours and rules of a sandbox's network.
pub const MAX_NETWORK_LEN: usize = 2 << 20;

/// Where the agent mounts the share in the guest.
pub const GUEST_SHARE: &str = "/run/husk/share";

/// Most mounts below a container's root file system and volumes that the host tells of. The guest meets others as they
/// are walked into.
pub const MAX_SUBMOUNTS: usize = 1024;

/// Largest regular file of a mirror, in bytes.
pub const MAX_MIRRORED_FILE: usize = 2 << 20;

/// Largest request that changes a mirror, in bytes.
pub const MAX_MIRROR_UPDATE: usize = 3 << 20;

/// Most bytes in the files and links of a mirror.
pub const MAX_MIRROR_BYTES: usize = 8 << 20;

/// Most files, links and directories of a mirror, its root included.
pub const MAX_MIRROR_ENTRIES: usize = 2048;

/// Longest path in a mirror, in bytes.
pub const MAX_MIRROR_PATH: usize = 2048;

/// Whether `id` may name a container or an exec: 1 to [`MAX_ID_LEN`] bytes of `[A-Za-z0-9_.+-]`, of which the
/// first is a letter, a digit or `_`. This excludes `/`, `.` and `..` as names of files.
pub fn is_valid_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    id.len() <= MAX_ID_LEN
        && bytes
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'+' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::is_valid_id;

    #[test]
    fn ids_that_name_one_file_are_valid() {
        for id in ["a", "0f3e", "my-app_1.2+3", "_x", &"a".repeat(128)] {
            assert!(is_valid_id(id), "{id}");
        }
    }

    #[test]
    fn ids_that_could_leave_a_directory_are_not() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "-rf",
            "a b",
            "a\0b",
            "ü",
            &"a".repeat(129),
        ] {
            assert!(!is_valid_id(id), "{id}");
        }
    }
}
