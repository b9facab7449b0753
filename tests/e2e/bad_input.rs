//! What a user got wrong gives one clear error, the exit code that runc's and Docker's users know, and leaves
//! nothing behind.

use std::fs;
use std::time::Duration;

use crate::census::Census;
use crate::command::{Finished, Input, Running, ok, run};
use crate::containerd::{BUSYBOX, RUNTIME, ctr_run};
use crate::foreground::Bundle;

/// Runs `husk run` and expects it to fail with `code` and one line on stderr that has `words` in it.
#[track_caller]
fn refused(argv: &[&str], code: i32, words: &[&str]) {
    let census = Census::take();
    let done = run(argv).expect_code(code);
    one_error(&done, words);
    census.assert_unchanged();
}

#[track_caller]
fn one_error(done: &Finished, words: &[&str]) {
    assert_eq!(done.out(), "", "an error belongs on stderr");
    let message = done.err();
    assert_eq!(
        message.trim_end().lines().count(),
        1,
        "one error, one line: {message:?}"
    );
    for word in words {
        assert!(
            message.contains(word),
            "the error does not say {word:?}: {message:?}"
        );
    }
}

#[track_caller]
fn run_refused(bundle: &Bundle, id: &str, code: i32, words: &[&str]) {
    refused(&["husk", "run", "--bundle", bundle.path(), id], code, words);
}

#[test]
fn a_bundle_without_config() {
    let bundle = Bundle::busybox(&["true"]);
    fs::remove_file(bundle.join("config.json")).unwrap();
    run_refused(&bundle, "bad", 125, &["config.json", "o such file"]);
}

#[test]
fn a_bundle_that_is_not_there() {
    refused(
        &["husk", "run", "--bundle", "/no/such/bundle", "bad"],
        125,
        &["/no/such/bundle"],
    );
}

#[test]
fn a_config_that_is_not_json() {
    let bundle = Bundle::busybox(&["true"]);
    fs::write(bundle.join("config.json"), "{ this is not json").unwrap();
    run_refused(&bundle, "bad", 125, &["config.json"]);
}

#[test]
fn a_config_without_process() {
    let bundle = Bundle::busybox(&["true"]);
    bundle.edit(|spec| drop(spec.as_object_mut().unwrap().remove("process")));
    run_refused(&bundle, "bad", 125, &["process"]);
}

#[test]
fn a_config_without_arguments() {
    let bundle = Bundle::busybox(&[]);
    run_refused(&bundle, "bad", 125, &["args"]);
}

#[test]
fn a_command_that_is_not_there() {
    let bundle = Bundle::busybox(&["no-such-command"]);
    run_refused(
        &bundle,
        "bad",
        127,
        &[r#"exec: "no-such-command": executable file not found in $PATH"#],
    );
    let bundle = Bundle::busybox(&["/no/such/command"]);
    run_refused(
        &bundle,
        "bad",
        127,
        &["/no/such/command", "no such file or directory"],
    );
}

#[test]
fn a_command_that_cannot_be_executed() {
    let bundle = Bundle::busybox(&["/etc/passwd"]);
    run_refused(&bundle, "bad", 126, &["/etc/passwd", "permission denied"]);
    let bundle = Bundle::busybox(&["/etc"]);
    run_refused(&bundle, "bad", 126, &["/etc"]);
}

#[test]
fn a_root_file_system_that_is_not_there() {
    let bundle = Bundle::busybox(&["true"]);
    fs::remove_dir_all(bundle.join("rootfs")).unwrap();
    run_refused(&bundle, "bad", 125, &["rootfs"]);
}

#[test]
fn ids_that_are_not_names() {
    let bundle = Bundle::busybox(&["true"]);
    for id in ["a/b", "..", "../x", ""] {
        run_refused(&bundle, id, 125, &["id"]);
    }
}

#[test]
fn a_second_container_of_the_same_id() {
    let census = Census::take();
    let first = Bundle::busybox(&["sh", "-c", "echo ready; cat"]);
    let mut running = Running::start(
        &["husk", "run", "--bundle", first.path(), "twin"],
        Input::Bytes(vec![]),
    );
    running.wait_for("ready");
    drop(running);
    let first = Bundle::busybox(&["sh", "-c", "echo ready; exec sleep 1000"]);
    let mut running = Running::start(
        &["husk", "run", "--bundle", first.path(), "twins"],
        Input::Nothing,
    );
    running.wait_for("ready");
    let second = Bundle::busybox(&["true"]);
    let done = run(&["husk", "run", "--bundle", second.path(), "twins"]).expect_code(125);
    one_error(&done, &["twins", "exists"]);
    ok(&["kill", "-TERM", &running.id().to_string()]);
    // sleep as pid 1 ignores TERM; the container goes on undisturbed until it is killed.
    ok(&["kill", "-KILL", &running.id().to_string()]);
    running.finish(Duration::from_secs(20)).expect_code(137);
    for id in ["twin", "twins"] {
        run(&["husk", "run", "--bundle", second.path(), id]).expect_code(0);
    }
    drop((first, second));
    census.assert_unchanged();
}

#[test]
fn no_kvm() {
    let bundle = Bundle::busybox(&["true"]);
    let command = format!(
        "mount --bind /dev/null /dev/kvm && exec husk run --bundle {} no-kvm",
        bundle.path()
    );
    refused(&["unshare", "--mount", "sh", "-c", &command], 125, &["/dev/kvm"]);
    let done = run(&[
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount --bind /dev/null /dev/kvm && exec husk check",
    ]);
    assert_ne!(done.code, 0);
    assert!(
        done.out().contains("/dev/kvm") || done.err().contains("/dev/kvm"),
        "{}{}",
        done.out(),
        done.err()
    );
}

#[test]
fn no_guest_image() {
    let bundle = Bundle::busybox(&["true"]);
    let prefix = tempfile::tempdir().unwrap();
    let husk = ok(&["sh", "-c", "readlink -f $(command -v husk)"]);
    let installed = std::path::Path::new(husk.trim())
        .parent()
        .unwrap()
        .parent()
        .unwrap();
    for directory in ["bin", "libexec/husk"] {
        fs::create_dir_all(prefix.path().join(directory)).unwrap();
    }
    for file in [
        "bin/husk",
        "libexec/husk/husk-vmm",
        "libexec/husk/husk-fsd",
        "libexec/husk/husk-standin",
    ] {
        fs::copy(installed.join(file), prefix.path().join(file)).unwrap();
    }
    let husk = prefix.path().join("bin/husk");
    refused(
        &[husk.to_str().unwrap(), "run", "--bundle", bundle.path(), "bad"],
        125,
        &["vmlinux", "make install"],
    );
}

#[test]
fn containerd_shows_the_error_and_nothing_is_left() {
    let census = Census::take();
    let done = ctr_run("bad", BUSYBOX, &["no-such-command"]);
    assert_ne!(done.code, 0);
    let message = done.err();
    assert!(
        message.contains(r#"exec: "no-such-command": executable file not found in $PATH"#),
        "{message}"
    );
    census.assert_unchanged();
}

#[test]
fn containerd_refuses_a_second_container_of_the_same_id() {
    let container = crate::containerd::Detached::start("same", &["sleep", "1000"]);
    let done = run(&["ctr", "run", "--runtime", RUNTIME, BUSYBOX, "same", "true"]);
    assert_ne!(done.code, 0);
    assert!(done.err().contains("already exists"), "{}", done.err());
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    container.remove();
}
