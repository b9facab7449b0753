//! The driver's side of a virtqueue, for the tests of devices.

use super::device::{ActiveQueue, Interrupt};
use crate::memory::Memory;
use std::collections::BTreeMap;
use std::sync::Arc;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Whether it is the device's to write.
    pub write: bool,
}

/// A virtqueue as its driver keeps it.
#[derive(Debug)]
pub struct GuestQueue {
    memory: Memory,
    base: u64,
    size: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    available: u16,
    used: u16,
    /// What the device waits for.
    pub notify: Arc<EventFd>,
}

/// `size` bytes of guest memory from 0 up.
pub fn memory(size: usize) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), size)]).unwrap()
}

/// An interrupt line and the eventfd that it writes.
pub fn interrupt() -> (Interrupt, EventFd) {
    let irq = eventfd();
    (Interrupt::new(irq.try_clone().unwrap()), irq)
}

/// As they are used here.
pub fn eventfd() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap()
}

impl GuestQueue {
    /// Bytes taken from `base` on.
    pub const SPAN: u64 = 0x4000;

    /// A queue with its rings at `base`.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        assert!(size <= 256);
        Self {
            memory: memory.clone(),
            base,
            size,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            available: 0,
            used: 0,
            notify: Arc::new(eventfd()),
        }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    /// The device's side of it.
    pub fn device_side(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some(self.available_ring() as u32), None);
        queue.set_used_ring_address(Some(self.used_ring() as u32), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue {
            queue,
            notify: Arc::clone(&self.notify),
        }
    }

    /// Descriptors that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Writes a descriptor as it is told.
    pub fn store(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(self.base + 16 * u64::from(index)))
            .unwrap();
    }

    /// Makes `head` available, whatever that is.
    pub fn publish(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Writes the index of the available ring.
    pub fn set_available_index(&self, index: u16) {
        self.memory
            .store(
                index,
                GuestAddress(self.available_ring() + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
    }

    /// Makes a chain available; its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let at = self.free.len() - parts.len();
        let indices: Vec<u16> = self.free.split_off(at);
        for (i, part) in parts.iter().enumerate() {
            let mut flags = if part.write { VRING_DESC_F_WRITE as u16 } else { 0 };
            let next = indices.get(i + 1).copied();
            if next.is_some() {
                flags |= VRING_DESC_F_NEXT as u16;
            }
            self.store(indices[i], part.address, part.length, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.publish(head);
        head
    }

    /// The next chain that the device returned: its head and the length that it told.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(
                GuestAddress(self.used_ring() + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
        if index == self.used {
            return None;
        }
        let element = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        // With EVENT_IDX: the next one is to be told of.
        self.memory
            .write_obj(
                self.used,
                GuestAddress(self.available_ring() + 4 + 2 * u64::from(self.size)),
            )
            .unwrap();
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        let head = head as u16;
        if let Some(indices) = self.chains.remove(&head) {
            self.free.extend(indices);
        }
        Some((head, length))
    }
}
