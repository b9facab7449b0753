//! The device's thread, the guest's half of it: requests from the queues to their files or to the server. The
//! server's half is in [`super::replies`].

use super::channel::{Channel, REPLY_BUFFER_LEN, Request};
use super::data;
use super::files::Files;
use super::wire::{
    DATA_ARGS_LEN, DataArgs, IN_HEADER_LEN, InHeader, OUT_HEADER_LEN, op, out_header, released_handle,
};
use crate::memory::Memory;
use crate::virtio::buffers::{Buffers, split};
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::warning;
use crate::worker::{Handler, Poll, READABLE, WRITABLE, WorkerError};
use husk_vmm_protocol::fs::{HEADER_LEN, MAX_REPLY_LEN, MAX_REQUEST_LEN, RequestHeader};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};

/// Token of the channel; those below are the queues' numbers.
const CHANNEL: u32 = 2;

/// Most chains taken, or replies handed on, before the worker looks at its other descriptors.
pub(super) const PER_PASS: u32 = 256;

/// Most requests under way at the server. More than the queues hold cannot come from a driver that keeps the rules.
const MAX_OUTSTANDING: usize = 2048;

/// What the guest is told when the server is gone, as by the kernel of a FUSE file system without its server.
pub(super) const GONE: i32 = libc::ENOTCONN;

pub(super) type Chain = DescriptorChain<Arc<Memory>>;

/// A request that the server has.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) queue: usize,
    pub(super) chain: Chain,
    pub(super) header: InHeader,
}

/// What runs on the thread.
#[derive(Debug)]
pub struct FsWorker {
    pub(super) memory: Arc<Memory>,
    queues: [ActiveQueue; 2],
    used: [bool; 2],
    interrupt: Interrupt,
    pub(super) channel: Channel,
    /// The server's end is open.
    pub(super) alive: bool,
    pub(super) outstanding: HashMap<u32, Outstanding>,
    pub(super) files: Files,
    /// The packet being made, and how much of it waits for room in the channel.
    packet: Vec<u8>,
    pub(super) waiting: Option<usize>,
    /// What is to be taken back at the server, as soon as there is room. At most two for each reply.
    pub(super) owed: VecDeque<Request>,
    pub(super) reply: Vec<u8>,
}

/// What became of a request.
pub(super) enum Outcome {
    /// It was answered: this many bytes were written for the guest.
    Done(usize),
    /// The server has it.
    Forwarded,
}

impl FsWorker {
    /// Serves the queues (urgent, requests) through `channel`.
    pub fn new(
        memory: Memory,
        queues: [ActiveQueue; 2],
        interrupt: Interrupt,
        channel: Channel,
        files: Files,
    ) -> Self {
        Self {
            memory: Arc::new(memory),
            queues,
            used: [false; 2],
            interrupt,
            channel,
            alive: true,
            outstanding: HashMap::new(),
            files,
            packet: Vec::with_capacity(HEADER_LEN + MAX_REQUEST_LEN),
            waiting: None,
            owed: VecDeque::new(),
            reply: vec![0; REPLY_BUFFER_LEN],
        }
    }

    /// The way to the server, for the next worker. What is under way is dropped with the rest.
    pub fn into_channel(self) -> Channel {
        self.channel
    }

