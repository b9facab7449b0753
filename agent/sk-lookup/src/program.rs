//! The program: one block of instructions for each rule, which either finds the rule's socket or jumps to the next.

use std::{net::IpAddr, os::fd::RawFd};

use husk_bpf::{
    Instruction,
    Register::{self, *},
};

use super::{Protocol, Rule};

/// Outlive the calls: the context, and a socket.
const CONTEXT: Register = R6;
const SOCKET: Register = R7;

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
const SK_PASS: u32 = 1;

/// The program for `rules`, whose sockets are in `map`, by the rules' places.
pub fn of(rules: &[Rule<'_>], map: RawFd) -> Vec<Instruction> {
    let mut program = vec![Instruction::copy_long(CONTEXT, R1)];
    for (place, rule) in (0..).zip(rules) {
        let found = found(place, map);
        let conditions = conditions(rule);
        // Each condition is a load and a jump past the rest of the block.
        let mut left = conditions.len() * 2 + found.len();
        for (field, number) in conditions {
            left -= 2;
            program.extend([
                Instruction::load(R2, CONTEXT, field),
                Instruction::jump_unless_equal(R2, number as u32).jumping(left),
            ]);
        }
        program.extend(found);
    }
    program.extend([Instruction::set(R0, SK_PASS), Instruction::exit()]);
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
    let [map, map_rest] = Instruction::load_map(R1, map);
    let rest = [
        Instruction::copy_long(SOCKET, R0),
        Instruction::copy_long(R1, CONTEXT),
        Instruction::copy_long(R2, SOCKET),
        Instruction::set(R3, 0),
        Instruction::call(SK_ASSIGN),
        Instruction::copy_long(R1, SOCKET),
        Instruction::call(SK_RELEASE),
        Instruction::set(R0, SK_PASS),
        Instruction::exit(),
    ];
    let mut block = vec![
        Instruction::store(-4, place),
        map,
        map_rest,
        Instruction::copy_long(R2, Stack),
        Instruction::add_long(R2, -4),
        Instruction::call(MAP_LOOKUP_ELEM),
        Instruction::jump_if_null(R0).jumping(rest.len()),
    ];
    block.extend(rest);
    block
}
