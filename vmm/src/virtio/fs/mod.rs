//! The file-system device (virtio-fs): the guest's FUSE requests, carried to `husk-fsd`.
//!
//! The VMM owns the queues and never a path. Requests go to the server as the guest wrote them
//! ([`husk_vmm_protocol::fs`]); the server hands over the files that it opens, and READ and WRITE of those are
//! answered here, between the file and the guest's buffers without a copy.
//!
//! The device's thread is done with a READ or WRITE before it looks at the next request; the server's requests are
//! under way side by side and come back in any order.

pub mod channel;
pub mod data;
pub mod files;
mod replies;
pub mod wire;
pub mod worker;

#[cfg(test)]
mod fs_test;

use crate::lockdown::seccomp;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, Device};
use crate::virtio::registers::RestoreError;
use crate::worker::{Thread, Worker};
use channel::Channel;
use files::Files;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use worker::FsWorker;

/// Queues: urgent requests (FORGET, INTERRUPT), all others. The second has room for a request of 1 MiB in single
/// pages several times over, which the driver wants even where it uses indirect descriptors.
const QUEUE_SIZES: [u16; 2] = [128, 1024];

/// Longest tag, in bytes.
pub const MAX_TAG_LEN: usize = 36;

/// What is kept of the device across a snapshot.
///
/// Nodes and open files are not: they live in a server of another time. So a snapshot is only of use when it is taken
/// before the guest mounts the share, or after it has unmounted it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The name by which the guest mounts the share.
    pub tag: String,
}

/// The file-system device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    /// `struct virtio_fs_config`: the tag, zero-padded, and the number of request queues.
    config: [u8; MAX_TAG_LEN + 4],
    /// How many files the guest may have open.
    max_files: usize,
    /// The way to the server, when no worker has it.
    channel: Option<Channel>,
    thread: Thread,
    worker: Option<Worker<FsWorker>>,
}

impl Fs {
    /// A device that the guest mounts as `tag` (what is beyond [`MAX_TAG_LEN`] bytes is cut off), served at the other
    /// end of `channel`. Readies the process for the guest's files (see [`files::ready_process`]).
    ///
    /// # Errors
    /// When it cannot have a thread.
    pub fn new(tag: &str, channel: OwnedFd) -> io::Result<Self> {
        let max_files = files::ready_process();
        // The longest of its beginnings that has room, in whole characters.
        let tag = (0..=tag.len().min(MAX_TAG_LEN))
            .rev()
            .find_map(|end| tag.get(..end));
        let tag = tag.unwrap_or_default();
        let mut config = [0; MAX_TAG_LEN + 4];
        let (name, queues) = config.split_at_mut(MAX_TAG_LEN);
        for (to, from) in name.iter_mut().zip(tag.bytes()) {
            *to = from;
        }
        for (to, from) in queues.iter_mut().zip(1u32.to_le_bytes()) {
            *to = from;
        }
        Ok(Self {
            tag: tag.to_owned(),
            config,
            max_files,
            channel: Some(Channel::new(channel)),
            thread: Thread::new("fs", seccomp::Device::Fs)?,
            worker: None,
        })
    }

    /// What a copy of the device has to know.
    pub fn save(&self) -> State {
        State {
            tag: self.tag.clone(),
        }
    }

    /// A copy of a saved device, served at the other end of `channel`.
    ///
    /// # Errors
    /// As of [`new`](Self::new), and when the state is none that a device can have.
    pub fn restore(state: State, channel: OwnedFd) -> Result<Self, RestoreError> {
        let tag = state.tag;
        if tag.is_empty() || tag.len() > MAX_TAG_LEN || tag.contains('\0') {
            return Err(RestoreError::Device {
                device: "file-system",
                what: format!("no share has a tag of {} bytes like this", tag.len()),
            });
        }
        Ok(Self::new(&tag, channel)?)
    }
}

/// A descriptor to watch a channel by: it becomes ready (`EPOLLHUP`, whatever is asked for) when the server is gone.
/// A machine without its files is of no use and has to end then.
///
/// # Errors
/// When there are no descriptors left.
pub fn watch(channel: &OwnedFd) -> io::Result<OwnedFd> {
    channel.try_clone()
}

impl Device for Fs {
    fn kind(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Active);
        }
        let mut queues: [ActiveQueue; QUEUE_SIZES.len()] = activation
            .queues
            .try_into()
            .map_err(|queues: Vec<_>| ActivateError::QueueMissing(queues.len()))?;
        for (number, queue) in queues.iter_mut().enumerate() {
            if !queue.queue.ready() {
                return Err(ActivateError::QueueMissing(number));
            }
            queue
                .queue
                .set_event_idx(activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        let channel = self.channel.take().ok_or(ActivateError::HostEnd)?;
        let (memory, interrupt, max_files) = (activation.memory, activation.interrupt, self.max_files);
        let worker = self
            .thread
            .serve(move || {
                Ok(FsWorker::new(
                    memory,
                    queues,
                    interrupt,
                    channel,
                    Files::new(max_files),
                ))
            })
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // The worker's requests and files go with it; replies still to come bear tags that are not used again.
            self.channel = worker.stop().map(FsWorker::into_channel);
        }
    }
}
