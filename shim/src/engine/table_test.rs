use proptest::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

/// A table with a running container `c`.
fn running() -> (Table, UnboundedReceiver<Event>) {
    let (sender, events) = unbounded_channel();
    let mut table = Table::new(sender);
    make(&mut table, "c");
    table.begin_start("c").unwrap();
    table.finish_start("c", None, Ok(None));
    (table, events)
}

fn make(table: &mut Table, id: &str) {
    table.reserve(id, false).unwrap();
    table
        .commit(id, 1, Streams::none(), &mut Undo::default())
        .unwrap();
    table.set_host_pid(id, None, 42);
}

fn run_exec(table: &mut Table, exec: &str) {
    table.add_exec("c", exec, vec![], false).unwrap();
    table.set_host_pid("c", Some(exec), 43);
    table.begin_exec("c", exec).unwrap();
    table.finish_start("c", Some(exec), Ok(Some(2)));
}

fn now() -> SystemTime {
    SystemTime::now()
}

fn exited(exec: Option<&str>, status: u32) -> GuestEvent {
    GuestEvent::Exited {
        container: "c".into(),
        exec: exec.map(str::to_owned),
        status,
    }
}

/// Who ended, with which status, in order.
fn ends(events: &mut UnboundedReceiver<Event>) -> Vec<(Option<String>, u32)> {
    let mut ends = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let Event::Exited { exec, status, .. } = event {
            ends.push((exec, status));
        }
    }
    ends
}

fn end(exec: &str, status: u32) -> (Option<String>, u32) {
    ((!exec.is_empty()).then(|| exec.to_owned()), status)
}

#[test]
fn the_init_process_ends_last() {
    let (mut table, mut events) = running();
    run_exec(&mut table, "e");
    assert_eq!(table.guest_event(exited(None, 0), now()), After::Held("c".into()));
    assert_eq!(ends(&mut events), []);
    assert_eq!(table.status("c", None).unwrap(), ProcessStatus::Running);
    assert!(table.add_exec("c", "late", vec![], false).is_err());
    assert_eq!(table.guest_event(exited(Some("e"), 137), now()), After::Nothing);
    assert_eq!(ends(&mut events), [end("e", 137), end("", 0)]);
}

#[test]
fn an_end_is_told_with_the_pid_on_the_host_and_a_kill_there_decides_the_status() {
    let (mut table, mut events) = running();
    run_exec(&mut table, "e");
    table.set_killed("c", None, 139);
    table.guest_event(exited(Some("e"), 1), now());
    table.guest_event(exited(None, 0), now());
    let mut ends = Vec::new();
    while let Ok(Event::Exited { status, pid, .. }) = events.try_recv() {
        ends.push((pid, status));
    }
    assert_eq!(ends, [(43, 1), (42, 139)]);
}

#[test]
fn execs_whose_end_is_not_told_are_ended() {
    let (mut table, mut events) = running();
    run_exec(&mut table, "e");
    run_exec(&mut table, "f");
    table.guest_event(exited(None, 3), now());
    table.release("c", now());
    assert_eq!(
        ends(&mut events),
        [end("e", KILLED), end("f", KILLED), end("", 3)]
    );
    table.release("c", now());
    table.guest_event(exited(Some("e"), 0), now());
    assert_eq!(ends(&mut events), []);
}

/// The container was killed while an exec of it was on its way.
#[test]
fn an_exec_that_does_not_start_holds_the_end_back_no_longer() {
    let (mut table, mut events) = running();
    table.add_exec("c", "late", vec![], false).unwrap();
    table.begin_exec("c", "late").unwrap();
    assert_eq!(
        table.guest_event(exited(None, 137), now()),
        After::Held("c".into())
    );
    assert_eq!(ends(&mut events), []);
    let killed = EngineError::Guest("the process was killed before its exec".into());
    table.finish_start("c", Some("late"), Err(&killed));
    assert_eq!(ends(&mut events), [end("", 137)]);
    table.release("c", now());
    assert_eq!(ends(&mut events), []);
}

#[test]
fn out_of_memory_is_told_before_the_end_it_caused() {
    let (mut table, mut events) = running();
    table.guest_event(
        GuestEvent::Oom {
            container: "c".into(),
        },
        now(),
    );
    table.guest_event(exited(None, 137), now());
    assert_eq!(
        events.try_recv().unwrap(),
        Event::Oom {
            container: "c".into()
        }
    );
    assert_eq!(ends(&mut events), [end("", 137)]);
}

