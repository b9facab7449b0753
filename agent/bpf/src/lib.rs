//! eBPF: programs of a few instructions, given to the kernel by bpf(2). Just enough for the device filter of a cgroup, for
//! what becomes of a NIC's frames, and for which socket gets a packet.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// The registers in use: 0 has answers, 1 to 5 the arguments of a call (1 the context at the start), 6 and 7 outlive
/// calls, 10 is the end of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R5 = 5,
    R6 = 6,
    R7 = 7,
    Stack = 10,
}

/// The kernel's `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// One of [`code`].
    pub code: u8,
    /// Destination in the lower half, source in the upper.
    pub registers: u8,
    /// Of a jump: how many instructions; else bytes.
    pub offset: i16,
    /// The operand, if it is no register.
    pub number: i32,
}

/// Codes: class, operation and source in one byte, as in the kernel's `bpf_common.h` and `bpf.h`.
#[allow(missing_docs)] // The names say it; the kernel's are beside them.
pub mod code {
    /// LDX, MEM, W and H.
    pub const LOAD: u8 = 0x61;
    pub const LOAD_HALF: u8 = 0x69;
    /// ST, MEM, W: of a number.
    pub const STORE: u8 = 0x62;
    /// LD, DW, IMM, of two instructions.
    pub const LOAD_LONG: u8 = 0x18;
    /// ALU, of 32 bits, of a register and a number or (`_X`) another register.
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const SET: u8 = 0xb4;
    pub const COPY_X: u8 = 0xbc;
    /// ALU64.
    pub const ADD_LONG: u8 = 0x07;
    pub const COPY_LONG_X: u8 = 0xbf;
    /// JMP32.
    pub const JUMP_IF_EQUAL: u8 = 0x16;
    pub const JUMP_UNLESS_EQUAL: u8 = 0x56;
    pub const JUMP_UNLESS_EQUAL_X: u8 = 0x5e;
    /// JMP, of 64 bits.
    pub const JUMP_IF_EQUAL_LONG: u8 = 0x15;
    pub const JUMP_UNLESS_EQUAL_LONG: u8 = 0x55;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
}

impl Instruction {
    const fn new(code: u8, to: Register, from: Register, offset: i16, number: i32) -> Self {
        Self {
            code,
            registers: to as u8 | (from as u8) << 4,
            offset,
            number,
        }
    }

    /// `to` = the 32 bits at `offset` bytes from where `from` points.
    pub const fn load(to: Register, from: Register, offset: i16) -> Self {
        Self::new(code::LOAD, to, from, offset, 0)
    }

    /// `to` = the 16 bits at `offset` bytes from where `from` points.
    pub const fn load_half(to: Register, from: Register, offset: i16) -> Self {
        Self::new(code::LOAD_HALF, to, from, offset, 0)
    }

    /// The 32 bits at `offset` from the end of the stack = `number`.
    pub const fn store(offset: i16, number: i32) -> Self {
        Self::new(code::STORE, Register::Stack, Register::R0, offset, number)
    }

    /// `to` = the map of this descriptor.
    pub const fn load_map(to: Register, map: RawFd) -> [Self; 2] {
        // BPF_PSEUDO_MAP_FD stands where the source would.
        [
            Self::new(code::LOAD_LONG, to, Register::R1, 0, map),
            Self::new(0, Register::R0, Register::R0, 0, 0),
        ]
    }

    /// `to` &= `number`, of 32 bits.
    pub const fn and(to: Register, number: u32) -> Self {
        Self::new(code::AND, to, Register::R0, 0, number as i32)
    }

    /// `to` >>= `bits`, of 32 bits.
    pub const fn shift_right(to: Register, bits: u32) -> Self {
        Self::new(code::SHIFT_RIGHT, to, Register::R0, 0, bits as i32)
    }

    /// `to` = `number`, of 32 bits; the upper ones are cleared.
    pub const fn set(to: Register, number: u32) -> Self {
        Self::new(code::SET, to, Register::R0, 0, number as i32)
    }

    /// `to` = `from`, of 32 bits.
    pub const fn copy(to: Register, from: Register) -> Self {
        Self::new(code::COPY_X, to, from, 0, 0)
    }

    /// `to` = `from`, all of it, as a pointer needs.
    pub const fn copy_long(to: Register, from: Register) -> Self {
        Self::new(code::COPY_LONG_X, to, from, 0, 0)
    }

    /// `to` += `number`, as a pointer needs.
    pub const fn add_long(to: Register, number: i32) -> Self {
        Self::new(code::ADD_LONG, to, Register::R0, 0, number)
    }

