//! The control socket: the configuration in, reports out, and the engine's end.

use husk_vmm_protocol::config::{ConfigError, MAX_CONFIG_LEN, MachineConfig};
use husk_vmm_protocol::control::{MAX_REPORT_LEN, Report};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// How long the engine may take to send the configuration.
pub const CONFIG_DEADLINE: Duration = Duration::from_secs(30);

/// Why there is no configuration, or no report could be sent.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The other end is closed: there is nobody to run a machine for.
    #[error("the engine is gone")]
    EngineGone,
    /// Nothing came in time.
    #[error("no configuration came within {} seconds", CONFIG_DEADLINE.as_secs())]
    Deadline,
    /// It is not a valid configuration.
    #[error("the configuration is refused")]
    Config(#[from] ConfigError),
    /// The socket failed.
    #[error("the control socket failed")]
    Socket(#[source] io::Error),
    /// The engine sent something after the configuration.
    #[error("the engine sent a second message; only one is understood")]
    SecondMessage,
    /// The report does not fit its packet.
    #[error("the report is not valid")]
    Report(#[source] io::Error),
}

/// Our end of the socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

/// What woke [`Control::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The machine's end is readable.
    MachineEnded,
    /// The file server closed its end.
    FileServerGone,
    /// The engine closed its end.
    EngineGone,
}

impl Control {
    /// A control socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Waits for the configuration.
    ///
    /// # Errors
    /// When none comes in time, or it is not valid.
    pub fn receive_config(&self) -> Result<MachineConfig, ControlError> {
        let mut fds = [poll_for(self.socket.as_raw_fd())];
        if !poll(
            &mut fds,
            i32::try_from(CONFIG_DEADLINE.as_millis()).unwrap_or(i32::MAX),
        )? {
            return Err(ControlError::Deadline);
        }
        // One byte more than allowed, so that what is too long is seen to be.
        let mut buffer = vec![0; MAX_CONFIG_LEN.saturating_add(1)];
        let length = self.receive(&mut buffer)?;
        Ok(MachineConfig::decode(buffer.get(..length).unwrap_or(&[]))?)
    }

    /// Sends a report. A message too long is cut.
    ///
    /// # Errors
    /// When the engine is gone, or does not read.
    pub fn report(&self, report: &Report) -> Result<(), ControlError> {
        let mut packet = encode(report)?;
        if let (true, Report::Failed { message }) = (packet.len() > MAX_REPORT_LEN, report) {
            // JSON may take six bytes for one.
            let message = message.chars().take(MAX_REPORT_LEN / 32).collect();
            packet = encode(&Report::Failed { message })?;
        }
        // SAFETY: the packet's pointer and length belong together.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::EngineGone,
                _ => ControlError::Socket(error),
            });
        }
        Ok(())
    }

    /// Waits until `ended` is readable, or one of the other processes has closed its end: the file server that of
    /// `file_server`, the engine that of this socket. If several are, the first of these counts.
    ///
    /// # Errors
    /// When the engine sends anything, or the wait fails.
    pub fn wait(&self, ended: BorrowedFd<'_>, file_server: BorrowedFd<'_>) -> Result<Wake, ControlError> {
        // The end of a channel is told whatever is asked for.
        let hang_up = libc::pollfd {
            fd: file_server.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        let mut fds = [
            poll_for(ended.as_raw_fd()),
            poll_for(self.socket.as_raw_fd()),
            hang_up,
        ];
        poll(&mut fds, -1)?;
        let [ended, engine, _] = fds;
        if ended.revents != 0 {
            return Ok(Wake::MachineEnded);
        }
        if engine.revents == 0 {
            return Ok(Wake::FileServerGone);
        }
        match self.receive(&mut [0; 1]) {
            Ok(_) => Err(ControlError::SecondMessage),
            Err(ControlError::EngineGone) => Ok(Wake::EngineGone),
            Err(e) => Err(e),
        }
    }

    /// One packet; an empty one is the end, too.
    fn receive(&self, buffer: &mut [u8]) -> Result<usize, ControlError> {
        // SAFETY: the buffer's pointer and length belong together.
        let n = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
            )
        };
        match usize::try_from(n) {
            Ok(0) => Err(ControlError::EngineGone),
            Ok(n) => Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                Err(match error.kind() {
                    io::ErrorKind::ConnectionReset => ControlError::EngineGone,
                    _ => ControlError::Socket(error),
                })
            }
        }
    }
}

