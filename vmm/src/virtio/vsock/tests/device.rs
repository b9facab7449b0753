//! The device as the transport sees it.

use super::machine::*;
use crate::virtio::device::{Activation, Device};
use crate::virtio::guest_queue::{Part, interrupt};
use crate::virtio::registers::RestoreError;
use crate::virtio::vsock::packet::{Header, Op};
use crate::virtio::vsock::{State, Vsock};
use husk_vmm_protocol::vsock::{GUEST_CID, StreamOffer};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn a_transport_reset_ends_connections_and_tells_the_guest() {
    let mut machine = Machine::new();
    let (_, stream) = machine.connected();
    let _waiting = offer(&machine.engine, StreamOffer::Listen(1024));
    machine.run();
    machine.reset.store(true, Ordering::Release);
    machine.again.write(1).unwrap();
    machine.run();
    assert!(is_at_end(&stream));
    assert_eq!(machine.connections(), 0);
    // The guest gives the buffer late.
    machine
        .guest
        .memory
        .write_obj(u32::MAX, GuestAddress(TX_DATA))
        .unwrap();
    machine.guest.events.add(&[Part {
        address: TX_DATA,
        length: 4,
        write: true,
    }]);
    machine.guest.events.notify.write(1).unwrap();
    machine.run();
    assert_eq!(machine.guest.events.pop().unwrap().1, 4);
    let event: u32 = machine.guest.memory.read_obj(GuestAddress(TX_DATA)).unwrap();
    assert_eq!(event, 0);
    // What waits for the guest goes on to.
    assert_eq!(
        ops(&machine.send(header(PORTS, Op::Request), b"")),
        [Op::Response]
    );
}

/// The device as the transport sees it, its thread running.
struct Active {
    device: Vsock,
    guest: Driver,
    engine: OwnedFd,
    irq: EventFd,
}

fn activation(guest: &Driver) -> (Activation, EventFd) {
    let (interrupt, irq) = interrupt();
    (
        Activation {
            memory: guest.memory.clone(),
            queues: vec![
                guest.rx.device_side(true),
                guest.tx.device_side(true),
                guest.events.device_side(true),
            ],
            interrupt,
            features: 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX,
        },
        irq,
    )
}

impl Active {
    fn new() -> Self {
        let (channel, engine) = channel();
        let mut guest = Driver::new();
        guest.post_many(64);
        let mut device = Vsock::new(GUEST_CID, channel).unwrap();
        let (activation, irq) = activation(&guest);
        device.activate(activation).unwrap();
        Self {
            device,
            guest,
            engine,
            irq,
        }
    }

    /// Waits for packets.
    fn receive(&mut self) -> Vec<Packet> {
        let start = Instant::now();
        loop {
            let packets = self.guest.receive();
            if !packets.is_empty() {
                return packets;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no packet came");
            let mut poll = libc::pollfd {
                fd: self.irq.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one entry.
            unsafe { libc::poll(&raw mut poll, 1, 1000) };
            let _ = self.irq.read();
        }
    }
}

#[test]
fn the_running_device_serves_and_is_reset() {
    let mut active = Active::new();
    for _ in 0..2 {
        let stream = offer(&active.engine, StreamOffer::Listen(1024));
        stream.set_nonblocking(false).unwrap();
        assert!(active.guest.send(header(PORTS, Op::Request), b""));
        assert_eq!(ops(&active.receive()), [Op::Response]);
        assert!(active.guest.send(
            Header {
                len: 4,
                ..header(PORTS, Op::Rw)
            },
            b"ping"
        ));
        let mut text = [0; 4];
        (&stream).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"ping");
        (&stream).write_all(b"pong").unwrap();
        let packets = active.receive();
        assert_eq!(packets[0].data, b"pong");
        // The driver starts anew: the connection ends, the channel does not.
        active.device.reset();
        assert_eq!((&stream).read(&mut text).unwrap(), 0);
        active.guest = Driver::new();
        active.guest.post_many(64);
        let (activation, irq) = activation(&active.guest);
        active.irq = irq;
        active.device.activate(activation).unwrap();
    }
}

#[test]
fn an_active_device_is_not_activated_twice_and_needs_its_queues() {
    let mut active = Active::new();
    let (second, _) = activation(&active.guest);
    assert!(active.device.activate(second).is_err());
    active.device.reset();
    let (mut missing, _) = activation(&active.guest);
    missing.queues[1].queue.set_ready(false);
    assert!(active.device.activate(missing).is_err());
    let (mut missing, _) = activation(&active.guest);
    missing.queues.truncate(2);
    assert!(active.device.activate(missing).is_err());
    // None of these has cost it its channel.
    let (good, _) = activation(&active.guest);
    active.device.activate(good).unwrap();
}

#[test]
fn a_context_id_that_no_guest_has_is_not_restored() {
    for guest_cid in [0, 1, 2, u32::MAX.into(), 1 << 32, u64::MAX] {
        let state = State {
            guest_cid,
            transport_reset: false,
        };
        let refused = Vsock::restore(state, channel().0).unwrap_err();
        assert!(
            matches!(refused, RestoreError::Device { device: "socket", .. }),
            "{refused}"
        );
    }
}

#[test]
fn a_restored_device_tells_its_guest_that_connections_are_lost() {
    let active = Active::new();
    let json = serde_json::to_string(&active.device.save()).unwrap();
    let state: State = serde_json::from_str(&json).unwrap();
    assert_eq!(
        state,
        State {
            guest_cid: GUEST_CID,
            transport_reset: true
        }
    );
    let mut guest = Driver::new();
    guest.events.add(&[Part {
        address: TX_DATA,
        length: 4,
        write: true,
    }]);
    let mut copy = Vsock::restore(state.clone(), channel().0).unwrap();
    assert_eq!(copy.save(), state);
    assert_eq!(copy.config(), GUEST_CID.to_le_bytes());
    let (activation, irq) = activation(&guest);
    copy.activate(activation).unwrap();
    let start = Instant::now();
    while guest.events.pop().is_none() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(1));
    }
    copy.reset();
    assert_eq!(irq.read().unwrap(), 1);
    assert!(!copy.save().transport_reset);
    // The other one, running, is told to.
    active.device.transport_reset();
    assert!(active.device.save().transport_reset);
}
