//! All connections of a guest: which packet belongs to which, and who sends next.

use super::connection::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, Connection, Fate, Phase};
use super::offers::{ConnectOffer, Offers};
use super::packet::{HEADER_LEN, Header, Op, Ports, TYPE_STREAM};
use crate::virtio::buffers::Buffers;
use crate::warning;
use husk_vmm_protocol::vsock::HOST_CID;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;
use vm_memory::ByteValued;

/// Most connections at once; more are answered by RST.
pub const MAX_CONNECTIONS: usize = 1023;

/// With this many RSTs not yet sent, no more packets are taken from the guest until it takes some of them.
pub const MAX_REPLIES: usize = 256;

/// Host ports of connections to the guest are taken from here up. The engine offers none of them.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// One past the last: `VMADDR_PORT_ANY`.
const END_OF_PORTS: u32 = u32::MAX;

/// What has to change in the set of streams that are waited for. In this order, no descriptor named is closed yet.
#[derive(Debug)]
pub enum Interest {
    /// Wait for this stream, by the name of its slot.
    Watch {
        /// The stream.
        stream: RawFd,
        /// Names it in [`Muxer::event`].
        slot: usize,
    },
    /// Wait, or wait no longer, for room to write.
    Output {
        /// The stream.
        stream: RawFd,
        /// Its slot.
        slot: usize,
        /// Which of both.
        wanted: bool,
    },
    /// Wait for it no longer, then close it.
    Forget(OwnedFd),
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// Whether it is in the queue of those that may send.
    queued: bool,
    /// Whether room to write is waited for.
    output: bool,
    /// When it ends if it is still in that phase.
    deadline: Option<(Instant, Phase)>,
}

/// The table of connections.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    offers: Offers,
    slots: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_ports: BTreeMap<Ports, usize>,
    /// Slots of connections that may have a packet for the guest, in the order of their turns.
    ready: VecDeque<usize>,
    /// RSTs that belong to no connection, or to none any more.
    replies: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, usize)>,
    interest: Vec<Interest>,
    next_port: u32,
}

impl Muxer {
    /// An empty table.
    pub fn new(guest_cid: u64, offers: Offers) -> Self {
        Self {
            guest_cid,
            offers,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: BTreeSet::new(),
            interest: Vec::new(),
            next_port: FIRST_EPHEMERAL_PORT,
        }
    }

    /// The streams on offer.
    pub fn offers(&self) -> &Offers {
        &self.offers
    }

    /// Closes all connections and gives the offers back.
    pub fn into_offers(self) -> Offers {
        self.offers
    }

    /// Changes to the set of streams that are waited for, since this was last called.
    pub fn take_interest(&mut self) -> Vec<Interest> {
        std::mem::take(&mut self.interest)
    }

    /// Whether the guest has to take packets before more of its own are looked at.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// The earliest time at which [`expire`](Self::expire) has to be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Closes all connections without a word to the guest, which knows by other means.
    pub fn reset(&mut self) {
        for slot in 0..self.slots.len() {
            self.remove(slot);
        }
        self.replies.clear();
    }

    /// A packet came from the guest.
    pub fn receive(&mut self, packet: &mut Buffers<'_>, now: Instant) {
        let Some(header) = packet.read_object::<Header>() else {
            warning!("vsock: a packet without a whole header was dropped");
            return;
        };
        let (src_cid, kind, length) = (header.src_cid, header.kind, header.len);
        if src_cid != self.guest_cid {
            // Nobody to answer.
            warning!("vsock: a packet from context {src_cid} was dropped");
            return;
        }
        let op = Op::from_number(header.op);
        let Some(op) = op.filter(|_| header.dst_cid == HOST_CID && kind == TYPE_STREAM) else {
            if op != Some(Op::Rst) {
                self.replies.push_back(header.refusal());
            }
            return;
        };
        let ports = header.ports_from_guest();
        let slot = self.by_ports.get(&ports).copied();
        match usize::try_from(length) {
            Ok(length) if length <= packet.len() => packet.truncate(length),
            _ => {
                warning!("vsock: a packet is shorter than it says: {length} bytes");
                return self.refuse(slot, &header, op);
            }
        }
        if op == Op::Request {
            return self.request(slot, &header, now);
        }
        let entry = slot.and_then(|slot| Some((slot, self.slots.get_mut(slot)?.as_mut()?)));
        match entry {
            Some((slot, entry)) => {
                let fate = entry.connection.receive(&header, op, packet);
                self.settle(slot, fate, now);
            }
            None => self.refuse(None, &header, op),
        }
    }

    /// Ends the connection, if there is one, and answers with RST.
    fn refuse(&mut self, slot: Option<usize>, header: &Header, op: Op) {
        if let Some(slot) = slot {
            self.remove(slot);
        }
        if op != Op::Rst {
            self.replies.push_back(header.refusal());
        }
    }

    fn request(&mut self, slot: Option<usize>, header: &Header, now: Instant) {
        if let Some(slot) = slot {
            let closing = matches!(self.slots.get(slot), Some(Some(entry)) if entry.connection.phase() == Phase::Closing);
            if !closing {
                return self.refuse(Some(slot), header, Op::Request);
            }
            // Both sides are done with the old one and the guest takes its port anew.
            self.remove(slot);
        }
        if self.is_full() {
            warning!("vsock: {MAX_CONNECTIONS} connections are open; one more was refused");
            return self.refuse(None, header, Op::Request);
        }
        let port = header.dst_port;
        let mut stream = self.offers.take(port);
        if stream.is_none() {
            // The engine makes an offer before it tells the guest of it, but the two may be seen here in any order.
            self.take_offers(now);
            stream = self.offers.take(port);
        }
        match stream {
            Some(stream) if !self.is_full() => self.insert(Connection::accept(header, stream), None, now),
            _ => self.refuse(None, header, Op::Request),
        }
    }

    fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= MAX_CONNECTIONS
    }

    /// Takes all offers that the channel has.
    pub fn take_offers(&mut self, now: Instant) {
        while let Some(offer) = self.offers.next_connect() {
            self.connect(offer, now);
        }
    }

    fn connect(&mut self, offer: ConnectOffer, now: Instant) {
        if self.is_full() || self.is_congested() {
            warning!(
                "vsock: no connection to port {} of the guest: too many are open",
                offer.port
            );
            return;
        }
        let ports = self.ephemeral_ports(offer.port);
        let deadline = now.checked_add(CONNECT_TIMEOUT).map(|at| (at, Phase::Requested));
        self.insert(Connection::request(ports, offer.stream), deadline, now);
    }

    /// A host port that is not in use with `guest`. There are more ports than connections, so that one is found.
    fn ephemeral_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = match host.saturating_add(1) {
                END_OF_PORTS => FIRST_EPHEMERAL_PORT,
                next => next,
            };
            let ports = Ports { guest, host };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn insert(&mut self, connection: Connection, deadline: Option<(Instant, Phase)>, now: Instant) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len().saturating_sub(1)
        });
        self.interest.push(Interest::Watch {
            stream: connection.stream().as_raw_fd(),
            slot,
        });
        self.by_ports.insert(connection.ports(), slot);
        if let Some((at, _)) = deadline {
            self.deadlines.insert((at, slot));
        }
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Entry {
                connection,
                queued: false,
                output: false,
                deadline,
            });
        }
        self.settle(slot, Fate::Live, now);
    }

    fn remove(&mut self, slot: usize) {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::take) else {
            return;
        };
        self.free.push(slot);
        self.forget_ports(entry.connection.ports(), slot);
        if entry.queued {
            self.ready.retain(|other| *other != slot);
        }
        if let Some((at, _)) = entry.deadline {
            self.deadlines.remove(&(at, slot));
        }
        self.interest
            .push(Interest::Forget(entry.connection.into_stream()));
    }

    fn forget_ports(&mut self, ports: Ports, slot: usize) {
        if self.by_ports.get(&ports) == Some(&slot) {
            self.by_ports.remove(&ports);
        }
    }

    /// After anything was done with a connection: what follows from it for the table.
    fn settle(&mut self, slot: usize, fate: Fate, now: Instant) {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let connection = &entry.connection;
        let ports = connection.ports();
        match fate {
            Fate::Live | Fate::Orphaned => {}
            Fate::Gone => return self.remove(slot),
            Fate::Reset => {
                if connection.is_known_to_guest() {
                    self.replies
                        .push_back(Header::to_guest(self.guest_cid, ports, Op::Rst));
                }
                return self.remove(slot);
            }
        }
        let output = connection.wants_output();
        if output != entry.output {
            entry.output = output;
            self.interest.push(Interest::Output {
                stream: connection.stream().as_raw_fd(),
                slot,
                wanted: output,
            });
        }
        let phase = connection.phase();
        if entry.deadline.map(|(_, phase)| phase) != Some(phase) {
            if let Some((at, _)) = entry.deadline.take() {
                self.deadlines.remove(&(at, slot));
            }
            if phase == Phase::Closing {
                entry.deadline = now.checked_add(CLOSE_TIMEOUT).map(|at| (at, phase));
            }
            if let Some((at, _)) = entry.deadline {
                self.deadlines.insert((at, slot));
            }
        }
        if !entry.queued && connection.has_packet() {
            entry.queued = true;
            self.ready.push_back(slot);
        }
        if fate == Fate::Orphaned {
            self.forget_ports(ports, slot);
        }
    }

    /// Something may have happened to a connection's stream.
    pub fn event(&mut self, slot: usize, now: Instant) {
        if let Some(entry) = self.slots.get_mut(slot).and_then(Option::as_mut) {
            let fate = entry.connection.event();
            self.settle(slot, fate, now);
        }
    }

    /// Ends the connections whose time is up.
    pub fn expire(&mut self, now: Instant) {
        while let Some((at, slot)) = self.deadlines.first().copied() {
            if at > now {
                return;
            }
            self.deadlines.remove(&(at, slot));
            self.settle(slot, Fate::Reset, now);
        }
    }

    /// Writes the next packet for the guest into `room`, which has more bytes than a header: its length, or `None`
    /// if there is no packet. Replies come first, then connections take turns.
    pub fn next(&mut self, room: &mut Buffers<'_>, now: Instant) -> Option<u32> {
        let mut head = room.split_front(HEADER_LEN);
        if let Some(reply) = self.replies.pop_front() {
            head.write(reply.as_slice());
            return u32::try_from(HEADER_LEN).ok();
        }
        while let Some(slot) = self.ready.pop_front() {
            let Some(entry) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            entry.queued = false;
            let (header, fate) = entry.connection.next(self.guest_cid, room);
            self.settle(slot, fate, now);
            if let Some(header) = header {
                head.write(header.as_slice());
                let length = header.len;
                return u32::try_from(HEADER_LEN).ok()?.checked_add(length);
            }
        }
        None
    }

    /// Number of connections, those that drain included.
    pub fn connections(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Bytes of the guest's that are held for all connections.
    #[cfg(test)]
    pub fn backlog(&self) -> usize {
        self.slots
            .iter()
            .flatten()
            .map(|entry| entry.connection.backlog())
            .sum()
    }

    /// Connections whose guest has no room for what the host wants to send.
    #[cfg(test)]
    pub fn without_credit(&self) -> usize {
        self.slots
            .iter()
            .flatten()
            .filter(|entry| entry.connection.waits_for_credit())
            .count()
    }
}
