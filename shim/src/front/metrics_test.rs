use proptest::prelude::*;

use super::*;

fn files(list: &[(&str, &str)]) -> Files {
    list.iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect()
}

#[test]
fn a_cgroup_s_files_become_containerd_s_metrics() {
    let metrics = metrics(&files(&[
        ("pids.current", "3\n"),
        ("pids.max", "100\n"),
        (
            "cpu.stat",
            "usage_usec 9000\nuser_usec 6000\nsystem_usec 3000\nnice_usec 0\ncore_sched.force_idle_usec 0\n\
             nr_periods 10\nnr_throttled 4\nthrottled_usec 777\nnr_bursts 2\nburst_usec 55\n",
        ),
        (
            "cpu.pressure",
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=4711\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=12\n",
        ),
        (
            "memory.stat",
            "anon 4096\nfile 8192\nkernel_stack 16384\ninactive_file 100\nworkingset_refault_anon 2\n\
             workingset_refault_file 3\npgfault 70\npgmajfault 1\nsomething_new 5\n",
        ),
        ("memory.current", "1048576\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "2097152\n"),
        ("memory.swap.current", "0\n"),
        ("memory.swap.max", "512\n"),
        (
            "memory.events",
            "low 1\nhigh 2\nmax 30\noom 4\noom_kill 3\noom_group_kill 1\n",
        ),
        (
            "io.stat",
            "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n8:0 \n254:1 rbytes=5\n",
        ),
        ("io.pressure", ""),
        (
            "rdma.current",
            "mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\n",
        ),
        ("hugetlb.2MB.current", "4194304\n"),
        ("hugetlb.2MB.max", "max\n"),
        ("hugetlb.2MB.events", "max 9\n"),
        ("hugetlb.1GB.current", "0\n"),
    ]));
    assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 100));
    let cpu = &metrics.cpu;
    assert_eq!(
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec),
        (9000, 6000, 3000)
    );
    assert_eq!(
        (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec),
        (10, 4, 777)
    );
    assert_eq!((cpu.nr_bursts, cpu.burst_usec), (2, 55));
    assert_eq!((cpu.psi.some.avg10, cpu.psi.some.total), (1.5, 4711));
    assert_eq!(cpu.psi.full.total, 12);
    let memory = &metrics.memory;
    assert_eq!(
        (memory.anon, memory.file, memory.kernel_stack),
        (4096, 8192, 16384)
    );
    assert_eq!(
        (memory.usage, memory.usage_limit, memory.max_usage),
        (1 << 20, u64::MAX, 2 << 20)
    );
    assert_eq!((memory.swap_usage, memory.swap_limit), (0, 512));
    assert_eq!((memory.workingset_refault, memory.workingset_activate), (5, 0));
    assert_eq!((memory.pgfault, memory.inactive_file), (70, 100));
    assert!(memory.psi.is_none());
    let events = &metrics.memory_events;
    assert_eq!(
        (events.max, events.oom, events.oom_kill, events.oom_group_kill),
        (30, 4, 3, 1)
    );
    let io: Vec<_> = metrics
        .io
        .usage
        .iter()
        .map(|e| (e.major, e.minor, e.rbytes, e.wbytes, e.rios, e.wios))
        .collect();
    assert_eq!(
        io,
        [
            (8, 16, 1_459_200, 314_773_504, 192, 353),
            (8, 0, 0, 0, 0, 0),
            (254, 1, 5, 0, 0, 0)
        ]
    );
    let rdma: Vec<_> = metrics
        .rdma
        .current
        .iter()
        .map(|e| (e.device.as_str(), e.hca_handles, e.hca_objects))
        .collect();
    assert_eq!(rdma, [("mlx4_0", 2, 2000), ("ocrdma1", 3, u32::MAX)]);
    let pages: Vec<_> = metrics
        .hugetlb
        .iter()
        .map(|e| (e.pagesize.as_str(), e.current, e.max, e.failcnt))
        .collect();
    assert_eq!(pages, [("1GB", 0, 0, 0), ("2MB", 4_194_304, u64::MAX, 9)]);
}

#[test]
fn what_is_not_there_is_not_told() {
    let metrics = metrics(&Files::new());
    assert_eq!(metrics, Metrics::default());
    assert!(metrics.cpu.is_none() && metrics.memory_events.is_none() && metrics.io.is_none());
}

#[test]
fn no_limit_is_the_largest_number() {
    let metrics = metrics(&files(&[("pids.current", "1\n"), ("pids.max", "max\n")]));
    assert_eq!((metrics.pids.current, metrics.pids.limit), (1, u64::MAX));
}

#[test]
fn what_is_malformed_is_left_out() {
    let metrics = metrics(&files(&[
        ("pids.current", "-1\n"),
        (
            "cpu.stat",
            "usage_usec 99999999999999999999999\nuser_usec +5\nsystem_usec 7 8\nnr_periods 6\n",
        ),
        ("cpu.pressure", "some avg10=inf avg60=nan total=1\n"),
        ("memory.current", "1e3\n"),
        ("memory.stat", "anon\n\n \nfile 0x10\n"),
        ("io.stat", "8 rbytes=1\n8:x rbytes=1\n8:1 rbytes=-1\n:\n"),
        ("rdma.max", "d\u{7f} hca_handle=1\n"),
        ("hugetlb.2MB\u{1b}[2J.current", "1\n"),
        ("hugetlb.MB.current", "1\n"),
    ]));
    assert!(metrics.pids.is_none());
    assert_eq!(
        (
            metrics.cpu.usage_usec,
            metrics.cpu.user_usec,
            metrics.cpu.system_usec
        ),
        (0, 0, 0)
    );
    assert_eq!(metrics.cpu.nr_periods, 6);
    assert!(metrics.cpu.psi.is_none());
    assert_eq!(
        (metrics.memory.usage, metrics.memory.anon, metrics.memory.file),
        (0, 0, 0)
    );
    assert!(metrics.io.usage.is_empty() && metrics.rdma.limit.is_empty() && metrics.hugetlb.is_empty());
}

#[test]
fn containerd_knows_the_type() {
    let any = encode(&metrics(&files(&[("pids.current", "2\n")])));
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    assert_eq!(Metrics::parse_from_bytes(&any.value).unwrap().pids.current, 2);
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic_and_bounded(
        name in prop_oneof![
            Just("cpu.stat"), Just("cpu.pressure"), Just("memory.stat"), Just("memory.events"), Just("io.stat"),
            Just("rdma.max"), Just("pids.max"), Just("hugetlb.2MB.events"),
        ],
        text in "(([a-z_]{0,8}|[0-9]{0,25}|max|some|[:=. +-]|\\PC){0,6}\n){0,20}",
        key in "hugetlb\\.\\PC{0,10}\\.current",
    ) {
        let metrics = metrics(&files(&[(name, &text), (&key, &text)]));
        prop_assert!(metrics.write_to_bytes().unwrap().len() <= 4 * text.len() + 256);
    }
}