#[test]
fn with_the_machine_all_end_once_and_in_order() {
    let (mut table, mut events) = running();
    run_exec(&mut table, "e");
    table.add_exec("c", "unstarted", vec![], false).unwrap();
    let unstarted = table.watch("c", Some("unstarted")).unwrap();
    table.guest_event(exited(None, 5), now());
    table.machine_ended("gone", now());
    table.machine_ended("gone twice", now());
    assert_eq!(ends(&mut events), [end("e", KILLED), end("", 5)]);
    assert!(unstarted.borrow().is_some());
    assert!(matches!(table.reserve("d", false), Err(EngineError::SandboxEnded(reason)) if reason == "gone"));
    assert!(matches!(
        table.begin_delete("c"),
        Ok(Some(Exit { status: 5, .. }))
    ));
}

#[test]
fn an_end_may_overtake_the_answer_to_the_start() {
    let (sender, mut events) = unbounded_channel();
    let mut table = Table::new(sender);
    make(&mut table, "c");
    table.begin_start("c").unwrap();
    table.guest_event(exited(None, 9), now());
    table.finish_start("c", None, Ok(None));
    assert!(matches!(
        table.status("c", None).unwrap(),
        ProcessStatus::Stopped { status: 9, .. }
    ));
    assert_eq!(ends(&mut events), [end("", 9)]);
}

#[test]
fn states_allow_what_they_should() {
    let (mut table, mut events) = running();
    let precondition = |result: Result<_, _>| matches!(result, Err(EngineError::FailedPrecondition(_)));
    let not_found = |result: Result<_, _>| matches!(result, Err(EngineError::NotFound(_)));
    assert!(matches!(
        table.reserve("c", false),
        Err(EngineError::AlreadyExists(_))
    ));
    assert!(precondition(table.begin_start("c")));
    assert!(precondition(table.begin_delete("c").map(drop)));
    table.add_exec("c", "e", vec![], false).unwrap();
    assert!(matches!(
        table.add_exec("c", "e", vec![], false),
        Err(EngineError::AlreadyExists(_))
    ));
    assert!(precondition(table.check_signal("c", Some("e"))));
    assert!(not_found(table.check_signal("c", Some("x"))));
    assert!(not_found(table.begin_exec("c", "x").map(drop)));
    table.begin_exec("c", "e").unwrap();
    assert!(precondition(table.begin_exec("c", "e").map(drop)));
    assert!(precondition(table.delete_exec("c", "e").map(drop)));
    let error = EngineError::CommandNotFound("no".into());
    table.finish_start("c", Some("e"), Err(&error));
    assert!(matches!(
        table.status("c", Some("e")).unwrap(),
        ProcessStatus::Stopped { status: 127, .. }
    ));
    assert_eq!(ends(&mut events), [], "an exec that did not start has no exit");
    assert!(not_found(table.check_signal("c", Some("e"))));
    assert_eq!(table.delete_exec("c", "e").unwrap().status, 127);
    assert!(not_found(table.delete_exec("c", "e").map(drop)));
    table.guest_event(exited(None, 0), now());
    assert!(not_found(table.check_signal("c", None)));
    assert!(precondition(table.add_exec("c", "e", vec![], false)));
    table.begin_delete("c").unwrap();
    assert!(not_found(table.begin_delete("c").map(drop)));
    table.finish_delete("c");
    assert!(not_found(table.status("c", None).map(drop)));
}

#[test]
fn a_start_that_fails_is_the_end_of_the_container() {
    let (sender, mut events) = unbounded_channel();
    let mut table = Table::new(sender);
    make(&mut table, "c");
    table.begin_start("c").unwrap();
    table.finish_start("c", None, Err(&EngineError::CommandNotExecutable("no".into())));
    table.guest_event(exited(None, 1), now());
    assert_eq!(ends(&mut events), [end("", 126)]);
}

#[test]
fn a_container_in_the_making_is_not_seen() {
    let (mut table, mut events) = running();
    table.reserve("d", false).unwrap();
    assert_eq!(table.ids(), ["c"]);
    assert!(table.status("d", None).is_err());
    table.abandon("c");
    table.abandon("d");
    table.reserve("d", false).unwrap();
    let died = GuestEvent::Exited {
        container: "d".into(),
        exec: None,
        status: 4,
    };
    table.guest_event(died, now());
    assert_eq!(ends(&mut events), []);
    table
        .commit("d", 1, Streams::none(), &mut Undo::default())
        .unwrap();
    assert_eq!(ends(&mut events), [end("", 4)], "its end is told once it is seen");
}

