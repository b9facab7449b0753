//! The little of D-Bus that systemd is asked with: method calls to its manager, their replies, and one signal.
//! <https://dbus.freedesktop.org/doc/dbus-specification.html>

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// Longest message that is read, in bytes.
const MAX_LEN: usize = 1 << 20;

/// Longest line of the greeting that is read, in bytes.
const MAX_LINE: usize = 512;

const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Values in the wire's form, little-endian, each aligned as its type wants.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    /// A `u`, or a `b` of 0 or 1.
    pub fn number(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }

    /// A `t`.
    pub fn long(&mut self, number: u64) {
        self.align(8);
        self.0.extend(number.to_le_bytes());
    }

    /// An `s` or `o`.
    pub fn string(&mut self, text: &str) -> &mut Self {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    fn signature(&mut self, signature: &str) {
        self.0.push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements are aligned to `to`.
    pub fn array(&mut self, to: usize, fill: impl FnOnce(&mut Self)) {
        self.number(0);
        let at = self.0.len();
        self.align(to);
        let start = self.0.len();
        fill(self);
        let length = u32::try_from(self.0.len() - start).unwrap_or(u32::MAX);
        if let Some(place) = self.0.get_mut(at - 4..at) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// An `(sv)` in an array of them.
    pub fn property(&mut self, name: &str, signature: &str, value: &dyn Fn(&mut Self)) {
        self.align(8);
        self.string(name);
        self.signature(signature);
        value(self);
    }
}

/// Reads values; every end of the bytes is an error.
struct Values<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Values<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let end = self.at.checked_add(length).ok_or_else(nonsense)?;
        let bytes = self.bytes.get(self.at..end).ok_or_else(nonsense)?;
        self.at = end;
        Ok(bytes)
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn byte(&mut self) -> io::Result<u8> {
        self.take(1)?.first().copied().ok_or_else(nonsense)
    }

    fn number(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?.try_into().map_err(|_| nonsense())?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn text(&mut self, length: usize) -> io::Result<String> {
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.take(1)?;
        Ok(text)
    }

    fn string(&mut self) -> io::Result<String> {
        let length = self.number()? as usize;
        self.text(length)
    }

    fn signature(&mut self) -> io::Result<String> {
        let length = self.byte()?.into();
        self.text(length)
    }
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what came over D-Bus makes no sense")
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The method returned; this is its first value, if that is a string or a path.
    Return(Option<String>),
    /// It failed.
    Error {
        /// The error's name.
        name: String,
        /// What it says.
        message: String,
    },
}

impl Reply {
    /// What was returned, of a method that returns a string.
    ///
    /// # Errors
    /// The peer's.
    pub fn into_string(self) -> io::Result<String> {
        match self {
            Self::Return(Some(text)) => Ok(text),
            Self::Return(None) => Err(nonsense()),
            Self::Error { name, message } => Err(io::Error::other(format!("{message} ({name})"))),
        }
    }

    /// Of a method that returns nothing.
    ///
    /// # Errors
    /// The peer's.
    pub fn into_nothing(self) -> io::Result<()> {
        match self {
            Self::Return(_) => Ok(()),
            error @ Self::Error { .. } => error.into_string().map(drop),
        }
    }
}

#[derive(Debug, Default)]
struct Message {
    kind: u8,
    reply_to: u32,
    member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    fn first_string(&self) -> Option<String> {
        let mut values = Values {
            bytes: &self.body,
            at: 0,
        };
        let textual = self.signature.starts_with(['s', 'o']);
        textual.then(|| values.string().ok()).flatten()
    }
}

/// A connection.
#[derive(Debug)]
pub struct Bus {
    stream: UnixStream,
    /// Whether others are there, too, so that messages need an address.
    shared: bool,
    /// All has to be done by then.
    pub(super) deadline: Instant,
    serial: u32,
    /// Jobs that ended while a reply was awaited, with their results.
    jobs: Vec<(String, String)>,
}

impl Bus {
    /// Connects. All that is done with the connection has to be done by `deadline`.
    ///
    /// # Errors
    /// When nobody is there, or not as expected.
    pub fn connect(path: &Path, shared: bool, deadline: Instant) -> io::Result<Self> {
        let mut bus = Self {
            stream: UnixStream::connect(path)?,
            shared,
            deadline,
            serial: 0,
            jobs: Vec::new(),
        };
        let own = nix::unistd::geteuid().to_string();
        let hex: String = own.bytes().map(|byte| format!("{byte:02x}")).collect();
        bus.send(format!("\0AUTH EXTERNAL {hex}\r\n").as_bytes())?;
        let answer = bus.line()?;
        if !answer.starts_with("OK") {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("D-Bus answered {answer:?}"),
            ));
        }
        bus.send(b"BEGIN\r\n")?;
        if shared {
            bus.call_bus("Hello", "", Body::default())?.into_nothing()?;
        }
        Ok(bus)
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(bytes)
    }

    fn receive(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut rest = bytes.as_mut_slice();
        while !rest.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => rest = rest.get_mut(read..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            if line.len() >= MAX_LINE {
                return Err(nonsense());
            }
            line.extend(self.receive(1)?);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Has the signal of a job's end delivered.
    ///
    /// # Errors
    /// The connection's or the peer's.
    pub fn listen_to_jobs(&mut self) -> io::Result<()> {
        if self.shared {
            let mut rule = Body::default();
            rule.string(&format!(
                "type='signal',interface='{MANAGER}',member='JobRemoved'"
            ));
            self.call_bus("AddMatch", "s", rule)?.into_nothing()?;
        }
        self.call_manager("Subscribe", "", Body::default())?
            .into_nothing()
    }

    fn call_bus(&mut self, member: &str, signature: &str, body: Body) -> io::Result<Reply> {
        let bus = "org.freedesktop.DBus";
        self.call((bus, "/org/freedesktop/DBus", bus), member, signature, body)
    }

    /// Calls a method of systemd's manager.
    ///
    /// # Errors
    /// The connection's.
    pub fn call_manager(&mut self, member: &str, signature: &str, body: Body) -> io::Result<Reply> {
        let manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", MANAGER);
        self.call(manager, member, signature, body)
    }

    fn call(
        &mut self,
        (destination, path, interface): (&str, &str, &str),
        member: &str,
        signature: &str,
        body: Body,
    ) -> io::Result<Reply> {
        self.serial += 1;
        let serial = self.serial;
        let mut message = Body(vec![b'l', CALL, 0, 1]);
        message.number(u32::try_from(body.0.len()).map_err(io::Error::other)?);
        message.number(serial);
        message.array(8, |fields| {
            let mut field = |code: u8, kind: &str, value: &str| {
                fields.align(8);
                fields.0.push(code);
                fields.signature(kind);
                if kind == "g" {
                    fields.signature(value);
                } else {
                    fields.string(value);
                }
            };
            field(1, "o", path);
            field(2, "s", interface);
            field(3, "s", member);
            if self.shared {
                field(6, "s", destination);
            }
            if !signature.is_empty() {
                field(8, "g", signature);
            }
        });
        message.align(8);
        message.0.extend(body.0);
        self.send(&message.0)?;
        loop {
            let message = self.message()?;
            if message.reply_to == serial && message.kind == RETURN {
                return Ok(Reply::Return(message.first_string()));
            }
            if message.reply_to == serial && message.kind == ERROR {
                return Ok(Reply::Error {
                    message: message.first_string().unwrap_or_default(),
                    name: message.error,
                });
            }
            self.note(&message);
        }
    }

    /// Waits for a job's end; tells its result.
    ///
    /// # Errors
    /// The connection's.
    pub fn job_result(&mut self, job: &str) -> io::Result<String> {
        loop {
            if let Some((_, result)) = self.jobs.iter().find(|(ended, _)| ended == job) {
                return Ok(result.clone());
            }
            self.jobs.clear();
            let message = self.message()?;
            self.note(&message);
        }
    }

    /// Keeps what a signal of a job's end says.
    fn note(&mut self, message: &Message) {
        if message.kind != SIGNAL || message.member != "JobRemoved" || message.signature != "uoss" {
            return;
        }
        let mut values = Values {
            bytes: &message.body,
            at: 0,
        };
        let mut read = || {
            values.number().ok()?;
            let job = values.string().ok()?;
            values.string().ok()?;
            Some((job, values.string().ok()?))
        };
        self.jobs.extend(read());
    }

    fn message(&mut self) -> io::Result<Message> {
        let head = self.receive(16)?;
        let mut values = Values { bytes: &head, at: 0 };
        let (order, kind) = (values.byte()?, values.byte()?);
        values.at = 4;
        let (body, _serial, fields) = (values.number()?, values.number()?, values.number()?);
        let (body, fields) = (body as usize, fields as usize);
        // Only big-endian machines would answer in another order.
        if order != b'l' || body > MAX_LEN || fields > MAX_LEN {
            return Err(nonsense());
        }
        // The fields begin at 16, the body where a multiple of 8 is next.
        let bytes = self.receive(fields.next_multiple_of(8))?;
        let mut message = Message {
            kind,
            ..Message::default()
        };
        let mut values = Values {
            bytes: bytes.get(..fields).ok_or_else(nonsense)?,
            at: 0,
        };
        while values.at < fields {
            values.align(8);
            let code = values.byte()?;
            let signature = values.signature()?;
            match (code, signature.as_str()) {
                (3, "s") => message.member = values.string()?,
                (4, "s") => message.error = values.string()?,
                (5, "u") => message.reply_to = values.number()?,
                (8, "g") => message.signature = values.signature()?,
                (_, "s" | "o") => drop(values.string()?),
                (_, "u") => drop(values.number()?),
                (_, "g") => drop(values.signature()?),
                _ => return Err(nonsense()),
            }
        }
        message.body = self.receive(body)?;
        Ok(message)
    }
}
