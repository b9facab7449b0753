//! Addresses, routes, neighbours and rules: the messages of the host's kernel, handed to this one.

use std::collections::HashSet;

use husk_agent_protocol::messages::Network;
use husk_netlink::{Message, Request, Socket, attributes, kind, message::u32_at};

use super::refused;
use crate::fault::Fault;

/// `RTPROT_KERNEL`.
const KERNEL: u8 = 2;

/// Takes away what of `told` is not in `wanted`. What is gone already is fine.
pub fn remove(socket: &mut Socket, told: &Network, wanted: &Network) {
    let lists = [
        (libc::RTM_DELRULE, &told.rules, &wanted.rules),
        (libc::RTM_DELROUTE, &told.routes, &wanted.routes),
        (libc::RTM_DELNEIGH, &told.neighbours, &wanted.neighbours),
        (libc::RTM_DELADDR, &told.addresses, &wanted.addresses),
    ];
    for (kind, told, wanted) in lists {
        let wanted: HashSet<&Vec<u8>> = wanted.iter().collect();
        for body in told.iter().filter(|body| !wanted.contains(body)) {
            // It went with its NIC, or a container has removed it.
            let _ = socket.request(&Request::new(kind, 0, body));
        }
    }
}

/// Adds what of `wanted` is not in `told`.
///
/// # Errors
/// The first that the kernel refused; all others are there.
pub fn add(socket: &mut Socket, told: &Network, wanted: &Network) -> Result<(), Fault> {
    let mut result = Ok(());
    let mut keep = |done: Result<(), Fault>| {
        if result.is_ok() {
            result = done;
        }
    };
    let addresses = new(&told.addresses, &wanted.addresses);
    for body in &addresses {
        keep(address(socket, body));
    }
    let fresh = new(&told.routes, &wanted.routes);
    if !addresses.is_empty() || !fresh.is_empty() {
        keep(routes(socket, fresh));
        keep(remove_surplus(socket, wanted));
    }
    for body in new(&told.neighbours, &wanted.neighbours) {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let done = socket.request(&Request::new(libc::RTM_NEWNEIGH, flags, body));
        keep(done.map_err(|error| refused("network: add a neighbour", &error)));
    }
    for body in new(&told.rules, &wanted.rules) {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        match socket.request(&Request::new(libc::RTM_NEWRULE, flags, body)) {
            Err(error) if error.number() != Some(libc::EEXIST) => {
                keep(Err(refused("network: add a rule", &error)));
            }
            _ => {}
        }
    }
    result
}

fn new<'a>(told: &[Vec<u8>], wanted: &'a [Vec<u8>]) -> Vec<&'a [u8]> {
    let told: HashSet<&Vec<u8>> = told.iter().collect();
    let new = wanted.iter().filter(|body| !told.contains(body));
    new.map(Vec::as_slice).collect()
}

fn address(socket: &mut Socket, body: &[u8]) -> Result<(), Fault> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    // It is in use on the host: nobody else has it, and it is not to wait until that is found out.
    let at_once = without_detection(body);
    let first = at_once.as_deref().unwrap_or(body);
    let mut done = socket.request(&Request::new(libc::RTM_NEWADDR, flags, first));
    if done.is_ok() && at_once.is_some() {
        // Without the flag that the host's does not have.
        done = socket.request(&Request::new(libc::RTM_NEWADDR, libc::NLM_F_REPLACE, body));
    }
    match done {
        Err(error) if error.number() != Some(libc::EEXIST) => {
            let name = name_of(body, kind::ADDRESS_HEADER, &[libc::IFA_LOCAL, libc::IFA_ADDRESS]);
            Err(refused(format_args!("network: add the address {name}"), &error))
        }
        _ => Ok(()),
    }
}

/// An IPv6 address with the flag that it is used at once, unless it has it.
fn without_detection(body: &[u8]) -> Option<Vec<u8>> {
    let known = attributes(body.get(kind::ADDRESS_HEADER..)?).find(|found| found.kind == libc::IFA_FLAGS);
    let flags = known.and_then(|found| found.u32()).unwrap_or(0);
    if body.first() != Some(&(libc::AF_INET6 as u8)) || flags & libc::IFA_F_NODAD != 0 {
        return None;
    }
    let mut request = Request::new(0, 0, body.get(..kind::ADDRESS_HEADER)?);
    for found in attributes(body.get(kind::ADDRESS_HEADER..)?) {
        if found.kind != libc::IFA_FLAGS {
            request = request.with(found.kind, found.data);
        }
    }
    let request = request.with_u32(libc::IFA_FLAGS, flags | libc::IFA_F_NODAD);
    Some(request.body().to_vec())
}

