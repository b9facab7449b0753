//! What a device is sent by a driver that keeps the rules, as bytes that can be put anywhere.

use crate::attack::{fs, net};
use crate::machine::load;
use crate::virtio::*;

/// What the device may do with the buffers of a queue's chains.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Reads them.
    Read,
    /// Writes them.
    Write,
    /// Reads the first, writes the others.
    Both,
}

/// That of a queue.
pub fn shape(device: Device, queue: u16) -> Shape {
    match (device.kind, queue) {
        (FS, _) => Shape::Both,
        // The queue of commands.
        (NET, _) if device.queues % 2 == 1 && queue == device.queues - 1 => Shape::Both,
        (RNG, _) | (VSOCK, 2) => Shape::Write,
        _ if queue % 2 == 0 => Shape::Write,
        _ => Shape::Read,
    }
}

/// Most bytes of a message.
pub const MOST: usize = 160;
/// Bytes of a READ or WRITE.
pub const DATA: u32 = 64;

/// A message.
pub struct Message {
    /// Its bytes, and zeroes.
    pub bytes: [u8; MOST],
    /// Length of its header.
    pub front: u32,
    /// Length of it all.
    pub length: u32,
}

/// A device that waits for one.
pub struct Ready {
    /// Its queues.
    pub rings: [Option<Ring>; FIRST],
    /// A file's handle, if it has files.
    pub handle: u64,
}

/// Resets a device and starts it. `None` if it does not come so far.
pub fn ready(device: Device, features: u64) -> Option<Ready> {
    if device.kind == FS {
        let (rings, handle) = fs::opened(device, features)?;
        return Some(Ready { rings, handle });
    }
    let rings = device.bring_up(features);
    rings.first()?.as_ref()?;
    Some(Ready { rings, handle: 0 })
}

/// What a device takes. A file's handle is one of [`Ready`]'s.
pub fn message(device: Device, handle: u64) -> Message {
    let mut message = Message {
        bytes: [0; MOST],
        front: 16,
        length: 64,
    };
    let mut put = |at: usize, bytes: &[u8]| message.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    match device.kind {
        // READ. The bytes behind it are there for the day that it is a WRITE.
        FS => {
            put(0, &80u32.to_le_bytes());
            put(4, &15u32.to_le_bytes());
            put(8, &(1u64 << 40).to_le_bytes());
            put(16, &1u64.to_le_bytes());
            put(40, &handle.to_le_bytes());
            put(56, &DATA.to_le_bytes());
            (message.front, message.length) = (40, 80 + DATA);
        }
        // A connection to a port where nobody listens.
        VSOCK => {
            put(0, &load::<u64>(device.base + reg::CONFIG).to_le_bytes());
            put(8, &2u64.to_le_bytes());
            put(16, &5002u32.to_le_bytes());
            put(20, &7u32.to_le_bytes());
            put(28, &[1, 0, 1, 0]);
            put(36, &0x4_0000u32.to_le_bytes());
            (message.front, message.length) = (44, 144);
        }
        // A question for the address of the network's other end, which is answered.
        NET => {
            let own = net::own_address(device);
            put(12, &[0xff; 6]);
            put(18, &own);
            put(24, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            put(34, &own);
            put(40, &[192, 0, 2, 66]);
            put(50, &[192, 0, 2, 1]);
            (message.front, message.length) = (12, 72);
        }
        _ => {
            put(0, &[b'.'; 63]);
            put(63, b"\n");
        }
    }
    message
}
