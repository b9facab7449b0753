//! Which socket of a network namespace gets a new connection or a datagram, whatever port it is bound to: a program of
//! type `BPF_PROG_TYPE_SK_LOOKUP` (Linux 5.9, bpf-sk_lookup in the kernel's documentation), attached to the namespace.
//!
//! The kernel asks it when a packet is for this host and belongs to no connection, before it looks for a listener. A
//! packet that no rule names goes on to whoever listens, as if nothing were here.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

mod program;

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

/// Most rules of a lookup: what fits a program whose jumps all reach its end.
pub const MAX_RULES: usize = 64;

/// What a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// New TCP connections; the socket is a listening one.
    Tcp,
    /// UDP datagrams; the socket is bound and not connected.
    Udp,
}

/// Who gets what.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// Of this protocol,
    pub protocol: Protocol,
    /// sent to this address
    pub address: IpAddr,
    /// and port; `None`: any.
    pub port: Option<u16>,
    /// The socket, which is in the namespace. It keeps its own address: a reply to a datagram comes from there.
    pub socket: BorrowedFd<'a>,
}

/// Rules in force. Dropped, or with the process, they are gone; and so they are when the namespace is.
#[derive(Debug)]
pub struct Lookup {
    _link: OwnedFd,
}

/// Commands, types and flags of bpf(2), of linux/bpf.h.
const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const LINK_CREATE: u32 = 28;
const SOCKMAP: u32 = 15;
const SK_LOOKUP_PROGRAM: u32 = 30;
const SK_LOOKUP_ATTACH: u32 = 36;

/// The beginnings of the parts of `union bpf_attr`; the kernel takes what is beyond for zero.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LinkAttributes {
    program: RawFd,
    target: RawFd,
    attach: u32,
    flags: u32,
}

impl Lookup {
    /// Puts rules into force in a network namespace; of those that fit a packet the first counts.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_BPF and CAP_NET_ADMIN, `EINVAL` where it has no such programs; `E2BIG` for
    /// more than [`MAX_RULES`].
    pub fn attach(namespace: BorrowedFd<'_>, rules: &[Rule<'_>]) -> io::Result<Self> {
        if rules.len() > MAX_RULES {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let sockets = map(rules)?;
        let program = program::of(rules, sockets.as_raw_fd());
        let program = husk_bpf::load(SK_LOOKUP_PROGRAM, SK_LOOKUP_ATTACH, "husk_sk_lookup", &program)?;
        let attributes = LinkAttributes {
            program: program.as_raw_fd(),
            target: namespace.as_raw_fd(),
            attach: SK_LOOKUP_ATTACH,
            flags: 0,
        };
        // SAFETY: the attributes are those of the command and have descriptors and integers only. The answer is a
        // new descriptor.
        let link = unsafe { husk_bpf::make(LINK_CREATE, &attributes) }?;
        // The link keeps the program, and that the map.
        Ok(Self { _link: link })
    }
}

/// The rules' sockets, by the rules' places.
fn map(rules: &[Rule<'_>]) -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        kind: SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: u32::try_from(rules.len().max(1)).map_err(io::Error::other)?,
    };
    // SAFETY: the attributes are those of the command and have integers only. The answer is a new descriptor.
    let map = unsafe { husk_bpf::make(MAP_CREATE, &attributes) }?;
    for (place, rule) in rules.iter().enumerate() {
        let key = u32::try_from(place).map_err(io::Error::other)?;
        let value = u64::try_from(rule.socket.as_raw_fd()).map_err(io::Error::other)?;
        let attributes = UpdateAttributes {
            map: map.as_raw_fd(),
            padding: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        // SAFETY: the attributes are those of the command; key and value are of the map's sizes and outlive the call,
        // which only reads them.
        unsafe { husk_bpf::call(MAP_UPDATE, &attributes) }?;
    }
    Ok(map)
}

#[cfg(test)]
#[path = "lookup_test.rs"]
mod tests;
