//! Real taps, in a network namespace of the test's own. They need root; where that is not to be had, these tests
//! say so.

use super::machine::*;
use crate::virtio::device::{Activation, Device};
use crate::virtio::guest_queue::{GuestQueue, interrupt, memory};
use crate::virtio::net::Net;
use crate::virtio::net::features::bits;
use crate::virtio::net::header::{LEN, MAX_FRAME};
use husk_vmm_protocol::config::NicConfig;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::Bytes;
use vm_memory::GuestAddress;

/// A kind of Ethernet frame that nobody else sends.
const KIND: u16 = 0x88b5;

/// A tap that is up, and a packet socket on the network's side of it.
struct Network {
    tap: Option<OwnedFd>,
    socket: OwnedFd,
    /// For IPv4, with the header that taps have, but for the number of buffers.
    segments: OwnedFd,
    name: [libc::c_char; 16],
}

fn request(name: [libc::c_char; 16], flags: i32) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name = name;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn packet_socket(kind: u16) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the new descriptor is nobody else's.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            i32::from(kind.to_be()),
        ))?))
    }
}

impl Network {
    fn new() -> io::Result<Self> {
        let mut name = [0; 16];
        for (to, from) in name.iter_mut().zip(b"hut0") {
            *to = *from as libc::c_char;
        }
        // SAFETY: plain numbers, and pointers to what lives through the calls; the new descriptors are nobody else's.
        unsafe {
            // This thread's alone.
            check(libc::unshare(libc::CLONE_NEWNET))?;
            let tap = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")?;
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let mut attach = request(name, flags);
            check(libc::ioctl(
                tap.as_raw_fd(),
                libc::TUNSETIFF as _,
                &raw mut attach,
            ))?;
            let length = LEN as i32;
            check(libc::ioctl(
                tap.as_raw_fd(),
                libc::TUNSETVNETHDRSZ as _,
                &raw const length,
            ))?;
            let network = Self {
                tap: Some(tap.into()),
                socket: packet_socket(KIND)?,
                segments: packet_socket(libc::ETH_P_IP as u16)?,
                name,
            };
            let on = 1i32;
            check(libc::setsockopt(
                network.segments.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            ))?;
            network.set_up(true)?;
            let mut index = request(name, 0);
            check(libc::ioctl(
                network.socket.as_raw_fd(),
                libc::SIOCGIFINDEX as _,
                &raw mut index,
            ))?;
            for (socket, kind) in [
                (&network.socket, KIND),
                (&network.segments, libc::ETH_P_IP as u16),
            ] {
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = kind.to_be();
                address.sll_ifindex = index.ifr_ifru.ifru_ifindex;
                check(libc::bind(
                    socket.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of_val(&address) as u32,
                ))?;
            }
            Ok(network)
        }
    }

    fn set_up(&self, up: bool) -> io::Result<()> {
        let mut flags = request(self.name, if up { libc::IFF_UP } else { 0 });
        // SAFETY: `flags` lives through the call.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut flags) })?;
        Ok(())
    }

    fn send(&self, frame: &[u8]) -> bool {
        send(&self.socket, frame)
    }

    /// The next frame that comes, waited for a while.
    fn receive(&self) -> Option<Vec<u8>> {
        receive(&self.socket)
    }
}

fn send(socket: &OwnedFd, frame: &[u8]) -> bool {
    // SAFETY: pointer and length belong together.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    sent == frame.len() as isize
}

fn receive(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut buffer = vec![0; 0x2_0000];
    // SAFETY: one entry; pointer and length belong together.
    let length = unsafe {
        libc::poll(&raw mut poll, 1, 2000);
        libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
    };
    buffer.truncate(usize::try_from(length).ok()?);
    Some(buffer)
}

/// Size of a segment.
const SEGMENT: usize = 1448;

/// Where the data of [`segmented`] starts, behind our header and those of Ethernet, IPv4 and TCP.
const SEGMENT_DATA: usize = LEN + 14 + 20 + 20;

