//! What the threads of one device share: the tap's queues, and how many pairs the guest uses.

use super::tap::Tap;
use crate::warning;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use vmm_sys_util::eventfd::EventFd;

/// The pairs of one active device.
#[derive(Debug)]
pub struct Pairs {
    taps: Arc<[Tap]>,
    active: RwLock<usize>,
    bells: Arc<[EventFd]>,
    usable: usize,
}

impl Pairs {
    /// `usable` pairs in front of `taps`, each with its bell, of which the guest uses `active`.
    pub fn new(taps: Arc<[Tap]>, bells: Arc<[EventFd]>, usable: usize, active: usize) -> Self {
        let usable = usable.clamp(1, bells.len().max(1));
        Self {
            taps,
            active: RwLock::new(active.clamp(1, usable)),
            bells,
            usable,
        }
    }

    /// All queues of the tap: the host's kernel spreads frames over them, however many pairs the guest uses.
    pub fn taps(&self) -> &[Tap] {
        &self.taps
    }

    /// Makes the thread of this pair look.
    pub fn bell(&self, index: usize) -> Option<&EventFd> {
        self.bells.get(index)
    }

    /// How many pairs the guest uses.
    pub fn active(&self) -> usize {
        *self.hold_active()
    }

    /// The same, and it stays so while this is held.
    pub fn hold_active(&self) -> RwLockReadGuard<'_, usize> {
        // The number is changed as a whole.
        self.active.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest uses the first `count` pairs from now on: when this returns, no other gives it any more frames.
    /// `false`, and no change, if there are not so many.
    pub fn set_active(&self, count: usize) -> bool {
        if count == 0 || count > self.usable {
            return false;
        }
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = count;
        for bell in self.bells.iter().take(self.usable) {
            // A full counter means that the thread is called already.
            if let Err(e) = bell.write(1) {
                warning!("net: a queue's thread cannot be called: {e}");
            }
        }
        true
    }
}
