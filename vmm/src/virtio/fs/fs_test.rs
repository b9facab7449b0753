//! The device between a driver and a server that both do what they like.

use super::wire::{OUT_HEADER_LEN, op, out_header};
use super::{Fs, MAX_TAG_LEN, State};
use crate::memory::Memory;
use crate::virtio::device::{Activation, Device};
use crate::virtio::guest_queue::{GuestQueue, Part, interrupt, memory};
use crate::virtio::registers::RestoreError;
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_DATA_LEN, MAX_REQUEST_LEN, ReplyHeader, RequestHeader};
use proptest::prelude::*;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const GETATTR: u32 = 3;
/// Where the tests keep their buffers; each has this much.
const DATA: u64 = 0x10000;
const AREA: u64 = 0x200000;
const SIZE: usize = 0x2000000;
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes a reply that is none.
type Forge<'a> = &'a dyn Fn(&Asked) -> Vec<u8>;

/// The server's end of the channel.
struct Server(OwnedFd);

/// A request as the server sees it.
struct Asked {
    tag: u32,
    capacity: u32,
    fuse: Vec<u8>,
}

impl Asked {
    fn opcode(&self) -> u32 {
        u32::from_le_bytes(self.fuse[4..8].try_into().unwrap())
    }

    fn unique(&self) -> u64 {
        u64::from_le_bytes(self.fuse[8..16].try_into().unwrap())
    }

    fn reply(&self, body: &[u8]) -> Vec<u8> {
        [
            &out_header(OUT_HEADER_LEN + body.len(), 0, self.unique())[..],
            body,
        ]
        .concat()
    }
}

impl Server {
    /// Waits for a request.
    fn next(&self) -> Asked {
        self.try_next(PATIENCE).expect("no request came")
    }

    fn try_next(&self, patience: Duration) -> Option<Asked> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, as the call is told, which lives through it.
        if unsafe { libc::poll(&raw mut poll, 1, patience.as_millis() as i32) } != 1 {
            return None;
        }
        let mut buffer = vec![0; HEADER_LEN + MAX_REQUEST_LEN];
        // SAFETY: `buffer` has room for the length given and lives through the call.
        let n = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let (header, fuse) = RequestHeader::decode(&buffer[..usize::try_from(n).unwrap()])?;
        Some(Asked {
            tag: header.tag,
            capacity: header.capacity,
            fuse: fuse.to_vec(),
        })
    }

    fn send(&self, tag: u32, fuse: &[u8], file: Option<RawFd>) {
        let mut packet = ReplyHeader { tag }.encode().to_vec();
        packet.extend(fuse);
        let mut data = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        let mut control = [0u64; 3];
        // SAFETY: all that the message points to lives through the call; the control buffer has room for one header
        // and one descriptor.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut data;
            message.msg_iovlen = 1;
            if let Some(file) = file {
                message.msg_control = control.as_mut_ptr().cast();
                message.msg_controllen = 24;
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
                libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(file);
            }
            assert!(libc::sendmsg(self.0.as_raw_fd(), &raw const message, 0) > 0);
        }
    }

    fn answer(&self, asked: &Asked, body: &[u8]) {
        self.send(asked.tag, &asked.reply(body), None);
    }
}

/// A driver before an active device.
struct Guest {
    memory: Memory,
    urgent: GuestQueue,
    requests: GuestQueue,
    unique: u64,
    areas: u64,
}

impl Guest {
    fn activate(device: &mut Fs) -> Self {
        let memory = memory(SIZE);
        let urgent = GuestQueue::new(&memory, 0, 16);
        let requests = GuestQueue::new(&memory, GuestQueue::SPAN, 256);
        let activation = Activation {
            memory: memory.clone(),
            queues: vec![urgent.device_side(false), requests.device_side(false)],
            interrupt: interrupt().0,
            features: 0,
        };
        device.activate(activation).unwrap();
        Self {
            memory,
            urgent,
            requests,
            unique: 100,
            areas: 0,
        }
    }