/// A TCP packet of `length` bytes of data over IPv4, to be cut into segments.
fn segmented(length: usize) -> Vec<u8> {
    let total = (40 + length) as u16;
    let mut packet = vec![1, 1, 54, 0];
    packet.extend((SEGMENT as u16).to_le_bytes());
    packet.extend([34, 0, 16, 0, 0, 0]);
    packet.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 9, 1, 10, 9, 9, 2]);
    let sum = !checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(&ip);
    let mut tcp = [0; 20];
    tcp[..4].copy_from_slice(&[0x13, 0x88, 0x13, 0x89]);
    tcp[12..16].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
    // That of the addresses, the protocol and the length; the rest is for who cuts it.
    let pseudo = [&ip[12..20], &[0, 6], &(20 + length as u16).to_be_bytes()].concat();
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    packet.extend(tcp);
    packet.extend((0..length).map(|at| (at / 7) as u8));
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Whether the TCP checksum of a segment, behind our header, is right.
fn has_right_checksum(frame: &[u8]) -> bool {
    let ip = &frame[LEN + 14..];
    let length = u16::from_be_bytes([ip[2], ip[3]]) - 20;
    let pseudo = [
        &ip[12..20],
        &[0, 6],
        &length.to_be_bytes(),
        &ip[20..20 + usize::from(length)],
    ]
    .concat();
    checksum(&pseudo) == 0xffff
}

/// Runs `test` on a thread of its own, which has a network.
fn with_network(name: &str, test: impl FnOnce(Network) + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| match Network::new() {
            Ok(network) => test(network),
            Err(e) => eprintln!("\n*** SKIPPED: {name} needs a tap: {e}. It has NOT been tested. ***\n"),
        });
    });
}

/// A frame with our kind, its header before it.
fn ethernet(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = frame(length + LEN, seed);
    frame[LEN..LEN + 12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9]);
    frame[LEN + 12..LEN + 14].copy_from_slice(&KIND.to_be_bytes());
    frame
}

/// The device, active, and the guest's side of it.
struct Guest {
    memory: crate::memory::Memory,
    pair: Pair,
    device: Net,
}

impl Guest {
    /// `name` is that of its thread, in part.
    fn new(name: &str, tap: OwnedFd, features: impl FnOnce(u64) -> u64) -> Self {
        let memory = memory(SIZE as usize);
        let config = NicConfig {
            mac: [2, 0, 0, 0, 0, 1],
            queue_pairs: 1,
        };
        let device = Net::new(name, &config, vec![tap]).unwrap();
        let features = features(device.features());
        let mut guest = Self {
            pair: Pair::new(&memory, 0, 256),
            device,
            memory,
        };
        guest.activate(features);
        guest
    }

    fn activate(&mut self, features: u64) {
        let activation = Activation {
            memory: self.memory.clone(),
            queues: vec![self.pair.rx.device_side(true), self.pair.tx.device_side(true)],
            interrupt: interrupt().0,
            features,
        };
        self.device.activate(activation).unwrap();
    }

