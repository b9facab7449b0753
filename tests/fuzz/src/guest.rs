//! What the shim hears: the agent's answers and events, what a captured VMM reports, and a container's figures. All of
//! it is the other side's word.

use crate::input::Input;
use husk_agent_protocol::limits::{MAX_PROCESSES, is_valid_id};
use husk_agent_protocol::messages as wire;
use husk_shim::config::Timeouts;
use husk_shim::front::metrics;
use husk_shim::guest::agent::{Agent, Events, GuestEvent, Shown, StdioPorts, greet};
use husk_shim::guest::{console::printable, vm};
use husk_vmm_protocol::control::MAX_REPORT_LEN;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// Most calls, and most frames in answer to them.
const MAX_CALLS: usize = 6;
const MAX_FRAMES: usize = 24;

/// ttrpc's frames.
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// An agent that answers the shim's calls as it likes.
pub fn agent(bytes: &[u8]) {
    // All tasks of an input go with its runtime.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("descriptors");
    runtime.block_on(converse(&mut Input::new(bytes)));
}

async fn converse(input: &mut Input<'_>) {
    let (own, mut guest) = UnixStream::pair().expect("descriptors");
    // The agent hangs up when it has said what it has to say, so nobody waits for that long.
    let patience = Duration::from_secs(30);
    let timeouts = Timeouts {
        boot: patience,
        call: patience,
        shutdown: patience,
    };
    let greeted = greet(own, wire::SetupRequest::default(), timeouts).await;
    let (agent, events) = greeted.expect("the stream is open");
    let mut calls = vec![];
    for _ in 0..input.below(MAX_CALLS) {
        calls.push(input.u8());
    }
    let speech = speech(input);
    let say = async move {
        // The buffer of the stream takes all of it, or the shim reads.
        let _ = guest.write_all(&speech).await;
        let _ = guest.shutdown().await;
        guest
    };
    // In this order: each call is on its way before the agent says anything.
    let ((), (), guest) = tokio::join!(listen(events), call_all(&agent, calls), say);
    drop(guest);
    let mut hello = agent.hello();
    let answered = hello.wait_for(Option::is_some).await.map(|hello| hello.clone());
    if let Ok(Some(Ok(info))) = answered {
        assert!(info.agent_version.len() <= 128 * 3 && is_printable(&info.agent_version));
    }
}

/// What the agent says: frames, most of them in their form.
fn speech(input: &mut Input<'_>) -> Vec<u8> {
    let mut speech = vec![];
    for _ in 0..MAX_FRAMES {
        if input.is_empty() {
            break;
        }
        let how = input.u8();
        // The host's streams have odd numbers: Setup, the events, then the calls.
        let stream = if how & 0x40 == 0 {
            u32::from(how & 7) * 2 + 1
        } else {
            input.number() as u32
        };
        let message = input.text(1024);
        let (kind, body) = match how >> 3 & 7 {
            0..=2 => (RESPONSE, response(None, message)),
            3 => (DATA, message.to_vec()),
            4 => (RESPONSE, response(Some(input.u8()), message)),
            5 => (RESPONSE, message.to_vec()),
            _ => (input.u8(), message.to_vec()),
        };
        let length = if how & 0x80 == 0 {
            body.len() as u32
        } else {
            input.number() as u32
        };
        let flags = if kind == DATA { input.u8() & 7 } else { 0 };
        speech.extend(length.to_be_bytes());
        speech.extend(stream.to_be_bytes());
        speech.extend([kind, flags]);
        speech.extend(body);
    }
    speech
}

/// `ttrpc.Response`: a status if there is one, and the answer.
fn response(code: Option<u8>, message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    match code {
        Some(code) => {
            let mut status = vec![8, code % 17];
            status.extend(field(2, message));
            bytes.extend(field(1, &status));
        }
        None => bytes.extend(field(2, message)),
    }
    bytes
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        field.push(length as u8 | 0x80);
        length >>= 7;
    }
    field.push(length as u8);
    field.extend(bytes);
    field
}

