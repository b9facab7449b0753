//! A VMM that says to husk-fsd whatever a test wants said.

use super::server::Server;
use husk_vmm::virtio::fs::channel::{Channel, REPLY_BUFFER_LEN, Receive};
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, ReplyHeader, RequestHeader};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

pub const ROOT: u64 = 1;

/// A FUSE reply.
#[derive(Debug)]
pub struct Reply {
    pub tag: u32,
    /// Positive, or 0.
    pub error: i32,
    pub unique: u64,
    pub body: Vec<u8>,
    pub file: Option<OwnedFd>,
}

impl Reply {
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.body[at..at + 8].try_into().unwrap())
    }

    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.body[at..at + 4].try_into().unwrap())
    }
}

pub struct Client {
    channel: Channel,
    tag: u32,
    pub server: Server,
}

/// Arguments of a request.
#[derive(Default, Clone)]
pub struct Args(pub Vec<u8>);

impl Args {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub fn name(self, name: &CStr) -> Self {
        self.bytes(name.to_bytes_with_nul())
    }
}

/// A FUSE request as a guest writes it.
pub fn request(opcode: u32, node: u64, unique: u64, args: &Args) -> Vec<u8> {
    let len = 40 + args.0.len() as u32;
    let mut bytes = vec![];
    bytes.extend(len.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(&args.0);
    bytes
}

impl Client {
    /// Before a server of its own.
    pub fn new() -> Self {
        Self::before(Server::start())
    }

    pub fn before(mut server: Server) -> Self {
        let channel = Channel::new(server.channel.take().unwrap());
        Self {
            channel,
            tag: 0,
            server,
        }
    }

    /// Closes the channel.
    pub fn close(self) -> Server {
        self.server
    }

    /// Sends a request with a descriptor attached.
    pub fn send_with_file(&mut self, fuse: &[u8], file: RawFd) {
        self.tag += 1;
        let mut packet = RequestHeader {
            tag: self.tag,
            capacity: 65536,
        }
        .encode()
        .to_vec();
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
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = 24;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(file);
            assert!(libc::sendmsg(self.channel.fd().as_raw_fd(), &raw const message, 0) > 0);
        }
    }

    /// Sends a packet as it is.
    pub fn send(&self, packet: &[u8]) {
        assert!(self.channel.send(packet).unwrap(), "the channel is full");
    }

    /// Waits up to two minutes for a packet: a SYNCFS takes what the host's disk takes. `None` at the channel's end.
    pub fn receive(&self) -> Option<Reply> {
        let mut buffer = vec![0; REPLY_BUFFER_LEN];
        let mut poll = libc::pollfd {
            fd: self.channel.fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, as the call is told, which lives through it.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 120_000) };
        assert_eq!(ready, 1, "the server does not answer");
        match self.channel.receive(&mut buffer).unwrap() {
            Receive::Packet(packet) => {
                let (header, fuse) = ReplyHeader::decode(&buffer[..packet.len]).unwrap();
                assert!(fuse.len() >= 16 && fuse.len() <= MAX_REPLY_LEN);
                let word = |at: usize| u32::from_le_bytes(fuse[at..at + 4].try_into().unwrap());
                assert_eq!(word(0) as usize, fuse.len());
                let error = -(word(4) as i32);
                assert!((0..512).contains(&error));
                assert!(error == 0 || fuse.len() == 16);
                Some(Reply {
                    tag: header.tag,
                    error,
                    unique: u64::from_le_bytes(fuse[8..16].try_into().unwrap()),
                    body: fuse[16..].to_vec(),
                    file: packet.file,
                })
            }
            Receive::End => None,
            Receive::Empty => unreachable!("poll says that there is something"),
        }
    }

    /// Sends a FUSE request, whatever it is.
    pub fn send_request(&mut self, capacity: u32, fuse: &[u8]) -> u32 {
        self.tag += 1;
        let mut packet = RequestHeader {
            tag: self.tag,
            capacity,
        }
        .encode()
        .to_vec();
        assert_eq!(packet.len(), HEADER_LEN);
        packet.extend(fuse);
        self.send(&packet);
        self.tag
    }

    /// Asks and waits for the answer.
    pub fn ask_with_room(&mut self, capacity: u32, opcode: u32, node: u64, args: &Args) -> Reply {
        let unique = 1000 + u64::from(self.tag);
        let tag = self.send_request(capacity, &request(opcode, node, unique, args));
        let reply = self.receive().expect("the server is gone");
        assert_eq!((reply.tag, reply.unique), (tag, unique));
        assert!(reply.body.len() + 16 <= (capacity as usize).max(16));
        reply
    }

    pub fn ask(&mut self, opcode: u32, node: u64, args: &Args) -> Reply {
        self.ask_with_room(u32::MAX, opcode, node, args)
    }

    /// The error of a request that must fail.
    pub fn error(&mut self, opcode: u32, node: u64, args: &Args) -> i32 {
        let reply = self.ask(opcode, node, args);
        assert_ne!(reply.error, 0, "it should have failed");
        assert!(reply.file.is_none());
        reply.error
    }

    /// Tells what has no answer.
    pub fn tell(&mut self, opcode: u32, node: u64, args: &Args) {
        self.send_request(0, &request(opcode, node, 0, args));
    }

    /// FUSE_INIT as a guest's kernel sends it, offering all it could.
    pub fn init(&mut self) -> Reply {
        let args = Args::new()
            .u32(7)
            .u32(41)
            .u32(1 << 20)
            .u32(u32::MAX)
            .u32(u32::MAX)
            .bytes(&[0; 44]);
        self.ask(26, 0, &args)
    }

    /// The node of a path that is there.
    pub fn look_up(&mut self, parent: u64, name: &CStr) -> Reply {
        let reply = self.ask(1, parent, &Args::new().name(name));
        assert_eq!(reply.error, 0, "{name:?}");
        reply
    }
}
