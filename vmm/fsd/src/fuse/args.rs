//! Taking a request apart: fields off its front, and never past its end.

use super::NAME_MAX;
use crate::sys::{Errno, Result};
use std::ffi::CStr;

/// What is left of a request.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    /// The whole of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>().ok_or(Errno(libc::EINVAL))?;
        self.0 = rest;
        Ok(*array)
    }

    /// The next integer.
    ///
    /// # Errors
    /// EINVAL at the end, as for all that follow.
    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next integer.
    ///
    /// # Errors
    /// EINVAL at the end.
    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next integer as an offset or length in a file.
    ///
    /// # Errors
    /// EINVAL at the end, or if it is 2^63 or more.
    pub fn offset(&mut self) -> Result<i64> {
        i64::try_from(self.u64()?).map_err(|_| Errno(libc::EINVAL))
    }

    /// Leaves `n` bytes out.
    ///
    /// # Errors
    /// EINVAL if there are fewer.
    pub fn skip(&mut self, n: usize) -> Result<()> {
        self.bytes(n).map(|_| ())
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// EINVAL if there are fewer.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(n).ok_or(Errno(libc::EINVAL))?;
        self.0 = rest;
        Ok(bytes)
    }

    /// The next string, up to its NUL.
    ///
    /// # Errors
    /// EINVAL if there is no NUL.
    pub fn string(&mut self) -> Result<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno(libc::EINVAL))?;
        self.skip(string.count_bytes().saturating_add(1))?;
        Ok(string)
    }

    /// The next string, which must be the name of a directory entry: one path component, and neither `.` nor `..`.
    ///
    /// # Errors
    /// EINVAL for what is no such name, ENAMETOOLONG for one over [`NAME_MAX`] bytes.
    pub fn name(&mut self) -> Result<&'a CStr> {
        let name = self.string()?;
        check_name(name)?;
        Ok(name)
    }

    /// That nothing is left.
    ///
    /// # Errors
    /// EINVAL if something is.
    pub fn end(&self) -> Result<()> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Errno(libc::EINVAL))
        }
    }
}

fn check_name(name: &CStr) -> Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno(libc::EINVAL));
    }
    if bytes.len() > NAME_MAX {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fuse::InHeader;
    use proptest::prelude::*;

    fn name_of(bytes: &[u8]) -> Result<Vec<u8>> {
        Args::new(bytes).name().map(|n| n.to_bytes().to_vec())
    }

    #[test]
    fn names_are_one_component() {
        for bad in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"a/b\0",
            b"/\0",
            b"../x\0",
            b"no end",
            b"",
        ] {
            assert_eq!(name_of(bad), Err(Errno(libc::EINVAL)), "{bad:?}");
        }
        assert_eq!(
            name_of(&[vec![b'x'; 256], vec![0]].concat()),
            Err(Errno(libc::ENAMETOOLONG))
        );
        assert_eq!(name_of(&[vec![b'x'; 255], vec![0]].concat()).unwrap().len(), 255);
        for good in [&b"...\0"[..], b"..a\0", b"\n\xff \\\0", b" \0"] {
            assert_eq!(name_of(good).unwrap(), good[..good.len() - 1]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            n in any::<usize>(),
        ) {
            let mut args = Args::new(&bytes);
            let _ = InHeader::read(&mut args);
            let _ = args.offset();
            let _ = args.name();
            let _ = args.bytes(n);
            let _ = args.string();
            let _ = args.end();
        }

        #[test]
        fn a_name_that_is_taken_is_one_component(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(name) = name_of(&bytes) {
                prop_assert!(!name.is_empty() && name.len() <= NAME_MAX);
                prop_assert!(!name.contains(&b'/') && name != b"." && name != b"..");
            }
        }
    }
}