    /// Jumps go to the next instruction until [`Self::jumping`] says otherwise.
    pub const fn jump_if_equal(register: Register, number: u32) -> Self {
        Self::new(code::JUMP_IF_EQUAL, register, Register::R0, 0, number as i32)
    }

    /// Unless the lower 32 bits are `number`.
    pub const fn jump_unless_equal(register: Register, number: u32) -> Self {
        Self::new(code::JUMP_UNLESS_EQUAL, register, Register::R0, 0, number as i32)
    }

    /// Unless the lower 32 bits of both registers are the same.
    pub const fn jump_unless_same(register: Register, other: Register) -> Self {
        Self::new(code::JUMP_UNLESS_EQUAL_X, register, other, 0, 0)
    }

    /// If all 64 bits are zero.
    pub const fn jump_if_null(register: Register) -> Self {
        Self::new(code::JUMP_IF_EQUAL_LONG, register, Register::R0, 0, 0)
    }

    /// Unless all 64 bits are zero.
    pub const fn jump_unless_null(register: Register) -> Self {
        Self::new(code::JUMP_UNLESS_EQUAL_LONG, register, Register::R0, 0, 0)
    }

    /// Calls a function of the kernel (`BPF_FUNC_*`), which takes 1 to 5 and answers in 0.
    pub const fn call(function: i32) -> Self {
        Self::new(code::CALL, Register::R0, Register::R0, 0, function)
    }

    /// Ends the program with the answer in 0.
    pub const fn exit() -> Self {
        Self::new(code::EXIT, Register::R0, Register::R0, 0, 0)
    }

    /// If this is a jump: one over the next `instructions`.
    pub fn jumping(mut self, instructions: usize) -> Self {
        if matches!(
            self.code,
            code::JUMP_IF_EQUAL
                | code::JUMP_UNLESS_EQUAL
                | code::JUMP_UNLESS_EQUAL_X
                | code::JUMP_IF_EQUAL_LONG
                | code::JUMP_UNLESS_EQUAL_LONG
        ) {
            self.offset = i16::try_from(instructions).unwrap_or(i16::MAX);
        }
        self
    }
}

/// `BPF_PROG_LOAD`.
const PROG_LOAD: u32 = 5;

/// The beginning of `union bpf_attr`; the kernel takes what is beyond for zero.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

/// Hands a program to the kernel: of type `kind` (`BPF_PROG_TYPE_*`), to be attached as `attach` (`BPF_*`, 0 where the type
/// says it), shown as `name` (at most 15 bytes).
///
/// # Errors
/// The kernel has no such programs, or does not take this one.
pub fn load(kind: u32, attach: u32, name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attributes = LoadAttributes {
        kind,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        // No function of the kernel is called that wants another license.
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        attach,
    };
    // The last byte stays zero.
    let [shown @ .., _] = &mut attributes.name;
    for (to, from) in shown.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    /// The kernel gives up a check when a signal comes, as a child's end is to the agent, and is to be asked again.
    const ATTEMPTS: usize = 100;
    let mut loaded = Err(io::ErrorKind::WouldBlock.into());
    for _ in 0..ATTEMPTS {
        // SAFETY: the attributes are those of the command; the addresses in them are of the length said, and of a C
        // string, and outlive the call, which only reads there. The answer is a new descriptor.
        loaded = unsafe { make(PROG_LOAD, &attributes) };
        if !loaded
            .as_ref()
            .is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::WouldBlock)
        {
            break;
        }
    }
    loaded
}

/// bpf(2), by a command that answers a new descriptor.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// As for [`call`]; and `command` is such a one.
pub unsafe fn make<T>(command: u32, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's.
    let fd = unsafe { call(command, attributes) }?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just answered this new descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2).
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// `attributes` is the beginning of the union's part for `command`, and what it points to is valid.
pub unsafe fn call<T>(command: u32, attributes: &T) -> io::Result<libc::c_long> {
    let attributes: *const T = attributes;
    // SAFETY: the caller's; the size is that of the attributes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_the_kernel() {
        let expected = Instruction {
            code: 0x61,
            registers: 0xa2,
            offset: -8,
            number: 0,
        };
        assert_eq!(Instruction::load(Register::R2, Register::Stack, -8), expected);
        assert_eq!(Instruction::jump_if_null(Register::R0).jumping(3).offset, 3);
        assert_eq!(Instruction::exit().jumping(3).offset, 0);
        let [map, rest] = Instruction::load_map(Register::R1, 7);
        assert_eq!((map.code, map.registers, map.number), (0x18, 0x11, 7));
        assert_eq!((rest.code, rest.registers, rest.number), (0, 0, 0));
    }
}