#[test]
fn a_pause_under_way_is_told_and_ends_with_the_container() {
    let (mut table, _events) = running();
    table.begin_pause("c").unwrap();
    assert_eq!(table.status("c", None).unwrap(), ProcessStatus::Pausing);
    for error in [table.begin_pause("c"), table.begin_resume("c")] {
        assert!(matches!(error, Err(EngineError::FailedPrecondition(_))));
    }
    assert!(table.finish_freeze("c", true));
    table.begin_resume("c").unwrap();
    assert_eq!(table.status("c", None).unwrap(), ProcessStatus::Paused);
    assert!(table.begin_resume("c").is_err());
    // A resume that fails leaves it paused.
    table.finish_freeze("c", true);
    table.begin_resume("c").unwrap();
    table.finish_freeze("c", false);
    assert_eq!(table.status("c", None).unwrap(), ProcessStatus::Running);
    table.begin_pause("c").unwrap();
    table.guest_event(exited(None, 137), now());
    assert!(!table.finish_freeze("c", true), "it has ended meanwhile");
    assert!(matches!(
        table.status("c", None).unwrap(),
        ProcessStatus::Stopped { status: 137, .. }
    ));
    assert!(table.check_update("c").is_err());
    table.begin_delete("c").unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Guest(GuestEvent),
    AddExec(String),
    BeginExec(String),
    /// The start of all that are under way is answered, with success or not.
    FinishExecs(bool),
    StartInit,
    Release,
    DeleteExec(String),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let id = prop_oneof![Just("c".to_owned()), Just("d".to_owned())];
    let exec = prop_oneof![Just("e".to_owned()), Just("f".to_owned())];
    let event = prop_oneof![
        id.clone().prop_map(|container| GuestEvent::Oom { container }),
        (id, proptest::option::of(exec.clone()), 0..256u32).prop_map(|(container, exec, status)| {
            GuestEvent::Exited {
                container,
                exec,
                status,
            }
        }),
    ];
    let step = prop_oneof![
        4 => event.prop_map(Step::Guest),
        2 => exec.clone().prop_map(Step::AddExec),
        2 => exec.clone().prop_map(Step::BeginExec),
        2 => any::<bool>().prop_map(Step::FinishExecs),
        1 => Just(Step::StartInit),
        1 => Just(Step::Release),
        1 => exec.prop_map(Step::DeleteExec),
    ];
    proptest::collection::vec(step, 0..40)
}

proptest! {
    /// Whatever a guest says in whatever order: each process ends at most once, nothing is heard of a container's
    /// execs after its own end, and in the end all who wait are answered.
    #[test]
    fn whatever_the_guest_says_the_order_holds(steps in steps()) {
        let (sender, mut events) = unbounded_channel();
        let mut table = Table::new(sender);
        make(&mut table, "c");
        let end = table.watch("c", None).unwrap();
        let mut starting = Vec::new();
        for step in steps.into_iter().chain([Step::FinishExecs(false), Step::Release]) {
            match step {
                Step::Guest(event) => { table.guest_event(event, now()); }
                Step::AddExec(exec) => { let _ = table.add_exec("c", &exec, vec![], false); }
                Step::BeginExec(exec) => if table.begin_exec("c", &exec).is_ok() {
                    starting.push(exec);
                },
                Step::FinishExecs(started) => for exec in starting.drain(..) {
                    let failed = EngineError::Guest("it was killed".into());
                    table.finish_start("c", Some(&exec), if started { Ok(Some(3)) } else { Err(&failed) });
                },
                Step::StartInit => if table.begin_start("c").is_ok() {
                    table.finish_start("c", None, Ok(None));
                },
                Step::Release => table.release("c", now()),
                Step::DeleteExec(exec) => { let _ = table.delete_exec("c", &exec); }
            }
        }
        prop_assert!(table.containers.get("c").is_some_and(|c| c.held.is_none()), "an end is held back for ever");
        table.machine_ended("gone", now());
        prop_assert!(end.borrow().is_some());
        let ends = ends(&mut events);
        let init = ends.iter().filter(|(exec, _)| exec.is_none()).count();
        prop_assert_eq!(init, 1);
        prop_assert!(ends.last().is_some_and(|(exec, _)| exec.is_none()), "{:?}", ends);
    }
}
