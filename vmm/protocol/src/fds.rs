//! The descriptor tables: which descriptor a child finds at which number. All others are closed at exec.

/// Descriptors of `husk-vmm`. 0 and 1 are /dev/null.
pub mod vmm {
    /// Write end of the log: one line of UTF-8 text per record.
    pub const LOG: i32 = 2;
    /// `SOCK_SEQPACKET` to the engine: see [`crate::config`] and [`crate::control`]. Its EOF ends the VMM.
    pub const CONTROL: i32 = 3;
    /// /dev/kvm, opened read-write.
    pub const KVM: i32 = 4;
    /// Guest memory: a memfd of exactly the configured size, sealed against growing and shrinking.
    pub const MEMORY: i32 = 5;
    /// The guest kernel, an ELF `vmlinux` with a PVH entry, read-only.
    pub const KERNEL: i32 = 6;
    /// The initramfs, a cpio archive, read-only.
    pub const INITRAMFS: i32 = 7;
    /// Where the guest's console goes: the write end of a pipe, non-blocking (what does not fit is dropped and
    /// counted, so that a reader that stalls cannot stall the guest).
    pub const CONSOLE: i32 = 8;
    /// `SOCK_SEQPACKET` to `husk-fsd`: see [`crate::fs`].
    pub const FS: i32 = 9;
    /// `SOCK_SEQPACKET` from the engine, carrying streams for vsock: see [`crate::vsock`].
    pub const VSOCK: i32 = 10;
    /// One past the last number.
    pub const END: i32 = 11;
}

/// Descriptors of `husk-fsd`. 0 and 1 are /dev/null.
pub mod fsd {
    /// Write end of the log: one line of UTF-8 text per record.
    pub const LOG: i32 = 2;
    /// The share's root directory, `O_PATH | O_DIRECTORY`.
    pub const SHARE: i32 = 3;
    /// `SOCK_SEQPACKET` to `husk-vmm`: see [`crate::fs`]. Its EOF ends the server.
    pub const CHANNEL: i32 = 4;
    /// One past the last number.
    pub const END: i32 = 5;
}
