//! A fuzzer's bytes, taken apart from the front.

/// What is left of them. Past the end all is zero, so that whoever takes them apart stops at [`is_empty`](Self::is_empty).
#[derive(Clone, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`, from one byte.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.u8()) % end.max(1)
    }

    /// One of `choices`, from one byte.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A number as such numbers are interesting: small, of one of the widths, or next to the largest.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            small @ 0..=0xef => u64::from(small),
            0xf0..=0xf3 => u64::from(self.u16()),
            0xf4..=0xf7 => u64::from(self.u32()),
            0xf8..=0xfb => self.u64(),
            0xfc => u64::from(u32::MAX) - u64::from(self.u8()),
            0xfd => i64::MAX as u64 - u64::from(self.u8()),
            0xfe => u64::MAX - u64::from(self.u8()),
            0xff => 1 << (self.u8() % 64),
        }
    }

    /// Up to `most` bytes: as many as the first byte, or two where that is all ones, says.
    pub fn text(&mut self, most: usize) -> &'a [u8] {
        let count = match self.u8() {
            0xff => usize::from(self.u16()),
            count => usize::from(count),
        };
        self.bytes(count.min(most))
    }
}
