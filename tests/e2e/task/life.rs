//! Create, Start, State, Wait, Kill, Delete, Pause, Resume, Connect, Shutdown.

use std::time::Duration;

use containerd_shim_protos::api::Status;
use ttrpc::Code;

use super::{each, each_with};
use crate::case::Runtime;
use crate::census::Census;
use crate::command::eventually;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn the_whole_life_of_a_task() {
    let census = Census::take();
    each(&["sh", "-c", "echo hello; exec sleep 1000"], |shim| {
        let (streams, created) = shim.create();
        let pid = created.unwrap().pid;
        assert_ne!(pid, 0);
        assert_eq!(shim.status(""), Status::CREATED);
        let state = shim.state("").unwrap();
        assert_eq!(
            (state.pid, state.id.as_str(), state.exit_status),
            (pid, shim.id.as_str(), 0)
        );
        assert_eq!(state.bundle, shim.bundle.path().to_str().unwrap());
        // Waits before the start, and many of them.
        let waiters: Vec<_> = (0..5).map(|_| shim.wait_aside("")).collect();
        assert_eq!(shim.start_process("").unwrap().pid, pid);
        assert_eq!(shim.status(""), Status::RUNNING);
        streams.wait_for("hello");
        let refused = shim.start_process("").unwrap_err();
        assert!(
            matches!(refused.0, Code::FAILED_PRECONDITION | Code::UNKNOWN),
            "a second start: {refused:?}"
        );
        // A running task is not deleted.
        let refused = shim.delete("").unwrap_err();
        assert!(
            matches!(refused.0, Code::FAILED_PRECONDITION | Code::UNKNOWN),
            "{refused:?}"
        );
        assert!(waiters.iter().all(|waiter| waiter.try_recv().is_err()));
        shim.kill("", libc::SIGKILL, false).unwrap();
        let first = waiters[0].recv_timeout(SOON).unwrap().unwrap();
        assert_eq!(first.exit_status, 137);
        for waiter in &waiters[1..] {
            assert_eq!(waiter.recv_timeout(SOON).unwrap().unwrap(), first);
        }
        assert_eq!(shim.wait("").unwrap(), first, "a wait after the end");
        let state = shim.state("").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
        assert_eq!((state.exit_status, &state.exited_at), (137, &first.exited_at));
        assert_eq!(
            shim.kill("", libc::SIGTERM, false).unwrap_err().0,
            Code::NOT_FOUND
        );
        let deleted = shim.delete("").unwrap();
        assert_eq!(
            (deleted.pid, deleted.exit_status, &deleted.exited_at),
            (pid, 137, &first.exited_at)
        );
        for refused in [
            shim.delete("").map(drop),
            shim.state("").map(drop),
            shim.wait("").map(drop),
            shim.kill("", libc::SIGKILL, true).map(drop),
            shim.start_process("").map(drop),
        ] {
            assert_eq!(refused.unwrap_err().0, Code::NOT_FOUND);
        }
        shim.shutdown().unwrap();
    });
    census.assert_unchanged();
}

/// The exit code of a process that ended by itself, and when.
#[test]
fn exit_code_and_time() {
    each(&["sh", "-c", "exit 42"], |shim| {
        let before = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs() as i64;
        shim.run();
        let exit = shim.wait("").unwrap();
        assert_eq!(exit.exit_status, 42);
        let after = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs() as i64;
        let at = exit.exited_at.seconds;
        assert!((before - 1..=after + 1).contains(&at), "{before} {at} {after}");
    });
}

#[test]
fn deleted_before_it_was_started() {
    let census = Census::take();
    each(&["sleep", "1000"], |shim| {
        shim.create().1.unwrap();
        shim.delete("").unwrap();
        assert_eq!(shim.state("").unwrap_err().0, Code::NOT_FOUND);
        shim.shutdown().unwrap();
    });
    census.assert_unchanged();
}

