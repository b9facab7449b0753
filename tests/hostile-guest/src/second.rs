//! A second processor. It changes memory while the first one has devices read it.

use crate::machine::{LOCAL_APIC, TABLES, load, store, wait};

/// Where it starts, in real mode: the page that the interrupt names.
const START: u64 = 0x9_0000;
const VECTOR: u32 = (START >> 12) as u32;
/// Commands of the local APIC, to all processors but this one.
const INIT: u32 = 0xc_4500;
const START_UP: u32 = 0xc_4600;

/// Holds the address of the function that it goes on with.
pub const WORK: u32 = TABLES + 0xe000;
/// End of its stack.
#[cfg(panic = "abort")]
pub const STACK: u32 = TABLES + 0x8_0000;

/// What it is to do: the number of places, how often it has gone through them, the places.
const COUNT: u64 = TABLES as u64 + 0x1_0000;
const ROUNDS: u64 = COUNT + 8;
const PLACES: u64 = COUNT + 64;
/// Bytes of a place: its address, how many bytes of it change, four values.
const PLACE: u64 = 64;
/// Most places.
const MOST: u32 = 1024;

/// How long it may take to do anything: it may have to share the first one's processor.
const PATIENCE: u64 = 60_000_000_000;

/// The first processor's view of it.
pub struct Second {
    places: u32,
    began: u64,
}

impl Second {
    /// Starts it. `None` if it does not come.
    pub fn start() -> Option<Self> {
        store(COUNT, 0u32);
        store(ROUNDS, 0u64);
        let work: extern "C" fn() -> ! = change_for_ever;
        store(u64::from(WORK), work as usize as u64);
        // The descriptor tables' register, where real mode reaches it.
        store(START + 0xff0, load::<[u8; 6]>(u64::from(TABLES) + 0x8ff0));
        put_start(START);
        store(LOCAL_APIC + 0x310, 0u32);
        for command in [INIT, START_UP | VECTOR, START_UP | VECTOR] {
            store(LOCAL_APIC + 0x300, command);
            wait(50_000_000);
        }
        let second = Self { places: 0, began: 0 };
        second.wait_rounds(1).then_some(second)
    }

    /// One more place: `width` bytes at `at`, which are to have these values by chance.
    pub fn add(&mut self, at: u64, width: u64, values: [u64; 4]) {
        if self.places < MOST {
            let place = PLACES + u64::from(self.places) * PLACE;
            store(place, at);
            store(place + 8, width);
            store(place + 16, values);
            self.places += 1;
        }
    }

    /// Has it change the places that were added, until it rests.
    pub fn go(&mut self) {
        self.began = load(ROUNDS);
        store(COUNT, self.places);
    }

    /// Has it change nothing any more, and forgets the places. How often it has changed them all.
    pub fn rest(&mut self) -> u64 {
        let changed = load::<u64>(ROUNDS).wrapping_sub(self.began);
        let worked = load::<u32>(COUNT) > 0;
        store(COUNT, 0u32);
        self.places = 0;
        // What it goes through now may be the places still; what it begins then is not.
        self.wait_rounds(2);
        if worked { changed } else { 0 }
    }

    fn wait_rounds(&self, count: u64) -> bool {
        let (start, before) = (crate::machine::cycles(), load::<u64>(ROUNDS));
        while load::<u64>(ROUNDS).wrapping_sub(before) < count {
            if crate::machine::cycles().wrapping_sub(start) > PATIENCE {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    }
}

/// What it does.
extern "C" fn change_for_ever() -> ! {
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    loop {
        for place in 0..u64::from(load::<u32>(COUNT)) {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let place = PLACES + place * PLACE;
            let at = load::<u64>(place);
            let value = load::<u64>(place + 16 + (noise >> 40 & 3) * 8);
            match load::<u64>(place + 8) {
                1 => store(at, value as u8),
                2 => store(at, value as u16),
                4 => store(at, value as u32),
                _ => store(at, value),
            }
        }
        store(ROUNDS, load::<u64>(ROUNDS).wrapping_add(1));
        core::hint::spin_loop();
    }
}

#[cfg(panic = "abort")]
use crate::entry::put_start;

/// Where this is no kernel, there is no code for it.
#[cfg(not(panic = "abort"))]
fn put_start(_: u64) {}