fn encode(report: &Report) -> Result<Vec<u8>, ControlError> {
    serde_json::to_vec(report).map_err(|e| ControlError::Report(e.into()))
}

fn poll_for(fd: RawFd) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

/// `false` when `timeout` (milliseconds, -1 for none) is over.
fn poll(fds: &mut [libc::pollfd], timeout: i32) -> Result<bool, ControlError> {
    loop {
        // SAFETY: the pointer and the count belong together.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if n >= 0 {
            return Ok(n > 0);
        }
        let error = io::Error::last_os_error();
        // This process handles no signals; an interrupted wait, as by a debugger, starts anew.
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(ControlError::Socket(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd};

    fn pair() -> (Control, OwnedFd) {
        let mut fds = [0; 2];
        // SAFETY: room for the two descriptors that are written; they are owned by nobody else.
        unsafe {
            assert_eq!(
                libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()),
                0
            );
            (
                Control::new(OwnedFd::from_raw_fd(fds[0])),
                OwnedFd::from_raw_fd(fds[1]),
            )
        }
    }

    fn send(socket: &OwnedFd, bytes: &[u8]) {
        // SAFETY: pointer and length belong together.
        let n = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(n, bytes.len() as isize);
    }

    #[test]
    fn a_configuration_is_received() {
        let (control, engine) = pair();
        let config = MachineConfig {
            version: 1,
            vcpus: 1,
            memory_mib: 64,
            kernel_params: String::new(),
            nics: vec![],
        };
        send(&engine, &config.encode().unwrap());
        assert_eq!(control.receive_config().unwrap(), config);
    }

    #[test]
    fn bad_configurations_are_refused() {
        let (control, engine) = pair();
        send(&engine, b"{}");
        assert!(matches!(
            control.receive_config(),
            Err(ControlError::Config(ConfigError::Json(_)))
        ));
        send(&engine, &vec![b' '; MAX_CONFIG_LEN + 1000]);
        assert!(matches!(
            control.receive_config(),
            Err(ControlError::Config(ConfigError::TooLong(_)))
        ));
        drop(engine);
        assert!(matches!(control.receive_config(), Err(ControlError::EngineGone)));
    }

    /// An event to wait for, and both ends of a file server's channel.
    fn others() -> (OwnedFd, OwnedFd, OwnedFd) {
        // SAFETY: the new descriptor is nobody else's.
        let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
        let (ours, server) = pair();
        (event, ours.socket, server)
    }

    #[test]
    fn each_end_wakes() {
        let (control, engine) = pair();
        let (event, ours, server) = others();
        drop(server);
        assert_eq!(
            control.wait(event.as_fd(), ours.as_fd()).unwrap(),
            Wake::FileServerGone
        );
        drop(engine);
        assert_eq!(
            control.wait(event.as_fd(), ours.as_fd()).unwrap(),
            Wake::EngineGone
        );
        // SAFETY: no pointers are involved.
        assert_eq!(unsafe { libc::eventfd_write(event.as_raw_fd(), 1) }, 0);
        assert_eq!(
            control.wait(event.as_fd(), ours.as_fd()).unwrap(),
            Wake::MachineEnded
        );
        assert!(matches!(
            control.report(&Report::Running),
            Err(ControlError::EngineGone)
        ));
    }

    #[test]
    fn a_second_message_is_refused() {
        let (control, engine) = pair();
        let (event, ours, _server) = others();
        send(&engine, b"more");
        assert!(matches!(
            control.wait(event.as_fd(), ours.as_fd()),
            Err(ControlError::SecondMessage)
        ));
    }

    #[test]
    fn reports_fit_their_packet() {
        let (control, engine) = pair();
        control
            .report(&Report::Failed {
                message: "\u{1}".repeat(100_000),
            })
            .unwrap();
        let mut buffer = vec![0; MAX_REPORT_LEN + 1];
        // SAFETY: pointer and length belong together.
        let n = unsafe { libc::recv(engine.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        assert!(n > 0 && n as usize <= MAX_REPORT_LEN);
        let report: Report = serde_json::from_slice(&buffer[..n as usize]).unwrap();
        assert!(matches!(report, Report::Failed { .. }));
    }
}
