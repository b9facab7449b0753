//! The filter of a cgroup's devices: a program that the kernel asks.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use husk_bpf::Instruction;

/// Commands, types and flags of bpf(2).
const PROG_ATTACH: u32 = 8;
const CGROUP_DEVICE_PROGRAM: u32 = 15;
const CGROUP_DEVICE_ATTACH: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// The beginning of its part of `union bpf_attr`; the kernel takes what is beyond for zero.
#[repr(C)]
struct AttachAttributes {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
    old: RawFd,
}

/// A filter of devices that the kernel has checked.
#[derive(Debug)]
pub struct DeviceFilter(OwnedFd);

impl DeviceFilter {
    /// Hands `program` to the kernel.
    ///
    /// # Errors
    ///
    /// The kernel has no such programs, or does not take this one.
    pub fn load(program: &[Instruction]) -> io::Result<Self> {
        husk_bpf::load(CGROUP_DEVICE_PROGRAM, 0, "husk_devices", program).map(Self)
    }

    /// Has the kernel ask it about the devices of `cgroup`, instead of asking `old`, in one step.
    ///
    /// # Errors
    ///
    /// The kernel refuses; then `old` goes on.
    pub fn attach(&self, cgroup: BorrowedFd<'_>, old: Option<&Self>) -> io::Result<()> {
        let attributes = AttachAttributes {
            target: cgroup.as_raw_fd(),
            program: self.0.as_raw_fd(),
            kind: CGROUP_DEVICE_ATTACH,
            // What a container attaches to cgroups of its own adds to this one.
            flags: ALLOW_MULTI | if old.is_some() { REPLACE } else { 0 },
            old: old.map_or(0, |old| old.0.as_raw_fd()),
        };
        // SAFETY: the attributes are those of the command; there are descriptors and integers only.
        unsafe { husk_bpf::call(PROG_ATTACH, &attributes) }.map(drop)
    }
}

/// What the kernel would do, for tests.
#[cfg(test)]
pub fn interpret(program: &[Instruction], context: [u32; 3]) -> u32 {
    use husk_bpf::code;
    let mut registers = [0u32; 6];
    let mut next = 0;
    loop {
        let instruction = program[next];
        next += 1;
        let to = usize::from(instruction.registers & 15);
        let from = registers[usize::from(instruction.registers >> 4)];
        let number = instruction.number as u32;
        let jump = match instruction.code {
            code::LOAD => {
                registers[to] = context[usize::try_from(instruction.offset).unwrap() / 4];
                false
            }
            code::AND => {
                registers[to] &= number;
                false
            }
            code::SHIFT_RIGHT => {
                registers[to] >>= number;
                false
            }
            code::SET => {
                registers[to] = number;
                false
            }
            code::COPY_X => {
                registers[to] = from;
                false
            }
            code::JUMP_IF_EQUAL => registers[to] == number,
            code::JUMP_UNLESS_EQUAL => registers[to] != number,
            code::JUMP_UNLESS_EQUAL_X => registers[to] != from,
            code::EXIT => return registers[0],
            other => panic!("code {other:#x}"),
        };
        if jump {
            next += usize::try_from(instruction.offset).unwrap();
        }
    }
}
