//! What the kernel counts for a container.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    path::Path,
};

use husk_agent_protocol::limits::MAX_STATS_LEN;

use super::cgroup::Cgroup;

/// The files that are of use to somebody, what is asked for most at first: these are kept if there is too much.
const FILES: &[&str] = &[
    "cgroup.events",
    "cpu.stat",
    "memory.current",
    "memory.max",
    "memory.stat",
    "memory.events",
    "memory.events.local",
    "memory.peak",
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "pids.current",
    "pids.max",
    "pids.events",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpu.idle",
    "cpu.pressure",
    "memory.pressure",
    "io.pressure",
    "io.stat",
    "rdma.current",
    "rdma.max",
    "misc.current",
];

impl Cgroup {
    /// The text of each file of which the kernel has one, by name; in all at most [`MAX_STATS_LEN`] bytes.
    pub fn statistics(&self) -> HashMap<String, String> {
        let mut left = MAX_STATS_LEN;
        let mut files = HashMap::new();
        let huge = page_sizes(Path::new("/sys/kernel/mm/hugepages"));
        let huge = huge.iter().flat_map(|size| {
            ["current", "max", "events", "rsvd.current"].map(|file| format!("hugetlb.{size}.{file}"))
        });
        for name in FILES.iter().map(|name| (*name).to_owned()).chain(huge) {
            let Some(rest) = left.checked_sub(name.len()) else {
                break;
            };
            if let Some(text) = read(&self.path().join(&name), rest) {
                left = rest.saturating_sub(text.len());
                files.insert(name, text);
            }
        }
        files
    }
}

/// The whole of the file, if it is there, can be read, and has no more than `max` bytes.
fn read(path: &Path, max: usize) -> Option<String> {
    let mut text = String::new();
    let bound = u64::try_from(max).ok()?.checked_add(1)?;
    File::open(path)
        .ok()?
        .take(bound)
        .read_to_string(&mut text)
        .ok()?;
    (text.len() <= max).then_some(text)
}

/// The sizes of huge pages, in the words of the hugetlb controller.
fn page_sizes(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut sizes: Vec<u64> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let kilobytes = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            kilobytes.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size).collect()
}

fn page_size(kilobytes: u64) -> String {
    match kilobytes {
        kilobytes if kilobytes >= 1 << 20 => format!("{}GB", kilobytes >> 20),
        kilobytes if kilobytes >= 1 << 10 => format!("{}MB", kilobytes >> 10),
        kilobytes => format!("{kilobytes}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_the_sizes_that_the_controller_writes() {
        let directory = tempfile::tempdir().unwrap();
        for name in [
            "hugepages-1048576kB",
            "hugepages-64kB",
            "hugepages-2048kB",
            "other",
        ] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        assert_eq!(page_sizes(directory.path()), ["64KB", "2MB", "1GB"]);
        assert_eq!(page_sizes(Path::new("/nonexistent")), Vec::<String>::new());
    }

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("memory.stat");
        fs::write(&file, "anon 0\n").unwrap();
        assert_eq!(read(&file, 7).as_deref(), Some("anon 0\n"));
        assert_eq!(read(&file, 6), None);
        assert_eq!(read(directory.path(), 100), None);
    }
}
