//! The thread of one pair of queues.

use super::control::Control;
use super::features::bits;
use super::pairs::Pairs;
use super::receive::{Receiver, Source};
use super::tap::Tap;
use super::transmit::Transmitter;
use crate::memory::Memory;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::worker::{Handler, Poll, READABLE, WRITABLE, WorkerError};
use husk_vmm_protocol::config::MAX_QUEUE_PAIRS;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BELL: u32 = 2;
const CONTROL: u32 = 3;
/// Tokens from here up are queues of the tap.
const FIRST_TAP: u32 = 8;

/// A tap is waited for edge-triggered: frames that the guest has no room for are remembered, not reported again and
/// again, and so is the end of a tap.
const EDGE: u32 = libc::EPOLLET as u32;

/// Most frames moved each way before the guest is told and the other descriptors get their turn.
const FRAMES_PER_PASS: u32 = 64;

/// Which queues of the tap this thread reads, and which of them may have frames.
#[derive(Debug)]
struct Sources {
    /// What each is waited for, 0 if it is not.
    watched: [u32; MAX_QUEUE_PAIRS as usize],
    mine: [bool; MAX_QUEUE_PAIRS as usize],
    ready: [bool; MAX_QUEUE_PAIRS as usize],
    /// The one whose turn it is.
    turn: usize,
}

impl Sources {
    fn next<'t>(&mut self, taps: &'t [Tap], source: Source) -> Option<&'t Tap> {
        if source == Source::Empty {
            if let Some(ready) = self.ready.get_mut(self.turn) {
                *ready = false;
            }
        }
        if source != Source::First {
            self.turn = self.turn.saturating_add(1);
        }
        for _ in 0..taps.len() {
            if self.turn >= taps.len() {
                self.turn = 0;
            }
            if self.is_ready(self.turn) {
                return taps.get(self.turn);
            }
            self.turn = self.turn.saturating_add(1);
        }
        None
    }

    fn is_ready(&self, index: usize) -> bool {
        let is = |set: &[bool]| set.get(index).copied().unwrap_or(false);
        is(&self.mine) && is(&self.ready)
    }
}

/// What runs on the thread.
#[derive(Debug)]
pub struct PairWorker {
    pairs: Arc<Pairs>,
    index: usize,
    receiver: Receiver,
    transmitter: Transmitter,
    control: Option<Control>,
    interrupt: Interrupt,
    sources: Sources,
    /// For how many active pairs `sources` hold.
    active: usize,
}

impl PairWorker {
    /// Serves the pair `index` (its queue to the guest and that from it) for a driver that accepted `features`.
    pub fn new(
        pairs: Arc<Pairs>,
        index: usize,
        memory: Memory,
        [receive, transmit]: [ActiveQueue; 2],
        control: Option<Control>,
        interrupt: Interrupt,
        features: u64,
    ) -> Self {
        let merge = features & bits(&[VIRTIO_NET_F_MRG_RXBUF]) != 0;
        Self {
            receiver: Receiver::new(memory.clone(), receive, merge),
            transmitter: Transmitter::new(memory, transmit, features),
            control,
            interrupt,
            sources: Sources {
                watched: [0; MAX_QUEUE_PAIRS as usize],
                mine: [false; MAX_QUEUE_PAIRS as usize],
                ready: [false; MAX_QUEUE_PAIRS as usize],
                turn: index,
            },
            active: 0,
            pairs,
            index,
        }
    }

