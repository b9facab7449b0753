//! One connection: a unix stream on the host's side, vsock packets on the guest's.
//!
//! The state machine knows nothing of queues and tables. It is told of packets from the guest and of events of
//! the stream, and it is asked for the next packet to the guest.

use super::credit::{BUF_ALLOC, Credit};
use super::offers::is_hung_up;
use super::packet::{Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::buffers::{Buffers, retry};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How long the guest has to answer a REQUEST.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the guest has to take leave once both sides have nothing more to say. Linux's own time.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// Most data in one packet to the guest: Linux's drivers take no more, however large their buffers are.
const MAX_DATA_LEN: usize = 64 * 1024;

/// Bytes moved at once where data has to be copied.
const CHUNK: usize = 4096;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// We asked the guest for it and wait for the answer.
    Requested,
    /// Data can flow.
    Established,
    /// Both directions are done; the guest has yet to say so.
    Closing,
    /// The guest has let go of it; the stream has yet to take what the guest sent before.
    Draining,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It goes on.
    Live,
    /// It goes on for the stream alone: its ports are free.
    Orphaned,
    /// It ends, and the guest is to be told by RST.
    Reset,
    /// It ends; the guest knows.
    Gone,
}

/// A connection of the guest to a stream.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    phase: Phase,
    stream: OwnedFd,
    credit: Credit,
    /// Data of the guest that the stream did not take yet: [`Credit::held`] bytes.
    backlog: VecDeque<u8>,
    /// REQUEST or RESPONSE that is yet to be sent.
    handshake: Option<Op>,
    /// Reading from the stream may give something: set by events, cleared by EAGAIN.
    readable: bool,
    /// The stream has nothing more for the guest: it ended, or the guest does not want more.
    host_done: bool,
    /// The stream takes nothing more.
    host_deaf: bool,
    /// The guest's SHUTDOWN flags so far.
    guest_shutdown: u32,
    /// The SHUTDOWN flags that were sent to the guest.
    told_shutdown: u32,
    /// The stream knows that the guest sends no more.
    end_passed_on: bool,
    /// The guest asked for our credit.
    update_asked: bool,
    /// The guest has yet to be asked for credit.
    request_credit: bool,
    /// The guest was asked, or will be, since credit last ran out.
    credit_requested: bool,
}

impl Connection {
    fn new(ports: Ports, phase: Phase, stream: OwnedFd, handshake: Op) -> Self {
        Self {
            ports,
            phase,
            stream,
            credit: Credit::default(),
            backlog: VecDeque::new(),
            handshake: Some(handshake),
            readable: true,
            host_done: false,
            host_deaf: false,
            guest_shutdown: 0,
            told_shutdown: 0,
            end_passed_on: false,
            update_asked: false,
            request_credit: false,
            credit_requested: false,
        }
    }

