//! Building a reply, and the structures that replies are made of.

use super::encode_device;
use crate::sys::{Errno, Result};

/// A reply's body as it is built; never longer than the guest has room for.
#[derive(Debug)]
pub struct Body {
    bytes: Vec<u8>,
    start: usize,
    limit: usize,
}

impl Body {
    /// An empty body after `start` bytes of headers, in a buffer of at most `capacity` bytes in all.
    pub fn new(start: usize, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity.max(start));
        bytes.resize(start, 0);
        Self {
            bytes,
            start,
            limit: capacity,
        }
    }

    /// Empties the body and sets how many bytes it may have, as far as the buffer goes.
    pub fn reset(&mut self, limit: usize) {
        self.bytes.truncate(self.start);
        self.limit = limit.saturating_add(self.start).min(self.bytes.capacity());
    }

    /// Bytes of the body so far.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    /// Whether the body is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that may still be added.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// EIO if there is no room, as for all that follow: the guest gave too little for the answer.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.room() {
            return Err(Errno(libc::EIO));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Adds an integer.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn u32(&mut self, value: u32) -> Result<()> {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds an integer.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn u64(&mut self, value: u64) -> Result<()> {
        self.bytes(&value.to_le_bytes())
    }

    /// Adds zeros.
    ///
    /// # Errors
    /// EIO if there is no room.
    pub fn zeros(&mut self, n: usize) -> Result<()> {
        if n > self.room() {
            return Err(Errno(libc::EIO));
        }
        self.bytes.resize(self.bytes.len().saturating_add(n), 0);
        Ok(())
    }

    /// Adds up to `n` bytes (fewer if there is less room) that `fill` writes; it returns how many it wrote.
    ///
    /// # Errors
    /// What `fill` returns.
    pub fn fill(&mut self, n: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize>) -> Result<usize> {
        let before = self.bytes.len();
        self.zeros(n.min(self.room()))?;
        let result = fill(self.bytes.get_mut(before..).unwrap_or_default());
        let written = result.unwrap_or(0);
        self.bytes.truncate(before.saturating_add(written));
        result
    }

    /// The headers' bytes, to be filled in at the end.
    pub fn headers(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.start).unwrap_or_default()
    }

    /// Headers and body.
    pub fn packet(&self) -> &[u8] {
        &self.bytes
    }
}

/// Adds a `fuse_attr`.
///
/// # Errors
/// EIO if there is no room.
pub fn put_attr(body: &mut Body, stat: &libc::statx, flags: u32) -> Result<()> {
    for value in [
        stat.stx_ino,
        stat.stx_size,
        stat.stx_blocks,
        stat.stx_atime.tv_sec as u64,
        stat.stx_mtime.tv_sec as u64,
        stat.stx_ctime.tv_sec as u64,
    ] {
        body.u64(value)?;
    }
    for value in [
        stat.stx_atime.tv_nsec,
        stat.stx_mtime.tv_nsec,
        stat.stx_ctime.tv_nsec,
        u32::from(stat.stx_mode),
        stat.stx_nlink,
        stat.stx_uid,
        stat.stx_gid,
        encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        stat.stx_blksize,
        flags,
    ] {
        body.u32(value)?;
    }
    Ok(())
}

/// Adds a `fuse_statx`.
///
/// # Errors
/// EIO if there is no room.
pub fn put_statx(body: &mut Body, stat: &libc::statx) -> Result<()> {
    let known = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    body.u32(stat.stx_mask & known)?;
    body.u32(stat.stx_blksize)?;
    body.u64(stat.stx_attributes)?;
    body.u32(stat.stx_nlink)?;
    body.u32(stat.stx_uid)?;
    body.u32(stat.stx_gid)?;
    body.u32(u32::from(stat.stx_mode))?;
    body.u64(stat.stx_ino)?;
    body.u64(stat.stx_size)?;
    body.u64(stat.stx_blocks)?;
    body.u64(stat.stx_attributes_mask)?;
    for time in [&stat.stx_atime, &stat.stx_btime, &stat.stx_ctime, &stat.stx_mtime] {
        body.u64(time.tv_sec as u64)?;
        body.u32(time.tv_nsec)?;
        body.u32(0)?;
    }
    for value in [
        stat.stx_rdev_major,
        stat.stx_rdev_minor,
        stat.stx_dev_major,
        stat.stx_dev_minor,
    ] {
        body.u32(value)?;
    }
    body.zeros(14 * 8)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn structures_have_the_kernels_lengths() {
        // SAFETY: statx is plain integers, for which zero is valid.
        let stat: libc::statx = unsafe { std::mem::zeroed() };
        let mut body = Body::new(0, 4096);
        put_attr(&mut body, &stat, 0).unwrap();
        assert_eq!(body.len(), 88);
        body.reset(4096);
        put_statx(&mut body, &stat).unwrap();
        assert_eq!(body.len(), 256);
    }

    #[test]
    fn a_body_stays_within_its_limit() {
        let mut body = Body::new(24, 100);
        body.reset(10);
        body.u64(1).unwrap();
        assert_eq!(body.u32(1), Err(Errno(libc::EIO)));
        assert_eq!(body.room(), 2);
        assert_eq!(body.fill(100, |b| Ok(b.len())), Ok(2));
        body.reset(usize::MAX);
        assert_eq!(body.room(), 76);
        assert_eq!(body.fill(8, |_| Err(Errno(5))), Err(Errno(5)));
        assert!(body.is_empty());
        assert_eq!(body.packet().len(), 24);
    }
}
