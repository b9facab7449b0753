use super::*;
use crate::virtio::guest_queue::{GuestQueue, Part, interrupt, memory};
use proptest::prelude::{any, prop, proptest};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 0x2_0000;
const DATA: u64 = 0x1_0000;

struct Guest {
    queue: GuestQueue,
    memory: Memory,
    worker: RngWorker,
    poll: Poll,
}

impl Guest {
    fn new() -> Self {
        let memory = memory(SIZE as usize);
        let queue = GuestQueue::new(&memory, 0, 16);
        let worker = RngWorker {
            memory: memory.clone(),
            queue: queue.device_side(false),
            interrupt: interrupt().0,
        };
        Self {
            queue,
            memory,
            worker,
            poll: Poll::new().unwrap(),
        }
    }

    fn run(&mut self) -> Result<(), WorkerError> {
        self.worker.handle(0, READABLE, &self.poll)
    }
}

fn room(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        write: true,
    }
}

#[test]
fn a_request_is_filled_with_bytes_that_differ() {
    let mut guest = Guest::new();
    guest.queue.add(&[room(DATA, 32), room(DATA + 0x100, 32)]);
    guest.queue.add(&[room(DATA + 0x200, 64)]);
    guest.run().unwrap();
    assert_eq!(guest.queue.pop().unwrap().1, 64);
    assert_eq!(guest.queue.pop().unwrap().1, 64);
    let mut parts = [[0u8; 32]; 3];
    for (i, part) in parts.iter_mut().enumerate() {
        guest
            .memory
            .read_slice(part, GuestAddress(DATA + 0x100 * i as u64))
            .unwrap();
        assert_ne!(*part, [0; 32]);
    }
    assert_ne!(parts[0], parts[1]);
    assert_ne!(parts[1], parts[2]);
}

#[test]
fn a_large_request_is_cut() {
    let mut guest = Guest::new();
    guest.queue.add(&[room(DATA, 0x8000)]);
    guest.run().unwrap();
    assert_eq!(guest.queue.pop().unwrap().1, 4096);
    let mut rest = [0u8; 0x7000];
    guest
        .memory
        .read_slice(&mut rest, GuestAddress(DATA + 4096))
        .unwrap();
    assert!(rest.iter().all(|b| *b == 0));
}

#[test]
fn a_request_without_room_is_returned_empty() {
    let mut guest = Guest::new();
    guest.queue.add(&[Part {
        address: DATA,
        length: 64,
        write: false,
    }]);
    guest.queue.add(&[room(DATA, 0)]);
    guest.run().unwrap();
    assert_eq!(guest.queue.pop().unwrap().1, 0);
    assert_eq!(guest.queue.pop().unwrap().1, 0);
}

#[test]
fn an_index_that_jumps_stops_the_device() {
    let mut guest = Guest::new();
    guest.queue.set_available_index(17);
    assert!(matches!(
        guest.run(),
        Err(WorkerError::Queue(virtio_queue::Error::InvalidAvailRingIndex))
    ));
}

#[test]
fn the_device_runs_and_can_be_activated_again() {
    let mut device = Rng::new().unwrap();
    for _ in 0..2 {
        let memory = memory(SIZE as usize);
        let mut queue = GuestQueue::new(&memory, 0, 16);
        let (interrupt, irq) = interrupt();
        // There before the device is: no notification comes for it.
        queue.add(&[room(DATA, 16)]);
        device
            .activate(Activation {
                memory,
                queues: vec![queue.device_side(true)],
                interrupt,
                features: 1 << VIRTIO_RING_F_EVENT_IDX,
            })
            .unwrap();
        let mut event = [vmm_sys_util::epoll::EpollEvent::default()];
        let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
        epoll
            .ctl(
                vmm_sys_util::epoll::ControlOperation::Add,
                irq.as_raw_fd(),
                vmm_sys_util::epoll::EpollEvent::new(vmm_sys_util::epoll::EventSet::IN, 0),
            )
            .unwrap();
        assert_eq!(epoll.wait(5000, &mut event).unwrap(), 1);
        assert_eq!(queue.pop().unwrap().1, 16);
        device.reset();
    }
    assert_eq!(Rng::restore(device.save()).unwrap().save(), device.save());
}

proptest! {
    #[test]
    fn no_table_of_descriptors_harms(
        table in prop::collection::vec((0u64..2 * SIZE, any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..16, 1..16),
    ) {
        let mut guest = Guest::new();
        for (i, (address, length, flags, next)) in table.into_iter().enumerate() {
            guest.queue.store(i as u16, address, length % 0x3_0000, flags, next);
        }
        let count = heads.len();
        for head in heads {
            guest.queue.publish(head);
        }
        // A device that writes where it is told may overwrite its own rings, and then may stop; nothing else.
        let _ = guest.run();
        for _ in 0..count {
            if let Some((_, length)) = guest.queue.pop() {
                let _ = length;
            }
        }
    }
}
