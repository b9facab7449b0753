//! cgroups of the machine that runs the tests, in directories of their own; as root.

use std::{os::fd::OwnedFd, sync::Arc};

use super::*;
use crate::{
    host::child::{Child, End, Program, Surroundings, spawn_in},
    test_help,
};

/// The hierarchies, with a root of the test's own. `None` where cgroups cannot be made, as in some containers.
fn hierarchies(name: &str) -> Option<(Hierarchies, Wanted)> {
    let all = Hierarchies::of_this_host().unwrap();
    let name = format!("/husk-unit-{}-{name}/a/b", std::process::id());
    let wanted = Wanted::Path(name.into());
    let probe = |(hierarchy, path): (&Hierarchy, PathBuf)| {
        let probe = path.ancestors().nth(2).unwrap().with_extension("probe");
        make_dir(hierarchy, &probe).and_then(|()| fs::remove_dir(&probe))
    };
    let Wanted::Path(path) = &wanted else { panic!() };
    let made = all.0.iter().zip(all.resolve(path)).try_for_each(probe);
    if let Err(error) = &made {
        eprintln!("cgroups cannot be made here, nothing is tested: {error}");
    }
    (made.is_ok() && !all.0.is_empty()).then_some((all, wanted))
}

fn nobody() -> u32 {
    0
}

async fn start(cgroup: &Arc<Cgroup>, script: &str) -> (Child, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    test_help::script(&path, script);
    let null: OwnedFd = File::options().write(true).open("/dev/null").unwrap().into();
    let program = Program {
        path: &path,
        fds: vec![(2, null)],
    };
    let surroundings = Surroundings {
        cgroup: Some(Arc::clone(cgroup)),
        ..Surroundings::default()
    };
    (spawn_in(program, surroundings).await.unwrap(), dir)
}

fn left(trace: &Trace) -> Vec<&PathBuf> {
    let gone = |path: &&PathBuf| path.ancestors().take(3).any(Path::exists);
    trace.dirs.iter().filter(gone).collect()
}

#[tokio::test]
async fn a_process_is_born_in_a_cgroup_that_goes_with_it() {
    let Some((hierarchies, wanted)) = hierarchies("born") else {
        return;
    };
    let plan = Plan::new(&hierarchies, &wanted);
    let trace = plan.trace();
    let limits = Limits {
        pids: Some(99),
        cpu_shares: Some(512),
        memory: Some(1 << 30),
        ..Limits::default()
    };
    let cgroup = Arc::new(plan.clone().make(nobody(), &limits).unwrap());
    assert!(cgroup.is(&plan));
    let (child, _dir) = start(&cgroup, "sleep 1000 & exec sleep 1000").await;
    let own = fs::read_to_string(format!("/proc/{}/cgroup", child.pid())).unwrap();
    let Wanted::Path(path) = &wanted else { panic!() };
    let inside = own.lines().filter(|line| line.ends_with(path.to_str().unwrap()));
    assert_eq!(inside.count(), hierarchies.0.len(), "{own}");
    let pids = cgroup
        .places
        .iter()
        .find(|(_, path)| path.join("pids.max").exists());
    if let Some((_, path)) = pids {
        assert_eq!(fs::read_to_string(path.join("pids.max")).unwrap(), "99\n");
    }
    // Another one cannot have it, and what still lives in it ends with it.
    let error = plan.make(nobody(), &limits).unwrap_err();
    assert!(error.to_string().contains("is not empty"), "{error}");
    trace.remove().unwrap();
    assert!(matches!(child.ended().await, End::Killed(_)));
    assert_eq!(left(&trace), [] as [&PathBuf; 0]);
    trace.remove().unwrap();
}

#[test]
fn what_others_made_or_use_is_left_alone() {
    let Some((hierarchies, wanted)) = hierarchies("others") else {
        return;
    };
    let Wanted::Path(path) = &wanted else { panic!() };
    let sibling = Wanted::Path(path.with_file_name("c"));
    let (one, two) = (
        Plan::new(&hierarchies, &wanted),
        Plan::new(&hierarchies, &sibling),
    );
    let (first, second) = (one.trace(), two.trace());
    one.make(nobody(), &Limits::default()).unwrap();
    two.make(nobody(), &Limits::default()).unwrap();
    first.remove().unwrap();
    assert!(second.dirs.iter().all(|dir| dir.exists()));
    // Somebody else's, before and after.
    for dir in &first.dirs {
        fs::create_dir(dir).unwrap();
    }
    let third = Plan::new(&hierarchies, &wanted);
    third.make(nobody(), &Limits::default()).unwrap();
    first.remove().unwrap();
    assert!(first.dirs.iter().all(|dir| dir.exists()));
    for dir in &first.dirs {
        fs::remove_dir(dir).unwrap();
    }
    second.remove().unwrap();
    assert_eq!(left(&second), [] as [&PathBuf; 0]);
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_counted() {
    let Some((hierarchies, wanted)) = hierarchies("oom") else {
        return;
    };
    let plan = Plan::new(&hierarchies, &wanted);
    let trace = plan.trace();
    let limits = Limits {
        memory: Some(32 << 20),
        ..Limits::default()
    };
    let cgroup = Arc::new(plan.make(nobody(), &limits).unwrap());
    if !cgroup
        .places
        .iter()
        .any(|(_, path)| path.join("memory.max").exists() || path.join("memory.limit_in_bytes").exists())
    {
        eprintln!("no controller of memory here");
        return trace.remove().unwrap();
    }
    assert_eq!(cgroup.oom_kills(), 0);
    let (child, _dir) = start(&cgroup, "exec dd if=/dev/zero of=/dev/null bs=200M count=1").await;
    assert_eq!(child.ended().await.to_string(), "was killed by SIGKILL");
    assert_eq!(cgroup.oom_kills(), 1);
    trace.remove().unwrap();
}
