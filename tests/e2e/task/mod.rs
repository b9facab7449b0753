//! The task service, call by call: the same calls are made to runc's shim and to husk's.

mod exec;
mod latency;
mod life;
mod limits;
mod standin;
mod streams;

use serde_json::json;

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::shim::Shim;

/// Runs `test` under each runtime with a shim for a container of `args`.
#[track_caller]
fn each(args: &[&str], test: impl Fn(&Shim)) {
    each_with(args, |_| (), test);
}

/// The same for a bundle that `prepare` has changed.
#[track_caller]
fn each_with(args: &[&str], prepare: impl Fn(&mut Bundle), test: impl Fn(&Shim)) {
    let name = std::thread::current().name().unwrap_or("task").to_owned();
    let name = name.rsplit("::").next().unwrap_or("task").replace('_', "-");
    for runtime in Runtime::all() {
        eprintln!("under {runtime:?}");
        let id = format!("{name}-{runtime:?}").to_lowercase();
        let mut bundle = Bundle::new(&id);
        bundle.spec["process"]["args"] = json!(args);
        prepare(&mut bundle);
        test(&Shim::start(runtime, &id, bundle));
    }
}