    fn send(&mut self, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(TX_DATA)).unwrap();
        self.pair.tx.add(&[bytes(TX_DATA, frame.len() as u32)]);
        self.pair.tx.notify.write(1).unwrap();
        let start = Instant::now();
        while self.pair.tx.pop().is_none() {
            assert!(start.elapsed() < Duration::from_secs(5), "it is not taken");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The frames of our kind that come until there are `count`.
    fn receive(&mut self, count: usize) -> Vec<Vec<u8>> {
        self.receive_kind(KIND, count)
    }

    fn receive_kind(&mut self, kind: u16, count: usize) -> Vec<Vec<u8>> {
        let start = Instant::now();
        let mut frames = vec![];
        while frames.len() < count {
            assert!(start.elapsed() < Duration::from_secs(10), "{} came", frames.len());
            std::thread::sleep(Duration::from_millis(1));
            let new = self.pair.receive(&self.memory);
            let buffers = new.iter().map(|(buffers, _)| usize::from(*buffers)).sum();
            self.pair.post_many(buffers);
            // The kernel has something to say on a new link, too.
            frames.extend(
                new.into_iter()
                    .map(|(_, frame)| frame)
                    .filter(|frame| frame.get(LEN + 12..LEN + 14) == Some(&kind.to_be_bytes())),
            );
        }
        frames
    }
}

#[test]
fn frames_move_between_a_tap_and_the_guest() {
    with_network("frames_move_between_a_tap_and_the_guest", |mut network| {
        assert!(crate::fds::is_set_up_tap(network.tap.as_ref().unwrap()));
        let mut guest = Guest::new("plain", network.tap.take().unwrap(), |all| all);
        guest.pair.post_many(64);
        let sent = ethernet(1000, 1);
        assert!(network.send(body(&sent)));
        let frames = guest.receive(1);
        assert_eq!(body(&frames[0]), body(&sent));
        guest.send(&ethernet(1500, 2));
        assert_eq!(network.receive().unwrap(), body(&ethernet(1500, 2)));
        // What the kernel refuses is dropped, and what comes after it is not.
        guest.send(&ethernet(14, 2)[..LEN + 13]);
        guest.send(&frame(LEN, 2));
        let mut odd = ethernet(100, 3);
        odd[..8].copy_from_slice(&[1, 1, 255, 255, 255, 255, 255, 255]);
        guest.send(&odd);
        guest.send(&ethernet(MAX_FRAME, 3));
        guest.send(&ethernet(100, 4));
        assert_eq!(network.receive().unwrap(), body(&ethernet(100, 4)));
    });
}

#[test]
fn a_tap_that_is_down_loses_frames_and_comes_back() {
    with_network("a_tap_that_is_down_loses_frames_and_comes_back", |mut network| {
        let mut guest = Guest::new("down", network.tap.take().unwrap(), |all| all);
        guest.pair.post_many(64);
        network.set_up(false).unwrap();
        guest.send(&ethernet(100, 1));
        network.set_up(true).unwrap();
        // That the link was down.
        let _ = network.receive();
        guest.send(&ethernet(100, 2));
        assert_eq!(network.receive().unwrap(), body(&ethernet(100, 2)));
        assert!(network.send(body(&ethernet(200, 3))));
        assert_eq!(body(&guest.receive(1)[0]), body(&ethernet(200, 3)));
    });
}

#[test]
fn a_tap_that_is_deleted_keeps_nobody_busy() {
    with_network("a_tap_that_is_deleted_keeps_nobody_busy", |mut network| {
        let mut guest = Guest::new("gone", network.tap.take().unwrap(), |all| all);
        guest.pair.post_many(64);
        let deleted = std::process::Command::new("ip")
            .args(["link", "del", "hut0"])
            .status();
        if !deleted.is_ok_and(|status| status.success()) {
            eprintln!("\n*** SKIPPED: ip(8) is needed to delete a tap. ***\n");
            return;
        }
        guest.send(&ethernet(100, 1));
        let before = cpu_time("gone.0");
        assert!(before > Duration::ZERO);
        std::thread::sleep(Duration::from_millis(300));
        assert!(cpu_time("gone.0") - before < Duration::from_millis(100));
        guest.device.reset();
    });
}

/// CPU time of the thread of this name.
fn cpu_time(thread: &str) -> Duration {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/thread-self/../").unwrap() {
        let path = task.unwrap().path();
        if let (Ok(name), Ok(stat)) = (
            std::fs::read_to_string(path.join("comm")),
            std::fs::read_to_string(path.join("schedstat")),
        ) {
            if name.trim() == thread {
                sum += stat.split(' ').next().unwrap().parse::<u64>().unwrap();
            }
        }
    }
    Duration::from_nanos(sum)
}

