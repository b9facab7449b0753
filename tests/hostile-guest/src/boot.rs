//! What the machine tells its guest: the command line with the devices, the memory map.

use crate::machine::{load, text};
use crate::virtio::Device;

/// Most devices that are looked at.
const MAX_DEVICES: usize = 20;

/// Where devices begin, and memory ends until 4 GiB: 3 GiB.
pub const GAP: u64 = 0xc000_0000;

/// What was found.
pub struct Boot {
    line: &'static str,
    devices: [Device; MAX_DEVICES],
    count: usize,
    /// Where memory below 3 GiB ends.
    pub ram_end: u64,
    /// Where all memory ends.
    pub end: u64,
}

impl Boot {
    /// Reads PVH's start info at an address.
    pub fn read(start_info: u64) -> Self {
        let line = text(load::<u64>(start_info + 24), 4096);
        let map = load::<u64>(start_info + 40);
        let ends = (0..u64::from(load::<u32>(start_info + 48)))
            .map(|entry| map + entry * 24)
            .map(|entry| load::<u64>(entry).saturating_add(load::<u64>(entry + 8)));
        let ram_end = ends.clone().filter(|end| *end <= GAP).max().unwrap_or(0);
        let end = ends.max().unwrap_or(0);
        let mut boot = Self {
            line,
            devices: [Device::default(); MAX_DEVICES],
            count: 0,
            ram_end,
            end,
        };
        for word in line.split(' ') {
            // virtio_mmio.device=4K@0xc0000000:5
            let Some(place) = word.strip_prefix("virtio_mmio.device=4K@0x") else {
                continue;
            };
            let Some(base) = place
                .split(':')
                .next()
                .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            else {
                continue;
            };
            if boot.count < MAX_DEVICES {
                boot.devices[boot.count] = Device::at(base, boot.count);
                boot.count += 1;
            }
        }
        boot
    }

    /// All devices.
    pub fn devices(&self) -> &[Device] {
        &self.devices[..self.count]
    }

    /// The first device of every kind.
    pub fn kinds(&self) -> impl Iterator<Item = Device> + '_ {
        let first = |device: &Device| {
            self.device(device.kind)
                .is_some_and(|first| first.slot == device.slot)
        };
        self.devices().iter().copied().filter(move |device| first(device))
    }

    /// The first device of a kind.
    pub fn device(&self, kind: u32) -> Option<Device> {
        self.devices().iter().find(|device| device.kind == kind).copied()
    }

    /// What is to be done.
    pub fn word(&self) -> &'static str {
        self.line
            .split(' ')
            .find_map(|word| word.strip_prefix("hostile="))
            .unwrap_or("nothing")
    }
}
