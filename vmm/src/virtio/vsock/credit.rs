//! Credit: how much either side of a connection may send (virtio 1.3, 5.10.6.3). All counts are modulo 2^32.

use std::collections::VecDeque;

/// Our buffer for each connection, in bytes: the most that the guest may have sent and the host's stream not yet
/// taken. Linux's own default.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// The guest is told of freed space when there is this much of it that it does not know of. What it knows to be
/// free then never falls below half of the buffer because of us.
const TELL_AT: u32 = BUF_ALLOC / 2;

/// What a packet is reckoned to cost in the guest's buffer whatever its length. Linux ends a connection on which
/// more packets wait than have room there with some 600 bytes of bookkeeping for each (`virtio_transport_inc_rx_pkt`).
const PACKET_COST: u32 = 1024;

/// Most packets under way, however large the guest's buffer is.
const MAX_PACKETS: u32 = 256;

/// Both sides' counts of one connection.
#[derive(Clone, Debug, Default)]
pub struct Credit {
    /// Of each packet that is in the guest's buffer: the count of bytes sent at its end.
    packets: VecDeque<u32>,
    /// Bytes sent to the guest.
    sent: u32,
    /// The guest's buffer in bytes.
    guest_buffer: u32,
    /// Bytes that have left the guest's buffer, as it last told.
    guest_forwarded: u32,
    /// Bytes received from the guest.
    received: u32,
    /// Bytes of those that have left our buffer.
    forwarded: u32,
    /// [`forwarded`](Self::forwarded) as the guest last was told.
    told: u32,
}

impl Credit {
    /// Takes in what a packet of the guest tells.
    pub fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        // Two of the guest's CPUs may write headers in one order and queue them in the other, so an older count is
        // no offence; and a count of bytes that were never sent must not become credit.
        if self.sent.wrapping_sub(fwd_cnt) <= self.in_flight() {
            self.guest_forwarded = fwd_cnt;
            self.guest_buffer = buf_alloc;
            let in_flight = self.in_flight();
            let sent = self.sent;
            // A packet is gone when all its bytes are.
            while matches!(self.packets.front(), Some(end) if sent.wrapping_sub(*end) >= in_flight) {
                self.packets.pop_front();
            }
        }
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.guest_forwarded)
    }

    /// Bytes that may be sent to the guest now.
    pub fn to_guest(&self) -> u32 {
        let packets = (self.guest_buffer / PACKET_COST).clamp(1, MAX_PACKETS);
        if self.packets.len() >= packets as usize {
            return 0;
        }
        self.guest_buffer.saturating_sub(self.in_flight())
    }

    /// A packet of `count` bytes, at most [`to_guest`](Self::to_guest), was sent to the guest.
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
        self.packets.push_back(self.sent);
    }

    /// Bytes that are in our buffer.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// `count` bytes came from the guest; `false` if it had no credit for them, and nothing is counted then.
    #[must_use]
    pub fn receive(&mut self, count: u32) -> bool {
        if count > BUF_ALLOC.saturating_sub(self.held()) {
            return false;
        }
        self.received = self.received.wrapping_add(count);
        true
    }

    /// `count` bytes, at most [`held`](Self::held), have left our buffer.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count.min(self.held()));
    }

    /// Whether it is time to tell the guest of freed space.
    pub fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= TELL_AT
    }

    /// Our buffer and our count for a header that goes to the guest now.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUF_ALLOC, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::{BUF_ALLOC, Credit};
    use proptest::prelude::*;

    #[test]
    fn a_guest_may_fill_the_buffer_and_not_a_byte_more() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUF_ALLOC));
        assert!(!credit.receive(1));
        credit.forward(10);
        assert!(!credit.receive(11));
        assert!(credit.receive(10));
        assert_eq!(credit.held(), BUF_ALLOC);
    }

    #[test]
    fn small_packets_are_counted_too() {
        let mut credit = Credit::default();
        credit.learn(64 * 1024, 0);
        for _ in 0..64 {
            assert!(credit.to_guest() > 60_000);
            credit.send(10);
        }
        assert_eq!(credit.to_guest(), 0);
        // The first is read in part, then in whole.
        credit.learn(64 * 1024, 9);
        assert_eq!(credit.to_guest(), 0);
        credit.learn(64 * 1024, 10);
        assert_eq!(credit.to_guest(), 64 * 1024 - 630);
        credit.learn(64 * 1024, 640);
        assert_eq!(credit.to_guest(), 64 * 1024);
        assert!(credit.packets.is_empty());
    }

    #[test]
    fn an_update_is_due_at_half_of_the_buffer() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUF_ALLOC));
        credit.forward(BUF_ALLOC / 2 - 1);
        assert!(!credit.update_due());
        credit.forward(1);
        assert!(credit.update_due());
        assert_eq!(credit.tell(), (BUF_ALLOC, BUF_ALLOC / 2));
        assert!(!credit.update_due());
    }

    #[test]
    fn forged_and_stale_counts_give_no_credit() {
        let mut credit = Credit::default();
        credit.learn(10_000, 0);
        credit.send(6000);
        credit.learn(10_000, 4000);
        assert_eq!(credit.to_guest(), 8000);
        credit.learn(10_000, 6001);
        assert_eq!(credit.to_guest(), 8000);
        credit.learn(10_000, 3000);
        assert_eq!(credit.to_guest(), 8000);
        credit.learn(1000, 4000);
        assert_eq!(credit.to_guest(), 0);
    }

    proptest! {
        #[test]
        fn counts_hold_across_the_wrap(start: u32, steps in prop::collection::vec((0u32..200_000, 0u32..200_000), 1..50)) {
            let mut credit = Credit { sent: start, guest_forwarded: start, received: start, forwarded: start, told: start, guest_buffer: 0, packets: Default::default() };
            let mut acknowledged = start;
            for (a, b) in steps {
                credit.learn(BUF_ALLOC, acknowledged);
                let n = a.min(credit.to_guest());
                if n > 0 {
                    credit.send(n);
                }
                prop_assert!(credit.packets.len() <= 256);
                prop_assert!(credit.in_flight() <= BUF_ALLOC);
                acknowledged = acknowledged.wrapping_add(b.min(credit.in_flight()));
                let held = credit.held();
                prop_assert_eq!(credit.receive(a), a <= BUF_ALLOC - held);
                credit.forward(b);
                prop_assert!(credit.held() <= BUF_ALLOC);
            }
        }
    }
}