/// Adds routes. One may need another, so that they are tried until there is no more success.
fn routes(socket: &mut Socket, mut wanted: Vec<&[u8]>) -> Result<(), Fault> {
    loop {
        let count = wanted.len();
        let mut last = None;
        wanted.retain(|body| {
            // Of several to the same place the order counts.
            let order = if body.first() == Some(&(libc::AF_INET as u8)) {
                libc::NLM_F_APPEND
            } else {
                0
            };
            let request = Request::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | order, body);
            match socket.request(&request) {
                Err(error) if error.number() != Some(libc::EEXIST) => {
                    let name = name_of(body, kind::ROUTE_HEADER, &[libc::RTA_DST]);
                    last.get_or_insert(refused(format_args!("network: add the route to {name}"), &error));
                    true
                }
                _ => false,
            }
        });
        match last {
            None => return Ok(()),
            Some(fault) if wanted.len() == count => return Err(fault),
            Some(_) => {}
        }
    }
}

/// Takes away those routes that the kernel has made for addresses and that the host does not have: somebody has
/// removed them there.
fn remove_surplus(socket: &mut Socket, wanted: &Network) -> Result<(), Fault> {
    let known: HashSet<Key> = wanted.routes.iter().filter_map(|body| Key::of(body)).collect();
    let nics: HashSet<u32> = wanted.nics.iter().map(|nic| nic.index).collect();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut header = [0; kind::ROUTE_HEADER];
        if let Some(first) = header.first_mut() {
            *first = family as u8;
        }
        let routes = match socket.dump(&Request::new(libc::RTM_GETROUTE, 0, &header)) {
            Ok(routes) => routes,
            Err(error) => return Err(refused("network: list the routes", &error)),
        };
        for Message { body, .. } in routes {
            let surplus = Key::of(&body)
                .is_some_and(|key| key.is_made_by_kernel && nics.contains(&key.nic) && !known.contains(&key));
            if surplus {
                let _ = socket.request(&Request::new(libc::RTM_DELROUTE, 0, &body));
            }
        }
    }
    Ok(())
}

/// Which route it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    family: u8,
    length: u8,
    to: Vec<u8>,
    nic: u32,
    priority: u32,
    /// And of the main table, to a network.
    is_made_by_kernel: bool,
}

impl Key {
    fn of(body: &[u8]) -> Option<Self> {
        let byte = |offset: usize| body.get(offset).copied();
        let mut key = Self {
            family: byte(0)?,
            length: byte(1)?,
            to: Vec::new(),
            nic: 0,
            priority: 0,
            is_made_by_kernel: byte(5)? == KERNEL
                && byte(4)? == libc::RT_TABLE_MAIN
                && byte(7)? == libc::RTN_UNICAST,
        };
        for found in attributes(body.get(kind::ROUTE_HEADER..)?) {
            match found.kind {
                libc::RTA_DST => key.to = found.data.to_vec(),
                libc::RTA_OIF => key.nic = found.u32()?,
                libc::RTA_PRIORITY => key.priority = u32_at(found.data, 0)?,
                _ => {}
            }
        }
        Some(key)
    }
}

/// The address in a message and its length, for people.
fn name_of(body: &[u8], header: usize, kinds: &[u16]) -> String {
    let length = body.get(1).copied().unwrap_or(0);
    let data = kinds.iter().find_map(|kind| {
        attributes(body.get(header..).unwrap_or_default())
            .find(|found| found.kind == *kind)
            .map(|found| found.data)
    });
    let text = match data {
        None => return "default".into(),
        Some(data) => match (<[u8; 4]>::try_from(data), <[u8; 16]>::try_from(data)) {
            (Ok(bytes), _) => std::net::Ipv4Addr::from(bytes).to_string(),
            (_, Ok(bytes)) => std::net::Ipv6Addr::from(bytes).to_string(),
            _ => return "?".into(),
        },
    };
    format!("{text}/{length}")
}