    fn pass(&mut self, poll: &Poll) -> Result<(), WorkerError> {
        let mut receive_budget = FRAMES_PER_PASS;
        {
            // Frames go by the number of pairs that holds now; a change of it waits until they are through.
            let active = self.pairs.hold_active();
            if *active != self.active {
                self.active = *active;
                watch(&self.pairs, self.index, self.active, &mut self.sources, poll)
                    .map_err(WorkerError::io("waiting for the tap"))?;
            }
            if self.index < *active {
                let (taps, sources) = (self.pairs.taps(), &mut self.sources);
                self.receiver
                    .serve(&mut receive_budget, |source| sources.next(taps, source))?;
            }
        }
        if self.receiver.is_signal_due()? {
            self.interrupt.signal_queue();
        }
        let mut transmit_budget = FRAMES_PER_PASS;
        if let (Some(tap), true) = (self.pairs.taps().get(self.index), self.transmitter.is_ready()) {
            if self.transmitter.serve(tap, &mut transmit_budget)? {
                self.interrupt.signal_queue();
            }
            if self.transmitter.is_blocked() {
                // Has the tap tell that it takes frames again, also if that is so by now.
                let events = self.sources.watched.get(self.index).copied().unwrap_or(0);
                poll.modify(tap.as_fd(), tap_token(self.index), events)
                    .map_err(WorkerError::io("waiting for room in the tap"))?;
            }
        }
        if receive_budget == 0 || transmit_budget == 0 {
            self.ring()?;
        }
        Ok(())
    }

    /// Makes another pass come, after the events that are there already.
    fn ring(&self) -> Result<(), WorkerError> {
        match self.pairs.bell(self.index) {
            Some(bell) => bell.write(1).map_err(WorkerError::io("calling for another pass")),
            None => Ok(()),
        }
    }
}

/// Waits for the queues of the tap that the pair `index` reads when `active` are in use, and for room in its own.
fn watch(pairs: &Pairs, index: usize, active: usize, sources: &mut Sources, poll: &Poll) -> io::Result<()> {
    let Sources {
        watched, mine, ready, ..
    } = sources;
    for (number, (((tap, watched), mine), ready)) in
        pairs.taps().iter().zip(watched).zip(mine).zip(ready).enumerate()
    {
        *mine = number.checked_rem(active) == Some(index);
        let mut events = 0;
        if *mine {
            events |= READABLE | EDGE;
            // What is there already is told only to who waits for it from now on.
            *ready = true;
        }
        if number == index {
            events |= WRITABLE | EDGE;
        }
        match (*watched, events) {
            (0, 0) => {}
            (0, _) => poll.add(tap.as_fd(), tap_token(number), events)?,
            (_, 0) => poll.remove(tap.as_fd())?,
            _ => poll.modify(tap.as_fd(), tap_token(number), events)?,
        }
        *watched = events;
    }
    Ok(())
}

fn tap_token(index: usize) -> u32 {
    // An index is less than MAX_QUEUE_PAIRS.
    u32::try_from(index).unwrap_or(0).saturating_add(FIRST_TAP)
}

impl Handler for PairWorker {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(borrow(&self.receiver.queue().notify), RECEIVE, READABLE)?;
        poll.add(borrow(&self.transmitter.queue().notify), TRANSMIT, READABLE)?;
        if let Some(control) = &self.control {
            poll.add(borrow(&control.queue().notify), CONTROL, READABLE)?;
            control.queue().notify.write(1)?;
        }
        if let Some(bell) = self.pairs.bell(self.index) {
            poll.add(borrow(bell), BELL, READABLE)?;
            // What is there already, as after a restore, gets no notification.
            bell.write(1)?;
        }
        Ok(())
    }

    fn handle(&mut self, token: u32, events: u32, poll: &Poll) -> Result<(), WorkerError> {
        // The eventfds' counts do not matter, nor that an earlier pass may have read them.
        match token {
            RECEIVE => drop(self.receiver.queue().notify.read()),
            TRANSMIT => {
                let _ = self.transmitter.queue().notify.read();
                self.transmitter.notified();
            }
            BELL => drop(self.pairs.bell(self.index).map(EventFd::read)),
            CONTROL => {
                if let Some(control) = &mut self.control {
                    control.serve()?;
                }
            }
            tap => {
                let number = tap.saturating_sub(FIRST_TAP) as usize;
                // The end of a tap is seen by who reads it or writes to it.
                if events & !WRITABLE != 0 {
                    if let Some(ready) = self.sources.ready.get_mut(number) {
                        *ready = true;
                    }
                }
                if number == self.index && events & !READABLE != 0 {
                    self.transmitter.unblocked();
                }
            }
        }
        self.pass(poll)
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to the worker or to what it shares, and its thread ends before these are dropped.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
