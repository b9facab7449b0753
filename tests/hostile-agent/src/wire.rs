//! The wire to the engine, which is ttrpc's: frames of a header (length, stream, both big-endian, kind, flags) and a
//! message.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

use protobuf::Message;
use ttrpc::proto::{Code, Request, Response, Status};

const HOST: u32 = 2;
pub const RESPONSE: u8 = 2;
pub const DATA: u8 = 3;
pub const CLOSED: u8 = 1;
/// Largest frame that ttrpc takes.
pub const MAX_FRAME: usize = 4 << 20;

/// A connection to a port of the host's.
pub fn dial(port: u32) -> io::Result<File> {
    // SAFETY: no pointers; the result is checked.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made.
    let file = unsafe { File::from_raw_fd(socket) };
    // SAFETY: plain data, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = HOST;
    address.svm_port = port;
    // SAFETY: the address is valid for its length.
    let result = unsafe {
        libc::connect(
            socket,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// The connection to the engine.
pub struct Wire(pub File);

impl Wire {
    pub fn frame_head(&mut self, length: u32, stream: u32, kind: u8, flags: u8) -> io::Result<()> {
        let mut head = length.to_be_bytes().to_vec();
        head.extend(stream.to_be_bytes());
        head.extend([kind, flags]);
        self.0.write_all(&head)
    }

    pub fn frame(&mut self, stream: u32, kind: u8, flags: u8, message: &[u8]) -> io::Result<()> {
        let mut bytes = (message.len() as u32).to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, flags]);
        bytes.extend(message);
        self.0.write_all(&bytes)
    }

    pub fn answer(&mut self, stream: u32, payload: Vec<u8>) -> io::Result<()> {
        self.respond(
            stream,
            &Response {
                payload,
                ..Default::default()
            },
        )
    }

    pub fn refuse(&mut self, stream: u32, code: Code, message: String) -> io::Result<()> {
        let status = Status {
            code: code.into(),
            message,
            ..Default::default()
        };
        self.respond(
            stream,
            &Response {
                status: Some(status).into(),
                ..Default::default()
            },
        )
    }

    fn respond(&mut self, stream: u32, response: &Response) -> io::Result<()> {
        self.frame(stream, RESPONSE, 0, &encode(response)?)
    }

    /// The next request, and its stream.
    pub fn request(&mut self) -> io::Result<(u32, Request)> {
        let mut head = [0; 10];
        self.0.read_exact(&mut head)?;
        let [a, b, c, d, e, f, g, h, ..] = head;
        let mut message = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
        self.0.read_exact(&mut message)?;
        let request = Request::parse_from_bytes(&message).map_err(io::Error::other)?;
        Ok((u32::from_be_bytes([e, f, g, h]), request))
    }
}

pub fn encode(message: &impl Message) -> io::Result<Vec<u8>> {
    message.write_to_bytes().map_err(io::Error::other)
}
