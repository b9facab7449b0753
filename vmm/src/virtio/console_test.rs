use super::*;
use crate::virtio::guest_queue::{GuestQueue, Part, interrupt, memory};
use proptest::prelude::*;
use std::fs::File;
use std::io::Read;
use vm_memory::{Bytes, GuestAddress};

const DATA: u64 = 0x1_0000;
const SIZE: usize = 0x20_0000;

fn pipe() -> (File, OwnedFd) {
    use std::os::fd::FromRawFd;
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors, which are ours alone.
    unsafe {
        assert_eq!(
            libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK),
            0
        );
        (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

fn drain(reader: &mut File) -> Vec<u8> {
    let mut all = Vec::new();
    // Ends with WouldBlock, after all that there is.
    let _ = reader.read_to_end(&mut all);
    all
}

/// How many bytes of the guest's are in the output, and how many it says are lost.
fn account(output: &[u8]) -> (u64, u64) {
    let (mut there, mut lost) = (0, 0);
    for line in output.split_inclusive(|b| *b == b'\n') {
        let text = String::from_utf8_lossy(line);
        match text
            .strip_prefix("[husk: ")
            .and_then(|rest| rest.strip_suffix(" bytes of console lost]\n"))
        {
            Some(count) => lost += count.parse::<u64>().unwrap(),
            None => there += line.iter().filter(|b| **b == b'x').count() as u64,
        }
    }
    (there, lost)
}

struct Guest {
    transmit: GuestQueue,
    memory: Memory,
    worker: ConsoleWorker,
    poll: Poll,
    irq: vmm_sys_util::eventfd::EventFd,
    panicked: Arc<AtomicBool>,
    console: Console,
}

impl Guest {
    fn new(output: OwnedFd) -> Self {
        let memory = memory(SIZE);
        let transmit = GuestQueue::new(&memory, 0, 64);
        let panicked = Arc::new(AtomicBool::new(false));
        let mut console = Console::new(output, panicked.clone()).unwrap();
        let (interrupt, irq) = interrupt();
        let mut worker = ConsoleWorker {
            memory: memory.clone(),
            transmit: transmit.device_side(false),
            interrupt,
            output: console.output.take().unwrap(),
            waiting: false,
        };
        let poll = Poll::new().unwrap();
        worker.register(&poll).unwrap();
        Self {
            transmit,
            memory,
            worker,
            poll,
            irq,
            panicked,
            console,
        }
    }

    fn print(&mut self, text: &[u8]) {
        self.memory.write_slice(text, GuestAddress(DATA)).unwrap();
        self.transmit.add(&[Part {
            address: DATA,
            length: text.len() as u32,
            write: false,
        }]);
        self.run();
        assert_eq!(self.transmit.pop().unwrap().1, 0);
    }

    fn run(&mut self) {
        self.worker.handle(NOTIFY, READABLE, &self.poll).unwrap();
    }

    fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }
}

#[test]
fn bytes_arrive_in_order_with_one_interrupt_per_pass() {
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    for (i, text) in [b"one ", b"two ", b"six\n"].into_iter().enumerate() {
        let address = DATA + 16 * i as u64;
        guest.memory.write_slice(text, GuestAddress(address)).unwrap();
        guest.transmit.add(&[
            Part {
                address,
                length: 2,
                write: false,
            },
            Part {
                address: address + 2,
                length: 2,
                write: false,
            },
        ]);
    }
    guest.run();
    assert_eq!(drain(&mut reader), b"one two six\n");
    assert_eq!(guest.irq.read().unwrap(), 1);
}

#[test]
fn a_panic_is_seen_across_chunks() {
    let (_reader, output) = pipe();
    let mut guest = Guest::new(output);
    guest.print(b"[    1.0] KKernel pani");
    guest.print(b"Kernel panic - not ");
    assert!(!guest.has_panicked());
    guest.print(b"syncin");
    assert!(!guest.has_panicked());
    guest.print(b"g: Attempted to kill init!");
    assert!(guest.has_panicked());
}

#[test]
fn a_panic_is_seen_when_nobody_reads() {
    let (reader, output) = pipe();
    let mut guest = Guest::new(output);
    drop(reader);
    guest.print(b"into the void\n");
    guest.print(b"Kernel panic - not syncing: VFS\n");
    assert!(guest.has_panicked());
}

#[test]
fn what_a_full_pipe_loses_is_counted_and_told_when_it_drains() {
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    let line = [b'x'; 1000];
    for _ in 0..200 {
        guest.print(&line);
    }
    assert!(guest.worker.waiting);
    let mut text = drain(&mut reader);
    assert!(text.starts_with(&line));
    // The pipe has room, which is an event, without the guest's doing.
    guest.worker.handle(OUTPUT, WRITABLE, &guest.poll).unwrap();
    assert!(!guest.worker.waiting);
    text.extend(drain(&mut reader));
    assert!(text.ends_with(b" bytes of console lost]\n"));
    let (there, lost) = account(&text);
    assert!(there > 0 && lost > 0);
    assert_eq!(there + lost, 200_000);
    guest.print(b"after\n");
    assert_eq!(drain(&mut reader), b"after\n");
}

#[test]
fn nothing_gets_through_before_the_loss_is_told() {
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    for _ in 0..70 {
        guest.print(&[b'x'; 1023]);
    }
    drain(&mut reader);
    guest.print(b"next\n");
    let text = String::from_utf8(drain(&mut reader)).unwrap();
    assert!(
        text.starts_with("\n[husk: ") && text.ends_with(" bytes of console lost]\nnext\n"),
        "{text}"
    );
}

#[test]
fn an_oversized_chain_is_cut_and_its_rest_counted() {
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    let part = Part {
        address: DATA,
        length: 0x10_0000,
        write: false,
    };
    for page in 0..256 {
        let address = GuestAddress(DATA + 4096 * page);
        guest.memory.write_slice(&[b'x'; 4096], address).unwrap();
    }
    guest.transmit.add(&[part; 20]);
    guest.run();
    let (there, lost) = account(&drain(&mut reader));
    assert!(there <= 0x10_0000);
    assert_eq!(guest.console.save().lost + lost + there, 20 * 0x10_0000);
}

#[test]
fn malformed_chains_are_returned_and_the_device_goes_on() {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    let (next, write, indirect) = (
        VRING_DESC_F_NEXT as u16,
        VRING_DESC_F_WRITE as u16,
        VRING_DESC_F_INDIRECT as u16,
    );
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    let queue = &mut guest.transmit;
    // A loop; a way out of the table; memory that is not there; one that wraps; a readable buffer behind a writable
    // one; an indirect table that is not a multiple of a descriptor, and one outside of memory.
    queue.store(40, DATA, 1, next, 40);
    queue.store(41, DATA, 1, next, 64);
    queue.store(42, SIZE as u64 - 1, 2, 0, 0);
    queue.store(43, u64::MAX, 2, 0, 0);
    queue.store(44, DATA, 1, next | write, 45);
    queue.store(45, DATA, 1, 0, 0);
    queue.store(46, DATA, 17, indirect, 0);
    queue.store(47, SIZE as u64, 16, indirect, 0);
    for head in [40, 41, 42, 43, 44, 46, 47] {
        queue.publish(head);
    }
    guest.run();
    for head in [40, 41, 42, 43, 44, 46, 47] {
        assert_eq!(guest.transmit.pop(), Some((head, 0)));
    }
    assert!(drain(&mut reader).is_empty());
    guest.print(b"still here\n");
    assert_eq!(drain(&mut reader), b"still here\n");
}

#[test]
fn a_head_outside_of_the_table_stops_the_device() {
    let (_reader, output) = pipe();
    let mut guest = Guest::new(output);
    guest.transmit.publish(64);
    assert!(guest.worker.handle(NOTIFY, READABLE, &guest.poll).is_err());
}

#[test]
fn the_state_survives() {
    let (mut reader, output) = pipe();
    let mut guest = Guest::new(output);
    guest.print(b"Kernel panic - ");
    let json = serde_json::to_string(&guest.console.save()).unwrap();
    let state: State = serde_json::from_str(&json).unwrap();
    assert_eq!(state.panic_seen, 15);
    let (_, output) = pipe();
    let panicked = Arc::new(AtomicBool::new(false));
    let mut copy = Console::restore(state.clone(), output, panicked.clone()).unwrap();
    assert_eq!(copy.save(), state);
    copy.output.as_mut().unwrap().take(b"not syncing");
    assert!(panicked.load(Ordering::Acquire));
    assert_eq!(drain(&mut reader), b"Kernel panic - ");
}

#[test]
fn a_panic_that_was_seen_as_a_whole_is_no_state() {
    let (_reader, output) = pipe();
    let state = State {
        panic_seen: PANIC.len() as u8,
        ..State::default()
    };
    let refused = Console::restore(state, output, Arc::default()).unwrap_err();
    assert!(
        matches!(
            refused,
            RestoreError::Device {
                device: "console",
                ..
            }
        ),
        "{refused}"
    );
}

#[test]
fn the_device_gives_its_output_back_on_reset() {
    let (mut reader, output) = pipe();
    let mut console = Console::new(output, Arc::default()).unwrap();
    for text in [b"a", b"b"] {
        let memory = memory(SIZE);
        memory.write_slice(text, GuestAddress(DATA)).unwrap();
        let receive = GuestQueue::new(&memory, 0, 2);
        let mut transmit = GuestQueue::new(&memory, GuestQueue::SPAN, 64);
        transmit.add(&[Part {
            address: DATA,
            length: 1,
            write: false,
        }]);
        console
            .activate(Activation {
                memory,
                queues: vec![receive.device_side(false), transmit.device_side(false)],
                interrupt: interrupt().0,
                features: 0,
            })
            .unwrap();
        let mut seen = Vec::new();
        let start = std::time::Instant::now();
        while seen.is_empty() && start.elapsed().as_secs() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(1));
            seen = drain(&mut reader);
        }
        assert_eq!(seen, text);
        console.reset();
    }
}

proptest! {
    #[test]
    fn the_panic_is_found_wherever_it_is_cut(before in "[Kern el]{0,40}", after in "[Kern el]{0,20}", cuts in prop::collection::vec(1usize..20, 1..8)) {
        let (_reader, output) = pipe();
        let panicked = Arc::new(AtomicBool::new(false));
        let mut console = Console::new(output, panicked.clone()).unwrap();
        let text = format!("{before}Kernel panic - not syncing{after}");
        let mut rest = text.as_bytes();
        let mut cuts = cuts.into_iter().cycle();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(cuts.next().unwrap().min(rest.len()));
            console.output.as_mut().unwrap().take(head);
            rest = tail;
        }
        prop_assert!(panicked.load(Ordering::Acquire));
    }

    #[test]
    fn other_text_is_no_panic(text in "(Kernel panic|- not|syncing| ){0,20}") {
        let (_reader, output) = pipe();
        let panicked = Arc::new(AtomicBool::new(false));
        Console::new(output, panicked.clone()).unwrap().output.as_mut().unwrap().take(text.as_bytes());
        prop_assert_eq!(panicked.load(Ordering::Acquire), text.contains("Kernel panic - not syncing"));
    }
}
