//! What a network namespace looks like: NICs, addresses, routes, neighbours and rules, as the guest is to have them.

use std::{collections::HashSet, io};

use husk_netlink::{
    Attribute, Message, Request, Socket, attributes, kind,
    message::{u16_at, u32_at},
};

use super::tap;

/// Loopback's number in every network namespace.
const LOOPBACK: u32 = 1;

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;

/// Links that the kernel makes in every new namespace, for want of anything else to do: no NICs while they are down.
const FALLBACKS: [&str; 4] = ["gretap", "erspan", "ip6gretap", "ip6erspan"];

/// `RTPROT_KERNEL` and `RTPROT_RA`: made by the kernel, for itself or as a router told it.
const PROTOCOL_KERNEL: u8 = 2;
const PROTOCOL_RA: u8 = 9;

/// A NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nic {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The length of its queue in frames.
    pub queue_length: u32,
    /// `IFF_…`.
    pub flags: u32,
    /// How the kernel makes its link-local IPv6 address: `IN6_ADDR_GEN_MODE_…`.
    pub address_mode: u8,
    /// Its settings: names below `/proc/sys/net`, without the NIC (`ipv4/rp_filter`), and values.
    pub settings: Vec<(String, i32)>,
}

/// What is seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The NICs, in the order of their numbers.
    pub nics: Vec<Nic>,
    /// The bodies of messages `RTM_NEWADDR`, of these NICs and loopback.
    pub addresses: Vec<Vec<u8>>,
    /// The bodies of messages `RTM_NEWROUTE`.
    pub routes: Vec<Vec<u8>>,
    /// The bodies of messages `RTM_NEWNEIGH`.
    pub neighbours: Vec<Vec<u8>>,
    /// The bodies of messages `RTM_NEWRULE`, without those that every namespace has.
    pub rules: Vec<Vec<u8>>,
}

/// A link of any kind.
#[derive(Clone, Debug)]
pub struct Link {
    /// What there would be of it as a NIC.
    pub nic: Nic,
    /// It is one that a guest can have.
    pub is_nic: bool,
    /// Why a guest cannot have it, though a container would.
    pub obstacle: Option<Obstacle>,
}

/// Why a link cannot be shown to a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// It has no frames that a machine's NIC could take.
    #[error("it is no Ethernet device (its kind is {0:?}), and the machine has no others")]
    NotEthernet(String),
    /// The kernel hands packets to the namespace's stack as if they came from another device.
    #[error(
        "it is an ipvlan in mode l3s, whose packets pass the device by; use the modes l2 or l3, or a macvlan"
    )]
    L3s,
    /// What is for it goes to the guest with all else that arrives at the other.
    #[error(
        "it lies on {0} of the same namespace, which is the guest's; leave {0} on the host, or make the device in the container"
    )]
    OnAnother(String),
}

/// Kinds of links that share another one, its `IFLA_LINK`.
const UPPER: [&str; 6] = ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"];

/// `IFLA_IPVLAN_MODE` and `IPVLAN_MODE_L3S` (`linux/if_link.h`).
const IPVLAN_MODE: u16 = 1;
const L3S: u16 = 2;

/// Lists the links but loopback.
///
/// # Errors
/// The kernel's.
pub fn links(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let list = socket.dump(&Request::new(libc::RTM_GETLINK, 0, &[0; kind::LINK_HEADER]))?;
    let found: Vec<(Link, Option<u32>)> = list.iter().filter_map(link).collect();
    let lower = |(_, lower): &(Link, Option<u32>)| {
        let on = found.iter().find(|(link, _)| Some(link.nic.index) == *lower);
        on.filter(|(link, _)| link.is_nic)
            .map(|(link, _)| link.nic.name.clone())
    };
    let lowers: Vec<Option<String>> = found.iter().map(lower).collect();
    let mut links: Vec<Link> = found.into_iter().map(|(link, _)| link).collect();
    for (link, lower) in links.iter_mut().zip(lowers) {
        let lower = lower.filter(|_| link.is_nic).map(Obstacle::OnAnother);
        link.obstacle = link.obstacle.take().or(lower);
        link.is_nic &= link.obstacle.is_none();
    }
    links.sort_unstable_by_key(|link| link.nic.index);
    Ok(links)
}

