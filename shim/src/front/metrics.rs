//! What a container has used, as containerd wants it: its metrics of cgroup v2, filled from the files of the
//! container's cgroup in the guest.
//!
//! The files are the guest's words. Each is read as the kernel writes it (Documentation/admin-guide/cgroup-v2.rst);
//! a file that is not there leaves its fields unset, a line that is not as it should be is left out, and an unknown
//! key is none of our business.

use std::collections::BTreeMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
    RdmaEntry, RdmaStat,
};
use protobuf::{Message, MessageField, MessageFull, well_known_types::any::Any};

/// Most devices, or page sizes, that are told of.
const MAX_ENTRIES: usize = 256;
/// Longest name of a device.
const MAX_NAME_LEN: usize = 64;

/// Names of files -> text.
type Files = BTreeMap<String, String>;

/// The metrics in the files of a container's cgroup.
pub fn metrics(files: &Files) -> Metrics {
    Metrics {
        pids: pids(files).into(),
        cpu: cpu(files).into(),
        memory: memory(files).into(),
        rdma: rdma(files).into(),
        io: io(files).into(),
        hugetlb: hugetlb(files),
        memory_events: memory_events(files).into(),
        ..Metrics::default()
    }
}

/// The metrics as containerd's clients look for them.
pub fn encode(metrics: &Metrics) -> Any {
    Any {
        // containerd's typeurl has no host before the name.
        type_url: Metrics::descriptor().full_name().to_owned(),
        // Encoding into memory fails only for a message past 2 GiB.
        value: metrics.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

fn pids(files: &Files) -> Option<PidsStat> {
    let current = number(files, "pids.current");
    let limit = number(files, "pids.max");
    (current.is_some() || limit.is_some()).then(|| PidsStat {
        current: current.unwrap_or(0),
        limit: limit.unwrap_or(0),
        ..PidsStat::default()
    })
}

fn cpu(files: &Files) -> Option<CPUStat> {
    let stat = keyed(files, "cpu.stat")?;
    let get = |key| stat.get(key).copied().unwrap_or(0);
    Some(CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: pressure(files, "cpu.pressure").into(),
        ..CPUStat::default()
    })
}

fn memory(files: &Files) -> Option<MemoryStat> {
    let stat = keyed(files, "memory.stat");
    let usage = number(files, "memory.current");
    if stat.is_none() && usage.is_none() {
        return None;
    }
    let stat = stat.unwrap_or_default();
    let get = |key| stat.get(key).copied().unwrap_or(0);
    // Since Linux 5.9 the kernel tells the two parts only.
    let parts = |whole, anon, file| match stat.get(whole) {
        Some(n) => *n,
        None => get(anon).saturating_add(get(file)),
    };
    let read = |name| number(files, name).unwrap_or(0);
    Some(MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: parts(
            "workingset_refault",
            "workingset_refault_anon",
            "workingset_refault_file",
        ),
        workingset_activate: parts(
            "workingset_activate",
            "workingset_activate_anon",
            "workingset_activate_file",
        ),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: usage.unwrap_or(0),
        usage_limit: read("memory.max"),
        swap_usage: read("memory.swap.current"),
        swap_limit: read("memory.swap.max"),
        max_usage: read("memory.peak"),
        swap_max_usage: read("memory.swap.peak"),
        psi: pressure(files, "memory.pressure").into(),
        ..MemoryStat::default()
    })
}

fn memory_events(files: &Files) -> Option<MemoryEvents> {
    let events = keyed(files, "memory.events")?;
    let get = |key| events.get(key).copied().unwrap_or(0);
    Some(MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..MemoryEvents::default()
    })
}

fn io(files: &Files) -> Option<IOStat> {
    let text = files.get("io.stat")?;
    let usage = text.lines().filter_map(io_entry).take(MAX_ENTRIES).collect();
    Some(IOStat {
        usage,
        psi: pressure(files, "io.pressure").into(),
        ..IOStat::default()
    })
}

/// A line of `io.stat`: `8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry {
        major: decimal(major)?,
        minor: decimal(minor)?,
        ..IOEntry::default()
    };
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        let field = match key {
            "rbytes" => &mut entry.rbytes,
            "wbytes" => &mut entry.wbytes,
            "rios" => &mut entry.rios,
            "wios" => &mut entry.wios,
            _ => continue,
        };
        *field = decimal(value)?;
    }
    Some(entry)
}

