//! Device threads, waiting in epoll for queue notifications and host descriptors. All are made before the guest runs: a
//! machine that is locked in makes none.

use crate::error;
use crate::lockdown::seccomp::{self, Device, Role};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Token of the worker's own stop descriptor; handlers may use all others.
const STOP: u32 = u32::MAX;

/// Most events taken from epoll at once.
const BATCH: usize = 16;

/// Readable: what most handlers wait for.
pub const READABLE: u32 = libc::EPOLLIN as u32;
/// Writable.
pub const WRITABLE: u32 = libc::EPOLLOUT as u32;

/// Why a device's worker ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A system call on one of the worker's descriptors failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The guest broke one of its queues beyond use.
    #[error("the guest's queue is broken")]
    Queue(#[from] virtio_queue::Error),
    /// The guest's memory could not be reached where a queue says that it is.
    #[error("the guest's memory is out of reach")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The other side of the device (its host end, or the guest's driver) broke the rules beyond use.
    #[error("broken rule: {0}")]
    Protocol(&'static str),
}

impl WorkerError {
    /// For `map_err`: a failed system call, with what was being done.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// What runs on a device's thread.
pub trait Handler: Send + 'static {
    /// Adds the descriptors to wait for. Called once, before any event is handled.
    ///
    /// # Errors
    /// When a descriptor cannot be waited for; the worker is then not started.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;

    /// Handles the event of one descriptor. `events` are EPOLL bits.
    ///
    /// # Errors
    /// Ends the worker: it is logged, and the device stays still until the guest resets it.
    fn handle(&mut self, token: u32, events: u32, poll: &Poll) -> Result<(), WorkerError>;
}

/// The set of descriptors that a worker waits for.
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    /// An empty set.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved; the result is checked before use.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and belongs to nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { epoll })
    }

    /// Waits for `events` (EPOLL bits) of `fd` from now on, named `token` (any but `u32::MAX`).
    ///
    /// # Errors
    /// When `fd` is there already, or cannot be waited for.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u32, events: u32) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, events)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// When `fd` is not in the set.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u32, events: u32) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, events)
    }

    /// Waits for `fd` no longer. To be called before the descriptor is closed.
    ///
    /// # Errors
    /// When `fd` is not in the set.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, 0)
    }

    fn control(&self, op: i32, fd: BorrowedFd<'_>, token: u32, events: u32) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events,
            u64: u64::from(token),
        };
        // SAFETY: both descriptors are open while borrowed, and `event` lives through the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), op, fd.as_raw_fd(), &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for up to `timeout` ms (-1: for ever) until something is ready and returns (token, events) of it, at most
    /// [`BATCH`] at a time. Descriptors that were removed while an earlier event of the same batch was handled may still
    /// be named.
    fn wait(&self, timeout: libc::c_int) -> io::Result<impl Iterator<Item = (u32, u32)> + use<>> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let count = loop {
            // SAFETY: `events` has room for the BATCH entries that the kernel may write.
            let n = unsafe {
                libc::epoll_wait(
                    self.epoll.as_raw_fd(),
                    events.as_mut_ptr(),
                    BATCH as libc::c_int,
                    timeout,
                )
            };
            match usize::try_from(n) {
                Ok(n) => break n,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        };
        Ok(events.into_iter().take(count).map(|e| (e.u64 as u32, e.events)))
    }
}

