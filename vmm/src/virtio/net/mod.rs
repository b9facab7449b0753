//! The network device: frames between a tap that the engine opened and the guest, without a copy.
//!
//! Each pair of queues has a thread of its own. What the guest cannot take stays in the tap, where the host's kernel
//! drops what is too much; what the tap cannot take stays in the guest.

pub mod control;
pub mod features;
pub mod header;
pub mod pairs;
pub mod pieces;
pub mod receive;
pub mod tap;
pub mod transmit;
pub mod used;
pub mod vhost;
pub mod worker;

#[cfg(test)]
mod tests;

use crate::lockdown::seccomp;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, Device};
use crate::virtio::registers::RestoreError;
use crate::warning;
use crate::worker::{Thread, Worker};
use control::Control;
use features::{negotiated_offload, offered};
use husk_vmm_protocol::config::{MAX_QUEUE_PAIRS, NicConfig};
use pairs::Pairs;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tap::{OFFLOADS, Tap};
use vhost::Vhost;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use worker::PairWorker;

/// Places of each queue.
const QUEUE_SIZE: u16 = 256;

/// For each pair the queue to the guest and the one from it, and the queue of commands behind them all.
const QUEUE_SIZES: [u16; 2 * MAX_QUEUE_PAIRS as usize + 1] = [QUEUE_SIZE; 2 * MAX_QUEUE_PAIRS as usize + 1];

/// Queues without those that only serve several pairs.
const ONE_PAIR: usize = 2;

/// What is kept of the device across a snapshot. Frames under way are lost, as on any network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Pairs of queues that the device has.
    pub queue_pairs: u8,
    /// Pairs of them that the guest uses.
    pub active_pairs: u8,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    /// `struct virtio_net_config` up to the number of pairs: MAC address, status (not offered), pairs.
    config: [u8; 10],
    name: String,
    mac: [u8; 6],
    taps: Arc<[Tap]>,
    /// `TUN_F_*` that the host's kernel knows.
    offloads: u32,
    /// Those that are set.
    offload: u32,
    /// Pairs in use by a guest that was saved.
    restored_pairs: u8,
    /// One for each pair, and what makes it look.
    threads: Vec<Thread>,
    bells: Arc<[EventFd]>,
    /// Where the host's kernel moves the frames.
    vhost: Option<Vhost>,
    running: Option<Running>,
}

#[derive(Debug)]
enum Running {
    /// Its own threads move the frames.
    Own {
        pairs: Arc<Pairs>,
        workers: Vec<Worker<PairWorker>>,
    },
    /// The host's kernel does, as long as this is there.
    Kernel(#[allow(dead_code)] vhost::Started),
}

impl Net {
    /// The device of `config`, called `name` in the log (at most 12 bytes), in front of the queues of one tap: as
    /// many as `config` has pairs.
    ///
    /// # Errors
    /// When the number is another, the tap takes no offloads, or there are no threads or descriptors left.
    pub fn new(name: &str, config: &NicConfig, taps: Vec<OwnedFd>) -> io::Result<Self> {
        let state = State {
            mac: config.mac,
            queue_pairs: config.queue_pairs,
            active_pairs: 1,
        };
        Ok(Self::restore(name, &state, taps)?)
    }

    /// What a copy of the device has to know.
    pub fn save(&self) -> State {
        let active = self.running.as_ref().map(|running| match running {
            Running::Own { pairs, .. } => pairs.active(),
            Running::Kernel(_) => 1,
        });
        State {
            mac: self.mac,
            queue_pairs: self.queue_pairs(),
            active_pairs: active.map_or(self.restored_pairs, |pairs| u8::try_from(pairs).unwrap_or(1)),
        }
    }

