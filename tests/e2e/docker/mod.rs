//! husk under Docker, by its own command line: what `docker` does with runc, it does with husk.

mod build;
mod daemon;
mod failures;
mod life;
mod network;
mod options;
mod ports;
mod terminal;

use crate::case::Runtime;
use crate::census::Census;
use crate::command::{Finished, ok, run};
use crate::containerd::BUSYBOX;

const PROGRAMS: &str = "localhost/programs:13";

/// The SHA-256 sum of 1 MiB of the letter x.
const MEGABYTE: &str = "8f990ba0b577b51cf009ea049368c16bbda1b21e1b93be07a824758bb253c39b";

/// Lets a container of busybox's image have the host's programs and their libraries.
const HOSTS_PROGRAMS: [&str; 6] = [
    "--volume",
    "/usr:/usr:ro",
    "--volume",
    "/usr/lib:/lib:ro",
    "--volume",
    "/usr/lib64:/lib64:ro",
];

/// dockerd, and what is on the host before a test.
#[track_caller]
fn begin() -> Census {
    daemon::ready();
    Census::take()
}

fn docker(arguments: &[&str]) -> Finished {
    run(&[&["docker"], arguments].concat())
}

/// Its output, without the end of the last line.
#[track_caller]
fn docker_ok(arguments: &[&str]) -> String {
    docker(arguments).expect_code(0).out().trim_end().to_owned()
}

/// The name of a runtime in daemon.json.
fn runtime_name(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Husk => "husk",
        Runtime::Runc => "runc",
    }
}

/// `docker run --rm` in the foreground, with husk.
fn foreground(options: &[&str], image: &str, command: &[&str]) -> Finished {
    docker(&[&["run", "--rm", "--runtime", "husk"], options, &[image], command].concat())
}

/// A container; removed with this.
struct Container {
    name: String,
}

impl Container {
    /// `docker run -d`.
    #[track_caller]
    fn start(runtime: Runtime, name: &str, options: &[&str], image: &str, command: &[&str]) -> Self {
        // What is left of it is removed when its start fails, too.
        let this = Self {
            name: name.to_owned(),
        };
        let head = ["run", "-d", "--name", name, "--runtime", runtime_name(runtime)];
        docker_ok(&[&head, options, &[image], command].concat());
        this
    }

    /// `docker exec`.
    fn exec(&self, options: &[&str], command: &[&str]) -> Finished {
        docker(&[&["exec"], options, &[&self.name], command].concat())
    }

    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.exec(&[], &["sh", "-ec", script]).expect_code(0).out()
    }

    #[track_caller]
    fn inspect(&self, format: &str) -> String {
        docker_ok(&["inspect", "--format", format, &self.name])
    }

    #[track_caller]
    fn remove(self) {
        docker_ok(&["rm", "-f", "-v", &self.name]);
        std::mem::forget(self);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        docker(&["rm", "-f", "-v", &self.name]);
    }
}

/// A user's network; removed with this, after its containers.
struct Network(&'static str);

impl Network {
    #[track_caller]
    fn create(name: &'static str, options: &[&str]) -> Self {
        let this = Self(name);
        docker_ok(&[&["network", "create"], options, &[name]].concat());
        this
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        docker(&["network", "rm", self.0]);
    }
}

/// Runs a script of the host's programs.
#[track_caller]
fn on_host(script: &str) -> String {
    ok(&["sh", "-ec", script])
}
