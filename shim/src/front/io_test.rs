use std::io::{ErrorKind, Read, Write};

use nix::{sys::stat::Mode, unistd::mkfifo};

use super::*;
use crate::test_help::eventually;

async fn opened_by(names: &Names) -> Result<(Stdio, Held), IoError> {
    let whose = Whose {
        namespace: "ns",
        id: "c",
    };
    open(names, whose, &Loggers::default()).await
}

fn fifo(dir: &tempfile::TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

fn client(path: &str, write: bool) -> File {
    OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

/// Reads to the end, which comes when no child that another test forks has a copy of the writer.
fn read_all(mut reader: File) -> String {
    let mut bytes = Vec::new();
    eventually(|| reader.read_to_end(&mut bytes).map_err(|error| error.to_string()));
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn an_output_outlives_its_client_and_ends_when_the_writer_does() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names {
        stdout: fifo(&dir, "out"),
        ..Names::default()
    };
    let (stdio, mut held) = opened_by(&names).await.unwrap();
    assert!(stdio.stdin.is_none() && stdio.stderr.is_none());
    let mut writer = File::from(stdio.stdout.unwrap());
    // No client yet, and after one has gone: no SIGPIPE, no EPIPE.
    writer.write_all(b"one").unwrap();
    drop(client(&names.stdout, false));
    writer.write_all(b" two").unwrap();
    let reader = client(&names.stdout, false);
    drop(writer);
    held.close();
    assert_eq!(read_all(reader), "one two");
}

#[tokio::test]
async fn an_input_ends_when_it_is_closed_and_not_when_its_client_goes() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names {
        stdin: fifo(&dir, "in"),
        ..Names::default()
    };
    let (stdio, mut held) = opened_by(&names).await.unwrap();
    let mut reader = File::from(stdio.stdin.unwrap());
    let mut buffer = [0; 16];
    assert_eq!(
        reader.read(&mut buffer).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    let mut first = client(&names.stdin, true);
    first.write_all(b"ab").unwrap();
    drop(first);
    assert_eq!(reader.read(&mut buffer).unwrap(), 2);
    assert_eq!(
        reader.read(&mut buffer).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    let mut second = client(&names.stdin, true);
    held.close_stdin();
    second.write_all(b"c").unwrap();
    assert_eq!(reader.read(&mut buffer).unwrap(), 1);
    drop(second);
    assert_eq!(read_all(reader), "");
}

#[tokio::test]
async fn a_file_is_made_with_its_directories_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/log");
    let uri = format!("file://{}", path.display());
    let names = Names {
        stdout: uri.clone(),
        stderr: uri,
        ..Names::default()
    };
    let (stdio, _held) = opened_by(&names).await.unwrap();
    File::from(stdio.stdout.unwrap()).write_all(b"out").unwrap();
    File::from(stdio.stderr.unwrap()).write_all(b"err").unwrap();
    assert_eq!(std::fs::read_to_string(path).unwrap(), "outerr");
}

#[tokio::test]
async fn a_terminal_has_no_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names {
        terminal: true,
        stdin: fifo(&dir, "in"),
        stdout: fifo(&dir, "out"),
        stderr: "/nonexistent".into(),
    };
    let (stdio, _held) = opened_by(&names).await.unwrap();
    assert!(stdio.terminal && stdio.stderr.is_none());
}

#[tokio::test]
async fn a_file_s_name_is_a_uri() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names {
        stdout: format!("file://{}/a%20b?x=y#z", dir.path().display()),
        ..Names::default()
    };
    let (stdio, _held) = opened_by(&names).await.unwrap();
    File::from(stdio.stdout.unwrap()).write_all(b"out").unwrap();
    let path = dir.path().join("a b");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "out");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o133, 0);
}

#[tokio::test]
async fn other_names_are_refused_with_what_to_do() {
    let refused = async |stdout: &str, stderr: &str| {
        let names = Names {
            stdout: stdout.into(),
            stderr: stderr.into(),
            ..Names::default()
        };
        opened_by(&names).await.unwrap_err().to_string()
    };
    assert_eq!(
        refused("https://x/y", "").await,
        "https:// as a container's output is not supported; use a FIFO, file:// or binary://"
    );
    for name in [
        "relative",
        "file://relative",
        "binary://",
        "binary:///x%",
        "binary:///x?a=%zz",
    ] {
        assert!(
            refused(name, "").await.contains("does not name a stream"),
            "{name}"
        );
    }
    assert!(
        refused("/nonexistent/fifo", "")
            .await
            .starts_with("cannot open /nonexistent/fifo")
    );
    assert!(
        refused("", "binary:///bin/true")
            .await
            .contains("stderr cannot have")
    );
    assert!(
        refused("binary:///bin/true", "binary:///bin/false")
            .await
            .contains("stderr cannot have")
    );
    let names = Names {
        stdin: "binary:///bin/true".into(),
        ..Names::default()
    };
    assert!(matches!(opened_by(&names).await, Err(IoError::Malformed(_))));
}
