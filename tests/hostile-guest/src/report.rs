//! Progress on the console.

use crate::boot::Boot;
use crate::machine::{RINGS, store_bytes};
use crate::virtio::{CONSOLE, Device, FEATURES, KINDS, Ring};
use core::fmt::{self, Write};

/// Writes a line of progress.
macro_rules! say {
    ($report:expr, $($what:tt)*) => { $report.line(format_args!($($what)*)) };
}
pub(crate) use say;

/// Tells of something that should not be possible.
macro_rules! wrong {
    ($report:expr, $($what:tt)*) => { $report.wrong(format_args!("WRONG: {}", format_args!($($what)*))) };
}
pub(crate) use wrong;

/// Memory of the queue for reports, and of the lines behind it.
const MEMORY: u64 = RINGS - 0x10_0000;
/// Length of a line, at most.
const LINE: usize = 200;
const TRANSMIT: u16 = 1;

/// The way to the console.
pub struct Report {
    console: Option<Device>,
    ring: Option<Ring>,
    /// How often something was not as it should be.
    pub wrong: u32,
    /// The kinds of devices that were attacked: a bit for each of [`KINDS`].
    attacked: u32,
    /// The first of that, repeated at the end: what is said early may not be kept.
    kept: [Option<Line>; 8],
}

impl Report {
    /// One for the machine's console.
    pub fn new(boot: &Boot) -> Self {
        Self {
            console: boot.device(CONSOLE),
            ring: None,
            wrong: 0,
            attacked: 0,
            kept: [const { None }; 8],
        }
    }

    /// Remembers that a device of this kind is attacked, for the end.
    pub fn attacks(&mut self, device: Device) {
        if let Some(number) = KINDS.iter().position(|(kind, _)| *kind == device.kind) {
            self.attacked |= 1 << number;
        }
    }

    /// Forgets the queue, since the console is about to be attacked. The next line makes it anew.
    pub fn give_up_console(&mut self) {
        self.ring = None;
    }

    /// Writes a line.
    pub fn line(&mut self, arguments: fmt::Arguments<'_>) {
        self.write(&Line::of(arguments));
    }

    /// Writes a line about something that should not be possible.
    pub fn wrong(&mut self, arguments: fmt::Arguments<'_>) {
        let line = Line::of(arguments);
        self.write(&line);
        if let Some(place) = self.kept.get_mut(self.wrong as usize) {
            *place = Some(line);
        }
        self.wrong += 1;
    }

    /// Writes the last lines.
    pub fn end(&mut self, word: &str) {
        // What flooded the console has been read by then, and is told as lost.
        crate::machine::wait(2_000_000_000);
        for line in core::mem::replace(&mut self.kept, [const { None }; 8])
            .iter()
            .flatten()
        {
            self.write(line);
        }
        for (number, (_, name)) in KINDS.iter().enumerate() {
            if self.attacked & 1 << number != 0 {
                say!(self, "{word}: attacked: {name}");
            }
        }
        let wrong = self.wrong;
        say!(self, "{word}: all was tried, {wrong} wrong");
    }

    fn write(&mut self, line: &Line) {
        let Some(console) = self.console else { return };
        if self.ring.is_none() {
            console.negotiate(FEATURES);
            let ring = Ring::new(MEMORY, 16);
            console.set_queue(TRANSMIT, &ring);
            console.start();
            self.ring = Some(ring);
        }
        let Some(ring) = &mut self.ring else { return };
        let text = MEMORY + 0x1_0000;
        store_bytes(text, &line.bytes[..line.length + 1]);
        ring.put(0, text, line.length as u32 + 1, 0, 0);
        ring.offer(0);
        console.notify(TRANSMIT.into());
        ring.wait_used(1);
    }
}

struct Line {
    bytes: [u8; LINE],
    length: usize,
}

impl Line {
    /// One with its end.
    fn of(arguments: fmt::Arguments<'_>) -> Self {
        let mut line = Self {
            bytes: [0; LINE],
            length: 0,
        };
        let _ = line.write_fmt(format_args!("hostile: {arguments}"));
        line.bytes[line.length] = b'\n';
        line
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.length + 1 >= LINE {
                return Ok(());
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}