    /// Takes chains off a queue until there are no more or the channel is full.
    fn serve_queue(&mut self, number: usize) -> Result<(), WorkerError> {
        let memory = self.memory.clone();
        for _ in 0..PER_PASS {
            if self.waiting.is_some() {
                // Room in the channel brings us back.
                return Ok(());
            }
            let Some(ActiveQueue { queue, .. }) = self.queues.get_mut(number) else {
                return Ok(());
            };
            let Some(chain) = queue.iter(memory.clone())?.next() else {
                if queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            match self.serve_chain(number, chain) {
                Outcome::Done(len) => self.give_back(number, head, len)?,
                Outcome::Forwarded => {}
            }
        }
        if let Some(queue) = self.queues.get(number) {
            queue
                .notify
                .write(1)
                .map_err(WorkerError::io("calling for another pass"))?;
        }
        Ok(())
    }

    fn serve_chain(&mut self, number: usize, chain: Chain) -> Outcome {
        let memory = self.memory.clone();
        let (mut readable, mut writable) = match split(chain.clone(), &memory) {
            Ok(buffers) => buffers,
            Err(e) => {
                warning!("fs: a request was refused: {e}");
                return Outcome::Done(0);
            }
        };
        let mut head = [0; IN_HEADER_LEN];
        if readable.read(&mut head) < IN_HEADER_LEN {
            warning!("fs: a request was refused: it is shorter than its header");
            return Outcome::Done(0);
        }
        let Some(header) = InHeader::read(&head) else {
            return Outcome::Done(0);
        };
        let Some(arguments_len) = header
            .len
            .checked_sub(IN_HEADER_LEN)
            .filter(|&len| len <= readable.len())
        else {
            return refuse(&header, &mut writable, libc::EINVAL);
        };
        readable.truncate(arguments_len);
        if !header.is_silent() && writable.len() < OUT_HEADER_LEN {
            warning!("fs: a request was refused: it has no room for its reply");
            return Outcome::Done(0);
        }
        match header.opcode {
            op::READ => self.read(&header, readable, writable),
            op::WRITE => self.write(&header, readable, writable),
            // The server interrupts nothing.
            op::INTERRUPT => Outcome::Done(0),
            _ => self.forward(number, chain, &header, &head, readable, writable),
        }
    }

    fn read(&self, header: &InHeader, mut readable: Buffers<'_>, mut writable: Buffers<'_>) -> Outcome {
        let Some(arguments) = data_args(&mut readable) else {
            return refuse(header, &mut writable, libc::EINVAL);
        };
        let mut front = writable.split_front(OUT_HEADER_LEN);
        match data::read(&self.files, &arguments, &mut writable) {
            Ok(len) => {
                let len = len.saturating_add(OUT_HEADER_LEN);
                front.write(&out_header(len, 0, header.unique));
                Outcome::Done(len)
            }
            Err(error) => refuse(header, &mut front, error),
        }
    }

    fn write(&self, header: &InHeader, mut readable: Buffers<'_>, mut writable: Buffers<'_>) -> Outcome {
        /// `fuse_write_out`: the size written, and padding.
        const BODY_LEN: usize = 8;
        let Some(arguments) = data_args(&mut readable) else {
            return refuse(header, &mut writable, libc::EINVAL);
        };
        if writable.len() < OUT_HEADER_LEN + BODY_LEN {
            return refuse(header, &mut writable, libc::EINVAL);
        }
        match data::write(&self.files, &arguments, &mut readable) {
            Ok(written) => {
                writable.write(&out_header(OUT_HEADER_LEN + BODY_LEN, 0, header.unique));
                // At most MAX_DATA_LEN.
                writable.write(&(written as u64).to_le_bytes());
                Outcome::Done(OUT_HEADER_LEN + BODY_LEN)
            }
            Err(error) => refuse(header, &mut writable, error),
        }
    }

    /// Sends a request to the server.
    fn forward(
        &mut self,
        number: usize,
        chain: Chain,
        header: &InHeader,
        head: &[u8; IN_HEADER_LEN],
        mut readable: Buffers<'_>,
        mut writable: Buffers<'_>,
    ) -> Outcome {
        if !self.alive {
            return refuse(header, &mut writable, GONE);
        }
        if header.len > MAX_REQUEST_LEN {
            return refuse(header, &mut writable, libc::E2BIG);
        }
        if self.outstanding.len() >= MAX_OUTSTANDING {
            return refuse(header, &mut writable, libc::EBUSY);
        }
        let tag = self.new_tag();
        let capacity = writable.len().min(MAX_REPLY_LEN) as u32;
        self.packet.clear();
        self.packet.extend(RequestHeader { tag, capacity }.encode());
        self.packet.extend(head);
        let arguments_at = self.packet.len();
        self.packet.resize(arguments_at.saturating_add(readable.len()), 0);
        readable.read(self.packet.get_mut(arguments_at..).unwrap_or_default());
        match header.opcode {
            op::RELEASE => {
                if let Some(handle) = self.packet.get(HEADER_LEN..).and_then(released_handle) {
                    self.files.release(handle);
                }
            }
            // A session's begin and end: the server too closes all.
            op::INIT | op::DESTROY => self.files.clear(),
            _ => {}
        }
        let silent = header.is_silent();
        if !silent {
            self.outstanding.insert(
                tag,
                Outstanding {
                    queue: number,
                    chain,
                    header: *header,
                },
            );
        }
        self.waiting = Some(self.packet.len());
        self.flush();
        if silent {
            Outcome::Done(0)
        } else {
            Outcome::Forwarded
        }
    }

    /// A tag that no request under way has.
    fn new_tag(&mut self) -> u32 {
        loop {
            let tag = self.channel.next_tag();
            if !self.outstanding.contains_key(&tag) {
                return tag;
            }
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        while self.alive {
            let sent = if self.waiting.is_some() {
                self.channel.send(&self.packet)
            } else if let Some(request) = self.owed.front().copied() {
                // No request under way has this tag, so that the reply is ignored.
                let tag = self.new_tag();
                self.channel.send(&request.packet(tag))
            } else {
                return;
            };
            match sent {
                Ok(true) if self.waiting.is_some() => self.waiting = None,
                Ok(true) => {
                    self.owed.pop_front();
                }
                Ok(false) => return,
                Err(e) => self.lose_server(Some(&e)),
            }
        }
    }

    /// Whether something waits for room in the channel.
    fn is_full(&self) -> bool {
        self.waiting.is_some() || !self.owed.is_empty()
    }

    pub(super) fn give_back(&mut self, number: usize, head: u16, len: usize) -> Result<(), WorkerError> {
        let (Some(queue), Some(used)) = (self.queues.get_mut(number), self.used.get_mut(number)) else {
            return Ok(());
        };
        queue
            .queue
            .add_used(&*self.memory, head, u32::try_from(len).unwrap_or(u32::MAX))?;
        *used = true;
        Ok(())
    }

    /// Tells the driver of what it was given back, if it cares.
    fn tell_driver(&mut self) -> Result<(), WorkerError> {
        let mut tell = false;
        for (queue, used) in self.queues.iter_mut().zip(&mut self.used) {
            if std::mem::take(used) {
                tell |= queue.queue.needs_notification(&*self.memory)?;
            }
        }
        if tell {
            self.interrupt.signal_queue();
        }
        Ok(())
    }
}

impl Handler for FsWorker {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, queue) in (0u32..).zip(&self.queues) {
            // SAFETY: the worker owns the descriptor, and its thread ends before it is dropped.
            let notify = unsafe { BorrowedFd::borrow_raw(queue.notify.as_raw_fd()) };
            poll.add(notify, token, READABLE)?;
            // What is there already, as after a restore, gets no notification.
            queue.notify.write(1)?;
        }
        poll.add(self.channel.fd(), CHANNEL, READABLE)
    }

