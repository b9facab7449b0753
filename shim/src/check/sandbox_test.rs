//! A made /proc with an engine, a VMM, a file server and a stand-in as they have to be, and with one fact changed each.

use std::{fs, os::unix::fs::symlink};

use super::*;
use crate::{engine::Status, host::pid::Identity};

const ENGINE: u32 = 10;
const VMM: u32 = 11;
const FSD: u32 = 12;
const STANDIN: u32 = 13;
const UID: u32 = 70_011;

/// A process to make.
struct Made {
    pid: u32,
    parent: u32,
    name: &'static str,
    ids: u32,
    caps: [u64; 5],
    locked: bool,
    own: &'static [&'static str],
    /// Most files, processes, bytes of a core dump.
    limits: [&'static str; 3],
    fds: Vec<(i32, &'static str, &'static str)>,
    mounts: &'static str,
}

struct Host {
    dir: tempfile::TempDir,
    seen: Seen,
}

const FSD_CAPS: u64 = expected::FSD.0;

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        for place in ["run/share", "empty", "host", "proc"] {
            fs::create_dir_all(dir.path().join(place)).unwrap();
        }
        fs::write(
            run.join("log"),
            "level=info msg=\"husk-vmm: info: locked in by Landlock, ABI 6\" sandbox=pod program=husk-vmm\n\
             level=info msg=\"locked in by Landlock, ABI 77 program=husk-fsd\" sandbox=pod program=husk-vmm\n\
             level=info msg=\"husk-fsd: info: locked in by Landlock, ABI 6\" sandbox=pod program=husk-fsd\n",
        )
        .unwrap();
        let identity = |pid| Identity { pid, started: 1 };
        let seen = Seen {
            namespace: "default".into(),
            id: "pod".into(),
            alive: true,
            vmm: VMM,
            status: Status::default(),
            processes: vec![
                (Role::Engine, identity(ENGINE)),
                (Role::Vmm, identity(VMM)),
                (Role::Fsd, identity(FSD)),
            ],
            dir: run,
        };
        let host = Self { dir, seen };
        host.make(&Made {
            pid: 1,
            name: "init",
            ..Self::root()
        });
        host.make(&Made {
            pid: ENGINE,
            name: "shim",
            parent: 1,
            fds: vec![(5, "/etc/husk", "flags:\t0100000\nmnt_id:\t20\n")],
            ..Self::root()
        });
        host.make(&Self::vmm());
        host.make(&Self::fsd());
        host.make(&Made {
            pid: STANDIN,
            parent: ENGINE,
            name: "husk-standin",
            caps: [0; 5],
            locked: true,
            own: &["net"],
            ..Self::root()
        });
        host
    }

    fn root() -> Made {
        Made {
            pid: 0,
            parent: 0,
            name: "",
            ids: 0,
            caps: [0, u64::MAX >> 23, u64::MAX >> 23, u64::MAX >> 23, 0],
            locked: false,
            own: &[],
            limits: ["524288", "unlimited", "0"],
            fds: vec![],
            mounts: "20 1 0:1 / / rw - ext4 x rw\n21 20 0:2 / /run rw - tmpfs x rw\n",
        }
    }

    fn vmm() -> Made {
        Made {
            pid: VMM,
            parent: ENGINE,
            name: "husk-vmm",
            ids: UID,
            caps: [0; 5],
            locked: true,
            own: &["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"],
            limits: ["1048576", "1024", "0"],
            fds: vec![
                (0, "/dev/null", "flags:\t0100002\nmnt_id:\t20\n"),
                (2, "pipe:[5]", ""),
                (3, "socket:[6]", ""),
                (4, "anon_inode:[eventfd]", ""),
                (5, "/memfd:guest (deleted)", "flags:\t0100002\nmnt_id:\t3\n"),
                (6, "anon_inode:[eventfd]", ""),
                (11, "/dev/net/tun", "flags:\t0104002\nmnt_id:\t20\n"),
                (30, "anon_inode:kvm-vcpu:0", ""),
                (31, "/bin/sh", "flags:\t0100000\nmnt_id:\t40\n"),
            ],
            mounts: "50 49 0:9 / / ro - tmpfs x ro\n",
        }
    }

    fn fsd() -> Made {
        Made {
            pid: FSD,
            parent: ENGINE,
            name: "husk-fsd",
            ids: 0,
            // Now without what it suspends.
            caps: [0, FSD_CAPS, FSD_CAPS & !0x1f, FSD_CAPS, 0],
            locked: true,
            own: &["mnt", "pid", "net", "ipc", "uts", "cgroup"],
            limits: ["524288", "0", "0"],
            fds: vec![
                (4, "socket:[7]", ""),
                (5, "/", "flags:\t012200000\nmnt_id:\t40\n"),
                (6, "/1/fd", "flags:\t012200000\nmnt_id:\t41\n"),
            ],
            mounts: "40 39 0:9 / / rw - ext4 x rw\n",
        }
    }

    fn proc(&self) -> Proc {
        Proc::at(self.dir.path().join("proc"))
    }

    fn make(&self, made: &Made) {
        let dir = self.dir.path().join("proc").join(made.pid.to_string());
        let _ = fs::remove_dir_all(&dir);
        let task = dir.join("task");
        for place in ["ns", "fd", "fdinfo", "task"] {
            fs::create_dir_all(dir.join(place)).unwrap();
        }
        for tid in [made.pid, made.pid + 100] {
            fs::create_dir(task.join(tid.to_string())).unwrap();
            fs::write(task.join(tid.to_string()).join("status"), status(made)).unwrap();
        }
        fs::write(dir.join("status"), status(made)).unwrap();
        let [files, processes, core] = made.limits;
        fs::write(
            dir.join("limits"),
            format!(
                "Limit                     Soft Limit           Hard Limit           Units\n\
                 Max core file size        0                    {core}                    bytes\n\
                 Max processes             0                    {processes}                 processes\n\
                 Max open files            64                   {files}                  files\n"
            ),
        )
        .unwrap();
        fs::write(dir.join("cgroup"), "0::/pod\n").unwrap();
        fs::write(dir.join("mountinfo"), made.mounts).unwrap();
        for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let id = if made.own.contains(&kind) { made.pid } else { 1 };
            symlink(format!("{kind}:[{id}]"), dir.join("ns").join(kind)).unwrap();
        }
        for (number, target, info) in &made.fds {
            symlink(target, dir.join("fd").join(number.to_string())).unwrap();
            fs::write(dir.join("fdinfo").join(number.to_string()), info).unwrap();
        }
        let root = match made.pid {
            VMM => "empty",
            FSD => "run/share",
            _ => "host",
        };
        symlink(self.dir.path().join(root), dir.join("root")).unwrap();
    }

    fn look(&self) -> Vec<Member> {
        look(&self.seen, &self.proc(), Some(6))
    }

    /// The faults of the only process that has any; a file system that can be written to is what the test has.
    #[track_caller]
    fn faults(&self, pid: u32) -> Vec<String> {
        let mut faults = Vec::new();
        for mut member in self.look() {
            member.faults.retain(|fault| !fault.contains("can be written to"));
            if member.pid == pid {
                faults = member.faults;
            } else {
                assert_eq!(member.faults, [""; 0], "of {}", member.pid);
            }
        }
        faults
    }
}

