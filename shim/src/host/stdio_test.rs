use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    path::Path,
    time::Duration,
};

use nix::{pty::openpty, sys::stat::Mode, unistd::mkfifo};

use super::*;

fn read_all(fd: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes).unwrap();
    bytes
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn never() -> (watch::Sender<bool>, watch::Receiver<bool>) {
    watch::channel(false)
}

async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::time::timeout(Duration::from_secs(20), tokio::task::spawn_blocking(work))
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_is_carried_byte_for_byte_and_its_end_too() {
    let (read, write) = pipe();
    let (own, guest) = stream_pair().unwrap();
    let (_keep, close) = never();
    let copy = tokio::spawn(feed(Handle::new(read).unwrap(), own, close));
    let sent = pattern(5_000_001);
    let expected = sent.clone();
    let writer = tokio::task::spawn_blocking(move || File::from(write).write_all(&sent).unwrap());
    let received = in_thread(move || read_all(guest)).await;
    assert!(received == expected);
    writer.await.unwrap();
    copy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn output_reaches_a_pipe_byte_for_byte_and_the_pipe_is_closed() {
    let (read, write) = pipe();
    let (own, guest) = stream_pair().unwrap();
    let copy = tokio::spawn(drain(own, Handle::new(write).unwrap()));
    let sent = pattern(5_000_001);
    let expected = sent.clone();
    let writer = tokio::task::spawn_blocking(move || File::from(guest).write_all(&sent).unwrap());
    assert!(in_thread(move || read_all(read)).await == expected);
    writer.await.unwrap();
    copy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_left_is_told_to_the_writer() {
    let (read, write) = pipe();
    let (own, guest) = stream_pair().unwrap();
    let copy = tokio::spawn(drain(own, Handle::new(write).unwrap()));
    drop(read);
    let error = in_thread(move || {
        let mut guest = File::from(guest);
        loop {
            if let Err(error) = guest.write_all(&[0; 4096]) {
                return error;
            }
        }
    })
    .await;
    assert!(
        matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)),
        "{error}"
    );
    copy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_holds_the_writer_back() {
    let (_read, write) = pipe();
    let (own, guest) = stream_pair().unwrap();
    tokio::spawn(drain(own, Handle::new(write).unwrap()));
    let guest = UnixStream::from_std({
        let guest = std::os::unix::net::UnixStream::from(guest);
        guest.set_nonblocking(true).unwrap();
        guest
    })
    .unwrap();
    let mut taken = 0;
    while let Ok(ready) = tokio::time::timeout(Duration::from_millis(300), guest.writable()).await {
        ready.unwrap();
        taken += guest.try_write(&[0; 65536]).unwrap_or(0);
        assert!(taken < 4 << 20, "memory is not bounded");
    }
    assert!(taken > 64 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifo_waits_for_its_first_writer_and_ends_with_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stdin");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    // As a shim opens it: without waiting for the writer.
    let read = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let (own, guest) = stream_pair().unwrap();
    let (_keep, close) = never();
    let copy = tokio::spawn(feed(Handle::new(read.into()).unwrap(), own, close));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!copy.is_finished(), "a FIFO without a writer is not at its end");
    in_thread(move || fs::write(path, "hello")).await.unwrap();
    assert_eq!(in_thread(move || read_all(guest)).await, b"hello");
    copy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_sends_what_was_there_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stdin");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    // Held open for writing too: it never ends by itself.
    let fifo = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    (&fifo).write_all(&pattern(60_000)).unwrap();
    let (own, guest) = stream_pair().unwrap();
    let (closer, close) = never();
    closer.send_replace(true);
    let copy = tokio::spawn(feed(Handle::new(fifo.into()).unwrap(), own, close));
    assert!(in_thread(move || read_all(guest)).await == pattern(60_000));
    copy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_dev_null_are_copied_too() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    fs::write(&input, pattern(300_000)).unwrap();
    let (own, guest) = stream_pair().unwrap();
    let (_keep, close) = never();
    let copy = tokio::spawn(feed(
        Handle::new(File::open(&input).unwrap().into()).unwrap(),
        own,
        close,
    ));
    assert!(in_thread(move || read_all(guest)).await == pattern(300_000));
    copy.await.unwrap().unwrap();

    // The file's own offset is used, as a shell's `> file 2>&1` needs it.
    let mut file = File::create(&output).unwrap();
    file.write_all(b"before ").unwrap();
    let (own, guest) = stream_pair().unwrap();
    let copy = tokio::spawn(drain(own, Handle::new(file.try_clone().unwrap().into()).unwrap()));
    File::from(guest).write_all(b"after").unwrap();
    copy.await.unwrap().unwrap();
    assert_eq!(fs::read(&output).unwrap(), b"before after");
    assert_eq!(file.stream_position().unwrap(), 12);

    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let (own, guest) = stream_pair().unwrap();
    let (_keep, close) = never();
    feed(Handle::new(null.into()).unwrap(), own, close).await.unwrap();
    assert_eq!(in_thread(move || read_all(guest)).await, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_pipe_or_tty_keeps_waiting_for_others() {
    let waits = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_GETFL).unwrap() & libc::O_NONBLOCK == 0;
    let (read, _write) = pipe();
    let pty = openpty(None, None).unwrap();
    for fd in [read, pty.slave] {
        let shared = fd.try_clone().unwrap();
        let _handle = Handle::new(fd).unwrap();
        assert!(waits(&shared));
    }
    assert!(Path::new("/proc/self/fd").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pty_master_is_that_pty_and_no_other() {
    let pty = openpty(None, None).unwrap();
    let (own, guest) = stream_pair().unwrap();
    tokio::spawn(drain(own, Handle::new(pty.master).unwrap()));
    // Held open: with its master, a pty loses what was not read.
    let mut guest = File::from(guest);
    guest.write_all(b"typed\n").unwrap();
    let slave = File::from(pty.slave);
    let line = in_thread(move || {
        let mut buffer = [0; 16];
        let length = (&slave).read(&mut buffer).unwrap();
        buffer[..length].to_vec()
    })
    .await;
    assert_eq!(line, b"typed\n");
}