fn rdma(files: &Files) -> Option<RdmaStat> {
    let read = |name| -> Option<Vec<RdmaEntry>> {
        let text: &String = files.get(name)?;
        Some(text.lines().filter_map(rdma_entry).take(MAX_ENTRIES).collect())
    };
    let (current, limit) = (read("rdma.current"), read("rdma.max"));
    if current.is_none() && limit.is_none() {
        return None;
    }
    Some(RdmaStat {
        current: current.unwrap_or_default(),
        limit: limit.unwrap_or_default(),
        ..RdmaStat::default()
    })
}

/// A line of `rdma.current` or `rdma.max`: `mlx4_0 hca_handle=2 hca_object=max`.
fn rdma_entry(line: &str) -> Option<RdmaEntry> {
    let mut words = line.split_ascii_whitespace();
    let mut entry = RdmaEntry {
        device: words.next().filter(|name| is_name(name))?.to_owned(),
        ..RdmaEntry::default()
    };
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        let field = match key {
            "hca_handle" => &mut entry.hca_handles,
            "hca_object" => &mut entry.hca_objects,
            _ => continue,
        };
        *field = u32::try_from(number_or_max(value)?).unwrap_or(u32::MAX);
    }
    Some(entry)
}

/// `hugetlb.2MB.current` and its like, one entry for each size of page.
fn hugetlb(files: &Files) -> Vec<HugeTlbStat> {
    let sizes = files.keys().filter_map(|name| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        is_page_size(size).then_some(size)
    });
    sizes
        .take(MAX_ENTRIES)
        .map(|size| {
            let read = |file: &str| number(files, &format!("hugetlb.{size}.{file}")).unwrap_or(0);
            let events = keyed(files, &format!("hugetlb.{size}.events"));
            HugeTlbStat {
                current: read("current"),
                max: read("max"),
                pagesize: size.to_owned(),
                failcnt: events.and_then(|events| events.get("max").copied()).unwrap_or(0),
                ..HugeTlbStat::default()
            }
        })
        .collect()
}

fn is_page_size(size: &str) -> bool {
    let digits = size.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = size.get(digits.len()..).unwrap_or_default();
    size.len() <= 16 && decimal(digits).is_some() && matches!(unit, "KB" | "MB" | "GB")
}

fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A file of pressure stall information; `None` when it is not there or tells nothing.
fn pressure(files: &Files, name: &str) -> Option<PSIStats> {
    let mut stats = PSIStats::default();
    for line in files.get(name)?.lines() {
        let Some((kind, rest)) = line.split_once(' ') else {
            continue;
        };
        let field = match kind {
            "some" => &mut stats.some,
            "full" => &mut stats.full,
            _ => continue,
        };
        *field = MessageField::some(pressure_data(rest)?);
    }
    (stats.some.is_some() || stats.full.is_some()).then_some(stats)
}

/// `avg10=0.12 avg60=0.00 avg300=0.00 total=4711`.
fn pressure_data(text: &str) -> Option<PSIData> {
    let mut data = PSIData::default();
    for word in text.split_ascii_whitespace() {
        let (key, value) = word.split_once('=')?;
        let field = match key {
            "avg10" => &mut data.avg10,
            "avg60" => &mut data.avg60,
            "avg300" => &mut data.avg300,
            "total" => {
                data.total = decimal(value)?;
                continue;
            }
            _ => continue,
        };
        *field = percent(value)?;
    }
    Some(data)
}

/// A share of time in percent, with two digits after the point.
fn percent(text: &str) -> Option<f64> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, rest) = text.split_once('.')?;
    if !digits(whole) || !digits(rest) {
        return None;
    }
    let share: f64 = text.parse().ok()?;
    (0.0..=100.0).contains(&share).then_some(share)
}

/// A file that holds one number, or `max`, which is the largest one.
fn number(files: &Files, name: &str) -> Option<u64> {
    number_or_max(files.get(name)?.trim_end_matches('\n'))
}

fn number_or_max(text: &str) -> Option<u64> {
    if text == "max" {
        return Some(u64::MAX);
    }
    decimal(text)
}

/// Digits and nothing else (Rust would take a sign).
fn decimal(text: &str) -> Option<u64> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// A file of lines `key value`.
fn keyed<'a>(files: &'a Files, name: &str) -> Option<BTreeMap<&'a str, u64>> {
    let lines = files.get(name)?.lines();
    let pair = |line: &'a str| {
        let (key, value) = line.split_once(' ')?;
        Some((key, decimal(value)?))
    };
    Some(lines.filter_map(pair).collect())
}

#[cfg(test)]
#[path = "metrics_test.rs"]
mod tests;
