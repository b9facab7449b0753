//! LOOKUP, FORGET, and the entry that all replies which name a file begin with.

use super::{Answer, Call, Passthrough, put_valid_nanos, put_valid_seconds};
use crate::fuse::{ATTR_SUBMOUNT, Body, put_attr};
use crate::node::Pinned;
use crate::sys::{self, Result};
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

/// A file that was looked up: the guest knows its node once the reply is out.
pub(super) struct Found {
    pub(super) node: Pinned,
    pub(super) stat: libc::statx,
}

impl Passthrough {
    pub(super) fn lookup(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let name = call.args.name()?;
        call.args.end()?;
        let parent = self.nodes.get(call.node)?;
        let found = self.find(&parent, name)?;
        self.put_entry(body, &parent, &found)?;
        Ok(Answer::Body)
    }

    pub(super) fn forget(&self, mut call: Call<'_>) -> Result<Answer> {
        self.nodes.forget(call.node, call.args.u64()?);
        Ok(Answer::Nothing)
    }

    pub(super) fn batch_forget(&self, mut call: Call<'_>) -> Result<Answer> {
        let count = call.args.u32()?;
        call.args.skip(4)?;
        // Ends with the request's bytes, whatever the count says.
        for _ in 0..count {
            let (node, lookups) = (call.args.u64()?, call.args.u64()?);
            self.nodes.forget(node, lookups);
        }
        Ok(Answer::Nothing)
    }

    /// Looks up the entry `name` of `parent`; counts one lookup.
    pub(super) fn find(&self, parent: &Pinned, name: &CStr) -> Result<Found> {
        self.adopt(self.entry(parent, name)?, Some((parent, name)))
    }

    /// Makes the file that `file` (`O_PATH`) names a node, or finds it; counts one lookup. `place` is where it was found.
    fn adopt(&self, file: OwnedFd, place: Option<(&Pinned, &CStr)>) -> Result<Found> {
        let stat = sys::stat(file.as_fd())?;
        let node = self.nodes.look_up(file, &stat, place)?;
        Ok(Found { node, stat })
    }

    /// The same of a file just opened or made, by its descriptor: its name may mean another file by now.
    pub(super) fn adopt_open(&self, file: &OwnedFd, place: Option<(&Pinned, &CStr)>) -> Result<Found> {
        self.adopt(sys::reopen(self.proc_fds(), file.as_fd(), libc::O_PATH)?, place)
    }

    /// Remembers where a file now is that was renamed to the entry `name` of `parent`.
    pub(super) fn renamed(&self, parent: &Pinned, name: &CStr) {
        self.hold_on(parent, name, Some((parent, name)));
    }

    /// Holds the file whose name `name` in `parent` is about to be removed: if it is its last, there is no way back to it.
    pub(super) fn before_removal(&self, parent: &Pinned, name: &CStr) {
        if self.nodes.have_released() {
            self.hold_on(parent, name, None);
        }
    }

    /// Where this fails, the guest's kernel is told that its node is stale and looks the name up again.
    fn hold_on(&self, parent: &Pinned, name: &CStr, place: Option<(&Pinned, &CStr)>) {
        let Ok(file) = self.entry(parent, name) else {
            return;
        };
        if let Ok(stat) = sys::stat(file.as_fd()) {
            self.nodes.hold_on(file, &stat, place);
        }
    }

    /// Adds a `fuse_entry_out`. When that fails the lookup is taken back.
    pub(super) fn put_entry(&self, body: &mut Body, parent: &Pinned, found: &Found) -> Result<()> {
        self.write_entry(body, parent, found)
            .inspect_err(|_| self.unfind(found))
    }

    /// Takes a lookup back of which the guest will not learn.
    pub(super) fn unfind(&self, found: &Found) {
        self.nodes.forget(found.node.id(), 1);
    }

    fn write_entry(&self, body: &mut Body, parent: &Pinned, found: &Found) -> Result<()> {
        let mut flags = 0;
        if self.submounts.load(Ordering::Relaxed)
            && found.node.kind() == libc::S_IFDIR
            && !found.node.key().same_mount(parent.key())
        {
            flags |= ATTR_SUBMOUNT;
        }
        body.u64(found.node.id())?;
        body.u64(0)?; // generation: numbers are never given out twice
        put_valid_seconds(body)?; // of the entry
        put_valid_seconds(body)?; // of the attributes
        put_valid_nanos(body)?;
        put_valid_nanos(body)?;
        put_attr(body, &found.stat, flags)
    }
}
