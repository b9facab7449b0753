//! A sandbox's network: the NICs of a network namespace, each bridged to a tap that a NIC of the machine is plugged
//! into.
//!
//! A NIC keeps all that it has in the namespace, but its frames pass the namespace's own stack by: see [`filter`]. What
//! the guest has to know of it is seen again whenever somebody changes it: see [`view`].

mod filter;
pub mod tap;
pub mod view;

#[cfg(test)]
mod network_test;

use std::{fs, io, os::fd::OwnedFd};

use husk_netlink::{Request, Socket, kind};

use self::{
    filter::Fate,
    view::{Link, Nic, Obstacle, View},
};
use super::{namespaces::Namespace, netns::within};

/// What the bridge knows of a machine's NIC.
#[derive(Debug)]
struct Slot {
    /// The tap's number.
    tap: u32,
    /// The NIC that it is wired to: number, MAC and MTU.
    wired: Option<(u32, [u8; 6], u32)>,
}

/// The network of a sandbox, with the taps for its machine.
#[derive(Debug)]
pub struct Network {
    socket: Socket,
    slots: Vec<Slot>,
}

/// A tap for a NIC of the machine.
#[derive(Debug)]
pub struct Tap {
    /// The NIC's MAC address.
    pub mac: [u8; 6],
    /// One for each of its queues.
    pub queues: Vec<OwnedFd>,
    /// /dev/vhost-net, if the host's kernel is to move its frames.
    pub vhost: Option<OwnedFd>,
}

/// What is seen when the network is followed.
#[derive(Debug)]
pub struct Followed {
    /// What the guest has to know.
    pub view: View,
    /// Why it does not get all of it.
    pub left_out: Option<NetworkError>,
}

/// How many NICs a machine gets.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// More than there are when it starts; `None`: two if there are none, as with an engine that wires late, and none
    /// otherwise.
    pub spare: Option<usize>,
    /// Most that there can be.
    pub most: usize,
    /// Pairs of queues of each.
    pub queues: u8,
    /// The host's kernel moves their frames.
    pub vhost: bool,
}

/// Spare NICs of a machine whose network is still empty.
const SPARE: usize = 2;

/// How many frames wait in each queue of a tap for the guest; what is more is dropped. As many as Linux gives a NIC, and the
/// same as it holds back for each CPU (`net.core.netdev_max_backlog`): what one passes on in one go, the next can take. A
/// tap's own default is half of it.
const QUEUE_LENGTH: u32 = 1000;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The machine has no NIC for it.
    #[error(
        "NIC {name} of the network namespace cannot be shown to the guest: its machine was started with {count} NICs and \
         all are in use; for more set network.spare_nics in husk.toml (at most {most} NICs are possible)"
    )]
    TooMany {
        /// The NIC on the host.
        name: String,
        /// NICs of the machine.
        count: usize,
        /// Most that a machine can have.
        most: usize,
    },
    /// A guest cannot have it.
    #[error("NIC {name} of the network namespace cannot be shown to the guest: {why}")]
    Unfit {
        /// The NIC on the host.
        name: String,
        /// What is in the way.
        why: Obstacle,
    },
    /// Two machines cannot have the same NICs.
    #[error(
        "the network namespace belongs to another sandbox that runs (its tap {0} is there); containers that share a network \
         must be of one sandbox"
    )]
    Taken(String),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |source| NetworkError::Host { what, source }
}