    /// A copy of a saved device; see [`new`](Self::new).
    ///
    /// # Errors
    /// As of [`new`](Self::new), and when the state is none that a device can have.
    pub fn restore(name: &str, state: &State, taps: Vec<OwnedFd>) -> Result<Self, RestoreError> {
        let impossible = |what| RestoreError::Device {
            device: "network",
            what,
        };
        let [first, ..] = state.mac;
        if state.mac == [0; 6] || first & 1 == 1 {
            return Err(impossible(format!("{:02x?} is not a unicast address", state.mac)));
        }
        let pairs = usize::from(state.queue_pairs);
        if taps.len() != pairs
            || !(1..=MAX_QUEUE_PAIRS).contains(&state.queue_pairs)
            || !(1..=state.queue_pairs).contains(&state.active_pairs)
        {
            return Err(impossible(format!(
                "{pairs} queue pairs, {} of them in use, do not go with {} descriptors of a tap",
                state.active_pairs,
                taps.len()
            )));
        }
        let taps: Arc<[Tap]> = taps.into_iter().map(Tap::new).collect();
        let offloads = best_offload(&taps)?;
        let mut config = [0; 10];
        let (mac, rest) = config.split_at_mut(6);
        mac.copy_from_slice(&state.mac);
        if let [_, _, low, _] = rest {
            *low = state.queue_pairs;
        }
        Ok(Self {
            config,
            name: name.to_owned(),
            mac: state.mac,
            taps,
            offloads,
            offload: offloads,
            restored_pairs: state.active_pairs,
            threads: (0..pairs)
                .map(|index| Thread::new(&format!("{name}.{index}"), seccomp::Device::Net))
                .collect::<io::Result<_>>()?,
            bells: (0..pairs)
                .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK))
                .collect::<io::Result<_>>()?,
            vhost: None,
            running: None,
        })
    }

    /// The same device, whose frames are moved by the host's kernel; `device` is /dev/vhost-net.
    ///
    /// # Errors
    /// The kernel's, or when there are several pairs of queues: it would not know which of them the guest uses.
    pub fn with_vhost(mut self, device: OwnedFd) -> io::Result<Self> {
        if self.taps.len() != 1 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "vhost-net is for NICs of one pair of queues",
            ));
        }
        self.vhost = Some(Vhost::new(device)?);
        Ok(self)
    }

    fn queue_pairs(&self) -> u8 {
        u8::try_from(self.taps.len()).unwrap_or(MAX_QUEUE_PAIRS)
    }

    /// Has the host's kernel do for frames to the guest what the guest does not do itself.
    fn set_offload(&mut self, offload: u32) -> io::Result<()> {
        if offload == self.offload {
            return Ok(());
        }
        // The queues are those of one tap, which has its offloads as a whole.
        if let Some(tap) = self.taps.first() {
            tap.set_offload(offload)?;
        }
        self.offload = offload;
        // What came before is as it was wanted then.
        self.taps.iter().for_each(Tap::drain);
        Ok(())
    }
}

