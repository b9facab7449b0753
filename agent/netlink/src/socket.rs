//! The socket: it belongs to the network namespace that it was made in, whoever uses it from wherever.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::message::{HEADER, Message, Request, attributes, u32_at};

/// How long the kernel may take to answer, in seconds. It does so within the call, unless it is very busy.
const PATIENCE: i64 = 20;

/// Room for what the kernel sends at once: it fills at most 32 KiB.
const ROOM: usize = 64 << 10;

/// How often a list is asked for anew that changed while it was read.
const TRIES: usize = 10;

/// `NLMSGERR_ATTR_MSG`: why, in the kernel's words.
const EXPLANATION: u16 = 1;

/// Why a request failed.
#[derive(Debug)]
pub struct Error {
    /// The kernel's error.
    pub source: io::Error,
    /// What it says about it, or nothing.
    pub explanation: String,
}

impl Error {
    /// The error's number, if the kernel sent it.
    pub fn number(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

impl From<io::Error> for Error {
    fn from(source: io::Error) -> Self {
        Self {
            source,
            explanation: String::new(),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        if error.explanation.is_empty() {
            return error.source;
        }
        Self::new(error.source.kind(), error.to_string())
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.explanation.as_str() {
            "" => self.source.fmt(f),
            text => write!(f, "{} ({})", self.source, text.trim_end_matches('.')),
        }
    }
}

impl std::error::Error for Error {}

/// A socket to the kernel's network.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

impl Socket {
    /// One of the calling thread's network namespace.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: integers only.
        let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
        // SAFETY: the call has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let patience = libc::timeval {
            tv_sec: PATIENCE,
            tv_usec: 0,
        };
        set(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
        // Without it errors have no words, which is no harm.
        let _ = set(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &1_i32);
        let _ = set(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &1_i32);
        Ok(Self { fd, sequence: 0 })
    }

    /// A socket that is told of changes of `groups` (`RTNLGRP_…`) and does not wait. It is for [`Socket::drain`] only.
    ///
    /// # Errors
    /// As [`Socket::new`].
    pub fn monitor(groups: &[u32]) -> io::Result<Self> {
        let this = Self::new()?;
        // SAFETY: all zeros are a valid value: the kernel chooses the number.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // Without a number of its own it would be told nothing.
        // SAFETY: the pointer and the length are those of `address`.
        check(unsafe { libc::bind(this.fd.as_raw_fd(), (&raw const address).cast(), length) })?;
        for group in groups {
            set(
                this.fd.as_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_ADD_MEMBERSHIP,
                group,
            )?;
        }
        // SAFETY: integers only.
        let flags = check(unsafe { libc::fcntl(this.fd.as_raw_fd(), libc::F_GETFL) })?;
        // SAFETY: as above.
        check(unsafe { libc::fcntl(this.fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
        Ok(this)
    }

    /// Reads and forgets what a monitor was told, so that it is readable only when there is more.
    ///
    /// # Errors
    /// The kernel's.
    pub fn drain(&self) -> io::Result<()> {
        let mut buffer = vec![0; ROOM];
        loop {
            match receive(self.fd.as_fd(), &mut buffer) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(()),
                    // More was told than there was room for: something has changed, that is all one wants to know.
                    Some(libc::ENOBUFS | libc::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Does what a request says.
    ///
    /// # Errors
    /// The kernel's.
    pub fn request(&mut self, request: &Request) -> Result<(), Error> {
        self.send(request, libc::NLM_F_ACK)?;
        let mut buffer = vec![0; ROOM];
        loop {
            for message in self.messages(&mut buffer)? {
                if i32::from(message.kind) == libc::NLMSG_ERROR {
                    return acknowledged(&message);
                }
            }
        }
    }

    /// All that the kernel answers to a request for a list.
    ///
    /// # Errors
    /// The kernel's; a list that does not stand still.
    pub fn dump(&mut self, request: &Request) -> Result<Vec<Message>, Error> {
        for _ in 0..TRIES {
            if let Some(list) = self.try_dump(request)? {
                return Ok(list);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN).into())
    }

    /// `None` when the list changed meanwhile.
    fn try_dump(&mut self, request: &Request) -> Result<Option<Vec<Message>>, Error> {
        self.send(request, libc::NLM_F_DUMP)?;
        let mut list = Vec::new();
        let mut steady = true;
        let mut buffer = vec![0; ROOM];
        loop {
            for message in self.messages(&mut buffer)? {
                steady &= i32::from(message.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => {
                        // It begins with the number of an error.
                        let number = u32_at(&message.body, 0).map_or(0, |number| number as i32);
                        if number < 0 {
                            return Err(io::Error::from_raw_os_error(number.saturating_neg()).into());
                        }
                        return Ok(steady.then_some(list));
                    }
                    libc::NLMSG_ERROR => acknowledged(&message)?,
                    libc::NLMSG_NOOP => {}
                    _ => list.push(message),
                }
            }
        }
    }

    fn send(&mut self, request: &Request, flags: libc::c_int) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        // The flags are numbers of 16 bits.
        let bytes = request.encode((libc::NLM_F_REQUEST | flags) as u16, self.sequence);
        // SAFETY: the pointer and the length are those of `bytes`.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// What comes next for the request that was sent last.
    fn messages(&self, buffer: &mut [u8]) -> io::Result<Vec<Message>> {
        let length = loop {
            match receive(self.fd.as_fd(), buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let mut rest = buffer.get(..length).ok_or(io::ErrorKind::InvalidData)?;
        let mut messages = Vec::new();
        while rest.len() >= HEADER {
            let (message, after) = Message::read(rest).ok_or(io::ErrorKind::InvalidData)?;
            rest = after;
            // An earlier request may have been given up on.
            if message.sequence == self.sequence {
                messages.push(message);
            }
        }
        Ok(messages)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

fn set<T>(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the pointer and the length are those of `value`, a plain struct or number.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            length,
        )
    })?;
    Ok(())
}

fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `buffer`.
    let length = unsafe {
        libc::recv(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_TRUNC,
        )
    };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// What an answer of `NLMSG_ERROR` says: an errno, the header of the request, and attributes.
fn acknowledged(message: &Message) -> Result<(), Error> {
    let number = u32_at(&message.body, 0).map_or(-libc::EIO, |number| number as i32);
    if number == 0 {
        return Ok(());
    }
    let words = message.body.get(4 + HEADER..).unwrap_or_default();
    let explanation = attributes(words)
        .find(|attribute| attribute.kind == EXPLANATION)
        .and_then(|attribute| attribute.text())
        .unwrap_or_default();
    Err(Error {
        source: io::Error::from_raw_os_error(number.saturating_neg()),
        explanation: explanation.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind;

    fn links() -> Request {
        Request::new(libc::RTM_GETLINK, 0, &[0; kind::LINK_HEADER])
    }

    #[test]
    fn a_list_has_what_there_is() {
        // To the machine's network another program may add a link between the two lists.
        let alone = || {
            // SAFETY: integers only; it is this thread's namespace alone that changes.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).unwrap();
            let mut socket = Socket::new().unwrap();
            let names: Vec<String> = socket
                .dump(&links())
                .unwrap()
                .iter()
                .flat_map(|link| {
                    let found = link.attributes(kind::LINK_HEADER);
                    found
                        .filter(|found| found.kind == libc::IFLA_IFNAME)
                        .filter_map(|found| found.text().map(str::to_owned))
                        .collect::<Vec<_>>()
                })
                .collect();
            assert!(names.contains(&"lo".to_owned()), "{names:?}");
            // The socket is good for another one.
            assert_eq!(socket.dump(&links()).unwrap().len(), names.len());
        };
        std::thread::spawn(alone).join().unwrap();
    }

    #[test]
    fn an_error_is_told_by_its_number() {
        let mut socket = Socket::new().unwrap();
        let mut header = [0; kind::LINK_HEADER];
        header[4..8].copy_from_slice(&0x7fff_fff0_i32.to_ne_bytes());
        let error = socket
            .request(&Request::new(libc::RTM_SETLINK, 0, &header))
            .unwrap_err();
        assert!(
            matches!(error.number(), Some(libc::ENODEV | libc::EPERM)),
            "{error}"
        );
    }

    #[test]
    fn a_monitor_that_was_told_nothing_waits_for_nobody() {
        Socket::monitor(&[kind::GROUP_LINK]).unwrap().drain().unwrap();
    }
}
