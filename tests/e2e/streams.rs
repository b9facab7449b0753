//! Standard streams under load: nothing lost, nothing hoarded.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::command::{Input, run_with};
use crate::containerd::{BUSYBOX, Detached, RUNTIME, ctr_run, ctr_run_script};
use crate::host;

/// Bytes without a pattern that a lost or doubled block could hide in (xorshift64*).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.reopen().unwrap()
}

#[test]
fn a_hundred_megabytes_pass_byte_for_byte() {
    let bytes = noise(100_000_000);
    let argv = ["ctr", "run", "--rm", "--runtime", RUNTIME, BUSYBOX, "cat", "cat"];
    let done = run_with(&argv, Input::File(file_of(&bytes)), Duration::from_secs(600)).expect_code(0);
    assert_eq!(done.stdout.len(), bytes.len());
    assert!(
        done.stdout == bytes,
        "the bytes differ, the first at {:?}",
        first_difference(&done.stdout, &bytes)
    );
}

#[test]
fn exec_streams_pass_byte_for_byte() {
    let bytes = noise(5_000_000);
    let container = Detached::start("cat-exec", &["sleep", "1000"]);
    let argv = ["ctr", "task", "exec", "--exec-id", "e", "cat-exec", "cat"];
    let done = run_with(&argv, Input::File(file_of(&bytes)), Duration::from_secs(180)).expect_code(0);
    assert!(
        done.stdout == bytes,
        "the bytes differ, the first at {:?}",
        first_difference(&done.stdout, &bytes)
    );
    container.remove();
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// A flood of output must pass without any of our processes growing by it.
#[test]
fn a_flood_of_output_is_not_hoarded() {
    let megabytes: usize = std::env::var("HUSK_TEST_FLOOD_MB").map_or(64, |n| n.parse().unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let most = Arc::new(Mutex::new(std::collections::BTreeMap::<String, u64>::new()));
    let sampler = thread::spawn({
        let (stop, most) = (stop.clone(), most.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                for process in host::processes() {
                    if process.name.contains("husk") {
                        let now = host::anonymous_kib(process.pid);
                        let mut most = most.lock().unwrap();
                        let peak = most.entry(process.name).or_insert(0);
                        *peak = now.max(*peak);
                    }
                }
                thread::sleep(Duration::from_millis(250));
            }
        }
    });
    let script = format!("yes | head -c {}", megabytes << 20);
    let done = ctr_run_script("flood", &script)
        .finish(Duration::from_secs(60 + 20 * megabytes as u64))
        .expect_code(0);
    stop.store(true, Ordering::Relaxed);
    sampler.join().unwrap();
    assert_eq!(done.stdout.len(), megabytes << 20);
    let most = most.lock().unwrap();
    for name in ["containerd-shim-husk-v2", "husk-vmm", "husk-fsd", "husk-standin"] {
        let peak = *most
            .get(name)
            .unwrap_or_else(|| panic!("{name} was never seen: {most:?}"));
        assert!(
            peak < 24 * 1024,
            "{name} grew to {peak} KiB of its own memory while {megabytes} MB passed"
        );
    }
}

#[test]
fn output_after_the_main_process_ended_does_not_delay_its_exit() {
    let done = ctr_run(
        "background",
        BUSYBOX,
        &["sh", "-c", "echo first; (sleep 600 &) ; exit 4"],
    )
    .expect_code(4);
    assert_eq!(done.out(), "first\n");
}

#[test]
fn many_lines_keep_their_order_and_end() {
    let done = ctr_run("lines", BUSYBOX, &["sh", "-c", "seq 1 20000"]).expect_code(0);
    let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(
        done.out() == expected,
        "{} bytes instead of {}",
        done.stdout.len(),
        expected.len()
    );
}