/// A link, and the number of the one in its namespace that it lies on.
fn link(message: &Message) -> Option<(Link, Option<u32>)> {
    let hardware = u16_at(&message.body, 2)?;
    let mut nic = Nic {
        index: u32_at(&message.body, 4)?,
        flags: u32_at(&message.body, 8)?,
        ..Nic::default()
    };
    let mut is_nic = hardware == ETHERNET && nic.index != LOOPBACK;
    let mut has_mac = false;
    let mut has_master = false;
    let (mut lower, mut lower_is_elsewhere) = (None, false);
    let (mut kind, mut mode) = (String::new(), None);
    for found in message.attributes(kind::LINK_HEADER) {
        match found.kind {
            libc::IFLA_IFNAME => nic.name = found.text()?.to_owned(),
            libc::IFLA_ADDRESS => {
                if let Ok(mac) = found.data.try_into() {
                    nic.mac = mac;
                    has_mac = true;
                }
            }
            libc::IFLA_MTU => nic.mtu = found.u32()?,
            libc::IFLA_TXQLEN => nic.queue_length = found.u32()?,
            // What arrives there is its master's.
            libc::IFLA_MASTER => has_master = true,
            libc::IFLA_LINK => lower = found.u32(),
            libc::IFLA_LINK_NETNSID => lower_is_elsewhere = true,
            libc::IFLA_LINKINFO => {
                for inner in found.nested() {
                    match inner.kind {
                        libc::IFLA_INFO_KIND => inner.text()?.clone_into(&mut kind),
                        libc::IFLA_INFO_DATA => {
                            let found = inner.nested().find(|data| data.kind == IPVLAN_MODE);
                            mode = found.and_then(|data| u16_at(data.data, 0));
                        }
                        _ => {}
                    }
                }
            }
            libc::IFLA_AF_SPEC => families(&found, &mut nic),
            _ => {}
        }
    }
    let is_up = nic.flags & libc::IFF_UP as u32 != 0;
    let is_ours = nic.name.starts_with(tap::NAME);
    is_nic &= has_mac && !has_master && !is_ours && (is_up || !FALLBACKS.contains(&kind.as_str()));
    let mut obstacle = None;
    if hardware != ETHERNET && is_up && !has_master {
        obstacle = Some(Obstacle::NotEthernet(kind.clone()));
    } else if is_nic && kind == "ipvlan" && mode == Some(L3S) {
        obstacle = Some(Obstacle::L3s);
    }
    let lower = lower.filter(|_| !lower_is_elsewhere && UPPER.contains(&kind.as_str()));
    let link = Link {
        nic,
        is_nic,
        obstacle,
    };
    (link.nic.index != LOOPBACK).then_some((link, lower))
}

/// Settings by their places in `IFLA_INET_CONF`, counted from 1, and in `IFLA_INET6_CONF`, counted from 0
/// (`linux/ip.h`, `linux/ipv6.h`).
const SETTINGS4: [(usize, &str); 19] = [
    (1, "forwarding"),
    (3, "proxy_arp"),
    (4, "accept_redirects"),
    (5, "secure_redirects"),
    (6, "send_redirects"),
    (7, "shared_media"),
    (8, "rp_filter"),
    (9, "accept_source_route"),
    (11, "log_martians"),
    (13, "arp_filter"),
    (18, "arp_announce"),
    (19, "arp_ignore"),
    (20, "promote_secondaries"),
    (21, "arp_accept"),
    (22, "arp_notify"),
    (23, "accept_local"),
    (24, "src_valid_mark"),
    (26, "route_localnet"),
    (29, "ignore_routes_with_linkdown"),
];
const SETTINGS6: [(usize, &str); 14] = [
    (26, "disable_ipv6"),
    (0, "forwarding"),
    (1, "hop_limit"),
    (3, "accept_ra"),
    (4, "accept_redirects"),
    (5, "autoconf"),
    (6, "dad_transmits"),
    (7, "router_solicitations"),
    (10, "use_tempaddr"),
    (17, "accept_ra_defrtr"),
    (18, "accept_ra_pinfo"),
    (22, "proxy_ndp"),
    (24, "accept_source_route"),
    (27, "accept_dad"),
];

fn families(found: &Attribute<'_>, nic: &mut Nic) {
    let number =
        |data: &[u8], place: usize| u32_at(data, place.saturating_mul(4)).map(|number| number as i32);
    for family in found.nested() {
        for inner in family.nested() {
            match (i32::from(family.kind), inner.kind) {
                (libc::AF_INET, kind::IFLA_INET_CONF) => {
                    let settings = SETTINGS4.iter().filter_map(|(place, name)| {
                        let value = number(inner.data, place.checked_sub(1)?)?;
                        Some((format!("ipv4/{name}"), value))
                    });
                    nic.settings.extend(settings);
                }
                (libc::AF_INET6, kind::IFLA_INET6_CONF) => {
                    let settings = SETTINGS6.iter().filter_map(|(place, name)| {
                        Some((format!("ipv6/{name}"), number(inner.data, *place)?))
                    });
                    nic.settings.extend(settings);
                }
                (libc::AF_INET6, kind::IFLA_INET6_ADDR_GEN_MODE) => {
                    nic.address_mode = inner.data.first().copied().unwrap_or(0);
                }
                _ => {}
            }
        }
    }
}

