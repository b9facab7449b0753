//! Lists of CPUs and memory nodes, as the kernel writes them: `0-3,8`.

use std::{fs, io, str::FromStr};

/// The largest number in a list: beyond what a kernel can be built for.
const MOST: u32 = 65_535;

/// A list. An empty one is possible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(Vec<(u32, u32)>);

impl CpuList {
    /// The CPUs of this host that are online.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn online_cpus() -> io::Result<Self> {
        read("/sys/devices/system/cpu/online")
    }

    /// The memory nodes of this host that are online.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn online_nodes() -> io::Result<Self> {
        read("/sys/devices/system/node/online")
    }

    /// Whether a number is in it.
    pub fn contains(&self, number: u32) -> bool {
        self.0
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&number))
    }

    /// The numbers, each once, in order.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        let last = self.0.iter().map(|(_, last)| last.saturating_add(1)).max();
        (0..last.unwrap_or(0)).filter(|number| self.contains(*number))
    }

    /// The first that `other` does not have.
    pub fn first_missing_in(&self, other: &Self) -> Option<u32> {
        self.numbers().find(|number| !other.contains(*number))
    }
}

fn read(path: &str) -> io::Result<CpuList> {
    fs::read_to_string(path)?
        .parse()
        .map_err(|()| io::ErrorKind::InvalidData.into())
}

impl FromStr for CpuList {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let number = |text: &str| {
            let number = text.trim().parse::<u32>().ok();
            number.filter(|number| *number <= MOST).ok_or(())
        };
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first <= last { Ok((first, last)) } else { Err(()) }
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let numbers = |text: &str| {
            let list = text.parse::<CpuList>();
            list.map(|list| list.numbers().collect::<Vec<_>>())
        };
        assert_eq!(numbers("0-3,8\n"), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(numbers("2, 1,1-2"), Ok(vec![1, 2]));
        assert_eq!(numbers(""), Ok(vec![]));
        for bad in ["a", "1-", "3-2", "-1", "1,,2", "65536", "99999999999"] {
            assert_eq!(numbers(bad), Err(()), "{bad}");
        }
        let has = "0-2".parse::<CpuList>().unwrap();
        assert_eq!("1-4".parse::<CpuList>().unwrap().first_missing_in(&has), Some(3));
        assert_eq!("1,2".parse::<CpuList>().unwrap().first_missing_in(&has), None);
        assert!(CpuList::online_cpus().unwrap().contains(0));
    }
}
