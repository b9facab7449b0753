//! A NIC: moved between namespaces, and given what the host's has.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use husk_agent_protocol::messages::network::{Nic, Setting};
use husk_netlink::{Error, Message, Request, Socket, kind, message::u32_at};

use super::refused;
use crate::{fault::Fault, log, sys};

/// The flags that are the host's to say.
const FLAGS: u32 = (libc::IFF_UP | libc::IFF_NOARP | libc::IFF_MULTICAST) as u32;

/// Longest name, in bytes: `IFNAMSIZ` less the zero byte.
const MAX_NAME: usize = 15;

/// A NIC's number.
pub fn index(link: &Message) -> Option<u32> {
    u32_at(&link.body, 4)
}

/// Whether a link is one of the machine's NICs. The kernel makes links of its own, too (`dummy0`).
pub fn is_virtio(link: &Message) -> bool {
    link.attributes(kind::LINK_HEADER)
        .any(|found| found.kind == libc::IFLA_PARENT_DEV_BUS_NAME && found.text() == Some("virtio"))
}

fn request(index: u32, flags: u32, mask: u32) -> Request {
    let mut header = Vec::with_capacity(kind::LINK_HEADER);
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&index.to_ne_bytes());
    header.extend_from_slice(&flags.to_ne_bytes());
    header.extend_from_slice(&mask.to_ne_bytes());
    Request::new(libc::RTM_SETLINK, 0, &header)
}

/// Brings a link up.
pub fn up(index: u32) -> Request {
    request(index, libc::IFF_UP as u32, libc::IFF_UP as u32)
}

/// Moves a link to another namespace, under another number and name. It is down then.
pub fn moved(index: u32, to: BorrowedFd<'_>, new_index: u32, name: &str) -> Request {
    request(index, 0, libc::IFF_UP as u32)
        .with_u32(libc::IFLA_NET_NS_FD, to.as_raw_fd() as u32)
        .with_u32(libc::IFLA_NEW_IFINDEX, new_index)
        .with_text(libc::IFLA_IFNAME, name)
}

/// Checks what the host says of a NIC.
pub fn check(nic: &Nic) -> Result<(), Fault> {
    let name = nic.name.as_str();
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.bytes().all(plain)
        || [".", "..", "lo"].contains(&name)
    {
        return Err(Fault::spec(
            "network",
            format_args!("{name:?} is no name of a NIC"),
        ));
    }
    let field = format!("network: NIC {name}");
    if nic.mac.len() != 6 {
        return Err(Fault::spec(field, "a MAC address has six bytes"));
    }
    if nic.index <= super::LOOPBACK || nic.index > i32::MAX as u32 {
        return Err(Fault::spec(
            field,
            format_args!("it cannot have the number {}", nic.index),
        ));
    }
    for Setting { name, .. } in &nic.settings {
        let good = |text: &str| {
            !text.is_empty()
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        if !name
            .split_once('/')
            .is_some_and(|(family, key)| good(family) && good(key))
        {
            return Err(Fault::spec(field, format_args!("{name:?} is no setting")));
        }
    }
    Ok(())
}

/// Gives a NIC that is down all that the host's has but its addresses.
pub fn set(socket: &mut Socket, nic: &Nic) -> Result<(), Fault> {
    set_link(socket, nic)?;
    // Its link-local address is the host's, which is told as any other.
    set_address_mode(socket, nic, kind::ADDR_GEN_MODE_NONE)?;
    for Setting { name, value, .. } in &nic.settings {
        write(nic, name, *value);
    }
    set_flags(socket, nic)
}

/// Lets a NIC that has its addresses make its own as the host's does.
pub fn release(socket: &mut Socket, nic: &Nic) -> Result<(), Fault> {
    set_address_mode(socket, nic, u8::try_from(nic.address_mode).unwrap_or(0))
}

/// Gives a NIC what is new. As after [`set`], it makes no addresses until it is released.
pub fn change(socket: &mut Socket, before: &Nic, nic: &Nic) -> Result<(), Fault> {
    if before.name != nic.name {
        socket
            .request(&request(nic.index, 0, 0).with_text(libc::IFLA_IFNAME, &nic.name))
            .map_err(|error| refused(format_args!("network: NIC {}: rename it", nic.name), &error))?;
    }
    if (&before.mac, before.mtu, before.queue_length) != (&nic.mac, nic.mtu, nic.queue_length) {
        set_link(socket, nic)?;
    }
    for setting in &nic.settings {
        if !before.settings.contains(setting) {
            write(nic, &setting.name, setting.value);
        }
    }
    if before.flags != nic.flags {
        set_address_mode(socket, nic, kind::ADDR_GEN_MODE_NONE)?;
        set_flags(socket, nic)?;
    }
    Ok(())
}

fn set_link(socket: &mut Socket, nic: &Nic) -> Result<(), Fault> {
    let request = request(nic.index, 0, 0)
        .with(libc::IFLA_ADDRESS, &nic.mac)
        .with_u32(libc::IFLA_MTU, nic.mtu)
        .with_u32(libc::IFLA_TXQLEN, nic.queue_length);
    socket.request(&request).map_err(|error| {
        refused(
            format_args!("network: NIC {}: set its MAC and MTU", nic.name),
            &error,
        )
    })
}

fn set_flags(socket: &mut Socket, nic: &Nic) -> Result<(), Fault> {
    socket
        .request(&request(nic.index, nic.flags & FLAGS, FLAGS))
        .map_err(|error| refused(format_args!("network: NIC {}: set its flags", nic.name), &error))
}

fn set_address_mode(socket: &mut Socket, nic: &Nic, mode: u8) -> Result<(), Fault> {
    let family = libc::AF_INET6 as u16 | kind::NESTED;
    let request = request(nic.index, 0, 0).with_nested(libc::IFLA_AF_SPEC | kind::NESTED, |families| {
        families.with_nested(family, |inner| {
            inner.with(kind::IFLA_INET6_ADDR_GEN_MODE, &[mode])
        })
    });
    match socket.request(&request) {
        // A NIC without IPv6, as one with a small MTU; a way of which the kernel needs to know more.
        Err(error) if !is_unsupported(&error) => Err(refused(
            format_args!("network: NIC {}: set how it makes IPv6 addresses", nic.name),
            &error,
        )),
        _ => Ok(()),
    }
}

fn is_unsupported(error: &Error) -> bool {
    matches!(
        error.number(),
        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)
    )
}

/// Writes a setting unless it has that value. One that this kernel does not have is none of the containers' either.
fn write(nic: &Nic, name: &str, value: i32) {
    match try_write(nic, name, value) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
            // Some cannot be written in every state of a NIC.
            log::warning!("network: NIC {}: set {name} to {value}: {error}", nic.name);
        }
        _ => {}
    }
}

fn try_write(nic: &Nic, name: &str, value: i32) -> io::Result<()> {
    let (family, key) = name.split_once('/').ok_or(io::ErrorKind::InvalidInput)?;
    let path = CString::new(format!("{family}/conf/{}/{key}", nic.name))?;
    let base = File::open("/proc/sys/net")?;
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
    let file = sys::openat2(base.as_fd(), &path, libc::O_RDWR, 0, resolve)?;
    let mut file = File::from(file);
    let mut text = [0; 32];
    let length = file.read(&mut text)?;
    let now = std::str::from_utf8(text.get(..length).unwrap_or_default())
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if now == Some(value) {
        return Ok(());
    }
    let file = sys::openat2(base.as_fd(), &path, libc::O_WRONLY, 0, resolve)?;
    File::from(file).write_all(value.to_string().as_bytes())
}
