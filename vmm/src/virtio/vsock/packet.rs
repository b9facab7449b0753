//! The header of every vsock packet (virtio 1.3, 5.10.6).

use vm_memory::ByteValued;

/// Length of a header in bytes.
pub const HEADER_LEN: usize = size_of::<Header>();

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type of socket there is here.
pub const TYPE_STREAM: u16 = 1;

/// Flag of SHUTDOWN: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of SHUTDOWN: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both halves.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for, `VIRTIO_VSOCK_OP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends a connection.
    Rst = 3,
    /// Announces that the sender will not send, or not receive, any more; see the flags.
    Shutdown = 4,
    /// Carries data.
    Rw = 5,
    /// Tells of buffer space, as every packet does, and nothing else.
    CreditUpdate = 6,
    /// Asks for a [`CreditUpdate`](Self::CreditUpdate).
    CreditRequest = 7,
}

impl Op {
    /// The operation of that number.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr` as it lies in memory: 44 bytes, little-endian, as is the only machine that this is
/// built for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub struct Header {
    /// The sender's context id.
    pub src_cid: u64,
    /// The receiver's context id.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// [`TYPE_STREAM`].
    pub kind: u16,
    /// An [`Op`].
    pub op: u16,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// The sender's buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer since the connection was made, modulo 2^32.
    pub fwd_cnt: u32,
}

const _: () = assert!(HEADER_LEN == 44);

// SAFETY: plain integers without padding (packed), for which any bytes are a value.
unsafe impl ByteValued for Header {}

/// The two ports that name a connection; the two context ids are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// The guest's.
    pub guest: u32,
    /// The host's.
    pub host: u32,
}

impl Header {
    /// Of a packet to the guest, without data, flags or credit.
    pub fn to_guest(guest_cid: u64, ports: Ports, op: Op) -> Self {
        Self {
            src_cid: husk_vmm_protocol::vsock::HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// Of the RST that answers this packet, whatever it was meant to be.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }

    /// The connection of a packet from the guest.
    pub fn ports_from_guest(&self) -> Ports {
        Ports {
            guest: self.src_port,
            host: self.dst_port,
        }
    }
}
