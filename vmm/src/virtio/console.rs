//! The console device: the guest kernel's log and whatever else is written to hvc0. Output only.

use super::buffers::retry;
use super::device::{ActivateError, Activation, ActiveQueue, Device, Interrupt};
use super::registers::RestoreError;
use super::requests;
use crate::lockdown::seccomp;
use crate::memory::Memory;
use crate::warning;
use crate::worker::{Handler, Poll, READABLE, Thread, WRITABLE, Worker, WorkerError};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

/// Queues: to the guest, which is never used and for which Linux fills every place with a page, and from the guest.
const QUEUE_SIZES: [u16; 2] = [2, 64];
const TRANSMIT: usize = 1;

const NOTIFY: u32 = 0;
const OUTPUT: u32 = 1;

/// Most bytes taken from one chain; the rest counts as lost.
const MAX_PER_CHAIN: usize = 1 << 20;

/// Bytes written at once. A pipe takes this (`PIPE_BUF`) as a whole or not at all.
const CHUNK: usize = 4096;

/// How Linux starts its last words.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// What is kept of the device across a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Bytes lost since that was last written to the output.
    pub lost: u64,
    /// Whether the output stands at the start of a line.
    pub line_start: bool,
    /// How many bytes of the panic's message were the last ones seen.
    pub panic_seen: u8,
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    state: Arc<Mutex<State>>,
    /// When no worker has it.
    output: Option<Output>,
    thread: Thread,
    worker: Option<Worker<ConsoleWorker>>,
}

impl Console {
    /// A console that writes to `output`, non-blocking: what that does not take is dropped, counted, and told there
    /// when it takes more. `panicked` is set when the guest's kernel says that it panics.
    ///
    /// # Errors
    /// When it cannot have a thread.
    pub fn new(output: OwnedFd, panicked: Arc<AtomicBool>) -> io::Result<Self> {
        let state = State {
            line_start: true,
            ..State::default()
        };
        Ok(Self::restore(state, output, panicked)?)
    }

    /// What a copy of the device has to know.
    pub fn save(&self) -> State {
        lock(&self.state).clone()
    }

    /// A copy of a saved device; see [`new`](Self::new).
    ///
    /// # Errors
    /// As there, and when the state is none that a device can have.
    pub fn restore(state: State, output: OwnedFd, panicked: Arc<AtomicBool>) -> Result<Self, RestoreError> {
        // Having seen all of it the device starts anew.
        if usize::from(state.panic_seen) >= PANIC.len() {
            return Err(RestoreError::Device {
                device: "console",
                what: format!("{} bytes of a panic's message", state.panic_seen),
            });
        }
        let state = Arc::new(Mutex::new(state));
        Ok(Self {
            state: state.clone(),
            output: Some(Output {
                fd: output,
                panicked,
                state,
                gone: false,
            }),
            thread: Thread::new("console", seccomp::Device::Console)?,
            worker: None,
        })
    }
}