/// Looks at all that belongs to `nics` and to loopback.
///
/// # Errors
/// The kernel's.
pub fn look(socket: &mut Socket, nics: Vec<Nic>) -> io::Result<View> {
    let indexes: HashSet<u32> = nics.iter().map(|nic| nic.index).chain([LOOPBACK]).collect();
    let mut view = View {
        nics,
        ..View::default()
    };
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut list = |kind: u16, length: usize| {
            let mut header = vec![0; length];
            if let Some(first) = header.first_mut() {
                *first = family as u8;
            }
            match socket.dump(&Request::new(kind, 0, &header)) {
                Ok(list) => Ok(list),
                // A host without this family.
                Err(error) if error.number() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
                Err(error) => Err(io::Error::from(error)),
            }
        };
        let of = |list: Vec<Message>, keep: &dyn Fn(Vec<u8>) -> Option<Vec<u8>>| -> Vec<Vec<u8>> {
            // A kernel without this family may answer for all of them.
            let own = list
                .into_iter()
                .filter(|message| message.body.first() == Some(&(family as u8)));
            own.filter_map(|message| keep(message.body)).collect()
        };
        // Routes first: whoever is just wiring adds the address that a route needs before it.
        let routes = list(libc::RTM_GETROUTE, kind::ROUTE_HEADER)?;
        view.routes.extend(of(routes, &|body| route(body, &indexes)));
        let addresses = list(libc::RTM_GETADDR, kind::ADDRESS_HEADER)?;
        let mut addresses = of(addresses, &|body| address(body, &indexes));
        if family == libc::AF_INET6 {
            // The kernel puts a new one before those of its kind.
            addresses.reverse();
        }
        view.addresses.extend(addresses);
        let neighbours = list(libc::RTM_GETNEIGH, kind::NEIGHBOUR_HEADER)?;
        view.neighbours
            .extend(of(neighbours, &|body| neighbour(body, &indexes)));
        let rules = list(libc::RTM_GETRULE, kind::ROUTE_HEADER)?;
        view.rules.extend(of(rules, &rule));
    }
    Ok(view)
}