#[test]
fn a_flood_stays_in_the_tap() {
    with_network("a_flood_stays_in_the_tap", |mut network| {
        let mut guest = Guest::new("flood", network.tap.take().unwrap(), |all| all);
        guest.pair.post_many(4);
        for turn in 0..20_000u32 {
            let _ = network.send(body(&ethernet(1500, turn as u8)));
        }
        let before = cpu_time("flood.0");
        assert!(before > Duration::ZERO);
        std::thread::sleep(Duration::from_millis(300));
        assert!(cpu_time("flood.0") - before < Duration::from_millis(100));
        // Traffic resumes when buffers come, with what the tap has kept, and then with what is new.
        guest.pair.post_many(60);
        guest.receive(300);
        let start = Instant::now();
        while !guest.receive(1).iter().any(|frame| frame.len() == LEN + 77) {
            let _ = network.send(body(&ethernet(77, 1)));
            assert!(start.elapsed() < Duration::from_secs(10), "nothing new comes");
        }
    });
}

#[test]
fn a_driver_without_offloads_gets_whole_frames() {
    with_network("a_driver_without_offloads_gets_whole_frames", |mut network| {
        let mut guest = Guest::new("offload", network.tap.take().unwrap(), |_| 0);
        guest.pair.post_many(8);
        assert!(network.send(body(&ethernet(500, 1))));
        let frames = guest.receive(1);
        assert_eq!(frames[0][..LEN], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        guest.device.reset();
        // A second driver, which takes more.
        guest
            .memory
            .write_slice(&vec![0; 2 * GuestQueue::SPAN as usize], GuestAddress(0))
            .unwrap();
        guest.pair = Pair::new(&guest.memory, 0, 256);
        guest.activate(bits(&[VIRTIO_NET_F_GUEST_CSUM]));
        guest.pair.post_many(8);
        assert!(network.send(body(&ethernet(600, 2))));
        assert_eq!(body(&guest.receive(1)[0]), body(&ethernet(600, 2)));
    });
}

#[test]
fn large_packets_are_left_whole_or_cut_as_the_driver_has_it() {
    let data = 30_000usize;
    let packet = segmented(data);
    let cut = data.div_ceil(SEGMENT);
    for (name, features, frames, checksums) in [
        ("whole", all_features(), 1, false),
        (
            "sums",
            all_features() & !bits(&[VIRTIO_NET_F_GUEST_TSO4]),
            cut,
            false,
        ),
        ("cut", all_features() & bits(&[VIRTIO_NET_F_MRG_RXBUF]), cut, true),
    ] {
        with_network(
            "large_packets_are_left_whole_or_cut_as_the_driver_has_it",
            |mut network| {
                let mut guest = Guest::new(name, network.tap.take().unwrap(), |_| features);
                guest.pair.post_many(100);
                // Without the number of buffers.
                assert!(send(&network.segments, &[&packet[..10], body(&packet)].concat()));
                let seen = guest.receive_kind(0x800, frames);
                assert_eq!(seen.len(), frames);
                let found: Vec<u8> = seen
                    .iter()
                    .flat_map(|frame| frame[SEGMENT_DATA..].to_vec())
                    .collect();
                assert!(
                    found == packet[SEGMENT_DATA..],
                    "{name}: the data are those that were sent"
                );
                assert_eq!(seen[0][1], u8::from(frames == 1), "{name}: kind of segmentation");
                assert_eq!(
                    seen[0][0] & 1,
                    u8::from(!checksums),
                    "{name}: a checksum to be made"
                );
                if checksums {
                    assert!(seen.iter().all(|frame| has_right_checksum(frame)));
                }
                // The other way round the host's kernel takes it whole.
                if features == all_features() {
                    guest.send(&packet);
                    let seen = receive(&network.segments).unwrap();
                    assert_eq!(seen[..8], packet[..8]);
                    assert!(seen[10..] == *body(&packet));
                }
            },
        );
    }
}
