//! The device's thread: the queues on one side, the streams and the channel of offers on the other.

use super::muxer::{Interest, Muxer};
use super::packet::HEADER_LEN;
use crate::memory::Memory;
use crate::virtio::buffers::{Buffers, split};
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::warning;
use crate::worker::{Handler, Poll, READABLE, WRITABLE, WorkerError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENTS: u32 = 2;
const OFFERS: u32 = 3;
const TIMER: u32 = 4;
const AGAIN: u32 = 5;
/// Tokens from here up are slots of connections.
const FIRST_SLOT: u32 = 16;

/// A stream is waited for edge-triggered: what is ready and cannot be used yet (no credit, no buffer of the guest)
/// is remembered, not reported again and again.
const STREAM_EVENTS: u32 = READABLE | (libc::EPOLLRDHUP | libc::EPOLLET) as u32;

/// Most packets moved before the other descriptors get their turn.
const PACKETS_PER_PASS: u32 = 512;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it is written to the event queue.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How the control side reaches a running worker.
#[derive(Debug)]
pub struct Doorbell {
    /// Makes the worker look.
    pub again: Arc<EventFd>,
    /// All connections are to be dropped, and the guest to be told.
    pub reset: Arc<AtomicBool>,
}

/// What runs on the thread.
#[derive(Debug)]
pub struct VsockWorker {
    memory: Memory,
    rx: ActiveQueue,
    tx: ActiveQueue,
    events: ActiveQueue,
    interrupt: Interrupt,
    muxer: Muxer,
    timer: TimerFd,
    /// When the timer will ring.
    armed: Option<Instant>,
    doorbell: Doorbell,
    offers_watched: bool,
    /// The guest may have packets in the tx queue.
    tx_pending: bool,
    /// The guest has yet to be told of the transport's reset.
    reset_owed: bool,
}

impl VsockWorker {
    /// Serves `muxer` on the three queues.
    ///
    /// # Errors
    /// When no timer is to be had.
    pub fn new(
        memory: Memory,
        [rx, tx, events]: [ActiveQueue; 3],
        interrupt: Interrupt,
        muxer: Muxer,
        doorbell: Doorbell,
    ) -> io::Result<Self> {
        Ok(Self {
            memory,
            rx,
            tx,
            events,
            interrupt,
            muxer,
            timer: TimerFd::new().map_err(io::Error::from)?,
            armed: None,
            offers_watched: false,
            tx_pending: true,
            reset_owed: doorbell.reset.swap(false, Ordering::AcqRel),
            doorbell,
        })
    }

    /// Closes all connections and gives the table back.
    pub fn into_muxer(self) -> Muxer {
        self.muxer
    }

    /// The table, to look at.
    #[cfg(test)]
    pub fn muxer(&self) -> &Muxer {
        &self.muxer
    }

    /// As if all deadlines had come.
    #[cfg(test)]
    pub fn expire_all(&mut self) {
        while let Some(at) = self.muxer.next_deadline() {
            self.muxer.expire(at);
        }
        self.ring().unwrap();
    }

    fn pass(&mut self, poll: &Poll) -> Result<(), WorkerError> {
        let now = Instant::now();
        let mut budget = PACKETS_PER_PASS;
        let (mut tx_used, mut rx_used) = (false, false);
        loop {
            tx_used |= self.serve_tx(&mut budget, now)?;
            rx_used |= self.serve_rx(&mut budget, now)?;
            // Packets from the guest wait for replies to it, never the other way round.
            if budget == 0 || !self.tx_pending || self.muxer.is_congested() {
                break;
            }
        }
        let event_used = self.serve_events(&mut budget)?;
        if budget == 0 {
            self.ring()?;
        }
        self.watch(poll)?;
        self.arm(now)?;
        let mut signal = false;
        for (used, queue) in [
            (rx_used, &mut self.rx),
            (tx_used, &mut self.tx),
            (event_used, &mut self.events),
        ] {
            signal |= used && queue.queue.needs_notification(&self.memory)?;
        }
        if signal {
            self.interrupt.signal_queue();
        }
        Ok(())
    }

    /// Takes packets from the guest. Whether buffers were returned.
    fn serve_tx(&mut self, budget: &mut u32, now: Instant) -> Result<bool, WorkerError> {
        let mut used = false;
        if !self.tx_pending {
            return Ok(used);
        }
        let (queue, memory) = (&mut self.tx.queue, &self.memory);
        queue.disable_notification(memory)?;
        loop {
            while *budget > 0 && !self.muxer.is_congested() {
                let Some(chain) = queue.iter(memory)?.next() else {
                    break;
                };
                *budget = budget.saturating_sub(1);
                let head = chain.head_index();
                match split(chain, memory) {
                    Ok((mut packet, _)) => self.muxer.receive(&mut packet, now),
                    Err(e) => warning!("vsock: a packet was dropped: {e}"),
                }
                queue.add_used(memory, head, 0)?;
                used = true;
            }
            if *budget == 0 || self.muxer.is_congested() {
                return Ok(used);
            }
            if !queue.enable_notification(memory)? {
                self.tx_pending = false;
                return Ok(used);
            }
            *budget = budget.saturating_sub(1);
            queue.disable_notification(memory)?;
        }
    }

    /// Gives packets to the guest. Whether buffers were returned.
    fn serve_rx(&mut self, budget: &mut u32, now: Instant) -> Result<bool, WorkerError> {
        let mut used = false;
        let (queue, memory) = (&mut self.rx.queue, &self.memory);
        while self.muxer.has_packet() && *budget > 0 {
            let Some(chain) = queue.iter(memory)?.next() else {
                // Only now, when buffers are missing, is the guest to say that it has added some.
                if queue.enable_notification(memory)? {
                    *budget = budget.saturating_sub(1);
                    continue;
                }
                return Ok(used);
            };
            let head = chain.head_index();
            let length = match split(chain, memory) {
                Ok((_, mut room)) if room.len() > HEADER_LEN => self.muxer.next(&mut room, now),
                Ok(_) => {
                    warning!("vsock: a buffer of the guest has no room for a packet");
                    Some(0)
                }
                Err(e) => {
                    warning!("vsock: a buffer of the guest is of no use: {e}");
                    Some(0)
                }
            };
            let Some(length) = length else {
                queue.go_to_previous_position();
                break;
            };
            *budget = budget.saturating_sub(1);
            queue.add_used(memory, head, length)?;
            used = true;
        }
        queue.disable_notification(memory)?;
        Ok(used)
    }

    /// Tells the guest of a transport reset if that is owed. Whether a buffer was returned.
    fn serve_events(&mut self, budget: &mut u32) -> Result<bool, WorkerError> {
        let (queue, memory) = (&mut self.events.queue, &self.memory);
        let mut used = false;
        while self.reset_owed && queue.ready() && *budget > 0 {
            *budget = budget.saturating_sub(1);
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let mut room = split(chain, memory).map_or_else(|_| Buffers::default(), |(_, room)| room);
            let mut length = 0;
            if room.len() >= TRANSPORT_RESET.len() {
                length = TRANSPORT_RESET.len();
                room.write(&TRANSPORT_RESET);
                self.reset_owed = false;
            }
            queue.add_used(memory, head, u32::try_from(length).unwrap_or(0))?;
            used = true;
        }
        Ok(used)
    }

    /// Makes another pass come, after the events that are there already.
    fn ring(&self) -> Result<(), WorkerError> {
        self.doorbell
            .again
            .write(1)
            .map_err(WorkerError::io("calling for another pass"))
    }

    fn watch(&mut self, poll: &Poll) -> Result<(), WorkerError> {
        for change in self.muxer.take_interest() {
            match change {
                Interest::Watch { stream, slot } => poll
                    .add(borrow(&stream), token(slot), STREAM_EVENTS)
                    .map_err(WorkerError::io("waiting for a stream"))?,
                Interest::Output { stream, slot, wanted } => {
                    let events = if wanted {
                        STREAM_EVENTS | WRITABLE
                    } else {
                        STREAM_EVENTS
                    };
                    poll.modify(borrow(&stream), token(slot), events)
                        .map_err(WorkerError::io("waiting for room in a stream"))?;
                }
                Interest::Forget(stream) => poll
                    .remove(stream.as_fd())
                    .map_err(WorkerError::io("letting go of a stream"))?,
            }
        }
        if self.offers_watched && !self.muxer.offers().is_open() {
            self.offers_watched = false;
            poll.remove(self.muxer.offers().channel())
                .map_err(WorkerError::io("letting go of the channel of offers"))?;
        }
        Ok(())
    }

    fn arm(&mut self, now: Instant) -> Result<(), WorkerError> {
        let deadline = self.muxer.next_deadline();
        if deadline == self.armed {
            return Ok(());
        }
        self.armed = deadline;
        match deadline {
            // A timer of zero would never ring.
            Some(at) => self.timer.reset(
                at.saturating_duration_since(now).max(Duration::from_micros(1)),
                None,
            ),
            None => self.timer.clear(),
        }
        .map_err(|e| WorkerError::io("setting the timer")(e.into()))
    }

    fn drop_connections(&mut self, poll: &Poll) {
        self.muxer.reset();
        // Only streams that were never added, or are closed anyway, are left to fail here.
        let _ = self.watch(poll);
        self.muxer.take_interest();
    }

    fn react(&mut self, token: u32, poll: &Poll) -> Result<(), WorkerError> {
        match token {
            // Also when the eventfd has been read by an earlier pass; its count does not matter.
            RX => drop(self.rx.notify.read()),
            TX => {
                let _ = self.tx.notify.read();
                self.tx_pending = true;
            }
            EVENTS => drop(self.events.notify.read()),
            OFFERS => self.muxer.take_offers(Instant::now()),
            TIMER => {
                // Not read: setting it anew takes the event away.
                self.armed = None;
                self.timer
                    .clear()
                    .map_err(|e| WorkerError::io("stopping the timer")(e.into()))?;
                self.muxer.expire(Instant::now());
            }
            AGAIN => {
                let _ = self.doorbell.again.read();
                if self.doorbell.reset.swap(false, Ordering::AcqRel) {
                    self.muxer.reset();
                    self.reset_owed = true;
                }
            }
            slot => {
                if let Some(slot) = slot.checked_sub(FIRST_SLOT) {
                    self.muxer.event(slot as usize, Instant::now());
                }
            }
        }
        self.pass(poll)
    }
}

impl Handler for VsockWorker {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (fd, token) in [
            (&self.rx.notify, RX),
            (&self.tx.notify, TX),
            (&self.events.notify, EVENTS),
            (&self.doorbell.again, AGAIN),
        ] {
            poll.add(borrow(fd), token, READABLE)?;
        }
        poll.add(borrow(&self.timer), TIMER, READABLE)?;
        if self.muxer.offers().is_open() {
            poll.add(self.muxer.offers().channel(), OFFERS, READABLE)?;
            self.offers_watched = true;
        }
        // What is there already, as after a restore, gets no notification.
        self.doorbell.again.write(1)
    }

    fn handle(&mut self, token: u32, _events: u32, poll: &Poll) -> Result<(), WorkerError> {
        self.react(token, poll).inspect_err(|_| {
            // Nobody will serve the streams: the engine has to see their end.
            self.drop_connections(poll);
        })
    }
}

fn token(slot: usize) -> u32 {
    // A slot is less than MAX_CONNECTIONS.
    u32::try_from(slot)
        .unwrap_or(u32::MAX)
        .saturating_add(FIRST_SLOT)
        .min(u32::MAX - 1)
}

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to what is borrowed; for streams, the muxer's table or an `Interest::Forget`
    // that comes later holds it open.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
