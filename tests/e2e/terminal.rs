//! Containers with a terminal: a real pty on the host's side, as a user's shell has.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};

use crate::containerd::{BUSYBOX, Detached, RUNTIME};
use crate::host;

/// A command on a pty of its own.
pub struct Terminal {
    master: File,
    child: Child,
    output: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    pub fn start(argv: &[&str], rows: u16, columns: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let slave = || -> Stdio { pty.slave.try_clone().unwrap().into() };
        let mut command = Command::new(argv[0]);
        command
            .args(&argv[1..])
            .stdin(slave())
            .stdout(slave())
            .stderr(slave());
        // SAFETY: between fork and exec only setsid and ioctl are called, both async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        drop(pty.slave);
        let master: File = pty.master.into();
        let mut reader = master.try_clone().unwrap();
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 || sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            master,
            child,
            output,
            seen: String::new(),
        }
    }

    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.seen.contains(text) {
            match self
                .output
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(_) => {
                    host::print_logs();
                    panic!("no {text:?} on the terminal: {:?}", self.seen);
                }
            }
        }
    }

    /// All that the command has said.
    pub fn seen(&self) -> &str {
        &self.seen
    }

    pub fn type_text(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads a winsize, which lives through the call.
        let result = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        assert_eq!(result, 0);
    }

    #[track_caller]
    pub fn finish(mut self) -> (i32, String) {
        let end = Instant::now() + Duration::from_secs(120);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                let _ = self.child.kill();
                host::print_logs();
                panic!("the terminal's command did not end: {:?}", self.seen);
            }
            self.seen.extend(
                self.output
                    .recv_timeout(Duration::from_millis(100))
                    .ok()
                    .map(|b| String::from_utf8_lossy(&b).into_owned()),
            );
        };
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(500)) {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        (status.code().unwrap_or(-1), self.seen)
    }
}

#[test]
fn a_terminal_has_the_users_size_and_follows_it() {
    let argv = [
        "ctr",
        "run",
        "--rm",
        "-t",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        "tty",
        "sh",
    ];
    let mut terminal = Terminal::start(&argv, 31, 97);
    terminal.type_text("tty && echo is-a-$((1+1))-tty\n");
    terminal.wait_for("is-a-2-tty");
    assert!(terminal.seen.contains("/dev/"), "{:?}", terminal.seen);
    // A size travels on its own; the shell asks until it has come.
    terminal.type_text("until stty size | grep '31 97'; do sleep 0.2; done; echo s$((40+1))\n");
    terminal.wait_for("s41");
    terminal.resize(42, 133);
    terminal.type_text("until stty size | grep '42 133'; do sleep 0.2; done; echo resized-$((1+2))\n");
    terminal.wait_for("resized-3");
    terminal.type_text("exit 6\n");
    let (code, seen) = terminal.finish();
    assert_eq!(code, 6, "{seen:?}");
}

#[test]
fn exec_with_a_terminal() {
    let container = Detached::start("tty-exec", &["sleep", "1000"]);
    let mut terminal = Terminal::start(
        &["ctr", "task", "exec", "-t", "--exec-id", "t", "tty-exec", "sh"],
        24,
        80,
    );
    terminal.type_text("tty; echo one-$((1+1)); exit 3\n");
    terminal.wait_for("one-2");
    let (code, seen) = terminal.finish();
    assert_eq!(code, 3, "{seen:?}");
    container.remove();
}

#[test]
fn control_c_interrupts_the_foreground_command() {
    let argv = [
        "ctr",
        "run",
        "--rm",
        "-t",
        "--runtime",
        RUNTIME,
        BUSYBOX,
        "intr",
        "sh",
    ];
    let mut terminal = Terminal::start(&argv, 24, 80);
    terminal.type_text("echo go-$((1+1)); sleep 1000\n");
    terminal.wait_for("go-2");
    thread::sleep(Duration::from_secs(1));
    terminal.type_text("\u{3}");
    terminal.type_text("echo back-$((1+2)); exit 0\n");
    terminal.wait_for("back-3");
    assert_eq!(terminal.finish().0, 0);
}

#[test]
fn husk_run_with_a_terminal() {
    let bundle = crate::foreground::Bundle::busybox(&["sh", "-c", "tty && stty size && exit 8"]);
    bundle.edit(|spec| spec["process"]["terminal"] = true.into());
    let mut terminal = Terminal::start(&["husk", "run", "--bundle", bundle.path(), "tty"], 33, 99);
    terminal.wait_for("33 99");
    let (code, seen) = terminal.finish();
    assert_eq!(code, 8, "{seen:?}");
    assert!(!std::path::Path::new("/run/husk/husk-run/tty").exists());
}
