//! systemd's journal, by its own protocol: one datagram for each entry, with fields that can be searched for.
//!
//! Source: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.

use std::{
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

use tracing::Level;

use super::{Identity, line::Line};

/// Where the journal listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// The journal.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journal {
    /// The journal that listens at `path`; `None` when there is none.
    pub fn open(path: impl AsRef<Path>) -> Option<Self> {
        let path = path.as_ref().to_owned();
        if !path.exists() {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Self { socket, path })
    }

    /// Sends an entry. One that the journal does not take at once is lost to it.
    pub fn send(&self, line: &Line, identity: &Identity) {
        let priority = match line.level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        let mut entry = Vec::new();
        let fixed = [
            ("MESSAGE", line.message.as_str()),
            ("PRIORITY", priority),
            ("SYSLOG_IDENTIFIER", identity.program),
            ("HUSK_NAMESPACE", &identity.namespace),
            ("HUSK_SANDBOX", &identity.sandbox),
        ];
        for (name, value) in fixed {
            if !value.is_empty() {
                field(&mut entry, name, value);
            }
        }
        for (name, value) in &line.fields {
            let name: String = name
                .chars()
                .map(|c| {
                    if c.is_ascii_alphanumeric() {
                        c.to_ascii_uppercase()
                    } else {
                        '_'
                    }
                })
                .collect();
            field(&mut entry, &format!("HUSK_{name}"), value);
        }
        let _ = self.socket.send_to(&entry, &self.path);
    }
}

fn field(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend(name.as_bytes());
    if value.contains('\n') {
        entry.push(b'\n');
        entry.extend((value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend(value.as_bytes());
    entry.push(b'\n');
}