impl AsRawFd for Poll {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// What a thread does until it is stopped.
type Job = Box<dyn FnOnce() + Send>;

/// A device's thread. It runs one handler after the other, and waits in between.
#[derive(Debug)]
pub struct Thread {
    name: String,
    jobs: Option<Sender<Job>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts a thread called `name` (at most 15 bytes), which makes no system calls but those of `device`.
    ///
    /// # Errors
    /// When no thread or descriptor is to be had, or the thread cannot be limited.
    pub fn new(name: &str, device: Device) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        #[cfg(feature = "fuzzing")]
        if inline::is_on() {
            return Ok(Self {
                name: name.to_owned(),
                jobs: None,
                stop,
                thread: None,
            });
        }
        let (jobs, to_do) = channel::<Job>();
        let (tell, told) = channel();
        let own_name = name.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            #[cfg(test)]
            crate::lockdown::watch_violations().unwrap();
            let limited = seccomp::limit(&own_name, &Role::Device(device));
            let is_limited = limited.is_ok();
            // Whoever starts the thread waits for this.
            let _ = tell.send(limited);
            if is_limited {
                to_do.into_iter().for_each(|job| job());
            }
        })?;
        told.recv()
            .map_err(|_| io::Error::other("the thread is gone"))?
            .map_err(io::Error::other)?;
        Ok(Self {
            name: name.to_owned(),
            jobs: Some(jobs),
            stop,
            thread: Some(thread),
        })
    }

    /// Has the thread make a handler and run it. When this returns, the handler is registered. The one before must
    /// have been stopped.
    ///
    /// # Errors
    /// When the handler cannot be made or cannot register, or an earlier one took the thread down with it.
    pub fn serve<H: Handler>(
        &self,
        make: impl FnOnce() -> io::Result<H> + Send + 'static,
    ) -> io::Result<Worker<H>> {
        #[cfg(feature = "fuzzing")]
        if inline::is_on() {
            return inline::serve(self, make);
        }
        let (tell, told) = channel();
        let (give, given) = channel();
        let (name, stop) = (self.name.clone(), Arc::clone(&self.stop));
        let job = move || {
            let (mut handler, poll) = match ready(make, &stop) {
                Ok(ready) => ready,
                Err(e) => return drop(tell.send(Err(e))),
            };
            // Whoever asked waits for this.
            let _ = tell.send(Ok(()));
            if let Err(e) = run(&mut handler, &poll) {
                error!("{name} has stopped: {}", crate::log::chain(&e));
            }
            let _ = give.send(handler);
        };
        let gone = || io::Error::other("the device's thread is gone");
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(Box::new(job)).map_err(|_| gone())?;
        told.recv().map_err(|_| gone())??;
        Ok(Worker {
            stop: Some(Arc::clone(&self.stop)),
            given,
        })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.jobs = None;
        // For a handler that still runs.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// A handler and what it waits in.
fn ready<H: Handler>(make: impl FnOnce() -> io::Result<H>, stop: &EventFd) -> io::Result<(H, Poll)> {
    // The end of the handler before may still be told.
    let _ = stop.read();
    let mut handler = make()?;
    let poll = Poll::new()?;
    // SAFETY: the thread that waits for it has a share of it.
    let stop = unsafe { BorrowedFd::borrow_raw(stop.as_raw_fd()) };
    poll.add(stop, STOP, READABLE)?;
    handler.register(&poll)?;
    Ok((handler, poll))
}

/// A handler that runs on its thread. Dropping it stops it too.
#[derive(Debug)]
pub struct Worker<H> {
    /// `None` once it is told.
    stop: Option<Arc<EventFd>>,
    given: Receiver<H>,
}

impl<H> Worker<H> {
    /// Stops the handler, waits for its end and gives it back: between two events, never within one. `None` if it
    /// panicked.
    pub fn stop(mut self) -> Option<H> {
        self.end()
    }

    fn end(&mut self) -> Option<H> {
        // It is written once for each handler, so its counter cannot be full.
        let _ = self.stop.take()?.write(1);
        #[cfg(feature = "fuzzing")]
        inline::run(usize::MAX);
        self.given.recv().ok()
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        self.end();
    }
}

fn run<H: Handler>(handler: &mut H, poll: &Poll) -> Result<(), WorkerError> {
    loop {
        for (token, events) in poll.wait(-1).map_err(WorkerError::io("waiting for events"))? {
            if token == STOP {
                return Ok(());
            }
            handler.handle(token, events, poll)?;
        }
    }
}

/// Handlers that run on the thread that asks for it, one event after the other: what a fuzzer does is then the same
/// each time.
#[cfg(feature = "fuzzing")]
pub mod inline {
    use super::{Handler, STOP, Thread, Worker, ready};
    use std::cell::{Cell, RefCell};
    use std::io;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    /// What became of a handler when it had its turn.
    #[derive(PartialEq, Eq)]
    enum Turn {
        /// It had nothing to do.
        Idle,
        /// It did something.
        Busy,
        /// It has ended and was given back.
        Over,
    }

    type Running = Box<dyn FnMut() -> Turn>;

    thread_local! {
        static ON: Cell<bool> = const { Cell::new(false) };
        static RUNNING: RefCell<Vec<Running>> = const { RefCell::new(Vec::new()) };
    }

    /// From now on the device threads that this thread makes are none: their handlers run in [`run`].
    pub fn enter() {
        ON.set(true);
    }

    /// Whether this thread has [`enter`]ed.
    pub fn is_on() -> bool {
        ON.get()
    }

    pub(super) fn serve<H: Handler>(
        thread: &Thread,
        make: impl FnOnce() -> io::Result<H>,
    ) -> io::Result<Worker<H>> {
        let (handler, poll) = ready(make, &thread.stop)?;
        let mut handler = Some(handler);
        let (give, given) = channel();
        let turn = move || {
            let Some(running) = &mut handler else {
                return Turn::Over;
            };
            let Ok(events) = poll.wait(0) else {
                return Turn::Idle;
            };
            let mut turn = Turn::Idle;
            for (token, events) in events {
                turn = Turn::Busy;
                if token == STOP || running.handle(token, events, &poll).is_err() {
                    turn = Turn::Over;
                    break;
                }
            }
            if turn == Turn::Over {
                // The worker may be gone.
                let _ = handler.take().map(|handler| give.send(handler));
            }
            turn
        };
        RUNNING.with_borrow_mut(|running| running.push(Box::new(turn)));
        Ok(Worker {
            stop: Some(Arc::clone(&thread.stop)),
            given,
        })
    }

    /// Gives each handler its turn until none has anything to do, but at most `rounds` times. Whether all are idle.
    pub fn run(rounds: usize) -> bool {
        for _ in 0..rounds {
            let mut running = RUNNING.take();
            let mut busy = false;
            running.retain_mut(|turn| {
                let turn = turn();
                busy |= turn != Turn::Idle;
                turn != Turn::Over
            });
            // None is started by another.
            RUNNING.set(running);
            if !busy {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[derive(Debug)]
    struct Counter {
        socket: std::os::unix::net::UnixStream,
        seen: Vec<u8>,
        tell: Sender<u8>,
    }

    impl Handler for Counter {
        fn register(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(self.socket.as_fd(), 7, READABLE)
        }

        fn handle(&mut self, token: u32, events: u32, _poll: &Poll) -> Result<(), WorkerError> {
            use std::io::Read;
            assert_eq!(token, 7);
            assert_ne!(events & READABLE, 0);
            let mut byte = [0];
            if self.socket.read(&mut byte).unwrap() == 0 {
                return Err(WorkerError::Protocol("the socket was closed"));
            }
            self.seen.push(byte[0]);
            self.tell.send(byte[0]).unwrap();
            Ok(())
        }
    }

    /// One, the other end of its socket, and what it tells.
    fn counter() -> (Counter, std::os::unix::net::UnixStream, Receiver<u8>) {
        let (socket, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (tell, told) = channel();
        let counter = Counter {
            socket,
            seen: vec![],
            tell,
        };
        (counter, theirs, told)
    }

    #[test]
    fn stop_gives_the_handler_back_and_it_can_go_on() {
        use std::io::Write;
        let (counter, mut theirs, told) = counter();
        let thread = Thread::new("test", Device::Vsock).unwrap();
        let worker = thread.serve(|| Ok(counter)).unwrap();
        theirs.write_all(b"a").unwrap();
        assert_eq!(told.recv().unwrap(), b'a');
        let handler = worker.stop().unwrap();
        theirs.write_all(b"b").unwrap();
        let worker = thread.serve(|| Ok(handler)).unwrap();
        assert_eq!(told.recv().unwrap(), b'b');
        assert_eq!(worker.stop().unwrap().seen, b"ab");
    }

    #[test]
    fn a_handler_that_failed_is_still_given_back() {
        use std::io::Write;
        let (counter, theirs, told) = counter();
        let thread = Thread::new("test", Device::Vsock).unwrap();
        let worker = thread.serve(|| Ok(counter)).unwrap();
        drop(theirs);
        let counter = worker.stop().unwrap();
        assert!(counter.seen.is_empty());
        // The thread takes another, whose start is not ended by that of the first.
        let (socket, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let worker = thread.serve(|| Ok(Counter { socket, ..counter })).unwrap();
        theirs.write_all(b"c").unwrap();
        assert_eq!(told.recv().unwrap(), b'c');
        drop(worker);
        assert!(told.recv().is_err());
    }

    #[test]
    fn one_that_cannot_be_made_says_why_and_leaves_the_thread_to_others() {
        let thread = Thread::new("test", Device::Vsock).unwrap();
        let failed = thread.serve(|| Err::<Counter, _>(io::Error::other("no timer")));
        assert_eq!(failed.unwrap_err().to_string(), "no timer");
        let (counter, _theirs, _told) = counter();
        assert!(thread.serve(|| Ok(counter)).unwrap().stop().is_some());
    }
}
