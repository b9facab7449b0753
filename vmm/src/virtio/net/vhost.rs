//! vhost-net: the host's kernel moves the frames between the tap and guest memory by itself; what is left to do here is to
//! hand it the queues, and to pass its interrupts on.

use super::features::bits;
use super::tap::Tap;
use crate::memory::Memory;
use crate::virtio::buffers::retry;
use crate::virtio::device::{ActivateError, ActiveQueue, Interrupt};
use crate::warning;
use crate::worker::{Handler, Poll, READABLE, Thread, Worker, WorkerError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Requests of `linux/vhost.h`: direction (1 writes, 2 reads), size of the argument, type 0xaf, number.
pub(crate) mod request {
    const fn code(direction: libc::Ioctl, size: usize, number: libc::Ioctl) -> libc::Ioctl {
        direction << 30 | (size as libc::Ioctl) << 16 | 0xaf << 8 | number
    }
    pub const GET_FEATURES: libc::Ioctl = code(2, 8, 0x00);
    pub const SET_FEATURES: libc::Ioctl = code(1, 8, 0x00);
    pub const SET_OWNER: libc::Ioctl = code(0, 0, 0x01);
    /// Its size is that of the table's header.
    pub const SET_MEM_TABLE: libc::Ioctl = code(1, 8, 0x03);
    pub const SET_VRING_NUM: libc::Ioctl = code(1, size_of::<super::VringState>(), 0x10);
    pub const SET_VRING_ADDR: libc::Ioctl = code(1, size_of::<super::VringAddr>(), 0x11);
    pub const SET_VRING_BASE: libc::Ioctl = code(1, size_of::<super::VringState>(), 0x12);
    pub const SET_VRING_KICK: libc::Ioctl = code(1, size_of::<super::VringFile>(), 0x20);
    pub const SET_VRING_CALL: libc::Ioctl = code(1, size_of::<super::VringFile>(), 0x21);
    pub const SET_VRING_ERR: libc::Ioctl = code(1, size_of::<super::VringFile>(), 0x22);
    pub const NET_SET_BACKEND: libc::Ioctl = code(1, size_of::<super::VringFile>(), 0x30);

    /// Those that a running device makes.
    pub const RUNNING: [libc::Ioctl; 9] = [
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_ADDR,
        SET_VRING_BASE,
        SET_VRING_KICK,
        SET_VRING_CALL,
        SET_VRING_ERR,
        NET_SET_BACKEND,
    ];
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`: addresses in this process.
#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest_address: u64,
    size: u64,
    own_address: u64,
    flags: u64,
}

/// `struct vhost_memory` with room for all regions that a guest has: below and above the gap.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; 2],
}

/// Features that are about queues and headers, and so the kernel's to say.
fn queue_features() -> u64 {
    bits(&[
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_F_VERSION_1,
    ])
}

/// /dev/vhost-net, for one pair of queues.
#[derive(Debug)]
pub struct Vhost {
    fd: Arc<OwnedFd>,
    /// What of [`queue_features`] it knows.
    features: u64,
    /// Two for each queue, see [`Bell`].
    events: [Arc<EventFd>; 4],
}

impl Vhost {
    /// Binds a descriptor that nobody has bound to this process, whose memory it is to read and write.
    ///
    /// # Errors
    /// The kernel's, or when it knows no version 1 of virtio.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let fd = Arc::new(fd);
        let mut features = 0u64;
        // SAFETY: the request writes one u64.
        unsafe { call(&fd, request::GET_FEATURES, &raw mut features)? };
        if features & bits(&[VIRTIO_F_VERSION_1]) == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the host's vhost-net is older than virtio 1.0",
            ));
        }
        // SAFETY: the request takes no argument.
        unsafe { call(&fd, request::SET_OWNER, std::ptr::null_mut::<u8>())? };
        Ok(Self {
            fd,
            features: features & queue_features(),
            events: [event()?, event()?, event()?, event()?],
        })
    }

    /// Which of `offered` a device can offer that works by it.
    pub fn limit(&self, offered: u64) -> u64 {
        offered & (self.features | !queue_features())
    }

    /// Has the kernel serve a receive and a transmit queue in front of `tap`, for a driver that accepted `features`.
    ///
    /// # Errors
    /// Then it serves none.
    pub fn start(
        &self,
        thread: &Thread,
        tap: &Tap,
        memory: &Memory,
        queues: [ActiveQueue; 2],
        interrupt: Interrupt,
        features: u64,
    ) -> Result<Started, ActivateError> {
        let mut events = self.events.iter();
        let bells = queues.map(|queue| {
            Some(Bell {
                queue,
                used: Arc::clone(events.next()?),
                broken: Arc::clone(events.next()?),
            })
        });
        let [Some(receive), Some(transmit)] = bells else {
            return Err(ActivateError::HostEnd);
        };
        let bells = Bells {
            queues: [receive, transmit],
            interrupt,
        };
        // Undone when it is dropped.
        let serving = Serving(Arc::clone(&self.fd));
        let features = features & self.features;
        // SAFETY: the request reads one u64.
        unsafe { call(&self.fd, request::SET_FEATURES, &raw const features as *mut u64) }
            .and_then(|()| self.set_memory(memory))
            .and_then(|()| {
                for (index, bell) in (0..).zip(&bells.queues) {
                    self.set_queue(index, bell, memory)?;
                }
                for index in [0, 1] {
                    set_file(&self.fd, request::NET_SET_BACKEND, index, tap.as_fd().as_raw_fd())?;
                }
                Ok(())
            })
            .map_err(ActivateError::Host)?;
        let worker = thread.serve(|| Ok(bells)).map_err(ActivateError::Worker)?;
        Ok(Started {
            _serving: serving,
            _worker: worker,
        })
    }

    fn set_memory(&self, memory: &Memory) -> io::Result<()> {
        let mut table = MemoryTable {
            count: 0,
            padding: 0,
            regions: [MemoryRegion::default(); 2],
        };
        for region in memory.iter() {
            let place = table.regions.get_mut(table.count as usize);
            let place = place.ok_or_else(|| io::Error::other("the guest's memory has too many regions"))?;
            *place = MemoryRegion {
                guest_address: region.start_addr().raw_value(),
                size: region.len(),
                own_address: region.as_ptr() as u64,
                flags: 0,
            };
            table.count = table.count.saturating_add(1);
        }
        // SAFETY: the request reads a header and as many regions as it says, which are there.
        unsafe { call(&self.fd, request::SET_MEM_TABLE, &raw mut table) }
    }

    fn set_queue(&self, index: u32, bell: &Bell, memory: &Memory) -> io::Result<()> {
        let queue = &bell.queue.queue;
        let own = |address: u64| {
            memory
                .get_host_address(GuestAddress(address))
                .map(|pointer| pointer as u64)
                .map_err(io::Error::other)
        };
        for (code, number) in [
            (request::SET_VRING_NUM, queue.size()),
            (request::SET_VRING_BASE, queue.next_avail()),
        ] {
            let mut state = VringState {
                index,
                number: number.into(),
            };
            // SAFETY: both requests read one `VringState`.
            unsafe { call(&self.fd, code, &raw mut state)? };
        }
        let mut address = VringAddr {
            index,
            flags: 0,
            descriptors: own(queue.desc_table())?,
            used: own(queue.used_ring())?,
            available: own(queue.avail_ring())?,
            log: 0,
        };
        // SAFETY: the request reads one `VringAddr`; the kernel checks each access to what it points to.
        unsafe { call(&self.fd, request::SET_VRING_ADDR, &raw mut address)? };
        set_file(&self.fd, request::SET_VRING_ERR, index, bell.broken.as_raw_fd())?;
        set_file(&self.fd, request::SET_VRING_CALL, index, bell.used.as_raw_fd())?;
        set_file(
            &self.fd,
            request::SET_VRING_KICK,
            index,
            bell.queue.notify.as_raw_fd(),
        )
    }
}

fn set_file(fd: &OwnedFd, code: libc::Ioctl, index: u32, file: RawFd) -> io::Result<()> {
    let mut file = VringFile { index, fd: file };
    // SAFETY: the requests that this is called for read one `VringFile`.
    unsafe { call(fd, code, &raw mut file) }
}

/// # Safety
/// `argument` must be what the request `code` reads or writes.
unsafe fn call<T>(fd: &OwnedFd, code: libc::Ioctl, argument: *mut T) -> io::Result<()> {
    // SAFETY: by the caller's promise.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), code, argument) } as isize)?;
    Ok(())
}

/// Queues that the kernel serves until this is dropped.
#[derive(Debug)]
pub struct Started {
    // First: the kernel is done with the queues before their descriptors are closed.
    _serving: Serving,
    _worker: Worker<Bells>,
}

#[derive(Debug)]
struct Serving(Arc<OwnedFd>);

impl Drop for Serving {
    fn drop(&mut self) {
        for index in [0, 1] {
            for code in [
                request::NET_SET_BACKEND,
                request::SET_VRING_KICK,
                request::SET_VRING_CALL,
                request::SET_VRING_ERR,
            ] {
                // -1: none.
                if let Err(e) = set_file(&self.0, code, index, -1) {
                    warning!("net: vhost-net cannot be stopped: {e}");
                }
            }
        }
    }
}

/// What is between the kernel and the driver of one queue.
#[derive(Debug)]
struct Bell {
    queue: ActiveQueue,
    /// Written by the kernel when buffers were used and the driver wants to know.
    used: Arc<EventFd>,
    /// Written by the kernel when the driver has broken the queue.
    broken: Arc<EventFd>,
}

/// What runs on the thread: passes interrupts on.
#[derive(Debug)]
struct Bells {
    queues: [Bell; 2],
    interrupt: Interrupt,
}

impl Handler for Bells {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (index, bell) in (0..).step_by(2).zip(&self.queues) {
            poll.add(borrow(&bell.used), index, READABLE)?;
            poll.add(borrow(&bell.broken), index.saturating_add(1), READABLE)?;
        }
        Ok(())
    }

    fn handle(&mut self, token: u32, _: u32, _: &Poll) -> Result<(), WorkerError> {
        let Some(bell) = self.queues.get((token >> 1) as usize) else {
            return Ok(());
        };
        // The counts do not matter.
        if token & 1 == 0 {
            let _ = bell.used.read();
            self.interrupt.signal_queue();
        } else {
            let _ = bell.broken.read();
            warning!("net: vhost-net: the guest has broken its queue {}", token >> 1);
        }
        Ok(())
    }
}

fn event() -> io::Result<Arc<EventFd>> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new)
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to the handler, and its thread ends before it is dropped.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `linux/vhost.h` makes them on x86-64.
    #[test]
    fn requests_are_those_of_the_kernel() {
        for (code, expected) in [
            (request::GET_FEATURES, 0x8008_af00),
            (request::SET_FEATURES, 0x4008_af00),
            (request::SET_OWNER, 0xaf01),
            (request::SET_MEM_TABLE, 0x4008_af03),
            (request::SET_VRING_NUM, 0x4008_af10),
            (request::SET_VRING_ADDR, 0x4028_af11),
            (request::SET_VRING_BASE, 0x4008_af12),
            (request::SET_VRING_KICK, 0x4008_af20),
            (request::SET_VRING_CALL, 0x4008_af21),
            (request::SET_VRING_ERR, 0x4008_af22),
            (request::NET_SET_BACKEND, 0x4008_af30),
        ] {
            assert_eq!(code, expected);
        }
    }

    #[test]
    fn what_is_no_vhost_net_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(Vhost::new(null.into()).is_err());
    }
}