/// A message's body less the attributes `without`, others passed through `change`.
fn rebuilt(
    body: &[u8],
    header: usize,
    without: &[u16],
    mut change: impl FnMut(Attribute<'_>) -> Option<Vec<u8>>,
) -> Option<Request> {
    let mut request = Request::new(0, 0, body.get(..header)?);
    for found in attributes(body.get(header..)?) {
        if !without.contains(&found.kind) {
            let changed = change(found);
            request = request.with(found.kind, changed.as_deref().unwrap_or(found.data));
        }
    }
    Some(request)
}

fn unchanged(_: Attribute<'_>) -> Option<Vec<u8>> {
    None
}

/// An address as an administrator would add it: without its age and what the kernel found out.
fn address(mut body: Vec<u8>, indexes: &HashSet<u32>) -> Option<Vec<u8>> {
    const KEPT: u32 = libc::IFA_F_NODAD
        | libc::IFA_F_HOMEADDRESS
        | libc::IFA_F_MANAGETEMPADDR
        | libc::IFA_F_NOPREFIXROUTE
        | libc::IFA_F_MCAUTOJOIN;
    let index = u32_at(&body, 4)?;
    if !indexes.contains(&index) {
        return None;
    }
    let found = |kind: u16| {
        attributes(body.get(kind::ADDRESS_HEADER..).unwrap_or_default()).find(|found| found.kind == kind)
    };
    let proto = found(kind::IFA_PROTO).and_then(|found| found.data.first().copied());
    let flags = found(libc::IFA_FLAGS).and_then(|found| found.u32()).unwrap_or(0);
    // The guest's kernel hears the routers itself. Of IPv4 the same flag says that an address is not a network's first.
    let is_temporary = body.first() == Some(&(libc::AF_INET6 as u8)) && flags & libc::IFA_F_TEMPORARY != 0;
    if proto == Some(kind::IFAPROT_KERNEL_RA) || is_temporary {
        return None;
    }
    let own = found(libc::IFA_LOCAL).or_else(|| found(libc::IFA_ADDRESS))?.data;
    let own_loopback = match (<[u8; 4]>::try_from(own), <[u8; 16]>::try_from(own)) {
        (Ok(own), _) => std::net::Ipv4Addr::from(own) == std::net::Ipv4Addr::LOCALHOST,
        (_, Ok(own)) => std::net::Ipv6Addr::from(own) == std::net::Ipv6Addr::LOCALHOST,
        _ => return None,
    };
    if index == LOOPBACK && own_loopback {
        return None;
    }
    // `ifa_flags`, the lower ones.
    if let Some(field) = body.get_mut(2) {
        *field &= KEPT as u8;
    }
    let request = rebuilt(&body, kind::ADDRESS_HEADER, &[libc::IFA_CACHEINFO], |found| {
        (found.kind == libc::IFA_FLAGS).then(|| (found.u32().unwrap_or(0) & KEPT).to_ne_bytes().to_vec())
    })?;
    Some(request.body().to_vec())
}

/// Of a next hop's flags and of a route's, those that say what is wanted: `RTNH_F_ONLINK`, `RTNH_F_PERVASIVE`.
const HOP_FLAGS: u8 = 4 | 2;

/// A route as an administrator would add it.
fn route(mut body: Vec<u8>, indexes: &HashSet<u32>) -> Option<Vec<u8>> {
    let byte = |offset: usize| body.get(offset).copied();
    let (table, protocol, kind) = (byte(4)?, byte(5)?, byte(7)?);
    let flags = u32_at(&body, 8)?;
    // A container's kernel makes its own for its own addresses. Of the rest it makes the same, unless somebody has
    // removed some.
    let is_own = protocol == PROTOCOL_KERNEL && (table == libc::RT_TABLE_LOCAL || kind != libc::RTN_UNICAST);
    if is_own || protocol == PROTOCOL_RA || flags & libc::RTM_F_CLONED != 0 {
        return None;
    }
    let mut is_ours = true;
    for found in attributes(body.get(kind::ROUTE_HEADER..)?) {
        match found.kind {
            libc::RTA_OIF => is_ours &= indexes.contains(&found.u32()?),
            libc::RTA_MULTIPATH => is_ours &= hops(found.data).all(|hop| indexes.contains(&hop)),
            _ => {}
        }
    }
    if !is_ours {
        return None;
    }
    // `rtm_flags`.
    if let Some(field) = body.get_mut(8..12) {
        field.copy_from_slice(&(flags & u32::from(HOP_FLAGS)).to_ne_bytes());
    }
    let without = [libc::RTA_CACHEINFO, kind::RTA_NH_ID];
    let request = rebuilt(&body, kind::ROUTE_HEADER, &without, |found| {
        (found.kind == libc::RTA_MULTIPATH).then(|| with_clean_hops(found.data))
    })?;
    Some(request.body().to_vec())
}

/// The devices of `struct rtnexthop`s: each has its length, flags, weight and device, and attributes.
fn hops(mut data: &[u8]) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(data, 0)?).max(8);
        let device = u32_at(data, 4)?;
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(device)
    })
}

fn with_clean_hops(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    let mut at = 0;
    while let Some(length) = u16_at(&data, at) {
        if let Some(flags) = data.get_mut(at.saturating_add(2)) {
            *flags &= HOP_FLAGS;
        }
        at = at.saturating_add(usize::from(length).max(8).next_multiple_of(4));
    }
    data
}

/// A neighbour that somebody has added for good.
fn neighbour(body: Vec<u8>, indexes: &HashSet<u32>) -> Option<Vec<u8>> {
    let state = u16_at(&body, 8)?;
    if !indexes.contains(&u32_at(&body, 4)?) || state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let without = [libc::NDA_CACHEINFO, libc::NDA_PROBES];
    let request = rebuilt(&body, kind::NEIGHBOUR_HEADER, &without, unchanged)?;
    Some(request.body().to_vec())
}

/// A rule but for the three that every namespace has.
fn rule(body: Vec<u8>) -> Option<Vec<u8>> {
    /// `FRA_PRIORITY`, `FRA_TABLE`.
    const PRIORITY: u16 = 6;
    const TABLE: u16 = 15;
    let byte = |offset: usize| body.get(offset).copied();
    let number = |kind: u16| {
        attributes(body.get(kind::ROUTE_HEADER..).unwrap_or_default())
            .find(|found| found.kind == kind)
            .and_then(|found| found.u32())
    };
    let priority = number(PRIORITY).unwrap_or(0);
    let table = number(TABLE).unwrap_or(0);
    let selects_nothing = byte(1)? == 0 && byte(2)? == 0 && byte(3)? == 0;
    let default = [(0, 255), (32766, 254), (32767, 253)].contains(&(priority, table)) && selects_nothing;
    (!default).then_some(body)
}