    /// The answer to the guest's REQUEST: it gets `stream`.
    pub fn accept(request: &Header, stream: OwnedFd) -> Self {
        let mut connection = Self::new(
            request.ports_from_guest(),
            Phase::Established,
            stream,
            Op::Response,
        );
        connection.credit.learn(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// A connection that the guest is to be asked for, for `stream`.
    pub fn request(ports: Ports, stream: OwnedFd) -> Self {
        Self::new(ports, Phase::Requested, stream, Op::Request)
    }

    /// Its name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The stream, for the one who waits for its events.
    pub fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The stream, to close it.
    pub fn into_stream(self) -> OwnedFd {
        self.stream
    }

    /// Whether it matters when the stream can take data.
    pub fn wants_output(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Bytes of the guest's that are held here.
    #[cfg(test)]
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Bytes that are taken to hold them.
    #[cfg(test)]
    pub fn backlog_memory(&self) -> usize {
        self.backlog.capacity()
    }

    /// Whether there is data for which the guest has no room.
    #[cfg(test)]
    pub fn waits_for_credit(&self) -> bool {
        self.could_read() && self.credit.to_guest() == 0
    }

    /// Whether the guest knows of this connection.
    pub fn is_known_to_guest(&self) -> bool {
        self.handshake != Some(Op::Request)
    }

    /// A packet of this connection came from the guest; `data` is all that it carries.
    pub fn receive(&mut self, header: &Header, op: Op, data: &mut Buffers<'_>) -> Fate {
        match (self.phase, op) {
            (_, Op::Rst) => return self.orphan(),
            (Phase::Requested, Op::Response) if self.handshake.is_none() => {
                self.phase = Phase::Established;
            }
            (Phase::Requested, _) | (_, Op::Request | Op::Response) => return Fate::Reset,
            // What was under way when we said that we receive no more.
            (Phase::Closing, Op::Rw | Op::CreditUpdate | Op::CreditRequest) => return Fate::Live,
            // Cannot be: a connection that drains has no ports.
            (Phase::Draining, _) => return Fate::Live,
            (_, Op::Shutdown) => self.guest_shutdown |= header.flags & SHUTDOWN_BOTH,
            (Phase::Established, Op::Rw) => {
                if self.guest_shutdown & SHUTDOWN_SEND != 0 || !self.receive_data(data) {
                    return Fate::Reset;
                }
            }
            (Phase::Established, Op::CreditUpdate) => {}
            (Phase::Established, Op::CreditRequest) => self.update_asked = true,
        }
        self.credit.learn(header.buf_alloc, header.fwd_cnt);
        self.settle()
    }

    /// The guest let go. What it sent before is still the host's: a guest gives up a connection that it closed
    /// after a while, however slowly its last words are read.
    fn orphan(&mut self) -> Fate {
        if self.backlog.is_empty() {
            return Fate::Gone;
        }
        self.phase = Phase::Draining;
        self.handshake = None;
        self.host_done = true;
        self.refuse_input();
        Fate::Orphaned
    }

    /// `false`: the guest had no credit for that much.
    fn receive_data(&mut self, data: &mut Buffers<'_>) -> bool {
        let Ok(length) = u32::try_from(data.len()) else {
            return false;
        };
        if !self.credit.receive(length) {
            return false;
        }
        while !data.is_empty() && self.backlog.is_empty() && !self.host_deaf {
            match data.send(self.stream.as_fd()) {
                Ok(0) => break,
                Ok(sent) => self.forwarded(sent),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.lose_listener(),
            }
        }
        if self.host_deaf {
            self.forwarded(data.len());
            return true;
        }
        let mut chunk = [0u8; CHUNK];
        loop {
            let count = data.read(&mut chunk);
            if count == 0 {
                return true;
            }
            self.keep(chunk.get(..count).unwrap_or(&chunk));
        }
    }

    /// Appends to the backlog. By itself its memory would double beyond the credit.
    fn keep(&mut self, data: &[u8]) {
        let needed = self.backlog.len().saturating_add(data.len());
        if needed > self.backlog.capacity() {
            let doubled = self.backlog.capacity().saturating_mul(2).min(BUF_ALLOC as usize);
            let more = needed.max(doubled).saturating_sub(self.backlog.len());
            self.backlog.reserve_exact(more);
        }
        self.backlog.extend(data);
    }

    fn forwarded(&mut self, count: usize) {
        // `count` came out of a buffer that is smaller than 2^32.
        self.credit.forward(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// The stream takes no more data: what the guest sent and sends is for nobody.
    fn lose_listener(&mut self) {
        self.host_deaf = true;
        self.forwarded(self.backlog.len());
        self.backlog = VecDeque::new();
    }

    /// Something happened to the stream; or it is said so: this tries, and believes what it sees itself.
    pub fn event(&mut self) -> Fate {
        self.readable = true;
        self.flush();
        if self.could_read() && self.credit.to_guest() == 0 {
            self.look_for_input();
        }
        if self.host_done && !self.host_deaf && is_hung_up(self.stream.as_fd()) {
            self.lose_listener();
        }
        self.settle()
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (head, tail) = self.backlog.as_slices();
            match send(self.stream.as_fd(), [head, tail]) {
                Ok(0) => return,
                Ok(sent) => {
                    self.backlog.drain(..sent.min(self.backlog.len()));
                    self.forwarded(sent);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.lose_listener(),
            }
        }
        // The memory of a backlog is only held while there is one.
        if self.backlog.capacity() > CHUNK {
            self.backlog = VecDeque::new();
        }
    }

    /// Draws the conclusions from what has just changed.
    fn settle(&mut self) -> Fate {
        if self.phase == Phase::Draining {
            return if self.backlog.is_empty() {
                Fate::Gone
            } else {
                Fate::Live
            };
        }
        if self.phase != Phase::Requested && self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && !self.host_done {
            self.host_done = true;
            self.refuse_input();
        }
        if self.credit.to_guest() > 0 {
            self.credit_requested = false;
            self.request_credit = false;
        } else if self.could_read() && !self.credit_requested {
            self.look_for_input();
            self.credit_requested = self.could_read();
            self.request_credit = self.credit_requested;
        }
        let guest_done = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.backlog.is_empty();
        if guest_done && !self.end_passed_on {
            self.end_passed_on = true;
            shut_down(self.stream.as_fd(), libc::SHUT_WR);
        }
        if self.guest_shutdown == SHUTDOWN_BOTH && (guest_done || self.host_deaf) {
            return Fate::Reset;
        }
        if self.phase == Phase::Established && self.host_done && (guest_done || self.host_deaf) {
            self.phase = Phase::Closing;
        }
        Fate::Live
    }

    /// The guest does not read any more: the stream's other end learns it, and what it has sent is read away, since
    /// closing a unix stream with data unread makes the other end see an error in place of the end.
    fn refuse_input(&mut self) {
        shut_down(self.stream.as_fd(), libc::SHUT_RD);
        let mut sink = [0u8; CHUNK];
        // After the shutdown nothing can be added, so that this ends.
        loop {
            // SAFETY: `sink` has the room that is told.
            let count = retry(|| unsafe {
                libc::recv(
                    self.stream.as_raw_fd(),
                    sink.as_mut_ptr().cast(),
                    sink.len(),
                    libc::MSG_DONTWAIT,
                )
            });
            if !matches!(count, Ok(n) if n > 0) {
                return;
            }
        }
    }

    fn could_read(&self) -> bool {
        self.phase == Phase::Established && self.handshake.is_none() && self.readable && !self.host_done
    }

    /// The SHUTDOWN flags that hold now.
    fn shutdown_flags(&self) -> u32 {
        match self.phase {
            Phase::Requested | Phase::Draining => 0,
            Phase::Closing => SHUTDOWN_BOTH,
            Phase::Established => {
                let mut flags = 0;
                // A guest that does not receive needs no word of our not sending.
                if self.host_done && self.guest_shutdown & SHUTDOWN_RECEIVE == 0 {
                    flags |= SHUTDOWN_SEND;
                }
                if self.host_deaf {
                    flags |= SHUTDOWN_RECEIVE;
                }
                flags
            }
        }
    }

    /// Whether [`next`](Self::next) may have a packet.
    pub fn has_packet(&self) -> bool {
        if self.phase == Phase::Draining {
            return false;
        }
        self.handshake.is_some()
            || self.shutdown_flags() != self.told_shutdown
            || (self.could_read() && self.credit.to_guest() > 0)
            || (self.phase == Phase::Established
                && (self.update_asked || self.request_credit || self.credit.update_due()))
    }

    /// The next packet to the guest: its header, and its data put into `room`. `None` if there is none after all.
    pub fn next(&mut self, guest_cid: u64, room: &mut Buffers<'_>) -> (Option<Header>, Fate) {
        let mut header = Header::to_guest(guest_cid, self.ports, Op::Rw);
        if let Some(op) = self.handshake.take() {
            header.op = op as u16;
        } else if self.shutdown_flags() != self.told_shutdown {
            self.told_shutdown = self.shutdown_flags();
            header.op = Op::Shutdown as u16;
            header.flags = self.told_shutdown;
        } else {
            header.len = self.read_into(room);
            if header.len == 0 {
                match self.end_or_credit() {
                    Some((op, flags)) => {
                        header.op = op as u16;
                        header.flags = flags;
                    }
                    None => return (None, self.settle()),
                }
            }
        }
        (header.buf_alloc, header.fwd_cnt) = self.credit.tell();
        self.update_asked = false;
        (Some(header), self.settle())
    }

    /// What there is to say when there is no data.
    fn end_or_credit(&mut self) -> Option<(Op, u32)> {
        // The end may just have been read.
        let flags = self.shutdown_flags();
        if flags != self.told_shutdown {
            self.told_shutdown = flags;
            return Some((Op::Shutdown, flags));
        }
        if self.phase != Phase::Established {
            return None;
        }
        if std::mem::take(&mut self.request_credit) {
            return Some((Op::CreditRequest, 0));
        }
        (self.update_asked || self.credit.update_due()).then_some((Op::CreditUpdate, 0))
    }

    /// Reads from the stream into the guest's buffer, as much as it has credit for.
    fn read_into(&mut self, room: &mut Buffers<'_>) -> u32 {
        let credit = self.credit.to_guest();
        if !self.could_read() || credit == 0 {
            return 0;
        }
        room.truncate(usize::try_from(credit).unwrap_or(MAX_DATA_LEN).min(MAX_DATA_LEN));
        if room.is_empty() {
            return 0;
        }
        match room.receive(self.stream.as_fd()) {
            Ok(0) => self.end_of_input(),
            Ok(count) => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.credit.send(count);
                return count;
            }
            Err(e) => self.input_failed(&e),
        }
        0
    }

    /// Without credit nothing is read. That nothing is there, or the end, has to be seen all the same.
    fn look_for_input(&mut self) {
        let mut byte = 0u8;
        // SAFETY: there is room for one byte.
        let count = retry(|| unsafe {
            libc::recv(
                self.stream.as_raw_fd(),
                (&raw mut byte).cast(),
                1,
                libc::MSG_DONTWAIT | libc::MSG_PEEK,
            )
        });
        match count {
            Ok(0) => self.end_of_input(),
            Ok(_) => {}
            Err(e) => self.input_failed(&e),
        }
    }

    fn input_failed(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.readable = false;
        } else {
            // The other end closed the stream with data unread.
            self.host_done = true;
            self.lose_listener();
        }
    }

    fn end_of_input(&mut self) {
        self.host_done = true;
        if !self.end_passed_on && is_hung_up(self.stream.as_fd()) {
            self.lose_listener();
        }
    }
}

fn shut_down(stream: BorrowedFd<'_>, how: libc::c_int) {
    // SAFETY: no pointers are involved. It fails when the other end is gone, which is as good.
    unsafe { libc::shutdown(stream.as_raw_fd(), how) };
}

fn send(stream: BorrowedFd<'_>, parts: [&[u8]; 2]) -> io::Result<usize> {
    let mut vector = parts.map(|part| libc::iovec {
        iov_base: part.as_ptr().cast_mut().cast(),
        iov_len: part.len(),
    });
    // SAFETY: all fields of msghdr are plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vector.as_mut_ptr();
    message.msg_iovlen = vector.len();
    // SAFETY: the vector describes `parts`, which sendmsg only reads.
    retry(|| unsafe {
        libc::sendmsg(
            stream.as_raw_fd(),
            &raw const message,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    })
}
