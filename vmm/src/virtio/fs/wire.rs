//! As much of the FUSE wire (linux/fuse.h) as concerns the VMM.

use super::channel::Request;

/// Length of `fuse_in_header` in bytes.
pub const IN_HEADER_LEN: usize = 40;
/// Length of `fuse_out_header` in bytes.
pub const OUT_HEADER_LEN: usize = 16;
/// Length of `fuse_read_in`, and of `fuse_write_in`, in bytes.
pub const DATA_ARGS_LEN: usize = 40;
/// Length of `fuse_entry_out` in bytes.
pub const ENTRY_LEN: usize = 128;

/// Operations, as numbered in linux/fuse.h.
#[allow(missing_docs)]
pub mod op {
    pub const FORGET: u32 = 2;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const INIT: u32 = 26;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const TMPFILE: u32 = 51;
}

/// `write_flags`: a page written back from the guest's cache, whose place in the file is the request's offset.
pub const WRITE_CACHE: u32 = 1 << 0;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

/// What the VMM looks at in `fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the request, this header included, in bytes.
    pub len: usize,
    /// One of [`op`], or another.
    pub opcode: u32,
    /// Names the request; its reply bears it.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
}

impl InHeader {
    /// Reads one.
    pub fn read(bytes: &[u8; IN_HEADER_LEN]) -> Option<Self> {
        Some(Self {
            len: usize::try_from(word(bytes, 0)?).ok()?,
            opcode: word(bytes, 4)?,
            unique: long(bytes, 8)?,
            node: long(bytes, 16)?,
        })
    }

    /// Whether FUSE has no reply to it.
    pub fn is_silent(&self) -> bool {
        matches!(self.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT)
    }
}

/// `fuse_read_in` or `fuse_write_in`: both begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataArgs {
    /// Handle of the file.
    pub handle: u64,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub size: usize,
    /// `write_flags` of a WRITE.
    pub write_flags: u32,
    /// The file's open flags in the guest, O_APPEND, O_DSYNC and O_SYNC among them.
    pub open_flags: u32,
}

impl DataArgs {
    /// Reads one.
    pub fn read(bytes: &[u8; DATA_ARGS_LEN]) -> Option<Self> {
        Some(Self {
            handle: long(bytes, 0)?,
            offset: long(bytes, 8)?,
            size: usize::try_from(word(bytes, 16)?).ok()?,
            write_flags: word(bytes, 20)?,
            open_flags: word(bytes, 32)?,
        })
    }
}

/// The handle that RELEASE is about. `request` is the whole of it.
pub fn released_handle(request: &[u8]) -> Option<u64> {
    long(request, IN_HEADER_LEN)
}

/// A `fuse_out_header` of a reply of `len` bytes in all; `error` is 0 or an error number.
pub fn out_header(len: usize, error: i32, unique: u64) -> [u8; OUT_HEADER_LEN] {
    let mut header = [0; OUT_HEADER_LEN];
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    let fields = len
        .to_le_bytes()
        .into_iter()
        .chain(error.wrapping_neg().to_le_bytes())
        .chain(unique.to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    header
}

/// A reply of the server that is what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// 0 or an error number.
    pub error: i32,
    /// The node of the entry and the handle of the open file that it tells of, if it does.
    pub opened: Option<Opened>,
}

/// What OPEN, CREATE or TMPFILE opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its handle.
    pub handle: u64,
    /// Its node.
    pub node: u64,
    /// Whether the reply counts as a lookup of the node.
    pub looked_up: bool,
}

impl Reply {
    /// Checks `reply` (header and body) to `request`; `None` if it is not a FUSE reply to it.
    pub fn read(reply: &[u8], request: &InHeader) -> Option<Self> {
        let (len, error, unique) = (word(reply, 0)?, word(reply, 4)? as i32, long(reply, 8)?);
        if usize::try_from(len) != Ok(reply.len()) || unique != request.unique || !(-511..=0).contains(&error)
        {
            return None;
        }
        if error != 0 && reply.len() != OUT_HEADER_LEN {
            return None;
        }
        let opened = match request.opcode {
            _ if error != 0 => None,
            op::OPEN => Some(Opened {
                handle: long(reply, OUT_HEADER_LEN)?,
                node: request.node,
                looked_up: false,
            }),
            op::CREATE | op::TMPFILE => Some(Opened {
                handle: long(reply, OUT_HEADER_LEN + ENTRY_LEN)?,
                node: long(reply, OUT_HEADER_LEN)?,
                looked_up: true,
            }),
            _ => None,
        };
        Some(Self {
            error: error.wrapping_neg(),
            opened,
        })
    }
}

impl Opened {
    /// The requests that take back what the server did, when its file cannot be handed on: as from the guest.
    pub fn undo(self) -> impl Iterator<Item = Request> {
        let release = Request::new(op::RELEASE, self.node, &[self.handle, 0, 0]);
        let forget = self.looked_up.then(|| Request::new(op::FORGET, self.node, &[1]));
        std::iter::once(release).chain(forget)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(opcode: u32) -> InHeader {
        InHeader {
            len: 40,
            opcode,
            unique: 9,
            node: 5,
        }
    }

    #[test]
    fn replies_are_checked() {
        let ok = out_header(16, 0, 9);
        assert_eq!(
            Reply::read(&ok, &request(3)),
            Some(Reply {
                error: 0,
                opened: None
            })
        );
        assert_eq!(
            Reply::read(&out_header(16, libc::ENOENT, 9), &request(op::OPEN)).map(|r| r.error),
            Some(libc::ENOENT)
        );
        let long = [out_header(20, 0, 9).to_vec(), vec![0; 4]].concat();
        assert!(Reply::read(&long, &request(3)).is_some());
        for bad in [
            out_header(17, 0, 9).to_vec(),
            out_header(16, 0, 8).to_vec(),
            out_header(16, 512, 9).to_vec(),
            out_header(16, -1, 9).to_vec(),
            [out_header(20, 2, 9).to_vec(), vec![0; 4]].concat(),
            ok.get(..15).unwrap().to_vec(),
        ] {
            assert_eq!(Reply::read(&bad, &request(3)), None, "{bad:?}");
        }
        // An open without a handle is none.
        assert_eq!(Reply::read(&ok, &request(op::OPEN)), None);
        assert_eq!(Reply::read(&long, &request(op::CREATE)), None);
    }

    #[test]
    fn what_was_opened_is_found() {
        let open = [&out_header(32, 0, 9)[..], &7u64.to_le_bytes(), &[0; 8]].concat();
        let opened = Reply::read(&open, &request(op::OPEN)).unwrap().opened.unwrap();
        assert_eq!(
            opened,
            Opened {
                handle: 7,
                node: 5,
                looked_up: false
            }
        );
        assert_eq!(opened.undo().count(), 1);
        let create = [
            &out_header(160, 0, 9)[..],
            &3u64.to_le_bytes(),
            &[0; 120],
            &8u64.to_le_bytes(),
            &[0; 8],
        ]
        .concat();
        let opened = Reply::read(&create, &request(op::CREATE))
            .unwrap()
            .opened
            .unwrap();
        assert_eq!(
            opened,
            Opened {
                handle: 8,
                node: 3,
                looked_up: true
            }
        );
        assert_eq!(opened.undo().count(), 2);
    }

    proptest! {
        #[test]
        fn any_reply_is_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), opcode in 0u32..60) {
            let _ = Reply::read(&bytes, &request(opcode));
        }
    }
}
