//! Programs that the kernel runs: just enough of eBPF for the filter of a cgroup's devices.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use crate::sys;

/// The registers in use: 0 is the answer, 1 the context at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
}

/// The kernel's `struct bpf_insn`. All arithmetic and comparison is of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    number: i32,
}

/// Codes: class, operation and source in one byte, as in the kernel's `bpf_common.h` and `bpf.h`.
mod code {
    /// LDX, MEM, W.
    pub const LOAD: u8 = 0x61;
    /// ALU, of a register and a number or (`_X`) another register.
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const SET: u8 = 0xb4;
    pub const COPY_X: u8 = 0xbc;
    /// JMP32.
    pub const JUMP_IF_EQUAL: u8 = 0x16;
    pub const JUMP_UNLESS_EQUAL: u8 = 0x56;
    pub const JUMP_UNLESS_EQUAL_X: u8 = 0x5e;
    pub const EXIT: u8 = 0x95;
}

impl Instruction {
    const fn new(code: u8, to: Register, from: Register, number: u32) -> Self {
        Self {
            code,
            registers: to as u8 | (from as u8) << 4,
            offset: 0,
            number: number as i32,
        }
    }

    /// `to` = the number at `offset` bytes from where `from` points.
    pub const fn load(to: Register, from: Register, offset: i16) -> Self {
        let mut load = Self::new(code::LOAD, to, from, 0);
        load.offset = offset;
        load
    }

    pub const fn and(to: Register, number: u32) -> Self {
        Self::new(code::AND, to, Register::R0, number)
    }

    pub const fn shift_right(to: Register, bits: u32) -> Self {
        Self::new(code::SHIFT_RIGHT, to, Register::R0, bits)
    }

    pub const fn set(to: Register, number: u32) -> Self {
        Self::new(code::SET, to, Register::R0, number)
    }

    pub const fn copy(to: Register, from: Register) -> Self {
        Self::new(code::COPY_X, to, from, 0)
    }

    /// The jumps go to the next instruction until [`Self::jumping`] says otherwise.
    pub const fn jump_if_equal(register: Register, number: u32) -> Self {
        Self::new(code::JUMP_IF_EQUAL, register, Register::R0, number)
    }

    pub const fn jump_unless_equal(register: Register, number: u32) -> Self {
        Self::new(code::JUMP_UNLESS_EQUAL, register, Register::R0, number)
    }

    /// Unless both registers are the same.
    pub const fn jump_unless_same(register: Register, other: Register) -> Self {
        Self::new(code::JUMP_UNLESS_EQUAL_X, register, other, 0)
    }

    pub const fn exit() -> Self {
        Self::new(code::EXIT, Register::R0, Register::R0, 0)
    }

    /// If this is a jump: one over the next `instructions`.
    pub fn jumping(mut self, instructions: usize) -> Self {
        if matches!(
            self.code,
            code::JUMP_IF_EQUAL | code::JUMP_UNLESS_EQUAL | code::JUMP_UNLESS_EQUAL_X
        ) {
            self.offset = i16::try_from(instructions).unwrap_or(i16::MAX);
        }
        self
    }
}

/// Commands, types and flags of bpf(2).
const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const CGROUP_DEVICE_PROGRAM: u32 = 15;
const CGROUP_DEVICE_ATTACH: u32 = 6;
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// The beginning of `union bpf_attr`; the kernel takes what is beyond for zero.
#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

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
        let attributes = LoadAttributes {
            program_type: CGROUP_DEVICE_PROGRAM,
            count: u32::try_from(program.len()).map_err(io::Error::other)?,
            instructions: program.as_ptr() as u64,
            // No helper of the kernel is called that wants a license.
            license: c"Apache-2.0".as_ptr() as u64,
            ..LoadAttributes::default()
        };
        // SAFETY: the attributes are those of the command; the addresses in them are of the length said, and of a C
        // string, and outlive the call, which only reads there. The descriptor is new and ours.
        unsafe { sys::bpf(PROG_LOAD, &attributes).and_then(sys::own) }.map(Self)
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
        unsafe { sys::bpf(PROG_ATTACH, &attributes) }.map(drop)
    }
}

/// What the kernel would do, for tests.
#[cfg(test)]
pub fn interpret(program: &[Instruction], context: [u32; 3]) -> u32 {
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