impl Device for Console {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// `struct virtio_console_config`, of which nothing holds without the features that are not offered.
    fn config(&self) -> &[u8] {
        &[0; 12]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.worker.is_some() {
            return Err(ActivateError::Active);
        }
        let mut transmit = activation
            .queues
            .into_iter()
            .nth(TRANSMIT)
            .filter(|queue| queue.queue.ready())
            .ok_or(ActivateError::QueueMissing(TRANSMIT))?;
        transmit
            .queue
            .set_event_idx(activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let worker = ConsoleWorker {
            memory: activation.memory,
            transmit,
            interrupt: activation.interrupt,
            output: self.output.take().ok_or(ActivateError::HostEnd)?,
            waiting: false,
        };
        let worker = self.thread.serve(|| Ok(worker)).map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.output = worker.stop().map(|worker| worker.output);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Every change of the state is a whole one.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the guest's bytes go.
#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    panicked: Arc<AtomicBool>,
    state: Arc<Mutex<State>>,
    /// Nobody reads any more.
    gone: bool,
}

impl Output {
    /// The guest wrote `bytes`.
    fn take(&mut self, bytes: &[u8]) {
        self.tell_of_loss();
        let state = self.state.clone();
        let mut state = lock(&state);
        for byte in bytes {
            state.panic_seen = after(state.panic_seen, *byte);
            if usize::from(state.panic_seen) == PANIC.len() {
                state.panic_seen = 0;
                self.panicked.store(true, Ordering::Release);
            }
        }
        // What follows a loss must not get through before the loss is told.
        let written = if state.lost > 0 { 0 } else { self.write(bytes) };
        let (written, lost) = bytes.split_at_checked(written).unwrap_or((bytes, &[]));
        if let Some(last) = written.last() {
            state.line_start = *last == b'\n';
        }
        state.lost = state.lost.saturating_add(lost.len() as u64);
    }

    /// Adds to the loss what never was seen here.
    fn lose(&mut self, count: usize) {
        let mut state = lock(&self.state);
        state.lost = state.lost.saturating_add(count as u64);
    }

    /// Whether something was lost and the output's reader has yet to be told.
    fn owes_word_of_loss(&self) -> bool {
        !self.gone && lock(&self.state).lost > 0
    }

    fn tell_of_loss(&mut self) {
        let state = self.state.clone();
        let mut state = lock(&state);
        if state.lost == 0 {
            return;
        }
        let line_break = if state.line_start { "" } else { "\n" };
        let line = format!("{line_break}[husk: {} bytes of console lost]\n", state.lost);
        // So short a line goes into a pipe as a whole or not at all.
        if self.write(line.as_bytes()) > 0 {
            state.lost = 0;
            state.line_start = true;
        }
    }

    /// How many of the bytes the output took.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0usize;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty() && !self.gone) {
            // SAFETY: the pointer and the length are those of `rest`.
            match retry(|| unsafe { libc::write(self.fd.as_raw_fd(), rest.as_ptr().cast(), rest.len()) }) {
                Ok(0) => break,
                Ok(count) => written = written.saturating_add(count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    warning!("console: the output is lost: {e}");
                    self.gone = true;
                }
            }
        }
        written
    }
}

/// How much of [`PANIC`] the bytes up to `byte` end in, if they ended in `seen` of it before. Its first letter does
/// not come a second time, so that a mismatch starts anew.
fn after(seen: u8, byte: u8) -> u8 {
    if PANIC.get(usize::from(seen)) == Some(&byte) {
        return seen.saturating_add(1);
    }
    u8::from(PANIC.first() == Some(&byte))
}

/// What runs on the thread.
#[derive(Debug)]
struct ConsoleWorker {
    memory: Memory,
    transmit: ActiveQueue,
    interrupt: Interrupt,
    output: Output,
    /// Whether room in the output is waited for.
    waiting: bool,
}

impl Handler for ConsoleWorker {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        // SAFETY: the worker owns the descriptor, and its thread ends before it is dropped.
        let notify = unsafe { BorrowedFd::borrow_raw(self.transmit.notify.as_raw_fd()) };
        poll.add(notify, NOTIFY, READABLE)?;
        // What is there already, as after a restore, gets no notification.
        self.transmit.notify.write(1)
    }

    fn handle(&mut self, token: u32, _events: u32, poll: &Poll) -> Result<(), WorkerError> {
        if token == OUTPUT {
            self.output.tell_of_loss();
        } else {
            let output = &mut self.output;
            requests::serve(
                "console",
                &mut self.transmit,
                &self.memory,
                &self.interrupt,
                |mut bytes, _| {
                    let left_out = bytes.len().saturating_sub(MAX_PER_CHAIN);
                    bytes.truncate(MAX_PER_CHAIN);
                    let mut chunk = [0u8; CHUNK];
                    loop {
                        let count = bytes.read(&mut chunk);
                        match chunk.get(..count) {
                            Some(bytes) if !bytes.is_empty() => output.take(bytes),
                            _ => break,
                        }
                    }
                    output.lose(left_out);
                    0
                },
            )?;
        }
        self.wait_for_room(poll);
        Ok(())
    }
}

impl ConsoleWorker {
    /// Waits for room in the output as long as its reader has to be told of a loss.
    fn wait_for_room(&mut self, poll: &Poll) {
        let wanted = self.output.owes_word_of_loss();
        if wanted == self.waiting {
            return;
        }
        let output = self.output.fd.as_fd();
        let change = if wanted {
            poll.add(output, OUTPUT, WRITABLE)
        } else {
            poll.remove(output)
        };
        match change {
            Ok(()) => self.waiting = wanted,
            // Then the loss is told before the next bytes that get through.
            Err(e) => warning!("console: the output cannot be waited for: {e}"),
        }
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod console_test;
