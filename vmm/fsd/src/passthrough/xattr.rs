//! Extended attributes. POSIX ACLs and file capabilities travel as such.
//!
//! What the host's kernel allows the server: `user.*`, `security.capability`, `system.posix_acl_*`. Attributes that
//! need CAP_SYS_ADMIN on the host (`trusted.*`, other `security.*`) are refused with EPERM.

use super::{Answer, Call, Passthrough};
use crate::fuse::{Body, SETXATTR_ACL_KILL_SGID};
use crate::sys::{self, Errno, Result};
use std::ffi::CStr;
use std::sync::atomic::Ordering;

/// Longest name (XATTR_NAME_MAX), value (XATTR_SIZE_MAX) and list (XATTR_LIST_MAX), in bytes.
const MAX_NAME_LEN: usize = 255;
const MAX_LEN: usize = 64 * 1024;

impl Passthrough {
    pub(super) fn getxattr(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let size = call.args.u32()?;
        call.args.skip(4)?;
        let name = attribute(&mut call)?;
        let node = self.nodes.get(call.node)?;
        answer_sized(size, body, |into| sys::xattr::get(node.fd(), name, into))
    }

    pub(super) fn listxattr(&self, mut call: Call<'_>, body: &mut Body) -> Result<Answer> {
        let size = call.args.u32()?;
        let node = self.nodes.get(call.node)?;
        answer_sized(size, body, |into| sys::xattr::list(node.fd(), into))
    }

    pub(super) fn setxattr(&self, mut call: Call<'_>) -> Result<Answer> {
        let (size, flags) = (call.args.u32()?, call.args.u32()?);
        let mut more_flags = 0;
        if self.long_setxattr.load(Ordering::Relaxed) {
            more_flags = call.args.u32()?;
            call.args.skip(4)?;
        }
        let name = attribute(&mut call)?;
        let value = call.args.bytes(size as usize)?;
        call.args.end()?;
        let node = self.nodes.get(call.node)?;
        sys::xattr::set(node.fd(), name, value, flags as libc::c_int)?;
        if more_flags & SETXATTR_ACL_KILL_SGID != 0 && node.kind() != libc::S_IFLNK {
            let mode = u32::from(sys::stat(node.fd())?.stx_mode);
            sys::chmod(self.proc_fds(), node.fd(), mode & 0o7777 & !libc::S_ISGID)?;
        }
        Ok(Answer::Body)
    }

    pub(super) fn removexattr(&self, mut call: Call<'_>) -> Result<Answer> {
        let name = attribute(&mut call)?;
        call.args.end()?;
        sys::xattr::remove(self.nodes.get(call.node)?.fd(), name)?;
        Ok(Answer::Body)
    }
}

/// The next string, as an attribute's name.
fn attribute<'a>(call: &mut Call<'a>) -> Result<&'a CStr> {
    let name = call.args.string()?;
    if name.is_empty() || name.count_bytes() > MAX_NAME_LEN {
        return Err(Errno(libc::ERANGE));
    }
    Ok(name)
}

/// Answers with what `read` gives, or with its length if the guest asks for 0 bytes.
fn answer_sized(
    size: u32,
    body: &mut Body,
    mut read: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<Answer> {
    if size == 0 {
        let len = read(&mut [])?;
        body.u32(u32::try_from(len).map_err(|_| Errno(libc::E2BIG))?)?;
        body.u32(0)?;
        return Ok(Answer::Body);
    }
    let wanted = (size as usize).min(MAX_LEN);
    if wanted > body.room() {
        return Err(Errno(libc::EIO));
    }
    body.fill(wanted, read)?;
    Ok(Answer::Body)
}