    fn handle(&mut self, token: u32, _events: u32, poll: &Poll) -> Result<(), WorkerError> {
        let (was_alive, was_full) = (self.alive, self.is_full());
        match usize::try_from(token) {
            Ok(number) if token < CHANNEL => {
                if let Some(queue) = self.queues.get(number) {
                    // Fails only when it was read before; what matters is the queue.
                    let _ = queue.notify.read();
                }
                self.serve_queue(number)?;
            }
            _ => {
                self.serve_replies()?;
                self.flush();
                if was_full && !self.is_full() {
                    for number in 0..self.queues.len() {
                        self.serve_queue(number)?;
                    }
                }
            }
        }
        if was_alive && !self.alive {
            poll.remove(self.channel.fd())
                .map_err(WorkerError::io("leaving the file server's channel"))?;
            self.answer_orphans()?;
            for number in 0..self.queues.len() {
                self.serve_queue(number)?;
            }
        } else if self.alive && was_full != self.is_full() {
            let events = if self.is_full() {
                READABLE | WRITABLE
            } else {
                READABLE
            };
            poll.modify(self.channel.fd(), CHANNEL, events)
                .map_err(WorkerError::io("waiting for room in the file server's channel"))?;
        }
        self.tell_driver()
    }
}

fn data_args(readable: &mut Buffers<'_>) -> Option<DataArgs> {
    let mut bytes = [0; DATA_ARGS_LEN];
    (readable.read(&mut bytes) == DATA_ARGS_LEN)
        .then(|| DataArgs::read(&bytes))
        .flatten()
}

/// Answers with an error number. Silent requests, and those without room for a reply, just go back.
pub(super) fn refuse(header: &InHeader, writable: &mut Buffers<'_>, error: i32) -> Outcome {
    if header.is_silent() || writable.len() < OUT_HEADER_LEN {
        return Outcome::Done(0);
    }
    Outcome::Done(writable.write(&out_header(OUT_HEADER_LEN, error, header.unique)))
}
