//! `struct virtio_net_hdr_v1`, which precedes each frame: flags, kind of segmentation, length of the headers, size of
//! a segment, where the checksum starts and where it goes, number of buffers. The guest and the tap have it alike.

use super::features::bits;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Length in bytes.
pub const LEN: usize = husk_vmm_protocol::fds::vmm::VNET_HEADER_LEN as usize;

/// Where the number of buffers stands, 2 bytes, little-endian.
pub const NUM_BUFFERS: usize = 10;

/// Most bytes of a frame with its header: 65,550 and [`LEN`] (virtio 1.3, 5.1.6.3.1).
pub const MAX_FRAME: usize = 65_562;

/// Why a header of the guest is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It asks for a checksum, which the driver did not agree on.
    #[error("its checksum is to be made, which was not agreed on")]
    Checksum,
    /// It asks for a segmentation that the driver did not agree on, or that there is not.
    #[error("it is to be segmented as {0:#x}, which was not agreed on")]
    Segmentation(u8),
    /// It asks for a segmentation but not for checksums.
    #[error("it is to be segmented without checksums")]
    SegmentsWithoutChecksum,
}

/// Checks what the guest asks of the host for a frame. Lengths and places are the host kernel's to check, which
/// alone knows the frame.
///
/// # Errors
/// When it is nothing that a driver which accepted `features` may ask for.
pub fn check(header: &mut [u8; LEN], features: u64) -> Result<(), HeaderError> {
    let [flags, kind, ..] = header;
    let has = |feature| features & bits(&[feature]) != 0;
    // Flags that are none of a driver's are to be ignored.
    *flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    let checksum = *flags != 0;
    if checksum && !has(VIRTIO_NET_F_CSUM) {
        return Err(HeaderError::Checksum);
    }
    let feature = match u32::from(*kind) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE if *kind == 0 => return Ok(()),
        VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 => VIRTIO_NET_F_HOST_USO,
        _ => return Err(HeaderError::Segmentation(*kind)),
    };
    let ecn = u32::from(*kind) & VIRTIO_NET_HDR_GSO_ECN != 0;
    if !has(feature) || ecn && (!has(VIRTIO_NET_F_HOST_ECN) || feature == VIRTIO_NET_F_HOST_USO) {
        return Err(HeaderError::Segmentation(*kind));
    }
    if !checksum {
        return Err(HeaderError::SegmentsWithoutChecksum);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(flags: u8, kind: u8, features: &[u32]) -> Result<u8, HeaderError> {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        check(&mut header, bits(features)).map(|()| header[0])
    }

    #[test]
    fn only_what_was_agreed_on_may_be_asked_for() {
        assert_eq!(checked(0, 0, &[]), Ok(0));
        assert_eq!(checked(1, 0, &[]), Err(HeaderError::Checksum));
        let tso4 = [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4];
        assert_eq!(checked(1, 1, &tso4), Ok(1));
        assert_eq!(checked(0, 1, &tso4), Err(HeaderError::SegmentsWithoutChecksum));
        assert_eq!(checked(1, 0x81, &tso4), Err(HeaderError::Segmentation(0x81)));
        assert_eq!(checked(1, 4, &tso4), Err(HeaderError::Segmentation(4)));
        let all = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_HOST_USO,
        ];
        for kind in [0, 1, 4, 5, 0x81, 0x84] {
            assert_eq!(checked(1, kind, &all), Ok(1), "{kind:#x}");
        }
        for kind in [2, 3, 6, 0x7f, 0x80, 0x85, 0xff] {
            assert_eq!(checked(1, kind, &all), Err(HeaderError::Segmentation(kind)));
        }
    }

    #[test]
    fn flags_that_are_no_drivers_are_taken_away() {
        assert_eq!(checked(0xff, 0, &[VIRTIO_NET_F_CSUM]), Ok(1));
        assert_eq!(checked(0xfe, 0, &[]), Ok(0));
    }
}
