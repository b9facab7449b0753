use std::time::SystemTime;

use proptest::prelude::*;

use super::*;

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::UNIX_EPOCH,
    }
}

fn words(announcements: Vec<Announcement>) -> Vec<String> {
    announcements
        .into_iter()
        .map(|announcement| match announcement {
            Announcement::Started { exec, .. } => format!("start {}", exec.unwrap_or_default()),
            Announcement::Oom { .. } => "oom".to_owned(),
            Announcement::Exited { exec, exit, .. } => {
                format!("exit {} {}", exec.unwrap_or_default(), exit.status)
            }
        })
        .collect()
}

#[test]
fn an_exit_that_overtakes_its_start_waits_for_it() {
    let mut order = Order::default();
    order.creating("c");
    order.created("c");
    assert!(order.starting("c", None));
    assert_eq!(words(order.exited("c", None, exit(7))), [""; 0]);
    assert!(!order.is_over("c", None));
    assert_eq!(words(order.started("c", None)), ["start ", "exit  7"]);
    assert!(order.is_over("c", None));
}

#[test]
fn the_container_s_exit_waits_for_an_exec_that_is_being_started() {
    let mut order = Order::default();
    order.creating("c");
    order.created("c");
    order.starting("c", None);
    order.started("c", None);
    order.added("c", "e");
    order.starting("c", Some("e"));
    assert_eq!(words(order.exited("c", Some("e"), exit(137))), [""; 0]);
    assert_eq!(words(order.exited("c", None, exit(0))), [""; 0]);
    assert_eq!(
        words(order.started("c", Some("e"))),
        ["start e", "exit e 137", "exit  0"]
    );
}

#[test]
fn an_exec_whose_start_failed_is_never_told_of_and_holds_nothing_back() {
    let mut order = Order::default();
    order.creating("c");
    order.created("c");
    order.starting("c", None);
    order.started("c", None);
    order.added("c", "e");
    order.starting("c", Some("e"));
    order.exited("c", Some("e"), exit(127));
    order.exited("c", None, exit(0));
    assert_eq!(words(order.start_failed("c", Some("e"))), ["exit  0"]);
}

#[test]
fn a_created_container_that_is_killed_has_an_exit_and_an_added_exec_has_none() {
    let mut order = Order::default();
    order.creating("c");
    order.created("c");
    order.added("c", "e");
    assert_eq!(words(order.exited("c", Some("e"), exit(137))), [""; 0]);
    assert_eq!(words(order.exited("c", None, exit(137))), ["exit  137"]);
    assert_eq!(words(order.exited("c", None, exit(137))), [""; 0]);
}

#[test]
fn a_container_that_ends_while_it_is_created_has_its_exit_after_that() {
    let mut order = Order::default();
    order.creating("c");
    assert!(!order.starting("c", None));
    assert_eq!(words(order.exited("c", None, exit(137))), [""; 0]);
    assert_eq!(words(order.created("c")), ["exit  137"]);
}

#[test]
fn out_of_memory_is_told_between_the_start_and_the_exit() {
    let mut order = Order::default();
    order.creating("c");
    order.created("c");
    order.starting("c", None);
    assert_eq!(words(order.oom("c")), [""; 0]);
    assert_eq!(words(order.exited("c", None, exit(137))), [""; 0]);
    assert_eq!(words(order.started("c", None)), ["start ", "oom", "exit  137"]);
    assert_eq!(words(order.oom("c")), [""; 0], "after its end");
    assert_eq!(words(order.oom("unknown")), [""; 0]);
    order.creating("d");
    order.created("d");
    assert_eq!(words(order.oom("d")), ["oom"]);
    order.starting("d", None);
    order.started("d", None);
    order.added("d", "e");
    order.starting("d", Some("e"));
    // An exec's start holds nothing of it back.
    assert_eq!(words(order.oom("d")), ["oom"]);
}

#[test]
fn nothing_starts_twice() {
    let mut order = Order::default();
    assert!(!order.starting("c", None));
    order.creating("c");
    order.created("c");
    assert!(order.starting("c", None));
    assert!(!order.starting("c", None));
    order.started("c", None);
    assert!(!order.starting("c", None));
    order.exited("c", None, exit(0));
    assert!(!order.starting("c", None));
}

proptest! {
    /// Whatever comes in whatever order: each exit at most once and, once started, after its start; the
    /// container's exit after its execs' announced starts.
    #[test]
    fn any_interleaving_comes_out_in_order(steps in proptest::collection::vec((0u8..4, 0u8..3), 0..40)) {
        let mut order = Order::default();
        order.creating("c");
        order.created("c");
        order.added("c", "1");
        order.added("c", "2");
        let mut out = Vec::new();
        for (step, process) in steps {
            let exec = match process { 0 => None, 1 => Some("1"), _ => Some("2") };
            match step {
                0 => { order.starting("c", exec); }
                1 => out.extend(order.started("c", exec)),
                2 => out.extend(order.start_failed("c", exec)),
                _ => out.extend(order.exited("c", exec, exit(u32::from(process)))),
            }
        }
        let out = words(out);
        for name in ["", "1", "2"] {
            let starts: Vec<_> = out.iter().enumerate().filter(|(_, w)| **w == format!("start {name}")).collect();
            let exits: Vec<_> = out.iter().enumerate().filter(|(_, w)| w.starts_with(&format!("exit {name} "))).collect();
            prop_assert!(starts.len() <= 1 && exits.len() <= 1, "{out:?}");
            if let (Some(start), Some(exit)) = (starts.first(), exits.first()) {
                prop_assert!(start.0 < exit.0, "{out:?}");
            }
        }
    }
}
