//! Making, linking, renaming and removing names; READLINK.

use super::{Answer, Call, Passthrough};
use crate::fuse::{Body, decode_device};
use crate::sys::{self, Errno, Result};

impl Passthrough {
    pub(super) fn mknod(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let (mode, device, umask) = (call.args.u32()?, call.args.u32()?, call.args.u32()?);
        call.args.skip(4)?;
        let name = call.args.name()?;
        call.args.end()?;
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK => {}
            _ => return Err(Errno(libc::EINVAL)),
        }
        let parent = self.nodes.get(call.node)?;
        let mode = mode & (libc::S_IFMT | 0o7777);
        call.caller.act(umask, || {
            sys::mknod(parent.fd(), name, mode, decode_device(device))
        })?;
        let found = self.find(&parent, name)?;
        self.put_entry(body, &parent, &found)?;
        Ok(Answer::Body)
    }

    pub(super) fn mkdir(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let (mode, umask) = (call.args.u32()?, call.args.u32()?);
        let name = call.args.name()?;
        call.args.end()?;
        let parent = self.nodes.get(call.node)?;
        call.caller
            .act(umask, || sys::mkdir(parent.fd(), name, mode & 0o7777))?;
        let found = self.find(&parent, name)?;
        self.put_entry(body, &parent, &found)?;
        Ok(Answer::Body)
    }

    pub(super) fn symlink(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let name = call.args.name()?;
        // What the link says is for the guest to follow; the host's side never does.
        let target = call.args.string()?;
        call.args.end()?;
        let parent = self.nodes.get(call.node)?;
        call.caller.act(0, || sys::symlink(target, parent.fd(), name))?;
        let found = self.find(&parent, name)?;
        self.put_entry(body, &parent, &found)?;
        Ok(Answer::Body)
    }

    pub(super) fn readlink(&self, call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let node = self.nodes.get(call.node)?;
        if node.kind() != libc::S_IFLNK {
            return Err(Errno(libc::EINVAL));
        }
        body.fill(libc::PATH_MAX as usize, |into| sys::read_link(node.fd(), into))?;
        Ok(Answer::Body)
    }

    pub(super) fn link(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let existing = call.args.u64()?;
        let name = call.args.name()?;
        call.args.end()?;
        let (node, parent) = (self.nodes.get(existing)?, self.nodes.get(call.node)?);
        sys::link(node.fd(), parent.fd(), name)?;
        let found = self.find(&parent, name)?;
        self.put_entry(body, &parent, &found)?;
        Ok(Answer::Body)
    }

    pub(super) fn unlink(&self, mut call: Call<'_>, directory: bool) -> Result<Answer> {
        let name = call.args.name()?;
        call.args.end()?;
        let parent = self.nodes.get(call.node)?;
        if !directory {
            self.before_removal(&parent, name);
        }
        sys::unlink(parent.fd(), name, directory)?;
        Ok(Answer::Body)
    }

    pub(super) fn rename(&self, mut call: Call<'_>, with_flags: bool) -> Result<Answer> {
        let to = call.args.u64()?;
        let flags = if with_flags { call.args.u32()? } else { 0 };
        if with_flags {
            call.args.skip(4)?;
        }
        let (old, new) = (call.args.name()?, call.args.name()?);
        call.args.end()?;
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT) != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let (from, to) = (self.nodes.get(call.node)?, self.nodes.get(to)?);
        if flags & (libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) == 0 {
            self.before_removal(&to, new);
        }
        let rename = || sys::rename(from.fd(), old, to.fd(), new, flags);
        if flags & libc::RENAME_WHITEOUT != 0 {
            // The whiteout left behind is a new file, and the caller's.
            call.caller.act(0, rename)?;
        } else {
            rename()?;
        }
        self.renamed(&to, new);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.renamed(&from, old);
        }
        Ok(Answer::Body)
    }
}