    /// A FUSE request.
    fn fuse(&mut self, opcode: u32, arguments: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let mut bytes = (40 + arguments.len() as u32).to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(5u64.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(arguments);
        bytes
    }

    /// Puts bytes and room for a reply on a queue: the head, and where the reply will be.
    fn put(&mut self, urgent: bool, request: &[u8], room: u32) -> (u16, u64) {
        let area = DATA + (self.areas % 12) * AREA;
        self.areas += 1;
        let reply = area + AREA / 2;
        self.memory.write_slice(request, GuestAddress(area)).unwrap();
        let mut parts = vec![];
        // In odd pieces, the reply's header too.
        let cut = (request.len() / 3) as u32;
        let pieces = [
            (area, cut, false),
            (area + u64::from(cut), request.len() as u32 - cut, false),
            (reply, room.min(5), true),
        ];
        for (address, length, write) in pieces {
            if length > 0 {
                parts.push(Part {
                    address,
                    length,
                    write,
                });
            }
        }
        if room > 5 {
            parts.push(Part {
                address: reply + 5,
                length: room - 5,
                write: true,
            });
        }
        let queue = if urgent {
            &mut self.urgent
        } else {
            &mut self.requests
        };
        let head = queue.add(&parts);
        queue.notify.write(1).unwrap();
        (head, reply)
    }

    /// Waits for a chain to come back: its length.
    fn wait(&mut self, urgent: bool, head: u16) -> usize {
        let (back, length) = self.wait_any(urgent);
        assert_eq!(back, head);
        length
    }

    fn wait_any(&mut self, urgent: bool) -> (u16, usize) {
        let queue = if urgent {
            &mut self.urgent
        } else {
            &mut self.requests
        };
        let start = Instant::now();
        loop {
            if let Some((head, length)) = queue.pop() {
                return (head, length as usize);
            }
            assert!(start.elapsed() < PATIENCE, "no chain came back");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Asks on the request queue and waits: the reply.
    fn ask(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        let (head, reply) = self.put(false, request, room);
        let length = self.wait(false, head);
        self.bytes(reply, length)
    }

    fn ask_error(&mut self, request: &[u8]) -> i32 {
        let reply = self.ask(request, 4096);
        assert_eq!(reply.len(), OUT_HEADER_LEN);
        error_of(&reply)
    }

    /// Opens `file` under `handle`, with the server's help.
    fn open(&mut self, server: &Server, handle: u64, file: &File) {
        let request = self.fuse(op::OPEN, &[0; 8]);
        let (head, reply) = self.put(false, &request, 4096);
        let asked = server.next();
        let body = [handle.to_le_bytes(), [0; 8]].concat();
        server.send(asked.tag, &asked.reply(&body), Some(file.as_raw_fd()));
        assert_eq!(self.wait(false, head), 32);
        assert_eq!(error_of(&self.bytes(reply, 32)), 0);
    }

    fn data_request(&mut self, opcode: u32, handle: u64, offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
        let mut arguments = handle.to_le_bytes().to_vec();
        arguments.extend(offset.to_le_bytes());
        arguments.extend(size.to_le_bytes());
        arguments.extend([0; 20]);
        arguments.extend(data);
        self.fuse(opcode, &arguments)
    }
}

fn error_of(reply: &[u8]) -> i32 {
    -i32::from_le_bytes(reply[4..8].try_into().unwrap())
}

fn pair() -> (OwnedFd, Server) {
    let mut fds: [RawFd; 2] = [-1; 2];
    // SAFETY: `fds` has room for two descriptors, which are nobody else's.
    unsafe {
        assert_eq!(
            libc::socketpair(
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
                0,
                fds.as_mut_ptr()
            ),
            0
        );
        (OwnedFd::from_raw_fd(fds[0]), Server(OwnedFd::from_raw_fd(fds[1])))
    }
}

fn start() -> (Fs, Guest, Server) {
    let (ours, server) = pair();
    let mut device = Fs::new("share", ours).unwrap();
    let guest = Guest::activate(&mut device);
    (device, guest, server)
}

#[test]
fn a_saved_device_comes_back_the_same() {
    let device = Fs::new("share", pair().0).unwrap();
    let state: State = serde_json::from_str(&serde_json::to_string(&device.save()).unwrap()).unwrap();
    let copy = Fs::restore(state, pair().0).unwrap();
    assert_eq!(copy.config(), device.config());
    assert_eq!(copy.save(), device.save());
    assert_eq!(device.config(), [&b"share"[..], &[0; 31], &[1, 0, 0, 0]].concat());
    let cut = Fs::new(&"x".repeat(50), pair().0).unwrap();
    assert_eq!(cut.config(), [&[b'x'; 36][..], &[1, 0, 0, 0]].concat());
    assert_eq!(Fs::restore(cut.save(), pair().0).unwrap().save(), cut.save());
    let cut = Fs::new(&format!("x{}", "ä".repeat(50)), pair().0).unwrap();
    assert_eq!(
        cut.save().tag,
        format!("x{}", "ä".repeat(17)),
        "no half of a character"
    );
}

#[test]
fn a_tag_that_no_share_has_is_not_restored() {
    for tag in ["", "a\0b", &"x".repeat(MAX_TAG_LEN + 1)] {
        let state = State { tag: tag.to_owned() };
        let refused = Fs::restore(state, pair().0).unwrap_err();
        assert!(
            matches!(
                refused,
                RestoreError::Device {
                    device: "file-system",
                    ..
                }
            ),
            "{tag}: {refused}"
        );
    }
}

#[test]
fn requests_are_answered_in_any_order() {
    let (mut device, mut guest, server) = start();
    let requests: Vec<_> = (0..8u8)
        .map(|n| {
            let request = guest.fuse(GETATTR, &[n; 16]);
            (guest.put(false, &request, 100), request)
        })
        .collect();
    let asked: Vec<_> = requests.iter().map(|_| server.next()).collect();
    for (n, (asked, (_, request))) in asked.iter().zip(&requests).enumerate() {
        assert_eq!(&asked.fuse, request);
        assert_eq!(asked.capacity, 100, "{n}");
    }
    for (asked, ((head, reply), _)) in asked.iter().zip(&requests).rev() {
        let body = [asked.tag as u8; 33];
        server.answer(asked, &body);
        assert_eq!(guest.wait(false, *head), OUT_HEADER_LEN + 33);
        assert_eq!(guest.bytes(*reply, OUT_HEADER_LEN + 33), asked.reply(&body));
    }
    device.reset();
}

#[test]
fn contents_go_between_the_file_and_the_guest() {
    let (mut device, mut guest, server) = start();
    let mut file = tempfile::tempfile().unwrap();
    let text: Vec<u8> = (0..MAX_DATA_LEN + 5000).map(|i| (i / 7) as u8).collect();
    file.write_all(&text).unwrap();
    guest.open(&server, 9, &file);
    let read = guest.data_request(op::READ, 9, 3, 5000, &[]);
    let reply = guest.ask(&read, 5016);
    assert_eq!((error_of(&reply), &reply[16..]), (0, &text[3..5003]));
    let read = guest.data_request(op::READ, 9, text.len() as u64 - 10, 4096, &[]);
    assert_eq!(guest.ask(&read, 4112)[16..], text[text.len() - 10..]);
    let read = guest.data_request(op::READ, 9, text.len() as u64 + 10, 4096, &[]);
    assert_eq!(guest.ask(&read, 4112).len(), 16);
    // More than there is room for, more than a request may have, beyond what offsets reach.
    for (offset, size) in [
        (0, 4097),
        (0, u32::MAX),
        (0, MAX_DATA_LEN as u32 + 1),
        (u64::MAX, 1),
        (i64::MAX as u64, 9),
    ] {
        let read = guest.data_request(op::READ, 9, offset, size, &[]);
        assert_eq!(
            guest.ask(&read, 4112),
            out_header(16, libc::EINVAL, guest.unique),
            "{offset} {size}"
        );
    }
    let write = guest.data_request(op::WRITE, 9, 5, 3, b"xyz");
    let reply = guest.ask(&write, 24);
    assert_eq!((error_of(&reply), &reply[16..]), (0, &3u64.to_le_bytes()[..]));
    let mut start = [0; 10];
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut start).unwrap();
    assert_eq!(start, [&text[..5], b"xyz", &text[8..10]].concat()[..]);
    // A size that is not that of the data; no room for the answer.
    for (size, data) in [(4, &b"xyz"[..]), (2, b"xyz"), (u32::MAX, b"")] {
        let write = guest.data_request(op::WRITE, 9, 0, size, data);
        assert_eq!(guest.ask_error(&write), libc::EINVAL);
    }
    let write = guest.data_request(op::WRITE, 9, 0, 3, b"xyz");
    assert_eq!(error_of(&guest.ask(&write, 23)), libc::EINVAL);
    // The arguments are cut short.
    for opcode in [op::READ, op::WRITE] {
        let request = guest.fuse(opcode, &[0; 39]);
        assert_eq!(guest.ask_error(&request), libc::EINVAL);
    }
    let read = guest.data_request(op::READ, 10, 0, 100, &[]);
    assert_eq!(guest.ask_error(&read), libc::EBADF);
    // Nothing of all that was the server's to see.
    assert!(server.try_next(Duration::from_millis(20)).is_none());
    device.reset();
}

#[test]
fn a_read_only_handle_takes_no_writes() {
    let (mut device, mut guest, server) = start();
    let path = tempfile::NamedTempFile::new().unwrap();
    guest.open(&server, 1, &File::open(path.path()).unwrap());
    let write = guest.data_request(op::WRITE, 1, 0, 3, b"xyz");
    assert_eq!(guest.ask_error(&write), libc::EBADF);
    device.reset();
}

#[test]
fn a_released_handle_is_gone_and_the_server_is_told() {
    let (mut device, mut guest, server) = start();
    let file = tempfile::tempfile().unwrap();
    guest.open(&server, 1, &file);
    guest.open(&server, 2, &file);
    let release = guest.fuse(op::RELEASE, &[1u64.to_le_bytes(), [0; 8], [0; 8]].concat());
    let (head, _) = guest.put(false, &release, 16);
    let asked = server.next();
    assert_eq!(asked.fuse, release);
    server.answer(&asked, &[]);
    guest.wait(false, head);
    let read = guest.data_request(op::READ, 1, 0, 1, &[]);
    assert_eq!(guest.ask_error(&read), libc::EBADF);
    let read = guest.data_request(op::READ, 2, 0, 1, &[]);
    assert_eq!(guest.ask(&read, 17).len(), 16);
    // The session's end closes all.
    let destroy = guest.fuse(op::DESTROY, &[]);
    let (head, _) = guest.put(false, &destroy, 16);
    server.answer(&server.next(), &[]);
    guest.wait(false, head);
    let read = guest.data_request(op::READ, 2, 0, 1, &[]);
    assert_eq!(guest.ask_error(&read), libc::EBADF);
    device.reset();
}

#[test]
fn what_has_no_reply_goes_back_at_once() {
    let (mut device, mut guest, server) = start();
    let forget = guest.fuse(op::FORGET, &1u64.to_le_bytes());
    let (head, _) = guest.put(true, &forget, 0);
    assert_eq!(guest.wait(true, head), 0);
    assert_eq!(server.next().fuse, forget);
    let interrupt = guest.fuse(op::INTERRUPT, &1u64.to_le_bytes());
    let (head, _) = guest.put(true, &interrupt, 0);
    assert_eq!(guest.wait(true, head), 0);
    assert!(server.try_next(Duration::from_millis(20)).is_none());
    device.reset();
}

#[test]
fn requests_that_are_none_go_no_further() {
    let (mut device, mut guest, server) = start();
    // Shorter than a header; a length that is not there, or below the header's.
    let good = guest.fuse(GETATTR, &[0; 16]);
    assert_eq!(guest.ask(&good[..39], 100).len(), 0);
    for len in [0u32, 39, 57, u32::MAX] {
        let mut bad = good.clone();
        bad[..4].copy_from_slice(&len.to_le_bytes());
        assert_eq!(guest.ask_error(&bad), libc::EINVAL, "{len}");
    }
    // No room for a reply.
    assert_eq!(guest.ask(&good, 15).len(), 0);
    assert_eq!(guest.ask(&good, 0).len(), 0);
    let long = guest.fuse(GETATTR, &vec![0; MAX_REQUEST_LEN]);
    assert_eq!(guest.ask_error(&long), libc::E2BIG);
    // Readable after writable; memory that is not there.
    for parts in [
        [
            Part {
                address: DATA,
                length: 100,
                write: true,
            },
            Part {
                address: DATA,
                length: 56,
                write: false,
            },
        ],
        [
            Part {
                address: DATA,
                length: 56,
                write: false,
            },
            Part {
                address: SIZE as u64 - 8,
                length: 16,
                write: true,
            },
        ],
        [
            Part {
                address: u64::MAX - 8,
                length: 56,
                write: false,
            },
            Part {
                address: DATA,
                length: 16,
                write: true,
            },
        ],
    ] {
        let head = guest.requests.add(&parts);
        guest.requests.notify.write(1).unwrap();
        assert_eq!(guest.wait(false, head), 0);
    }
    assert!(server.try_next(Duration::from_millis(20)).is_none());
    // What is beyond a request's own length is not passed on.
    let padded = [&good[..], b"rest"].concat();
    guest.put(false, &padded, 100);
    assert_eq!(server.next().fuse, good);
    device.reset();
}

#[test]
fn replies_that_are_none_become_errors() {
    let (mut device, mut guest, server) = start();
    let file = tempfile::tempfile().unwrap();
    let get = |asked: &Asked| asked.reply(&[0; 8]);
    let bad: [(u32, Forge<'_>); 7] = [
        (GETATTR, &|_| vec![]),
        (GETATTR, &|a| get(a)[..23].to_vec()),
        (GETATTR, &|a| [get(a), vec![0]].concat()),
        (GETATTR, &|a| out_header(16, 0, a.unique() + 1).to_vec()),
        (GETATTR, &|a| out_header(16, 4096, a.unique()).to_vec()),
        // Longer than the guest has room for.
        (GETATTR, &|a| a.reply(&[0; 4096])),
        (op::OPEN, &|a| a.reply(&[0; 7])),
    ];
    for (n, (opcode, reply)) in bad.iter().enumerate() {
        let request = guest.fuse(*opcode, &[0; 16]);
        let (head, at) = guest.put(false, &request, 100);
        let asked = server.next();
        server.send(asked.tag, &reply(&asked), Some(file.as_raw_fd()));
        assert_eq!(guest.wait(false, head), 16, "{n}");
        assert_eq!(
            guest.bytes(at, 16),
            out_header(16, libc::EIO, guest.unique),
            "{n}"
        );
    }
    // To nobody.
    server.send(12345, &out_header(16, 0, 1), Some(file.as_raw_fd()));
    let request = guest.fuse(GETATTR, &[0; 16]);
    let (head, _) = guest.put(false, &request, 100);
    let asked = server.next();
    server.answer(&asked, &[]);
    server.answer(&asked, &[]);
    assert_eq!(guest.wait(false, head), 16);
    device.reset();
}

#[test]
fn an_open_without_a_usable_file_is_taken_back() {
    let (mut device, mut guest, server) = start();
    let directory = File::open("/").unwrap();
    for file in [None, Some(directory.as_raw_fd())] {
        let request = guest.fuse(op::CREATE, &[0; 20]);
        let (head, at) = guest.put(false, &request, 4096);
        let asked = server.next();
        let mut body = 77u64.to_le_bytes().to_vec();
        body.extend([0; 120]);
        body.extend(88u64.to_le_bytes());
        body.extend([0; 8]);
        server.send(asked.tag, &asked.reply(&body), file);
        assert_eq!(guest.wait(false, head), 16);
        assert_eq!(error_of(&guest.bytes(at, 16)), libc::ENFILE);
        let release = server.next();
        assert_eq!(release.opcode(), op::RELEASE);
        assert_eq!(release.fuse[16..24], 77u64.to_le_bytes());
        assert_eq!(release.fuse[40..48], 88u64.to_le_bytes());
        let forget = server.next();
        assert_eq!(forget.opcode(), op::FORGET);
        assert_eq!(forget.fuse[16..24], 77u64.to_le_bytes());
        assert_eq!(forget.fuse[40..], 1u64.to_le_bytes());
        server.answer(&release, &[]);
    }
    device.reset();
}

#[test]
fn a_reset_drops_what_is_under_way() {
    let (mut device, mut guest, server) = start();
    let file = tempfile::tempfile().unwrap();
    guest.open(&server, 1, &file);
    let request = guest.fuse(op::OPEN, &[0; 8]);
    guest.put(false, &request, 4096);
    let late = server.next();
    device.reset();
    let mut guest = Guest::activate(&mut device);
    // The reply comes too late, with its file; the old handles are gone.
    server.send(
        late.tag,
        &late.reply(&[[2u8; 8], [0; 8]].concat()),
        Some(file.as_raw_fd()),
    );
    let request = guest.fuse(GETATTR, &[0; 16]);
    let (head, _) = guest.put(false, &request, 100);
    let asked = server.next();
    assert_ne!(asked.tag, late.tag);
    server.answer(&asked, &[1; 8]);
    assert_eq!(guest.wait(false, head), 24);
    for handle in [1, u64::from_le_bytes([2; 8])] {
        let read = guest.data_request(op::READ, handle, 0, 1, &[]);
        assert_eq!(guest.ask_error(&read), libc::EBADF);
    }
    device.reset();
    device.reset();
}

#[test]
fn a_full_channel_holds_requests_back_and_loses_none() {
    let (mut device, mut guest, server) = start();
    let count = 60usize;
    let mut heads = vec![];
    for n in 0..count {
        let request = guest.fuse(GETATTR, &vec![n as u8; 20_000]);
        // The areas are used again: wait for none, as the bytes' order does not matter here.
        heads.push(guest.put(false, &request, 64).0);
        std::thread::sleep(Duration::from_micros(500));
    }
    // What goes to files is not held back for ever by what does not; and FORGETs wait their turn.
    let forget = guest.fuse(op::FORGET, &1u64.to_le_bytes());
    let (forgotten, _) = guest.put(true, &forget, 0);
    let mut seen = 0;
    let mut forgets = 0;
    while seen + forgets < count + 1 {
        let asked = server.next();
        if asked.opcode() == op::FORGET {
            forgets += 1;
            continue;
        }
        assert_eq!(asked.fuse.len(), 20_040);
        server.answer(&asked, &[]);
        seen += 1;
    }
    let mut back: Vec<_> = (0..count).map(|_| guest.wait_any(false).0).collect();
    back.sort_unstable();
    heads.sort_unstable();
    assert_eq!(back, heads);
    assert_eq!(guest.wait(true, forgotten), 0);
    device.reset();
}

#[test]
fn without_its_server_the_device_answers_that_it_is_gone() {
    let (mut device, mut guest, server) = start();
    let file = tempfile::tempfile().unwrap();
    guest.open(&server, 1, &file);
    let requests: Vec<_> = (0..4)
        .map(|_| {
            let request = guest.fuse(GETATTR, &[0; 16]);
            guest.put(false, &request, 100).0
        })
        .collect();
    let _ = server.next();
    drop(server);
    let mut back: Vec<_> = requests.iter().map(|_| guest.wait_any(false)).collect();
    back.sort_unstable();
    assert_eq!(
        back,
        requests
            .iter()
            .map(|head| (*head, 16))
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );
    let request = guest.fuse(GETATTR, &[0; 16]);
    assert_eq!(guest.ask_error(&request), libc::ENOTCONN);
    let forget = guest.fuse(op::FORGET, &1u64.to_le_bytes());
    let (head, _) = guest.put(true, &forget, 0);
    assert_eq!(guest.wait(true, head), 0);
    // And after a reset.
    device.reset();
    let mut guest = Guest::activate(&mut device);
    let request = guest.fuse(GETATTR, &[0; 16]);
    assert_eq!(guest.ask_error(&request), libc::ENOTCONN);
    device.reset();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_come_back(
        requests in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..200), 0u32..300, any::<bool>()), 1..20),
        replies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 20),
        forms in prop::collection::vec((0u32..60, any::<bool>()), 20),
    ) {
        let (mut device, mut guest, server) = start();
        for (((bytes, room, urgent), reply), (opcode, form)) in requests.iter().zip(&replies).zip(&forms) {
            let request = if *form { guest.fuse(*opcode, bytes) } else { bytes.clone() };
            let (head, _) = guest.put(*urgent, &request, *room);
            let start = Instant::now();
            loop {
                let queue = if *urgent { &mut guest.urgent } else { &mut guest.requests };
                if let Some((back, length)) = queue.pop() {
                    prop_assert_eq!(back, head);
                    prop_assert!(length <= *room);
                    break;
                }
                if let Some(asked) = server.try_next(Duration::from_millis(1)) {
                    if *form { server.answer(&asked, reply) } else { server.send(asked.tag, reply, None) };
                }
                prop_assert!(start.elapsed() < PATIENCE, "a chain did not come back");
            }
        }
        device.reset();
    }
}
