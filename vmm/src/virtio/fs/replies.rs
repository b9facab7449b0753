//! The device's thread, the server's half of it: replies to the guest, opened files kept, and the server's end.

use super::channel::{Receive, Received};
use super::wire::{Opened, Reply};
use super::worker::{FsWorker, GONE, Outcome, Outstanding, PER_PASS, refuse};
use crate::virtio::buffers::split;
use crate::worker::WorkerError;
use crate::{error, warning};
use husk_vmm_protocol::fs::{HEADER_LEN, ReplyHeader};
use std::io;
use std::os::fd::OwnedFd;

impl FsWorker {
    /// Hands replies on.
    pub(super) fn serve_replies(&mut self) -> Result<(), WorkerError> {
        for _ in 0..PER_PASS {
            let mut reply = std::mem::take(&mut self.reply);
            let received = self.channel.receive(&mut reply);
            let result = match received {
                Ok(Receive::Packet(received)) => self.hand_on(&reply, received).map(|()| true),
                Ok(Receive::Empty) => Ok(false),
                Ok(Receive::End) => {
                    self.lose_server(None);
                    Ok(false)
                }
                Err(e) => {
                    self.lose_server(Some(&e));
                    Ok(false)
                }
            };
            self.reply = reply;
            if !result? {
                break;
            }
        }
        Ok(())
    }

    fn hand_on(&mut self, packet: &[u8], received: Received) -> Result<(), WorkerError> {
        let Received { len, file } = received;
        let Some((ReplyHeader { tag }, _)) =
            ReplyHeader::decode(packet.get(..len.min(packet.len())).unwrap_or_default())
        else {
            warning!("fs: the server sent a packet that is too short");
            return Ok(());
        };
        let Some(Outstanding { queue, chain, header }) = self.outstanding.remove(&tag) else {
            // It came too late: the driver was reset meanwhile. Or it is about what the VMM itself asked for.
            return Ok(());
        };
        let reply = packet
            .get(HEADER_LEN..len)
            .and_then(|body| Some((body, Reply::read(body, &header)?)));
        let memory = self.memory.clone();
        let head = chain.head_index();
        // The chain was good before; if the driver has changed it since, that is its own loss.
        let Ok((_, mut writable)) = split(chain, &memory) else {
            return self.give_back(queue, head, 0);
        };
        let error = match reply {
            None => {
                warning!(
                    "fs: the server's reply to a request of kind {} is not one",
                    header.opcode
                );
                libc::EIO
            }
            Some((body, Reply { error: 0, opened })) => {
                let kept = match opened {
                    Some(opened) => self.keep(opened, file),
                    None => Ok(()),
                };
                match kept {
                    Ok(()) if body.len() <= writable.len() => {
                        let len = writable.write(body);
                        return self.give_back(queue, head, len);
                    }
                    Ok(()) => libc::EIO,
                    Err(error) => error,
                }
            }
            Some((_, Reply { error, .. })) => error,
        };
        let Outcome::Done(len) = refuse(&header, &mut writable, error) else {
            return Ok(());
        };
        self.give_back(queue, head, len)
    }

    /// Keeps an opened file, or takes the open back. The error is the guest's.
    fn keep(&mut self, opened: Opened, file: Option<OwnedFd>) -> Result<(), i32> {
        let kept = match file {
            Some(file) => self
                .files
                .enter(opened.handle, file)
                .map_err(|e| warning!("fs: {e}")),
            // The kernel drops a descriptor for which the process has no number left.
            None => {
                warning!("fs: the VMM has no descriptor left for a file that the guest opens");
                Err(())
            }
        };
        kept.map_err(|()| {
            self.owed.extend(opened.undo());
            self.flush();
            libc::ENFILE
        })
    }

    /// The server is gone: all that it has is answered, and all that would go to it.
    pub(super) fn lose_server(&mut self, cause: Option<&io::Error>) {
        if !std::mem::replace(&mut self.alive, false) {
            return;
        }
        match cause {
            Some(e) => error!("the file server is gone: {e}"),
            None => error!("the file server is gone"),
        }
        self.waiting = None;
        self.owed.clear();
    }

    /// Answers what the server will not answer any more.
    pub(super) fn answer_orphans(&mut self) -> Result<(), WorkerError> {
        let memory = self.memory.clone();
        for (_, Outstanding { queue, chain, header }) in std::mem::take(&mut self.outstanding) {
            let head = chain.head_index();
            let len = match split(chain, &memory) {
                Ok((_, mut writable)) => match refuse(&header, &mut writable, GONE) {
                    Outcome::Done(len) => len,
                    Outcome::Forwarded => 0,
                },
                Err(_) => 0,
            };
            self.give_back(queue, head, len)?;
        }
        Ok(())
    }
}
