//! The snippets of configs/ for containerd: one that is started with its snippet knows husk, and runs containers by it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::bundle::Bundle;
use crate::census::Census;
use crate::command::{Input, Running, eventually, ok, run};
use crate::containerd::RUNTIME;

const SHIPPED: &str = "/usr/local/share/husk";

/// The snippet for the containerd of this host, and the plugin that it configures.
fn snippet() -> (String, &'static str) {
    let version = ok(&["containerd", "--version"]);
    let (file, plugin) = if version.contains(" v1.") || version.contains(" 1.") {
        ("containerd-1.7.toml", "io.containerd.grpc.v1.cri")
    } else {
        ("containerd-2.toml", "io.containerd.cri.v1.runtime")
    };
    (format!("{SHIPPED}/{file}"), plugin)
}

#[test]
fn containerd_understands_its_snippet() {
    let (snippet, plugin) = snippet();
    let dump = ok(&["containerd", "--config", &snippet, "config", "dump"]);
    // Each version quotes in its own way.
    let dump = dump.replace('\'', "\"");
    let heading = format!("[plugins.\"{plugin}\".containerd.runtimes.husk]");
    let section = dump
        .split_once(&heading)
        .unwrap_or_else(|| panic!("no {heading} in {dump}"))
        .1;
    let section = section.split("\n\n").next().unwrap_or_default();
    let section = section.split("\n  [").next().unwrap_or_default();
    for line in [
        "runtime_type = \"io.containerd.husk.v2\"",
        "privileged_without_host_devices = true",
    ] {
        assert!(section.contains(line), "no {line} in {section}");
    }
}

#[test]
fn a_containerd_with_its_snippet_runs_containers() {
    let census = Census::take();
    let (snippet, _) = snippet();
    let bundle = Bundle::new("snippet");
    let dir = tempfile::Builder::new().prefix("husk-e2e-").tempdir().unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let address = place("containerd.sock");
    let argv = [
        "containerd",
        "--config",
        &snippet,
        "--root",
        &place("root"),
        "--state",
        &place("state"),
        "--address",
        &address,
    ];
    let daemon = Running::start(&argv, Input::Nothing);
    eventually("containerd to answer", || {
        (Path::new(&address).exists() && run(&["ctr", "-a", &address, "version"]).code == 0).then_some(())
    });
    let root = bundle.in_root("/");
    fs::write(bundle.in_root("said"), "by the snippet's containerd\n").unwrap();
    let done = run(&[
        "ctr",
        "-a",
        &address,
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        "--rootfs",
        root.to_str().unwrap(),
        "snippet",
        "cat",
        "/said",
    ]);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    daemon.finish(Duration::from_secs(60)).expect_code(0);
    assert_eq!(done.expect_code(0).out(), "by the snippet's containerd\n");
    census.assert_unchanged();
}
