//! systemd as a peer on a socket of the test's.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread::{self, JoinHandle},
};

use super::*;

/// A message of the peer's: kind, reply to, member, error name, signature, body.
fn message(kind: u8, reply_to: u32, member: &str, error: &str, signature: &str, body: &[u8]) -> Vec<u8> {
    fn text(bytes: &mut Vec<u8>, code: u8, text: &str) {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend([code, 1, b's', 0]);
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.push(0);
    }
    let mut fields = Vec::new();
    text(&mut fields, 3, member);
    if !error.is_empty() {
        text(&mut fields, 4, error);
    }
    fields.resize(fields.len().next_multiple_of(8), 0);
    fields.extend([5, 1, b'u', 0]);
    fields.extend(reply_to.to_le_bytes());
    if !signature.is_empty() {
        fields.extend([8, 1, b'g', 0, signature.len() as u8]);
        fields.extend(signature.as_bytes());
        fields.push(0);
    }
    let mut bytes = vec![b'l', kind, 0, 1];
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(9_u32.to_le_bytes());
    bytes.extend((fields.len() as u32).to_le_bytes());
    bytes.extend(&fields);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(body);
    bytes
}

fn strings(texts: &[&str]) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for text in texts {
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.push(0);
    }
    bytes
}

fn job_removed(job: &str, result: &str) -> Vec<u8> {
    let mut body = 7_u32.to_le_bytes().to_vec();
    body.extend(strings(&[job, "a.scope", result]));
    message(4, 0, "JobRemoved", "", "uoss", &body)
}

/// Reads a call whole; gives its body and the text of all of it.
fn call(stream: &mut UnixStream) -> (u32, String) {
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
    let rest = number(12).next_multiple_of(8) + number(4);
    let mut bytes = vec![0; rest as usize];
    stream.read_exact(&mut bytes).unwrap();
    (number(8), String::from_utf8_lossy(&bytes).into_owned())
}

/// A peer that greets and then answers each call by what `answer` says.
fn peer(
    answer: impl Fn(u32, &str) -> Vec<u8> + Send + 'static,
) -> (tempfile::TempDir, JoinHandle<Vec<String>>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("bus")).unwrap();
    let peer = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let greeting = format!(
            "\0AUTH EXTERNAL {}\r\n",
            nix::unistd::geteuid()
                .to_string()
                .bytes()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        );
        let mut bytes = vec![0; greeting.len()];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, greeting.as_bytes());
        stream.write_all(b"OK 0123\r\n").unwrap();
        let mut begin = [0; 7];
        stream.read_exact(&mut begin).unwrap();
        let mut calls = Vec::new();
        loop {
            let mut peek = [0; 1];
            let more = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&stream),
                &mut peek,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            );
            if more != Ok(1) {
                return calls;
            }
            let (serial, text) = call(&mut stream);
            let _ = stream.write_all(&answer(serial, &text));
            calls.push(text);
        }
    });
    (dir, peer)
}

fn connect_to(dir: &tempfile::TempDir, patience: Duration) -> Bus {
    Bus::connect(&dir.path().join("bus"), true, Instant::now() + patience).unwrap()
}

fn unit() -> Unit {
    Unit {
        slice: "system.slice".into(),
        name: "husk-c.scope".into(),
    }
}

#[test]
fn a_unit_is_there_when_its_job_is_done() {
    let (dir, peer) = peer(|serial, text| {
        if !text.contains("StartTransientUnit") {
            return message(2, serial, "", "", "", &[]);
        }
        // Its end may be told before its name.
        let mut bytes = job_removed("/job/1", "failed");
        bytes.extend(job_removed("/job/2", "done"));
        bytes.extend(message(2, serial, "", "", "o", &strings(&["/job/2"])));
        bytes
    });
    let limits = Limits {
        memory: Some(1 << 20),
        cpu: Some((150_000, 100_000)),
        ..Limits::default()
    };
    start_on(&mut connect_to(&dir, START), &unit(), 4711, &limits).unwrap();
    let calls = peer.join().unwrap();
    let called = |call: &str| calls.iter().filter(|text| text.contains(call)).count();
    assert_eq!(
        (called("Hello"), called("AddMatch"), called("Subscribe")),
        (1, 1, 1)
    );
    let start = calls.last().unwrap();
    for part in [
        "org.freedesktop.systemd1",
        "husk-c.scope",
        "system.slice",
        "Delegate",
        "PIDs",
        "OOMPolicy",
        "MemoryMax",
        "CPUQuotaPerSecUSec",
    ] {
        assert!(start.contains(part), "{part}");
    }
    assert!(!start.contains("TasksMax"));
}

#[test]
fn a_unit_that_failed_before_or_a_property_that_is_too_new_is_no_obstacle() {
    let (dir, peer) = peer(|serial, text| {
        if text.contains("ResetFailedUnit") || !text.contains("StartTransientUnit") {
            return message(2, serial, "", "", "", &[]);
        }
        let refused = |name: &str, text: &str| message(3, serial, "", name, "s", &strings(&[text]));
        match serial {
            4 => refused(EXISTS, "Unit husk-c.scope already exists."),
            6 => refused("x.y", "Cannot set property OOMPolicy, or unknown property."),
            _ => {
                assert!(!text.contains("OOMPolicy"));
                let mut bytes = message(2, serial, "", "", "o", &strings(&["/job/2"]));
                bytes.extend(job_removed("/job/2", "done"));
                bytes
            }
        }
    });
    start_on(&mut connect_to(&dir, START), &unit(), 1, &Limits::default()).unwrap();
    assert!(peer.join().unwrap()[4].contains("ResetFailedUnit"));
}

#[test]
fn what_systemd_says_against_it_is_told() {
    let answers: [fn(u32) -> Vec<u8>; 2] = [
        |serial| message(3, serial, "", "x.Denied", "s", &strings(&["No."])),
        |serial| {
            let mut bytes = message(2, serial, "", "", "o", &strings(&["/job/2"]));
            bytes.extend(job_removed("/job/2", "canceled"));
            bytes
        },
    ];
    for (answer, expected) in answers.into_iter().zip(["No. (x.Denied)", "canceled"]) {
        let (dir, peer) = peer(move |serial, text| {
            if text.contains("StartTransientUnit") {
                answer(serial)
            } else {
                message(2, serial, "", "", "", &[])
            }
        });
        let error = start_on(&mut connect_to(&dir, START), &unit(), 1, &Limits::default()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        peer.join().unwrap();
    }
}

#[test]
fn silence_and_nonsense_end_in_time() {
    let answers: [fn(u32) -> Vec<u8>; 4] = [
        |_| Vec::new(),
        |_| vec![0xff; 64],
        |serial| message(2, serial, "", "", "", &[]).repeat(2)[..24].to_vec(),
        |_| message(4, 0, "JobRemoved", "", "uoss", &[1, 2, 3]),
    ];
    for answer in answers {
        let (dir, peer) = peer(move |serial, text| {
            if text.contains("Hello") {
                message(2, serial, "", "", "", &[])
            } else {
                answer(serial)
            }
        });
        let mut bus = connect_to(&dir, START);
        bus.deadline = Instant::now() + Duration::from_millis(300);
        start_on(&mut bus, &unit(), 1, &Limits::default()).unwrap_err();
        drop(bus);
        peer.join().unwrap();
    }
}