async fn listen(mut events: Events) {
    loop {
        match events.next().await {
            Ok(GuestEvent::Oom { container }) => assert!(is_valid_id(&container)),
            Ok(GuestEvent::Exited {
                container,
                exec,
                status,
            }) => {
                assert!(is_valid_id(&container) && status <= 255);
                assert!(exec.is_none_or(|exec| is_valid_id(&exec)));
            }
            Err(why) => {
                assert!(is_printable(&why), "{why:?}");
                return;
            }
        }
    }
}

/// All of them at once, in their order.
async fn call_all(agent: &Agent, calls: Vec<u8>) {
    let mut under_way: Vec<_> = calls
        .into_iter()
        .map(|which| Box::pin(call(agent, which)))
        .collect();
    std::future::poll_fn(|context| {
        under_way.retain_mut(|call| call.as_mut().poll(context).is_pending());
        if under_way.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

async fn call(agent: &Agent, which: u8) {
    let ports = StdioPorts::default();
    let failed = match which % 9 {
        0 => {
            let nothing = Shown::default();
            let spec = b"{}".to_vec();
            let created = agent.create_container("c", spec, ports, nothing, [], Path::new("/"));
            let created = created.await;
            assert!(created.as_ref().is_ok_and(|pid| *pid > 0) || created.is_err());
            created.err()
        }
        1 => agent.start_container("c", Duration::ZERO).await.err(),
        2 => agent.exec_process("c", "e", b"{}".to_vec(), ports).await.err(),
        3 => match agent.container_stats("c").await {
            Ok(files) => {
                metrics::encode(&metrics::metrics(&files));
                None
            }
            Err(error) => Some(error),
        },
        4 => match agent.processes("c").await {
            Ok(processes) => {
                assert!(processes.len() <= MAX_PROCESSES);
                assert!(processes.iter().all(|process| process.pid > 0));
                None
            }
            Err(error) => Some(error),
        },
        5 => agent.signal("c", None, 15, false).await.err(),
        6 => agent.delete_container("c").await.err(),
        7 => agent.connect_localhost(80, false, 70_000).await.err(),
        _ => agent.update_container("c", b"{}".to_vec()).await.err(),
    };
    if let Some(error) = failed {
        let told = error.to_string();
        assert!(told.len() < 20_000 && is_printable(&told), "{told:?}");
    }
}

fn is_printable(text: &str) -> bool {
    text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\t'))
}

/// A report of a VMM that may be captured.
pub fn report(bytes: &[u8]) {
    let told = match vm::read_report(bytes) {
        Ok(report) => vm::reason_of(&report),
        Err(nonsense) => nonsense,
    };
    assert!(
        told.len() <= 4 * MAX_REPORT_LEN && is_printable(&told),
        "{told:?}"
    );
    assert!(is_printable(&printable(&String::from_utf8_lossy(bytes))));
}

/// The files of a container's cgroup, as the guest tells them: each is a line with its name, and a line of one dot
/// behind its text.
pub fn figures(bytes: &[u8]) {
    const NAMES: [&str; 12] = [
        "cpu.stat",
        "cpu.pressure",
        "memory.stat",
        "memory.current",
        "memory.max",
        "memory.events",
        "memory.pressure",
        "pids.current",
        "pids.max",
        "io.stat",
        "rdma.current",
        "hugetlb.2MB.current",
    ];
    let text = String::from_utf8_lossy(bytes);
    let mut files = BTreeMap::new();
    for file in text.split("\n.\n") {
        let (name, text) = file.split_once('\n').unwrap_or((file, ""));
        // A number is one of the names that matter.
        let name = name
            .parse()
            .ok()
            .and_then(|index: usize| NAMES.get(index))
            .unwrap_or(&name);
        files.insert((*name).to_owned(), text.to_owned());
    }
    let encoded = metrics::encode(&metrics::metrics(&files));
    assert!(encoded.value.len() <= 64 * 1024 + 4 * bytes.len());
}