fn status(made: &Made) -> String {
    let Made { ids, .. } = made;
    let [inheritable, permitted, effective, bounding, ambient] = made.caps;
    let flag = u8::from(made.locked);
    format!(
        "Name:\t{}\nPid:\t{}\nPPid:\t{}\nUid:\t{ids}\t{ids}\t{ids}\t{ids}\nGid:\t{ids}\t{ids}\t{ids}\t{ids}\n\
         Groups:\t \nCapInh:\t{inheritable:016x}\nCapPrm:\t{permitted:016x}\nCapEff:\t{effective:016x}\n\
         CapBnd:\t{bounding:016x}\nCapAmb:\t{ambient:016x}\nNoNewPrivs:\t{flag}\nSeccomp:\t{}\nSeccomp_filters:\t{flag}\n",
        made.name,
        made.pid,
        made.parent,
        2 * flag
    )
}

#[test]
fn a_sandbox_as_it_has_to_be_is_without_fault() {
    let host = Host::new();
    let members = host.look();
    let roles: Vec<_> = members.iter().map(|member| (member.role, member.pid)).collect();
    assert_eq!(
        roles,
        [
            (Role::Engine, ENGINE),
            (Role::Vmm, VMM),
            (Role::Fsd, FSD),
            // In no record.
            (Role::StandIn, STANDIN)
        ]
    );
    assert_eq!(host.faults(0), [""; 0]);
    let vmm = &members[1];
    assert_eq!(
        [vmm.landlock, members[2].landlock, members[3].landlock],
        [Some(Landlock::Abi(6)), Some(Landlock::Abi(6)), None]
    );
    let facts = vmm.facts.as_ref().unwrap();
    assert_eq!(facts.threads.len(), 2);
    assert_eq!(facts.cgroups, ["0::/pod"]);
    assert_eq!(facts.limits[0].soft, "64");
}

