//! Exec, and what is asked of execs.

use containerd_shim_protos::api::Status;
use containerd_shim_protos::shim::oci::ProcessDetails;
use protobuf::Message;
use serde_json::json;
use ttrpc::Code;

use super::{each, each_with};
use crate::case::Runtime;

const SLEEP: &[&str] = &["sleep", "1000"];

#[test]
fn the_whole_life_of_an_exec() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        let (mut streams, added) =
            shim.exec("e", &["sh", "-c", "read line; echo got $line; exit 7"], json!({}));
        added.unwrap();
        assert_eq!(shim.status("e"), Status::CREATED);
        let twice = shim.exec("e", &["true"], json!({})).1.unwrap_err();
        assert_eq!(twice.0, Code::ALREADY_EXISTS, "{twice:?}");
        let wait = shim.wait_aside("e");
        streams.open_stdin();
        shim.start_process("e").unwrap();
        assert_eq!(shim.status("e"), Status::RUNNING);
        streams.write(b"words\n");
        let exit = wait
            .recv_timeout(std::time::Duration::from_secs(60))
            .unwrap()
            .unwrap();
        assert_eq!(exit.exit_status, 7);
        streams.wait_for("got words");
        assert_eq!(shim.status("e"), Status::STOPPED);
        let refused = shim.kill("e", libc::SIGKILL, false).unwrap_err();
        assert!(
            matches!(refused.0, Code::NOT_FOUND | Code::FAILED_PRECONDITION),
            "{refused:?}"
        );
        assert_eq!(shim.delete("e").unwrap().exit_status, 7);
        assert_eq!(shim.state("e").unwrap_err().0, Code::NOT_FOUND);
        assert_eq!(shim.delete("e").unwrap_err().0, Code::NOT_FOUND);
        assert_eq!(shim.status(""), Status::RUNNING);
    });
}

#[test]
fn one_that_was_not_started() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        shim.exec("e", &["true"], json!({})).1.unwrap();
        let refused = shim.kill("e", libc::SIGTERM, false).unwrap_err();
        assert!(
            matches!(
                refused.0,
                Code::FAILED_PRECONDITION | Code::NOT_FOUND | Code::UNKNOWN
            ),
            "{refused:?}"
        );
        shim.delete("e").unwrap();
        assert_eq!(shim.state("e").unwrap_err().0, Code::NOT_FOUND);
    });
}

#[test]
fn after_the_container_has_ended() {
    each(&["true"], |shim| {
        shim.run();
        shim.wait("").unwrap();
        let (_streams, added) = shim.exec("e", &["true"], json!({}));
        let refused = added
            .map(drop)
            .and_then(|()| shim.start_process("e").map(drop))
            .unwrap_err();
        assert!(
            matches!(
                refused.0,
                Code::FAILED_PRECONDITION | Code::UNKNOWN | Code::NOT_FOUND
            ),
            "{refused:?}"
        );
    });
}

#[test]
fn a_command_that_is_not_there() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        let (_streams, added) = shim.exec("e", &["no-such-program"], json!({}));
        added.unwrap();
        let refused = shim.start_process("e").unwrap_err();
        assert!(
            refused.1.contains("no-such-program") && refused.1.contains("not found"),
            "{refused:?}"
        );
        shim.delete("e").unwrap();
        assert_eq!(
            shim.exec_to_end("f", &["echo", "fine"], json!({})),
            ("fine\n".to_owned(), 0)
        );
    });
}

/// The exec's own process object decides, not the container's.
#[test]
fn its_own_process_object() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        let script = "id -u; id -G; pwd; umask; echo $COLOUR; ulimit -n; grep -E '^(NoNewPrivs|CapEff|CapBnd):' /proc/self/status; cat /proc/self/oom_score_adj";
        let change = json!({
            "user": {"uid": 1234, "gid": 4321, "umask": 0o77, "additionalGids": [900]}, "cwd": "/tmp", "env": ["PATH=/bin", "COLOUR=green"],
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}], "noNewPrivileges": false, "oomScoreAdj": 77,
            "capabilities": {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
        });
        let (out, code) = shim.exec_to_end("e", &["sh", "-c", script], change);
        assert_eq!(code, 0);
        let rest =
            out.replacen("\n0077\n", "\n", 1)
                .replacen("\nNoNewPrivs:\t0\n77\n", "\nNoNewPrivs:\t0\n", 1);
        let rest = match shim.runtime {
            // runc's exec has no umask and no oomScoreAdj of its own, whatever its process object says.
            Runtime::Runc => rest
                .replacen("\n0022\n", "\n", 1)
                .lines()
                .take(8)
                .map(|line| format!("{line}\n"))
                .collect(),
            Runtime::Husk => {
                assert!(out.contains("\n0077\n") && out.ends_with("\n77\n"), "{out}");
                rest
            }
        };
        assert_eq!(
            rest,
            "1234\n4321 900\n/tmp\ngreen\n55\nCapEff:\t0000000000000020\nCapBnd:\t0000000000000020\nNoNewPrivs:\t0\n"
        );
    });
}

