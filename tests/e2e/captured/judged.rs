//! Attacks that need a judgement: those that show nothing on some hosts, and those that succeed without filters and harm
//! nobody.

/// Why, and which attacks.
pub type Judged = (&'static str, &'static [&'static str]);

/// Attacks that may fail without a lock-down, and then show nothing.
const MAY_FAIL: &[Judged] = &[
    (
        "no kernel of today lets anybody do it, or none with a secure boot",
        &["hosts-memory", "io-ports"],
    ),
    (
        "this host's KVM may be older, or made without",
        &["kvm-memory-attributes", "kvm-memory-file"],
    ),
    (
        "these hosts' kernels have them not, or as modules that are not there; UDP-Lite is gone from Linux 7",
        &[
            "socket-inet-udplite",
            "socket-mctp",
            "socket-rds",
            "socket-smc",
            "socket-tipc",
        ],
    ),
];

/// What succeeds in either program that is locked in but for its filters, and why that harms nobody. The filters forbid it
/// all the same: none of it is needed, and there is kernel code behind it.
pub const HARMLESS: &[Judged] = &[
    (
        "its own descriptors and pipes; it has no file of the host to watch",
        &[
            "close-a-range",
            "descriptor-flags",
            "duplicate-a-descriptor",
            "inotify",
            "listen-to-signals",
            "pipe",
            "timers",
        ],
    ),
    (
        "queues for system calls that it could make itself, with its rights",
        &["io-uring"],
    ),
    (
        "anybody may ask for what is written anyway to be written",
        &["quota"],
    ),
    (
        "its own process: nobody else's rights, limits or signals, and nothing that was taken from it comes back",
        &[
            "ambient-capabilities",
            "another-filter",
            "dumpable",
            "filter-with-a-listener",
            "landlock",
            "name-of-a-thread",
            "other-handlers",
            "outlive-the-parent",
            "personality",
            "read-the-time-stamp",
            "segments",
            "session",
        ],
    ),
    (
        "its own memory, and code that it could have run as well by returning into its own; no program of the host's",
        &[
            "execveat-of-memory",
            "make-executable",
            "make-executable-by-key",
            "map-all",
            "map-executable",
            "memory-file",
            "memory-policy",
            "run-a-memory-file",
            "run-what-it-wrote",
            "secret-memory",
        ],
    ),
    (
        "an ipc namespace and keyrings of its own; messages are limited",
        &["keyring", "keys", "messages", "shared-memory"],
    ),
    (
        "processes that are locked in as it is, as many as its cgroup has room for; they end with its pid namespace",
        &["clone", "clone3", "fork", "vfork"],
    ),
    (
        "a user namespace gives rights to nothing that is there already, and none to mount anything",
        &["clone-into-namespaces", "unshare-user"],
    ),
    (
        "a net namespace with nothing in it, not even a loopback that is up",
        &[
            "socket-audit",
            "socket-can",
            "socket-crypto",
            "socket-diagnosis",
            "socket-events",
            "socket-generic",
            "socket-inet",
            "socket-inet-mptcp",
            "socket-inet-sctp",
            "socket-inet-udp",
            "socket-inet-udplite",
            "socket-inet6",
            "socket-inet6-tcp",
            "socket-kcm",
            "socket-l2tp",
            "socket-mctp",
            "socket-netfilter",
            "socket-netlink",
            "socket-ppp",
            "socket-rds",
            "socket-smc",
            "socket-tipc",
            "socket-xfrm",
        ],
    ),
    (
        "names of files and abstract names of others are out of reach, see connect-by-a-path and connect-abstract",
        &[
            "socket-unix",
            "socket-unix-datagrams",
            "socket-unix-packets",
            "socketpair",
        ],
    ),
    // Not so harmless: vsock has no namespaces in most kernels, so the filters alone keep a program from the ports of the
    // host and of other machines that listen there. husk's own never do.
    ("nobody of husk's listens there", &["socket-vsock"]),
    ("computes; it reaches nothing", &["socket-alg"]),
];

/// What else does in the VMM.
pub const HARMLESS_OF_A_VMM: &[Judged] = &[
    ("it has no capability to keep", &["keep-capabilities"]),
    ("the guest's memory", &["map-a-descriptor", "map-a-file"]),
    // Of its machine and its vCPUs it has all that KVM lets them do. Attacks upon these fail here for another reason alone:
    // each is tried in a process of its own, whose memory is not the machine's.
    ("what its own vCPUs' exits are told in", &["kvm-state-mapped"]),
];

/// What else does in the file server.
pub const HARMLESS_OF_A_FILE_SERVER: &[Judged] = &[(
    "it acts for all users of the guest, and has nobody's files but theirs",
    &["setgid", "setgroups", "setuid"],
)];

/// Whether an attack may fail without a lock-down.
pub fn may_fail(name: &str) -> bool {
    MAY_FAIL.iter().any(|(_, names)| names.contains(&name))
}