#[test]
fn killed_before_it_was_started() {
    each(&["sleep", "1000"], |shim| {
        shim.create().1.unwrap();
        shim.kill("", libc::SIGKILL, false).unwrap();
        assert_eq!(shim.wait("").unwrap().exit_status, 137);
        assert_eq!(shim.status(""), Status::STOPPED);
        shim.start_process("").unwrap_err();
        shim.delete("").unwrap();
    });
}

#[test]
fn a_second_create_of_the_same_task() {
    each(&["sleep", "1000"], |shim| {
        let _streams = shim.run();
        let again = shim.create_logged("").unwrap_err();
        assert!(
            matches!(again.0, Code::ALREADY_EXISTS | Code::UNKNOWN),
            "{again:?}"
        );
        assert_eq!(shim.status(""), Status::RUNNING);
    });
}

/// A signal to all reaches every process of the container, not only the first.
#[test]
fn kill_all() {
    let script = "trap 'echo first' USR1; sh -c 'trap \"echo child; exit\" USR1; echo ready; while :; do sleep 0.1; done' & \
                  while :; do wait; sleep 0.1; done";
    each(&["sh", "-c", script], |shim| {
        let streams = shim.run();
        streams.wait_for("ready");
        shim.kill("", libc::SIGUSR1, true).unwrap();
        streams.wait_for("first");
        // runc takes "all" at its word for SIGKILL only, since 1.2.
        if shim.runtime == Runtime::Husk || Runtime::runc_version() < (1, 2) {
            streams.wait_for("child");
        }
        shim.kill("", libc::SIGKILL, true).unwrap();
        assert_eq!(shim.wait("").unwrap().exit_status, 137);
    });
}

#[test]
fn kill_of_a_signal_that_is_none() {
    each(&["sleep", "1000"], |shim| {
        let _streams = shim.run();
        shim.kill("", 99, false).unwrap_err();
        assert_eq!(shim.status(""), Status::RUNNING);
    });
}

#[test]
fn pause_and_resume() {
    let script = "echo ready; n=0; while :; do n=$((n + 1)); echo $n; sleep 0.1; done";
    each(&["sh", "-c", script], |shim| {
        let (streams, created) = shim.create();
        created.unwrap();
        shim.pause().unwrap_err();
        shim.start_process("").unwrap();
        streams.wait_for("3\n");
        shim.resume().unwrap_err();
        shim.pause().unwrap();
        assert_eq!(shim.status(""), Status::PAUSED);
        // What it wrote before may still be under way.
        let stood = eventually("a paused container to stand still", || {
            let before = streams.out();
            std::thread::sleep(Duration::from_secs(2));
            (streams.out() == before).then_some(before)
        });
        let refused = shim.delete("").unwrap_err();
        assert!(
            matches!(refused.0, Code::FAILED_PRECONDITION | Code::UNKNOWN),
            "{refused:?}"
        );
        // While paused, State, Pids, Connect and Stats answer all the same.
        shim.pids().unwrap();
        shim.connect(&shim.id).unwrap();
        shim.resume().unwrap();
        assert_eq!(shim.status(""), Status::RUNNING);
        eventually("the container to go on", || {
            (streams.out().len() > stood.len()).then_some(())
        });
        // A paused container can be killed.
        shim.pause().unwrap();
        shim.kill("", libc::SIGKILL, false).unwrap();
        let exit = shim.wait_aside("");
        if exit.recv_timeout(SOON).is_err() {
            // runc leaves it in the freezer, where no signal takes effect until it is resumed.
            assert_eq!(shim.runtime, Runtime::Runc, "a kill while paused takes no effect");
            shim.resume().unwrap();
        }
        assert_eq!(shim.wait("").unwrap().exit_status, 137);
    });
}