/// The container's filter, namespaces, cgroup and root are the exec's too.
#[test]
fn in_the_container() {
    each_with(
        SLEEP,
        |bundle| {
            bundle.change(&json!({"linux": {"seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
            }}}));
        },
        |shim| {
            let _streams = shim.run();
            let script = "probe mkdir /x 0; cat /proc/self/cgroup; hostname; cat /proc/1/comm; \
                          for n in pid ipc uts mnt net cgroup; do test \"$(readlink /proc/1/ns/$n)\" = \"$(readlink /proc/self/ns/$n)\" || echo other $n; done; \
                          test \"$(grep -c . /sys/fs/cgroup/cgroup.procs)\" -ge 2 && echo both";
            let (out, _) = shim.exec_to_end("e", &["sh", "-c", script], json!({}));
            assert_eq!(out, "mkdir: ENOSYS\n0::/\nhusk-e2e\nsleep\nboth\n");
        },
    );
}

#[test]
fn a_scheduler_and_io_priority_of_its_own() {
    each(SLEEP, |shim| {
        if shim.runtime == crate::case::Runtime::Runc && crate::case::Runtime::runc_version() < (1, 2) {
            return;
        }
        let _streams = shim.run();
        let change = json!({"scheduler": {"policy": "SCHED_IDLE"}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}});
        let (out, _) = shim.exec_to_end(
            "e",
            &[
                "sh",
                "-c",
                "probe scheduler | cut -d' ' -f1,2; probe ioprio_get 1 0",
            ],
            change,
        );
        assert_eq!(out, "policy 5\nioprio_get = 24576\n");
    });
}

/// Which CPUs an exec may use: of one there is not much choice, but a CPU that is not there cannot be had.
#[test]
fn cpu_affinity() {
    each(SLEEP, |shim| {
        if shim.runtime == crate::case::Runtime::Runc && crate::case::Runtime::runc_version() < (1, 3) {
            return;
        }
        let _streams = shim.run();
        let change = json!({"execCPUAffinity": {"initial": "0", "final": "0"}});
        let (out, _) = shim.exec_to_end("e", &["grep", "Cpus_allowed_list", "/proc/self/status"], change);
        assert_eq!(out, "Cpus_allowed_list:\t0\n");
        let (_streams, added) = shim.exec(
            "f",
            &["true"],
            json!({"execCPUAffinity": {"initial": "0-", "final": "0"}}),
        );
        let refused = added
            .map(drop)
            .and_then(|()| shim.start_process("f").map(drop))
            .unwrap_err();
        if shim.runtime == crate::case::Runtime::Husk {
            assert!(refused.1.contains("process.execCPUAffinity"), "{refused:?}");
        }
    });
}

/// Pids tells which of them are execs.
#[test]
fn pids_name_the_execs() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        let (_streams, added) = shim.exec("the-exec", SLEEP, json!({}));
        added.unwrap();
        let pid = shim.start_process("the-exec").unwrap().pid;
        assert_ne!(pid, 0);
        let pids = shim.pids().unwrap();
        let named: Vec<(u32, String)> = pids
            .processes
            .iter()
            .filter_map(|process| {
                let details = ProcessDetails::parse_from_bytes(&process.info.as_ref()?.value).unwrap();
                (!details.exec_id.is_empty()).then_some((process.pid, details.exec_id))
            })
            .collect();
        assert_eq!(named, [(pid, "the-exec".to_owned())]);
        assert_eq!(shim.state("the-exec").unwrap().pid, pid);
    });
}

/// The end of the container takes its execs along, and their exits are known before its own.
#[test]
fn ended_with_the_container() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        let (_streams, added) = shim.exec("e", SLEEP, json!({}));
        added.unwrap();
        shim.start_process("e").unwrap();
        let wait = shim.wait_aside("e");
        shim.kill("", libc::SIGKILL, false).unwrap();
        shim.wait("").unwrap();
        let exit = wait
            .recv_timeout(std::time::Duration::from_secs(20))
            .unwrap()
            .unwrap();
        assert_eq!(exit.exit_status, 137);
        shim.delete("e").unwrap();
        shim.delete("").unwrap();
    });
}

#[test]
fn many_at_once() {
    each(SLEEP, |shim| {
        let _streams = shim.run();
        std::thread::scope(|scope| {
            for n in 0..6 {
                scope.spawn(move || {
                    let id = format!("e{n}");
                    let (out, code) =
                        shim.exec_to_end(&id, &["sh", "-c", &format!("echo {n}; exit {n}")], json!({}));
                    assert_eq!((out, code), (format!("{n}\n"), n));
                });
            }
        });
    });
}

/// As systemd does: the kernel takes no process into a cgroup that has handed controllers on to those below it.
#[test]
fn into_a_container_that_has_cgroups_of_its_own() {
    const SCRIPT: &str = "mkdir /sys/fs/cgroup/init && echo 1 > /sys/fs/cgroup/init/cgroup.procs && \
        echo +pids > /sys/fs/cgroup/cgroup.subtree_control && echo ready; exec sleep 1000";
    each_with(
        &["sh", "-c", SCRIPT],
        |bundle| {
            bundle.namespace(json!({"type": "cgroup"}));
            let mounts = bundle.spec["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["type"] != "cgroup");
            mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]}));
        },
        |shim| {
            let streams = shim.run();
            streams.wait_for("ready");
            let (out, code) = shim.exec_to_end("e", &["cat", "/proc/self/cgroup"], json!({}));
            assert_eq!((out.as_str(), code), ("0::/init\n", 0));
        },
    );
}
