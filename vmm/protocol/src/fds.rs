//! The descriptor tables: which descriptor a child finds at which number. All others are closed at exec.

/// Descriptors of `husk-vmm`. 0 and 1 are /dev/null.
pub mod vmm {
    use crate::config::{MAX_NICS, MAX_QUEUE_PAIRS};

    /// Write end of the log: one line of UTF-8 text per record.
    pub const LOG: i32 = 2;
    /// `SOCK_SEQPACKET` to the engine: see [`crate::config`] and [`crate::control`]. Its EOF ends the VMM.
    pub const CONTROL: i32 = 3;
    /// /dev/kvm, opened read-write. Closed as soon as the VM is made.
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
    /// The taps, from here up without a gap: one for each queue pair of [`MachineConfig::nics`], all of the first
    /// NIC before those of the second. Each is /dev/net/tun, opened read-write and non-blocking, attached
    /// (TUNSETIFF) with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if its NIC has several pairs,
    /// with headers of [`VNET_HEADER_LEN`] bytes (TUNSETVNETHDRSZ). Which offloads it has (TUNSETOFFLOAD) is the
    /// VMM's to set.
    ///
    /// [`MachineConfig::nics`]: crate::config::MachineConfig::nics
    pub const TAPS: i32 = 11;
    /// Most taps.
    pub const MAX_TAPS: i32 = MAX_NICS as i32 * MAX_QUEUE_PAIRS as i32;
    /// /dev/vhost-net, from here up without a gap: one for each NIC, none of them bound yet, if the host's kernel is to
    /// move the frames; else none. NICs have one queue pair each then.
    pub const VHOST: i32 = TAPS + MAX_TAPS;
    /// One past the last number of the table.
    pub const END: i32 = VHOST + MAX_NICS as i32;

    /// Length in bytes of the header before each frame of a tap: `struct virtio_net_hdr_v1`.
    pub const VNET_HEADER_LEN: i32 = 12;
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
