//! The program: one block of instructions for each rule, which either finds the rule's socket or jumps to the next.

use std::{net::IpAddr, os::fd::RawFd};

use super::{Protocol, Rule};

/// The kernel's `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    number: i32,
}

/// Registers: 0 has answers, 1 to 3 arguments, 6 the context and 7 a socket, 10 the end of the stack.
type Register = u8;
const STACK: Register = 10;
const CONTEXT: Register = 6;
const SOCKET: Register = 7;

/// Where the fields of `struct bpf_sk_lookup` are, all of 32 bits. Addresses are in the network's order, the port in
/// the host's.
mod field {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_IP4: i16 = 40;
    pub const LOCAL_IP6: i16 = 44;
    pub const LOCAL_PORT: i16 = 60;
}

/// Functions of the kernel, of linux/bpf.h.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// The answer: go on, with the socket that was assigned or by looking for one.
const SK_PASS: i32 = 1;

const fn instruction(code: u8, to: Register, from: Register, offset: i16, number: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        number,
    }
}

/// LDX, MEM, W: `to` = the field of the context.
const fn load(to: Register, offset: i16) -> Instruction {
    instruction(0x61, to, CONTEXT, offset, 0)
}

/// ST, MEM, W: a number to the stack, `offset` from its end.
const fn store(offset: i16, number: i32) -> Instruction {
    instruction(0x62, STACK, 0, offset, number)
}

/// ALU64, MOV, X.
const fn copy(to: Register, from: Register) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}

/// ALU64, MOV, K.
const fn set(to: Register, number: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, number)
}

/// ALU64, ADD, K.
const fn add(to: Register, number: i32) -> Instruction {
    instruction(0x07, to, 0, 0, number)
}

/// JMP32, JNE, K: over the next `offset` instructions.
const fn jump_unless_equal(register: Register, number: i32, offset: i16) -> Instruction {
    instruction(0x56, register, 0, offset, number)
}

/// JMP, JEQ, K.
const fn jump_if_null(register: Register, offset: i16) -> Instruction {
    instruction(0x15, register, 0, offset, 0)
}

/// LD, DW, IMM, of two instructions: `to` = the map.
const fn load_map(to: Register, map: RawFd) -> [Instruction; 2] {
    const PSEUDO_MAP_FD: Register = 1;
    [
        instruction(0x18, to, PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
    ]
}

const fn call(function: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, function)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0, 0);

/// The program for `rules`, whose sockets are in `map`, by the rules' places.
pub fn of(rules: &[Rule<'_>], map: RawFd) -> Vec<Instruction> {
    let mut program = vec![copy(CONTEXT, 1)];
    for (place, rule) in (0..).zip(rules) {
        let found = found(place, map);
        let conditions = conditions(rule);
        // Each condition is a load and a jump past the rest of the block.
        let mut left = conditions.len() * 2 + found.len();
        for (field, number) in conditions {
            left -= 2;
            let rest = i16::try_from(left).unwrap_or(i16::MAX);
            program.extend([load(2, field), jump_unless_equal(2, number, rest)]);
        }
        program.extend(found);
    }
    program.extend([set(0, SK_PASS), EXIT]);
    program
}

/// The fields that a packet must have for the rule.
fn conditions(rule: &Rule<'_>) -> Vec<(i16, i32)> {
    let protocol = match rule.protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
    };
    let mut conditions = vec![(field::PROTOCOL, protocol)];
    match rule.address {
        IpAddr::V4(address) => conditions.extend([
            (field::FAMILY, libc::AF_INET),
            (field::LOCAL_IP4, i32::from_ne_bytes(address.octets())),
        ]),
        IpAddr::V6(address) => {
            conditions.push((field::FAMILY, libc::AF_INET6));
            let bits = address.to_bits();
            let words = [96, 64, 32, 0].map(|shift| ((bits >> shift) as u32).to_be() as i32);
            conditions.extend((field::LOCAL_IP6..).step_by(4).zip(words));
        }
    }
    if let Some(port) = rule.port {
        conditions.push((field::LOCAL_PORT, port.into()));
    }
    conditions
}

/// Assigns the socket at `place` and ends. A socket that is not there any more is passed over.
fn found(place: i32, map: RawFd) -> Vec<Instruction> {
    let [map, map_rest] = load_map(1, map);
    let rest = [
        copy(SOCKET, 0),
        copy(1, CONTEXT),
        copy(2, SOCKET),
        set(3, 0),
        call(SK_ASSIGN),
        copy(1, SOCKET),
        call(SK_RELEASE),
        set(0, SK_PASS),
        EXIT,
    ];
    let mut block = vec![
        store(-4, place),
        map,
        map_rest,
        copy(2, STACK),
        add(2, -4),
        call(MAP_LOOKUP_ELEM),
        jump_if_null(0, rest.len() as i16),
    ];
    block.extend(rest);
    block
}