#[test]
fn connect_and_pids() {
    each(&["sh", "-c", "sleep 1000 & echo ready; wait"], |shim| {
        let (streams, created) = shim.create();
        let pid = created.unwrap().pid;
        shim.start_process("").unwrap();
        streams.wait_for("ready");
        let connected = shim.connect(&shim.id).unwrap();
        assert_eq!(connected.task_pid, pid);
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", connected.shim_pid)).unwrap();
        assert!(comm.starts_with("containerd-shim"), "{comm}");
        let unknown = shim.connect("no-such-task");
        assert!(unknown.is_err() || unknown.unwrap().task_pid == 0);
        let pids: Vec<u32> = shim
            .pids()
            .unwrap()
            .processes
            .iter()
            .map(|process| process.pid)
            .collect();
        assert!(pids.contains(&pid), "{pids:?} without {pid}");
        for pid in pids {
            assert!(
                std::path::Path::new(&format!("/proc/{pid}")).exists(),
                "{pid} is no process of this host"
            );
        }
    });
}

/// While a task is there, Shutdown changes nothing; afterwards the server ends.
#[test]
fn shutdown() {
    let census = Census::take();
    each(&["sleep", "1000"], |shim| {
        let _streams = shim.run();
        let server = shim.connect(&shim.id).unwrap().shim_pid;
        let _ = shim.shutdown();
        assert_eq!(shim.status(""), Status::RUNNING);
        shim.end();
        eventually("the shim to end", || {
            (!std::path::Path::new(&format!("/proc/{server}")).exists()).then_some(())
        });
    });
    census.assert_unchanged();
}

/// The end of a task is reported when its process ends, though a child of it still holds the output open.
#[test]
fn a_background_child_holds_the_output_open() {
    // Not in the container's pid namespace, whose end takes all with it: the host's stays in the exec.
    each(&["sleep", "1000"], |shim| {
        let _streams = shim.run();
        let (streams, added) = shim.exec(
            "e",
            &["sh", "-c", "sleep 1000 & echo done; exit 5"],
            serde_json::json!({}),
        );
        added.unwrap();
        shim.start_process("e").unwrap();
        let exit = shim
            .wait_aside("e")
            .recv_timeout(SOON)
            .expect("the exit waits for the child")
            .unwrap();
        assert_eq!(exit.exit_status, 5);
        streams.wait_for("done");
        assert!(!streams.ended(), "the child's output is still open");
    });
}

/// What containerd tells its listeners of a life, in order.
#[test]
fn events() {
    each(&["sh", "-c", "exit 3"], |shim| {
        let mut events = crate::containerd::events();
        shim.run();
        shim.wait("").unwrap();
        if shim.runtime == Runtime::Runc {
            // Whose shim may tell it after the deletion.
            events.wait_for("/tasks/exit");
        }
        shim.delete("").unwrap();
        events.wait_for("/tasks/delete");
        let seen = events.seen();
        let at = |topic: &str| {
            let line = seen
                .lines()
                .position(|line| line.contains(topic) && line.contains(&shim.id));
            line.unwrap_or_else(|| panic!("no {topic} under {:?}: {seen}", shim.runtime))
        };
        let order = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"].map(at);
        assert!(order.is_sorted(), "{:?}: {seen}", shim.runtime);
        let exits = seen
            .lines()
            .filter(|line| line.contains("/tasks/exit") && line.contains(&shim.id))
            .count();
        assert_eq!(exits, 1, "{seen}");
    });
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    let census = Census::take();
    each_with(
        &["no-such-program"],
        |_| (),
        |shim| {
            let (_streams, created) = shim.create();
            // runc says so at Create, too.
            let refused = created
                .map(drop)
                .and_then(|()| shim.start_process("").map(drop))
                .unwrap_err();
            assert!(
                refused.1.contains("no-such-program") && refused.1.contains("not found"),
                "{refused:?}"
            );
            let _ = shim.delete("");
            let _ = shim.shutdown();
        },
    );
    census.assert_unchanged();
}
