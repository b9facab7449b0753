//! Commands are run here over a loopback connection, as the runner runs them in the host.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::*;
use crate::testhost::wire::STDIN_WINDOW;

/// What came back from a command.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    credit: usize,
    outcome: Option<Outcome>,
}

fn open(argv: &[&str], change: impl FnOnce(&mut Run)) -> (TcpStream, JoinHandle<io::Result<()>>) {
    let mut request = Run {
        argv: argv.iter().map(|a| (*a).to_owned()).collect(),
        cwd: Some("/".into()),
        ..Run::default()
    };
    change(&mut request);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, thread::spawn(move || run(server, request)))
}

fn collect(client: &mut TcpStream) -> Answer {
    let mut answer = Answer::default();
    while answer.outcome.is_none() {
        match Frame::read(client).unwrap().unwrap() {
            Frame::Stdout(bytes) => answer.stdout.extend(bytes),
            Frame::Stderr(bytes) => answer.stderr.extend(bytes),
            Frame::Credit(bytes) => answer.credit += usize::try_from(bytes).unwrap(),
            Frame::Outcome(outcome) => answer.outcome = Some(outcome),
            other => panic!("{other:?} is not the runner's to send"),
        }
    }
    answer
}

fn ask(argv: &[&str]) -> Answer {
    let (mut client, _) = open(argv, |_| {});
    collect(&mut client)
}

#[test]
fn streams_are_kept_apart_and_the_exit_code_is_carried() {
    let answer = ask(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(answer.stdout, b"out\n");
    assert_eq!(answer.stderr, b"err\n");
    assert_eq!(answer.outcome, Some(Outcome::Exited(7)));
}

#[test]
fn arguments_reach_the_program_as_they_are() {
    let answer = ask(&["printf", "%s|", "a b", "$HOME", "", "*"]);
    assert_eq!(answer.stdout, b"a b|$HOME||*|");
}

#[test]
fn a_signal_is_told_as_such() {
    assert_eq!(
        ask(&["sh", "-c", "kill -9 $$"]).outcome,
        Some(Outcome::Signaled(9))
    );
}

#[test]
fn what_cannot_be_started_has_a_shells_code() {
    assert!(matches!(
        ask(&["/nowhere/program"]).outcome,
        Some(Outcome::NotStarted(127, _))
    ));
    assert!(matches!(
        ask(&["/etc/passwd"]).outcome,
        Some(Outcome::NotStarted(126, _))
    ));
    assert!(matches!(ask(&[]).outcome, Some(Outcome::NotStarted(126, _))));
}

#[test]
fn output_is_whole_when_the_command_ends_at_once() {
    let answer = ask(&["head", "-c", "3000000", "/dev/zero"]);
    assert_eq!(answer.stdout.len(), 3_000_000);
}

#[test]
fn a_child_left_behind_does_not_hold_up_the_end() {
    let begin = Instant::now();
    let answer = ask(&["sh", "-c", "sleep 20 & echo started; echo $!"]);
    assert!(begin.elapsed() < Duration::from_secs(10));
    let text = String::from_utf8(answer.stdout).unwrap();
    let pid = text.strip_prefix("started\n").unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it still runs");
}

#[test]
fn input_is_carried_and_paid_for() {
    let (mut client, _) = open(&["cat"], |_| {});
    let input: Vec<u8> = (0..STDIN_WINDOW)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    for piece in input.chunks(MAX_PAYLOAD) {
        Frame::Stdin(piece.to_vec()).write(&mut client).unwrap();
    }
    Frame::Stdin(Vec::new()).write(&mut client).unwrap();
    let answer = collect(&mut client);
    assert!(answer.stdout == input, "{} bytes came back", answer.stdout.len());
    assert_eq!(answer.credit, STDIN_WINDOW);
}

#[test]
fn a_command_that_does_not_read_its_input_is_killed_with_its_client() {
    let (mut client, server) = open(&["sleep", "1000"], |_| {});
    for _ in 0..STDIN_WINDOW / MAX_PAYLOAD {
        Frame::Stdin(vec![0; MAX_PAYLOAD]).write(&mut client).unwrap();
    }
    drop(client);
    let begin = Instant::now();
    // Nobody is there to be told the outcome.
    let _ = server.join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_command_that_outlives_its_time_is_killed_with_its_children() {
    let (mut client, _) = open(&["sh", "-c", "trap '' TERM; sleep 1000; echo survived"], |run| {
        run.timeout = Some(1)
    });
    let answer = collect(&mut client);
    assert_eq!(answer.outcome, Some(Outcome::TimedOut));
    assert_eq!(answer.stdout, b"");
}

#[test]
fn a_terminal_has_the_size_asked_for_and_follows_changes() {
    let script = "trap 'stty size; exit 3' WINCH; stty size; while :; do sleep 0.05; done";
    let (mut client, _) = open(&["sh", "-c", script], |run| run.tty = Some((33, 101)));
    match Frame::read(&mut client).unwrap().unwrap() {
        Frame::Stdout(bytes) => assert_eq!(bytes, b"33 101\r\n"),
        other => panic!("{other:?}"),
    }
    Frame::Resize(44, 55).write(&mut client).unwrap();
    let answer = collect(&mut client);
    assert_eq!(answer.stdout, b"44 55\r\n");
    assert_eq!(answer.outcome, Some(Outcome::Exited(3)));
}