/// Sets and returns the first of [`OFFLOADS`] that the host's kernel knows.
fn best_offload(taps: &[Tap]) -> io::Result<u32> {
    let Some(tap) = taps.first() else { return Ok(0) };
    let mut refused = io::ErrorKind::InvalidInput.into();
    for offload in OFFLOADS {
        match tap.set_offload(offload) {
            Ok(()) => return Ok(offload),
            Err(e) => refused = e,
        }
    }
    Err(refused)
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        let pairs = self.taps.len();
        let count = match pairs {
            1 => ONE_PAIR,
            _ => pairs.saturating_mul(2).saturating_add(1),
        };
        QUEUE_SIZES.get(..count).unwrap_or(&QUEUE_SIZES)
    }

    fn features(&self) -> u64 {
        let offered = offered(self.offloads, self.taps.len() > 1);
        self.vhost.as_ref().map_or(offered, |vhost| vhost.limit(offered))
    }

    fn config(&self) -> &[u8] {
        // Without VIRTIO_NET_F_MQ there are no pairs to tell of.
        let length = if self.taps.len() > 1 { 10 } else { 6 };
        self.config.get(..length).unwrap_or(&self.config)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.running.is_some() {
            return Err(ActivateError::Active);
        }
        let features = activation.features & (self.features() | 1 << VIRTIO_RING_F_EVENT_IDX);
        self.set_offload(negotiated_offload(features, self.offloads))
            .map_err(ActivateError::Host)?;
        let several = features & (1 << VIRTIO_NET_F_MQ) != 0 && features & (1 << VIRTIO_NET_F_CTRL_VQ) != 0;
        let Sorted { mut pairs, control } = sort(
            activation.queues,
            if several { self.taps.len() } else { 1 },
            features,
        )?;
        // A guest that was saved uses no more than it set up.
        let in_use = usize::from(self.restored_pairs);
        if in_use > pairs.len() {
            return Err(ActivateError::QueueMissing(pairs.len().saturating_mul(2)));
        }
        if let (Some(vhost), Some(tap)) = (&self.vhost, self.taps.first()) {
            let queues = pairs.pop().ok_or(ActivateError::QueueMissing(0))?;
            let thread = self.threads.first().ok_or(ActivateError::HostEnd)?;
            let started = vhost.start(
                thread,
                tap,
                &activation.memory,
                queues,
                activation.interrupt,
                activation.features,
            )?;
            self.running = Some(Running::Kernel(started));
            return Ok(());
        }
        let shared = Arc::new(Pairs::new(
            Arc::clone(&self.taps),
            Arc::clone(&self.bells),
            pairs.len(),
            in_use,
        ));
        self.restored_pairs = 1;
        let mut control = control.map(|queue| {
            Control::new(
                queue,
                activation.memory.clone(),
                activation.interrupt.clone(),
                several.then(|| Arc::clone(&shared)),
            )
        });
        let mut workers = Vec::with_capacity(pairs.len());
        for ((index, [receive, transmit]), thread) in pairs.drain(..).enumerate().zip(&self.threads) {
            let worker = PairWorker::new(
                Arc::clone(&shared),
                index,
                activation.memory.clone(),
                [receive, transmit],
                control.take(),
                activation.interrupt.clone(),
                features,
            );
            // Those that were started before end when this returns.
            workers.push(thread.serve(|| Ok(worker)).map_err(ActivateError::Worker)?);
        }
        self.running = Some(Running::Own {
            pairs: shared,
            workers,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.restored_pairs = 1;
        let Some(running) = self.running.take() else {
            return;
        };
        match running {
            Running::Own { workers, .. } => workers.into_iter().for_each(|worker| drop(worker.stop())),
            Running::Kernel(started) => drop(started),
        }
        // Frames that come until the next driver is there may be of any kind; it is asked again then.
        if let Err(e) = self.set_offload(self.offloads) {
            warning!("{}: the offloads cannot be set: {e}", self.name);
        }
    }
}

/// The queues by what they are for.
struct Sorted {
    /// Receive and transmit queue of each pair that can be used.
    pairs: Vec<[ActiveQueue; 2]>,
    control: Option<ActiveQueue>,
}

/// Of `queues` those of the first pairs, up to `wanted` and up to the first that the driver left out; there must be
/// one.
fn sort(queues: Vec<ActiveQueue>, wanted: usize, features: u64) -> Result<Sorted, ActivateError> {
    let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
    let mut queues = queues.into_iter().map(|mut queue| {
        queue.queue.set_event_idx(event_idx);
        queue
    });
    let mut pairs = Vec::with_capacity(wanted);
    let mut complete = true;
    for number in 0..wanted {
        let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
            break;
        };
        for (queue, place) in [(&receive, 0), (&transmit, 1)] {
            complete &= queue.queue.ready();
            if !complete && number == 0 {
                return Err(ActivateError::QueueMissing(place));
            }
        }
        if complete {
            pairs.push([receive, transmit]);
        }
    }
    if pairs.is_empty() {
        return Err(ActivateError::QueueMissing(0));
    }
    let control = queues
        .next()
        .filter(|queue| features & (1 << VIRTIO_NET_F_CTRL_VQ) != 0 && queue.queue.ready());
    Ok(Sorted { pairs, control })
}
