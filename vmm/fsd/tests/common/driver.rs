//! The guest driver's part of virtio-fs: requests into the device's queues, replies out of them.
//!
//! The device is husk-vmm's own, activated on a thread without capabilities as in the VMM.

use husk_vmm::memory::Memory;
use husk_vmm::virtio::device::{Activation, ActiveQueue, Device, Interrupt};
use husk_vmm::virtio::fs::Fs;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// Requests under way at most.
const SLOTS: u16 = 8;
/// Descriptors of each: header and rest of the request, header and rest of the reply.
const PARTS: u16 = 4;
const QUEUE_SIZE: u16 = SLOTS * PARTS;
/// Room for a request, and for its reply.
pub const AREA: usize = (1 << 20) + (128 << 10);
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const FIRST_AREA: u64 = 0x10000;

/// Where a ring lies: descriptors, available and used.
fn ring(queue: usize) -> (u64, u64, u64) {
    let base = 0x1000 + queue as u64 * 0x4000;
    (base, base + 0x1000, base + 0x2000)
}

struct State {
    free: Vec<u16>,
    available: [u16; 2],
}

pub struct Driver {
    memory: Memory,
    device: Mutex<Fs>,
    notify: Vec<EventFd>,
    irq: EventFd,
    state: Mutex<State>,
    freed: Condvar,
}

impl Driver {
    /// A device before the server at the other end of `channel`, ready.
    pub fn new(channel: OwnedFd) -> Self {
        let size = FIRST_AREA as usize + usize::from(SLOTS) * 2 * AREA;
        let memory = Memory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let eventfd = || EventFd::new(EFD_CLOEXEC).unwrap();
        let irq = eventfd();
        let notify = vec![eventfd(), eventfd()];
        let queues = (0..2)
            .map(|number| {
                let mut queue = Queue::new(QUEUE_SIZE).unwrap();
                let (descriptors, available, used) = ring(number);
                queue.set_desc_table_address(Some(descriptors as u32), None);
                queue.set_avail_ring_address(Some(available as u32), None);
                queue.set_used_ring_address(Some(used as u32), None);
                queue.set_ready(true);
                ActiveQueue {
                    queue,
                    notify: notify[number].try_clone().unwrap().into(),
                }
            })
            .collect();
        let activation = Activation {
            memory: memory.clone(),
            queues,
            interrupt: Interrupt::new(irq.try_clone().unwrap()),
            features: 0,
        };
        let device = std::thread::spawn(move || {
            let nothing = husk_fsd::capabilities::Sets {
                effective: 0,
                permitted: 0,
                inheritable: 0,
            };
            husk_fsd::capabilities::set(nothing).unwrap();
            let mut device = Fs::new("share", channel).unwrap();
            device.activate(activation).unwrap();
            device
        })
        .join()
        .unwrap();
        Self {
            memory,
            device: Mutex::new(device),
            notify,
            irq,
            state: Mutex::new(State {
                free: (0..SLOTS).collect(),
                available: [0; 2],
            }),
            freed: Condvar::new(),
        }
    }

    /// Reserves room for a request; waits for it.
    pub fn take_slot(&self) -> u16 {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(slot) = state.free.pop() {
                return slot;
            }
            state = self.freed.wait(state).unwrap();
        }
    }

    pub fn free_slot(&self, slot: u16) {
        self.state.lock().unwrap().free.push(slot);
        self.freed.notify_one();
    }

    fn area(slot: u16, reply: bool) -> u64 {
        FIRST_AREA + (u64::from(slot) * 2 + u64::from(reply)) * AREA as u64
    }

    /// The bytes of a slot's request or reply.
    pub fn bytes(&self, slot: u16, reply: bool) -> *mut u8 {
        use vm_memory::GuestMemoryBackend;
        let slice =
            GuestMemoryBackend::get_slice(&self.memory, GuestAddress(Self::area(slot, reply)), AREA).unwrap();
        slice.ptr_guard_mut().as_ptr()
    }

    /// Sends the request of `len` bytes in a slot.
    pub fn send(&self, slot: u16, len: usize, urgent: bool) {
        let queue = usize::from(!urgent);
        let (descriptors, available, _) = ring(queue);
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        let (request, reply) = (Self::area(slot, false), Self::area(slot, true));
        let parts = [
            (request, IN_HEADER, next),
            (request + IN_HEADER as u64, len - IN_HEADER, next),
            (reply, OUT_HEADER, next | write),
            (reply + OUT_HEADER as u64, AREA - OUT_HEADER, write),
        ];
        // A request without arguments has no descriptor for them.
        let parts: Vec<_> = parts.into_iter().filter(|(_, len, _)| *len > 0).collect();
        let head = slot * PARTS;
        for (n, (address, len, flags)) in (0u16..).zip(&parts) {
            let at = GuestAddress(descriptors + u64::from(head + n) * 16);
            let mut bytes = [0u8; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&(*len as u32).to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(head + n + 1).to_le_bytes());
            self.memory.write_slice(&bytes, at).unwrap();
        }
        let mut state = self.state.lock().unwrap();
        let index = &mut state.available[queue];
        let entry = GuestAddress(available + 4 + u64::from(*index % QUEUE_SIZE) * 2);
        self.memory.write_obj(head, entry).unwrap();
        *index = index.wrapping_add(1);
        self.memory
            .store(
                *index,
                GuestAddress(available + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
        self.notify[queue].write(1).unwrap();
    }

    /// Waits for the device to tell of replies, or for [`wake`](Self::wake).
    pub fn wait(&self) {
        self.irq.read().unwrap();
    }

    pub fn wake(&self) {
        self.irq.write(1).unwrap();
    }

    /// Replies since the indices `seen`: (slot, length).
    pub fn replies(&self, seen: &mut [u16; 2]) -> Vec<(u16, u32)> {
        let mut replies = vec![];
        for (queue, seen) in seen.iter_mut().enumerate() {
            let (_, _, used) = ring(queue);
            let index: u16 = self
                .memory
                .load(GuestAddress(used + 2), std::sync::atomic::Ordering::SeqCst)
                .unwrap();
            while *seen != index {
                let at = used + 4 + u64::from(*seen % QUEUE_SIZE) * 8;
                let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
                let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
                replies.push((head as u16 / PARTS, len));
                *seen = seen.wrapping_add(1);
            }
        }
        replies
    }

    /// Stops the device.
    pub fn reset(&self) {
        self.device.lock().unwrap().reset();
    }
}