impl Network {
    /// Makes the taps of a sandbox in its network namespace, and wires the NICs that are there. Gives what the guest has
    /// to know, too.
    ///
    /// # Errors
    /// Then nothing of it is left but what [`clear`] removes.
    pub fn open(namespace: &Namespace, size: Size) -> Result<(Self, Vec<Tap>, View), NetworkError> {
        let mut socket =
            within(namespace, Socket::new).map_err(host("cannot enter the network namespace"))?;
        let list = |socket: &mut Socket| view::links(socket).map_err(host("cannot list the NICs"));
        let links = list(&mut socket)?;
        if let Some(taken) = links.iter().find(|link| link.nic.name.starts_with(tap::NAME)) {
            return Err(NetworkError::Taken(taken.nic.name.clone()));
        }
        // A sandbox that was killed may have left them.
        for link in &links {
            filter::remove(&mut socket, link.nic.index).map_err(host("cannot remove old filters"))?;
        }
        let found = links.iter().filter(|link| link.is_nic).count();
        let spare = size.spare.unwrap_or(if found == 0 { SPARE } else { 0 });
        // Too few are an error below, which names the NIC.
        let count = found.saturating_add(spare).min(size.most);
        let queues = size.queues;
        let queues = within(namespace, move || {
            (0..count)
                .map(|number| tap_of_slot(number, queues))
                .collect::<io::Result<Vec<_>>>()
        })
        .map_err(host("cannot make a tap"))?;
        let vhost = (0..count).map(|_| size.vhost.then(tap::vhost).transpose());
        let vhost = vhost.collect::<io::Result<Vec<_>>>();
        let vhost = vhost.map_err(host(
            "network.vhost is set in husk.toml, and cannot be had on this host",
        ))?;

        let links = list(&mut socket)?;
        let mut slots = Vec::with_capacity(count);
        for number in 0..count {
            let name = name_of(number);
            let tap = links.iter().find(|link| link.nic.name == name);
            let tap = tap.map(|link| link.nic.index);
            let tap =
                tap.ok_or_else(|| host("cannot find a tap")(io::Error::new(io::ErrorKind::NotFound, name)))?;
            slots.push(Slot { tap, wired: None });
        }
        let mut this = Self { socket, slots };
        for slot in &this.slots {
            // Until it is wired, nothing that the guest sends goes anywhere.
            filter::set(&mut this.socket, slot.tap, Fate::Drop)
                .and_then(|()| {
                    this.socket
                        .request(&changed(slot.tap, None).with_u32(libc::IFLA_TXQLEN, QUEUE_LENGTH))
                        .map_err(io::Error::from)
                })
                .map_err(host("cannot set up a tap"))?;
        }
        let Followed { view, left_out } = this.follow(size.most)?;
        if let Some(error) = left_out {
            return Err(error);
        }
        let taps = queues.into_iter().zip(vhost).enumerate();
        let taps = taps.map(|(number, (queues, vhost))| {
            let wired = this.slots.get(number).and_then(|slot| slot.wired);
            let mac = wired.map_or_else(|| spare_mac(number), |(_, mac, _)| mac);
            Tap { mac, queues, vhost }
        });
        let taps = taps.collect();
        Ok((this, taps, view))
    }

    /// Wires NICs that are new and lets go of those that are gone.
    ///
    /// # Errors
    /// What could not be done.
    pub fn follow(&mut self, most: usize) -> Result<Followed, NetworkError> {
        let links = view::links(&mut self.socket).map_err(host("cannot list the NICs"))?;
        let unfit = links.iter().find_map(|link| {
            let (name, why) = (link.nic.name.clone(), link.obstacle.clone()?);
            Some(NetworkError::Unfit { name, why })
        });
        let mut nics: Vec<Nic> = links
            .into_iter()
            .filter(|link| link.is_nic)
            .map(|Link { nic, .. }| nic)
            .collect();
        for number in 0..self.slots.len() {
            let wired = self.slots.get(number).and_then(|slot| slot.wired);
            let Some((index, ..)) = wired else { continue };
            if !nics.iter().any(|nic| nic.index == index) {
                self.unwire(number)?;
            }
        }
        let mut left_out = unfit;
        for nic in &nics {
            let free = || self.slots.iter().position(|slot| slot.wired.is_none());
            match self.slot_of(nic.index).or_else(free) {
                Some(number) => self.wire(number, nic)?,
                None => {
                    left_out.get_or_insert(NetworkError::TooMany {
                        name: nic.name.clone(),
                        count: self.slots.len(),
                        most,
                    });
                }
            }
        }
        nics.retain(|nic| self.slot_of(nic.index).is_some());
        let view = view::look(&mut self.socket, nics).map_err(host("cannot list addresses and routes"))?;
        Ok(Followed { view, left_out })
    }

    /// Which of the machine's NICs is wired to the NIC of this number.
    pub fn slot_of(&self, index: u32) -> Option<usize> {
        self.slots
            .iter()
            .position(|slot| slot.wired.is_some_and(|(wired, ..)| wired == index))
    }

