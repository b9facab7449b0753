//! The file-system device, with a file server behind it that answers as it likes.

use super::drive;
use crate::descriptors::{memory_file, packet_pair, receive, send};
use crate::driver::Host;
use crate::input::Input;
use husk_vmm::virtio::fs::Fs;
use husk_vmm::worker::inline;
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, MAX_REQUEST_LEN, ReplyHeader, RequestHeader};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const CREATE: u32 = 35;

/// LOOKUP, OPEN, READ, WRITE, RELEASE, INIT, CREATE, FORGET, INTERRUPT, DESTROY, BATCH_FORGET, TMPFILE, GETATTR,
/// READDIRPLUS.
const OPERATIONS: [u32; 14] = [1, OPEN, READ, WRITE, 18, 26, CREATE, 2, 36, 38, 42, 51, 3, 44];

const OUT_HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 128;

/// Most requests that the server puts off.
const MAX_KNOWN: usize = 32;

/// A request that the server has seen.
#[derive(Clone, Copy)]
struct Known {
    tag: u32,
    opcode: u32,
    unique: u64,
}

struct Server {
    channel: Option<OwnedFd>,
    file: File,
    directory: File,
    known: VecDeque<Known>,
    next_unique: u64,
}

impl Host for Server {
    fn request(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let how = input.u8();
        let opcode = match input.u8() {
            0xff => input.u32(),
            choice => OPERATIONS[usize::from(choice) % OPERATIONS.len()],
        };
        self.next_unique += 1;
        let unique = if how & 1 == 0 {
            self.next_unique
        } else {
            input.number()
        };
        let mut arguments = vec![];
        if matches!(opcode, READ | WRITE) {
            arguments.extend(u64::from(input.u8() % 4).to_le_bytes());
            arguments.extend(input.number().to_le_bytes());
            let size = match input.u8() {
                0xff => input.number() as u32,
                size => u32::from(size) * 16,
            };
            arguments.extend(size.to_le_bytes());
            arguments.extend(u32::from(how >> 1 & 1).to_le_bytes());
            arguments.extend(0u64.to_le_bytes());
            // O_APPEND and O_SYNC among them.
            arguments.extend((u32::from(input.u16()) << 8).to_le_bytes());
            arguments.extend([0; 4]);
            if opcode == WRITE {
                arguments.resize(40 + (size as usize).min(0x4000), 0x33);
            }
        } else {
            arguments.extend(u64::from(input.u8() % 4).to_le_bytes());
            arguments.extend(input.text(300));
            if how & 0x60 == 0x60 {
                arguments.resize(usize::from(input.u8()) * 0x180, 0);
            }
        }
        let length = if how & 0x10 == 0 {
            40 + arguments.len() as u32
        } else {
            input.number() as u32
        };
        let mut request = vec![];
        request.extend(length.to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(unique.to_le_bytes());
        request.extend(u64::from(how >> 2 & 3).to_le_bytes());
        request.extend([0; 16]);
        request.append(&mut arguments);
        if how & 0x80 != 0 {
            request.truncate(usize::from(input.u8()));
        }
        request
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let Some(channel) = &self.channel else { return };
        let what = input.u8();
        let mut packet = vec![0; HEADER_LEN + MAX_REQUEST_LEN + 1];
        for _ in 0..what >> 5 {
            let Some(length) = receive(channel, &mut packet) else {
                break;
            };
            assert!(
                (HEADER_LEN + 40..=HEADER_LEN + MAX_REQUEST_LEN).contains(&length),
                "a request of {length} bytes"
            );
            let Some((header, request)) = RequestHeader::decode(&packet[..length]) else {
                break;
            };
            assert!(header.capacity as usize <= MAX_REPLY_LEN);
            let field = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("four bytes"));
            assert_eq!(
                field(0) as usize,
                request.len(),
                "the length that a request tells"
            );
            assert!(
                !matches!(field(4), READ | WRITE),
                "file contents went to the server"
            );
            if self.known.len() < MAX_KNOWN {
                self.known.push_back(Known {
                    tag: header.tag,
                    opcode: field(4),
                    unique: u64::from(field(8)) | u64::from(field(12)) << 32,
                });
            }
        }
        let known = match what & 1 {
            0 => self.known.pop_front(),
            _ => self.known.pop_back(),
        };
        let Some(Known { tag, opcode, unique }) = known else {
            if what & 0x1e == 0x1e && input.u8() == 0 {
                self.channel = None;
            }
            return;
        };
        let mut error = 0u32;
        let mut body = vec![];
        match (what >> 1 & 3, opcode) {
            (0, _) => {
                error = input
                    .one_of(&[2u32, 1, 511, 512, u32::MAX, 1 << 31])
                    .wrapping_neg()
            }
            (1, _) => body.extend(input.text(0x400)),
            _ => {
                // What an honest server says, where it is about an open file.
                if matches!(opcode, CREATE | 51) {
                    body.extend(u64::from(input.u8() % 4).to_le_bytes());
                    body.resize(ENTRY_LEN, 0);
                }
                if matches!(opcode, OPEN | CREATE | 51) {
                    body.extend(u64::from(input.u8() % 4).to_le_bytes());
                    body.extend([0; 8]);
                } else {
                    body.resize(usize::from(input.u8()) * 0x150, 0x11);
                }
            }
        }
        let mut reply = ReplyHeader { tag }.encode().to_vec();
        let (length, unique, tamper) = match input.u8() {
            0 => (input.number() as u32, unique, false),
            1 => ((OUT_HEADER_LEN + body.len()) as u32, input.number(), false),
            tamper => ((OUT_HEADER_LEN + body.len()) as u32, unique, tamper == 2),
        };
        reply.extend(length.to_le_bytes());
        reply.extend(error.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.append(&mut body);
        if tamper {
            reply.truncate(usize::from(input.u8() % 32));
        }
        let attached = match (what >> 3 & 3, matches!(opcode, OPEN | CREATE | 51)) {
            (0 | 1, true) => vec![self.file.as_fd()],
            (2, _) => vec![self.directory.as_fd()],
            (3, true) => vec![self.file.as_fd(), self.directory.as_fd()],
            _ => vec![],
        };
        send(channel, &reply, &attached);
    }

    fn returned(&mut self, _queue: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        assert!(bytes.len() >= OUT_HEADER_LEN, "a reply of {} bytes", bytes.len());
        let told = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        assert_eq!(told as usize, bytes.len(), "the length that a reply tells");
    }
}

/// The device's end of the channel, and what is at the other one.
pub(super) fn server() -> (OwnedFd, impl Host) {
    let (device, own) = packet_pair();
    let file = File::from(memory_file());
    file.set_len(10_000).expect("a file in memory can");
    let server = Server {
        channel: Some(own),
        file,
        directory: File::open("/").expect("it is there"),
        known: VecDeque::new(),
        next_unique: 1,
    };
    (device, server)
}

/// The file-system device.
pub fn fs(bytes: &[u8]) {
    inline::enter();
    let (channel, mut server) = server();
    let device = Fs::new("share", channel).expect("descriptors");
    drive(&mut Input::new(bytes), vec![Box::new(device)], &mut server);
}