#[test]
fn what_the_file_server_keeps_is_what_it_says() {
    let kept = husk_fsd::capabilities::set_of(&husk_fsd::capabilities::KEPT);
    assert_eq!(expected::FSD.0, kept);
}

#[test]
fn limits_are_as_they_are_set() {
    use husk_lockdown::limits::{MAX_FILES, MAX_THREADS};
    assert_eq!(
        expected::VMM_LIMITS,
        [("nofile", MAX_FILES), ("nproc", MAX_THREADS), ("core", 0)]
    );
    assert_eq!(
        expected::FSD_LIMITS,
        [("nofile", MAX_FILES), ("nproc", 0), ("core", 0)]
    );
}

#[test]
fn each_missing_fact_of_a_vmm_is_told() {
    let cases: [(&str, Made); 15] = [
        (
            "no namespace of its own of: net, uts, cgroup",
            Made {
                own: &["user", "mnt", "pid", "ipc"],
                ..Host::vmm()
            },
        ),
        (
            "its limit nofile is unlimited, not 1048576 or less",
            Made {
                limits: ["unlimited", "1024", "0"],
                ..Host::vmm()
            },
        ),
        (
            "its limit nproc is 1025, not 1024 or less",
            Made {
                limits: ["64", "1025", "0"],
                ..Host::vmm()
            },
        ),
        (
            "its limit core is 1, not 0 or less",
            Made {
                limits: ["64", "1", "1"],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 4 is none of its own: /dev/kvm",
            Made {
                fds: vec![(4, "/dev/kvm", "flags:\t0100002\nmnt_id:\t20\n")],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 6 is none of its own: /usr/share/vmlinux",
            Made {
                fds: vec![(6, "/usr/share/vmlinux", "flags:\t0100000\nmnt_id:\t20\n")],
                ..Host::vmm()
            },
        ),
        (
            "is root's",
            Made {
                ids: 0,
                ..Host::vmm()
            },
        ),
        (
            "has bounding capabilities: kill",
            Made {
                caps: [0, 0, 0, 1 << 5, 0],
                ..Host::vmm()
            },
        ),
        (
            "thread 111 (husk-vmm) has ambient capabilities: sys_admin",
            Made {
                caps: [0, 0, 0, 0, 1 << 21],
                ..Host::vmm()
            },
        ),
        (
            "no seccomp filter",
            Made {
                locked: false,
                ..Host::vmm()
            },
        ),
        (
            "descriptor 40 is none of its own: /etc/shadow",
            Made {
                fds: vec![(40, "/etc/shadow", "flags:\t0100000\nmnt_id:\t20\n")],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 41 is none of its own: /dir",
            Made {
                fds: vec![(41, "/dir", "flags:\t0300000\nmnt_id:\t40\n")],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 4 is none of its own: /dev/mem",
            Made {
                fds: vec![(4, "/dev/mem", "flags:\t0100002\nmnt_id:\t20\n")],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 42 is none of its own: anon_inode:[io_uring]",
            Made {
                fds: vec![(42, "anon_inode:[io_uring]", "")],
                ..Host::vmm()
            },
        ),
        (
            "descriptor 43 is none of its own: /memfd:other",
            Made {
                fds: vec![(43, "/memfd:other", "flags:\t0100002\nmnt_id:\t3\n")],
                ..Host::vmm()
            },
        ),
    ];
    for (told, made) in cases {
        let host = Host::new();
        host.make(&made);
        let faults = host.faults(VMM);
        assert!(
            faults.iter().any(|fault| fault.contains(told)),
            "{told}: {faults:?}"
        );
    }
}

#[test]
fn a_user_that_others_have_is_not_the_vmms_own() {
    let host = Host::new();
    host.make(&Made {
        pid: 900,
        parent: 1,
        ..Host::vmm()
    });
    assert_eq!(
        host.faults(VMM),
        ["its user is not its own: process 900 has it, too"]
    );
}

#[test]
fn each_missing_fact_of_a_file_server_is_told() {
    let cases = [
        (
            "has needless permitted capabilities: kill",
            Made {
                caps: [0, FSD_CAPS | 1 << 5, 0, FSD_CAPS, 0],
                ..Host::fsd()
            },
        ),
        (
            "lacks bounding capabilities: mknod",
            Made {
                caps: [0, FSD_CAPS, 0, FSD_CAPS & !(1 << 27), 0],
                ..Host::fsd()
            },
        ),
        (
            "no namespace of its own of: pid, net",
            Made {
                own: &["mnt", "ipc", "uts", "cgroup"],
                ..Host::fsd()
            },
        ),
        (
            "its limit nproc is 1024, not 0 or less",
            Made {
                limits: ["64", "1024", "0"],
                ..Host::fsd()
            },
        ),
        (
            "descriptor 9 is none of its own: /etc",
            Made {
                fds: vec![(9, "/etc", "flags:\t012200000\nmnt_id:\t20\n")],
                ..Host::fsd()
            },
        ),
    ];
    for (told, made) in cases {
        let host = Host::new();
        host.make(&made);
        let faults = host.faults(FSD);
        assert!(
            faults.iter().any(|fault| fault.contains(told)),
            "{told}: {faults:?}"
        );
    }
    let host = Host::new();
    let root = host.dir.path().join("proc/12/root");
    fs::remove_file(&root).unwrap();
    symlink("/", root).unwrap();
    assert_eq!(host.faults(FSD), ["its root directory is not the share"]);
}

#[test]
fn one_that_has_ended_is_a_fault() {
    let host = Host::new();
    fs::remove_dir_all(host.dir.path().join("proc/12")).unwrap();
    let faults = host.faults(FSD);
    assert!(faults[0].starts_with("it cannot be looked at"), "{faults:?}");
}

#[test]
fn what_landlock_denies_is_not_made_up() {
    let of = |message: &str, program: &str| {
        let log = format!("level=info msg={message:?} program={program}\n");
        landlock_in(&log, "husk-fsd")
    };
    let locked_in = "husk-fsd: info: locked in by Landlock, ABI 7";
    assert_eq!(of(locked_in, "husk-fsd"), Landlock::Abi(7));
    assert_eq!(of(locked_in, "husk-vmm"), Landlock::Unknown);
    let none = "husk-fsd: warning: this host's kernel has no Landlock to lock the file server in with";
    assert_eq!(of(none, "husk-fsd"), Landlock::Missing);
    assert_eq!(landlock_in("", "husk-fsd"), Landlock::Unknown);
}

#[test]
fn less_than_the_kernels_landlock_is_a_fault() {
    assert_eq!(expected::of_landlock(Landlock::Abi(6), 6), None);
    assert_eq!(expected::of_landlock(Landlock::Unknown, 6), None);
    assert_eq!(expected::of_landlock(Landlock::Missing, 0), None);
    for less in [Landlock::Abi(5), Landlock::Missing] {
        let fault = expected::of_landlock(less, 6).unwrap();
        assert!(fault.contains("this kernel has ABI 6"), "{fault}");
    }
    let host = Host::new();
    let faults = look(&host.seen, &host.proc(), Some(7))[2].faults.clone();
    assert!(
        faults[0].starts_with("Landlock denies it only what ABI 6"),
        "{faults:?}"
    );
}
