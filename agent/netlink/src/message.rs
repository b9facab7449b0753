//! Messages: a header, a struct of the message's kind, and attributes, each aligned to four bytes.

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// Length of an attribute's header.
const ATTRIBUTE_HEADER: usize = 4;

/// Flags in an attribute's kind: it is nested; its number is in network byte order.
const KIND_FLAGS: u16 = 0xc000;

const fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

/// A message to the kernel in the making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A message of `kind` (`RTM_…`) with `flags` (`NLM_F_…`, beside `NLM_F_REQUEST`) and the struct that this kind
    /// begins with.
    pub fn new(kind: u16, flags: i32, header: &[u8]) -> Self {
        let mut this = Self {
            kind,
            // The flags are numbers of 16 bits.
            flags: flags as u16,
            body: Vec::with_capacity(128),
        };
        this.body.extend_from_slice(header);
        this.pad();
        this
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, data: &[u8]) -> Self {
        let length = u16::try_from(data.len().saturating_add(ATTRIBUTE_HEADER)).unwrap_or(u16::MAX);
        self.body.extend_from_slice(&length.to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        // What is too long for an attribute is for none of ours; a reader must find its end all the same.
        let kept = usize::from(length).saturating_sub(ATTRIBUTE_HEADER);
        self.body.extend_from_slice(data.get(..kept).unwrap_or(data));
        self.pad();
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn with_u32(self, kind: u16, number: u32) -> Self {
        self.with(kind, &number.to_ne_bytes())
    }

    /// Adds a text, with the zero byte that ends it.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.with(kind, &bytes)
    }

    /// Adds an attribute that consists of those which `fill` adds.
    #[must_use]
    pub fn with_nested(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let inner = fill(Self {
            kind: 0,
            flags: 0,
            body: Vec::new(),
        });
        self.with(kind, &inner.body)
    }

    fn pad(&mut self) {
        self.body.resize(aligned(self.body.len()), 0);
    }

    /// What follows the message's own header: its struct and its attributes.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    pub(crate) fn encode(&self, more_flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER.saturating_add(self.body.len())).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(self.body.len().saturating_add(HEADER));
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | more_flags).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A message of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `RTM_…` or `NLMSG_…`.
    pub kind: u16,
    /// `NLM_F_…`.
    pub flags: u16,
    /// The number of the request that it answers.
    pub sequence: u32,
    /// What follows the message's own header.
    pub body: Vec<u8>,
}

impl Message {
    /// Reads the first message of `bytes`; gives what follows it, too.
    pub(crate) fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(HEADER..length)?;
        let message = Self {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
            body: body.to_vec(),
        };
        Some((message, bytes.get(aligned(length)..).unwrap_or_default()))
    }

    /// Its attributes, which follow a struct of `header` bytes.
    pub fn attributes(&self, header: usize) -> impl Iterator<Item = Attribute<'_>> {
        attributes(self.body.get(aligned(header)..).unwrap_or_default())
    }
}

/// An attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Without its flags.
    pub kind: u16,
    /// What it holds.
    pub data: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// As a number.
    pub fn u32(&self) -> Option<u32> {
        u32_at(self.data, 0)
    }

    /// As a text, to its first zero byte.
    pub fn text(&self) -> Option<&'a str> {
        let text = self.data.split(|byte| *byte == 0).next()?;
        std::str::from_utf8(text).ok()
    }

    /// As attributes.
    pub fn nested(self) -> impl Iterator<Item = Attribute<'a>> + use<'a> {
        attributes(self.data)
    }
}

/// The attributes in `bytes`. What is malformed ends them.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let attribute = Attribute {
            kind: u16_at(bytes, 2)? & !KIND_FLAGS,
            data: bytes.get(ATTRIBUTE_HEADER..length)?,
        };
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some(attribute)
    })
}

/// The number of two bytes at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..offset.checked_add(2)?)?;
    bytes.try_into().ok().map(u16::from_ne_bytes)
}

/// The number of four bytes at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let request = Request::new(20, 5, &[1, 2, 3])
            .with_u32(7, 0x0102_0304)
            .with_text(3, "eth0")
            .with_nested(26 | super::super::kind::NESTED, |inner| {
                inner.with(1, &[9]).with(2, &[])
            });
        let bytes = request.encode(1, 77);
        assert_eq!(bytes.len() % 4, 0);
        let (message, rest) = Message::read(&bytes).unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (20, 5, 77));
        assert!(rest.is_empty());
        let found: Vec<_> = message.attributes(3).collect();
        assert_eq!(found[0].u32(), Some(0x0102_0304));
        assert_eq!((found[1].kind, found[1].text()), (3, Some("eth0")));
        assert_eq!(found[2].kind, 26);
        let inner: Vec<_> = found[2]
            .nested()
            .map(|inner| (inner.kind, inner.data.len()))
            .collect();
        assert_eq!(inner, [(1, 1), (2, 0)]);
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn nonsense_has_no_attributes_and_no_messages() {
        for bytes in [
            &[][..],
            &[1],
            &[3, 0, 1, 0],
            &[0, 0, 0, 0],
            &[9, 0, 1, 0, 5, 5],
            &[255; 40],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
            assert!(Message::read(bytes).is_none(), "{bytes:?}");
        }
        let short = Request::new(1, 0, &[0; 8]).encode(0, 0);
        assert!(Message::read(&short[..20]).is_none());
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let request = Request::new(1, 0, &[]).with(1, &[7; 70_000]).with(2, &[]);
        let kinds: Vec<_> = attributes(request.body()).map(|found| found.kind).collect();
        assert_eq!(kinds, [1, 2]);
    }
}
