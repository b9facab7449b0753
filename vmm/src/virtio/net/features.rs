//! Which features are offered, and which offloads of the tap they stand for.

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Each offload of a tap (what the guest takes from it) and the feature that stands for it.
const GUEST: [(u32, u32); 6] = [
    (TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
    (TUN_F_TSO4, VIRTIO_NET_F_GUEST_TSO4),
    (TUN_F_TSO6, VIRTIO_NET_F_GUEST_TSO6),
    (TUN_F_TSO_ECN, VIRTIO_NET_F_GUEST_ECN),
    (TUN_F_USO4, VIRTIO_NET_F_GUEST_USO4),
    (TUN_F_USO6, VIRTIO_NET_F_GUEST_USO6),
];

/// Both of a kind that the host's kernel has together or not at all.
const USO: u32 = TUN_F_USO4 | TUN_F_USO6;

/// What a device offers whose tap can have `offloads`, with queues for more than one pair or not. A tap takes
/// from the guest what it can give to it.
pub fn offered(offloads: u32, several_pairs: bool) -> u64 {
    let mut features = bits(&[
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
    ]);
    for (offload, feature) in GUEST {
        if offloads & offload != 0 {
            features |= bits(&[feature]);
        }
    }
    if offloads & USO == USO {
        features |= bits(&[VIRTIO_NET_F_HOST_USO]);
    }
    if several_pairs {
        features |= bits(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
    }
    features
}

/// The offloads to set when the driver accepted `features` and the tap can have `offloads`: only what the kernel
/// takes together.
pub fn negotiated_offload(features: u64, offloads: u32) -> u32 {
    let mut wanted = GUEST
        .iter()
        .filter(|(_, feature)| features & bits(&[*feature]) != 0)
        .fold(0, |sum, (offload, _)| sum | offload)
        & offloads;
    if wanted & TUN_F_CSUM == 0 {
        return 0;
    }
    if wanted & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
        wanted &= !TUN_F_TSO_ECN;
    }
    if wanted & USO != USO {
        wanted &= !USO;
    }
    wanted
}

/// The features of these numbers.
pub fn bits(numbers: &[u32]) -> u64 {
    numbers
        .iter()
        .filter_map(|number| 1u64.checked_shl(*number))
        .fold(0, |sum, bit| sum | bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::net::tap::OFFLOADS;

    #[test]
    fn a_driver_that_takes_all_gets_all() {
        for offloads in OFFLOADS {
            assert_eq!(negotiated_offload(offered(offloads, true), offloads), offloads);
        }
    }

    #[test]
    fn the_kernel_is_asked_for_nothing_that_it_refuses() {
        let all = OFFLOADS[0];
        let of = |numbers: &[u32]| negotiated_offload(bits(numbers), all);
        assert_eq!(of(&[VIRTIO_NET_F_GUEST_TSO4]), 0, "without checksums");
        assert_eq!(of(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN]), TUN_F_CSUM);
        assert_eq!(
            of(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4]),
            TUN_F_CSUM
        );
        assert_eq!(
            of(&[
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN
            ]),
            TUN_F_CSUM | TUN_F_TSO6 | TUN_F_TSO_ECN
        );
    }

    #[test]
    fn several_pairs_and_new_offloads_are_offered_only_where_they_are() {
        let mq = bits(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        assert_eq!(offered(OFFLOADS[0], false) & mq, 0);
        assert_eq!(offered(OFFLOADS[0], true) & mq, mq);
        let uso = bits(&[
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ]);
        assert_eq!(offered(OFFLOADS[0], false) & uso, uso);
        assert_eq!(offered(OFFLOADS[1], false) & uso, 0);
    }
}
