//! The network that containers live in: a namespace which holds the NICs that the host has wired, as the host's
//! namespace has them, and no other.
//!
//! The machine's NICs wait in the namespace that the kernel booted with until the host names them. The agent itself is
//! in the containers' one, and with it all that it forks.

mod nic;
mod replay;

#[cfg(test)]
mod network_test;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use husk_agent_protocol::{
    limits::{MAX_NETWORK_LEN, MAX_NICS},
    messages::{self as wire, network::Nic},
};
use husk_netlink::{Error, Message, Request, Socket, kind};
use nix::sched::{CloneFlags, unshare};

use crate::fault::{Fault, describe};

/// Loopback's number in every network namespace.
pub const LOOPBACK: u32 = 1;

/// The sandbox's network.
#[derive(Debug)]
pub struct Network {
    /// In the containers' namespace.
    socket: Socket,
    machine: Option<Machine>,
    /// What the host has asked for.
    told: wire::Network,
    /// Some of that could not be done: it is tried again with the next change, which may be what it needs.
    incomplete: bool,
}

/// Where the machine's NICs are that are not wired.
#[derive(Debug)]
struct Machine {
    socket: Socket,
    namespace: OwnedFd,
    /// The containers'.
    own: OwnedFd,
    /// Their numbers there, by slot.
    nics: Vec<u32>,
}

impl Network {
    /// That of a process that is in somebody else's network: it has no NICs to wire.
    ///
    /// # Errors
    /// The kernel's.
    pub fn outside() -> io::Result<Self> {
        Ok(Self {
            socket: Socket::new()?,
            machine: None,
            told: wire::Network::default(),
            incomplete: false,
        })
    }

    /// Makes that of the machine: the calling thread's namespace keeps the NICs, and the thread moves to a new one with
    /// loopback up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of_machine() -> io::Result<Self> {
        Self::of_machine_with(nic::is_virtio)
    }

    fn of_machine_with(is_nic: impl Fn(&Message) -> bool) -> io::Result<Self> {
        let mut socket = Socket::new()?;
        let links = socket.dump(&Request::new(libc::RTM_GETLINK, 0, &[0; kind::LINK_HEADER]))?;
        let mut nics: Vec<u32> = links
            .iter()
            .filter(|link| is_nic(link))
            .filter_map(nic::index)
            .collect();
        // In the order in which the kernel found them.
        nics.sort_unstable();
        let open = || File::open("/proc/thread-self/ns/net").map(OwnedFd::from);
        let namespace = open()?;
        unshare(CloneFlags::CLONE_NEWNET)?;
        let machine = Machine {
            socket,
            namespace,
            own: open()?,
            nics,
        };
        let mut socket = Socket::new()?;
        socket.request(&nic::up(LOOPBACK))?;
        Ok(Self {
            socket,
            machine: Some(machine),
            told: wire::Network::default(),
            incomplete: false,
        })
    }

    /// Makes the network what `wanted` says.
    ///
    /// # Errors
    /// What could not be done; all else is.
    pub fn set(&mut self, wanted: wire::Network) -> Result<(), Fault> {
        check(&wanted)?;
        let told = std::mem::replace(&mut self.told, wanted.clone());
        let mut faults = Vec::new();
        let same = |a: &Nic, b: &Nic| (a.slot, a.index) == (b.slot, b.index);
        for gone in &told.nics {
            if !wanted.nics.iter().any(|nic| same(nic, gone)) {
                faults.extend(self.unwire(gone).err());
            }
        }
        let mut changed = Vec::new();
        for nic in &wanted.nics {
            let before = told.nics.iter().find(|before| same(nic, before));
            if before == Some(nic) {
                continue;
            }
            changed.push(nic);
            let done = match before {
                None => self.wire(nic),
                Some(before) => nic::change(&mut self.socket, before, nic),
            };
            faults.extend(done.err());
        }
        // What a NIC has had until now may have gone with its being down.
        let before = wire::Network {
            nics: told.nics.clone(),
            ..wire::Network::default()
        };
        replay::remove(&mut self.socket, &told, &wanted);
        let anew = self.incomplete || !changed.is_empty();
        let from = if anew { &before } else { &told };
        faults.extend(replay::add(&mut self.socket, from, &wanted).err());
        for nic in changed {
            faults.extend(nic::release(&mut self.socket, nic).err());
        }
        self.incomplete = !faults.is_empty();
        match faults.into_iter().next() {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// Moves a NIC in from the machine's namespace.
    fn wire(&mut self, nic: &Nic) -> Result<(), Fault> {
        let field = format!("network: NIC {}", nic.name);
        let Some(machine) = &mut self.machine else {
            return Err(Fault::spec(field, "the agent has no machine of its own"));
        };
        let Some(index) = machine.nics.get(nic.slot as usize) else {
            return Err(Fault::spec(
                field,
                format_args!(
                    "the machine has no NIC {}; it has {}",
                    nic.slot,
                    machine.nics.len()
                ),
            ));
        };
        machine
            .socket
            .request(&nic::moved(*index, machine.own.as_fd(), nic.index, &nic.name))
            .map_err(|error| refused(format_args!("{field}: move it in"), &error))?;
        nic::set(&mut self.socket, nic)
    }

    /// Moves a NIC back.
    fn unwire(&mut self, nic: &Nic) -> Result<(), Fault> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let Some(index) = machine.nics.get(nic.slot as usize) else {
            return Ok(());
        };
        let name = format!("husk{}", nic.slot);
        self.socket
            .request(&nic::moved(nic.index, machine.namespace.as_fd(), *index, &name))
            .map_err(|error| refused(format_args!("network: NIC {}: take it away", nic.name), &error))
    }
}

/// What the host may ask for.
fn check(wanted: &wire::Network) -> Result<(), Fault> {
    let field = "network";
    if wanted.nics.len() > MAX_NICS {
        return Err(Fault::spec(field, format_args!("has more than {MAX_NICS} NICs")));
    }
    let messages = [
        &wanted.addresses,
        &wanted.routes,
        &wanted.neighbours,
        &wanted.rules,
    ];
    let length = messages
        .into_iter()
        .flatten()
        .fold(0_usize, |sum, message| sum.saturating_add(message.len()));
    if length > MAX_NETWORK_LEN {
        return Err(Fault::spec(
            field,
            format_args!("has more than {MAX_NETWORK_LEN} bytes of addresses and routes"),
        ));
    }
    wanted.nics.iter().try_for_each(nic::check)
}

/// The kernel refused `what`.
fn refused(what: impl std::fmt::Display, error: &Error) -> Fault {
    let words = describe(&error.source);
    let reason = match error.explanation.as_str() {
        "" => words,
        text => format!("{words} ({})", text.trim_end_matches('.')),
    };
    Fault {
        kind: crate::fault::Kind::System,
        message: format!("{what}: {reason}"),
    }
}