    fn wire(&mut self, number: usize, nic: &Nic) -> Result<(), NetworkError> {
        let wanted = Some((nic.index, nic.mac, nic.mtu));
        let Some(slot) = self.slots.get_mut(number).filter(|slot| slot.wired != wanted) else {
            return Ok(());
        };
        let failed = || format!("cannot bridge NIC {}", nic.name);
        let is_new = slot.wired.is_none();
        // From here on it is to be undone.
        slot.wired = wanted;
        let (socket, tap) = (&mut self.socket, slot.tap);
        socket
            .request(&changed(tap, Some(nic.mtu)))
            .map_err(io::Error::from)
            .and_then(|()| filter::set(socket, tap, Fate::RedirectFrom(nic.mac, nic.index)))
            .and_then(|()| {
                if is_new {
                    filter::set(socket, nic.index, Fate::Redirect(tap))?;
                }
                Ok(())
            })
            .map_err(host(failed()))?;
        if is_new {
            tracing::info!(nic = nic.name, number, "a NIC is wired");
        }
        Ok(())
    }

    fn unwire(&mut self, number: usize) -> Result<(), NetworkError> {
        let Some(slot) = self.slots.get_mut(number) else {
            return Ok(());
        };
        let Some((index, ..)) = slot.wired.take() else {
            return Ok(());
        };
        tracing::info!(number, "a NIC is gone");
        filter::set(&mut self.socket, slot.tap, Fate::Drop)
            // It is there still when it has got a master.
            .and_then(|()| filter::remove(&mut self.socket, index))
            .map_err(host("cannot let go of a NIC"))
    }
}

/// Takes back what was done to the NICs of a namespace. The taps go with their descriptors.
///
/// # Errors
/// The kernel's; the rest is done.
pub fn clear(namespace: &Namespace) -> io::Result<()> {
    let mut socket = within(namespace, Socket::new)?;
    let mut result = Ok(());
    for link in view::links(&mut socket)? {
        if !link.nic.name.starts_with(tap::NAME) {
            result = result.and(filter::remove(&mut socket, link.nic.index));
        }
    }
    result
}

/// As [`clear`], where the sandbox's machine is gone: a tap that is there is another's, and with it the NICs.
///
/// # Errors
/// The kernel's.
pub fn clear_dead(namespace: &Namespace) -> io::Result<()> {
    let mut socket = within(namespace, Socket::new)?;
    let links = view::links(&mut socket)?;
    if links.iter().any(|link| link.nic.name.starts_with(tap::NAME)) {
        return Ok(());
    }
    clear(namespace)
}

/// A socket that becomes readable when something changes that the guest has to know.
///
/// # Errors
/// The kernel's.
pub fn monitor(namespace: &Namespace) -> io::Result<Socket> {
    within(namespace, || {
        Socket::monitor(&[
            kind::GROUP_LINK,
            kind::GROUP_NEIGHBOUR,
            kind::GROUP_ADDRESS4,
            kind::GROUP_ROUTE4,
            kind::GROUP_RULE4,
            kind::GROUP_ADDRESS6,
            kind::GROUP_ROUTE6,
            kind::GROUP_RULE6,
        ])
    })
}

fn name_of(number: usize) -> String {
    format!("{}{number}", tap::NAME)
}

/// A MAC address for a NIC that has no other yet: nobody but the guest's kernel sees it.
fn spare_mac(number: usize) -> [u8; 6] {
    let [husk @ .., _] = *b"\x02husk\0";
    let [a, b, c, d, e] = husk;
    [a, b, c, d, e, number as u8]
}

/// Makes the tap of a slot, which has no IPv6: the host's stack would talk to the guest by it. In the namespace.
fn tap_of_slot(number: usize, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let name = name_of(number);
    let descriptors = tap::make(&name, queues)?;
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        // A host without IPv6.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(descriptors),
    }
}

/// Brings a tap up, which has no addresses to be asked for, and sets its MTU.
fn changed(tap: u32, mtu: Option<u32>) -> Request {
    let flags = (libc::IFF_UP | libc::IFF_NOARP) as u32;
    let mut header = [0; kind::LINK_HEADER];
    for (to, from) in header.chunks_mut(4).zip([0, tap, flags, flags]) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    let request = Request::new(libc::RTM_SETLINK, 0, &header);
    match mtu {
        Some(mtu) => request.with_u32(libc::IFLA_MTU, mtu),
        None => request,
    }
}
