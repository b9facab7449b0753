//! Hostile input for all that a guest, its agent or a captured VMM can say something to.
//!
//! A [`Target`] is a function of bytes that must neither panic nor overflow nor allocate by a number of the other
//! side's, and asserts what must hold besides. `make fuzz` has libFuzzer look for bytes with which it does not; the
//! tests of this crate replay what is in `corpus`, without libFuzzer.

pub mod allocations;
pub mod boot;
pub mod descriptors;
pub mod devices;
pub mod driver;
pub mod fuse;
pub mod guest;
pub mod input;
pub mod ram;

/// One thing to be fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and its directory's in the corpus.
    pub name: &'static str,
    /// Longest input that is of use, in bytes.
    pub longest: usize,
    /// Most bytes that it may allocate at once.
    pub allocation: usize,
    /// Takes an input.
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, longest: usize, allocation: usize, run: fn(&[u8])) -> Target {
    Target {
        name,
        longest,
        allocation,
        run,
    }
}

const KIB: usize = 1 << 10;

/// All of them.
pub const TARGETS: [Target; 13] = [
    target("bus", 2 * KIB, 256 * KIB, devices::bus),
    target("rng", KIB, 256 * KIB, devices::rng),
    target("console", 2 * KIB, 256 * KIB, devices::console),
    target("net", 2 * KIB, 256 * KIB, devices::net),
    target("vsock", 2 * KIB, 256 * KIB, devices::vsock),
    target("fs", 2 * KIB, 256 * KIB, devices::fs),
    target("state", 2 * KIB, 256 * KIB, devices::state),
    target("fuse", 2 * KIB, 256 * KIB, fuse::fuse),
    target("kernel", 4 * KIB, 256 * KIB, boot::kernel),
    target("config", 2 * KIB, 256 * KIB, boot::config),
    // What ttrpc takes is at most 4 MiB; protobuf reserves 10 MB for a field that says that it is as long.
    target("agent", 4 * KIB, 10_000_000, guest::agent),
    target("report", 2 * KIB, 256 * KIB, guest::report),
    target("figures", 4 * KIB, 256 * KIB, guest::figures),
];

/// The target of that name.
pub fn find(name: &str) -> Option<&'static Target> {
    const ALL: &[Target] = &TARGETS;
    ALL.iter().find(|target| target.name == name)
}
