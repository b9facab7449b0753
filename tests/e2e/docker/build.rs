//! Images: built with husk as the default runtime, and composed.

use std::fs;

use super::daemon::HuskByDefault;
use super::{begin, docker, docker_ok, on_host};
use crate::command::run;

const DOCKERFILE: &str = "FROM localhost/busybox:1
COPY file /copied
RUN uname -r >/release
USER user
WORKDIR /work
RUN id -un >/tmp/who && cat /copied
CMD [\"sh\", \"-c\", \"cat /release /tmp/who /copied; uname -r; pwd\"]
";

#[test]
fn built_with_husk_as_the_default() {
    let census = begin();
    let by_default = HuskByDefault::set();
    let context = tempfile::tempdir().unwrap();
    fs::write(context.path().join("Dockerfile"), DOCKERFILE).unwrap();
    fs::write(context.path().join("file"), "copied\n").unwrap();
    let mut build = vec![
        "env",
        "DOCKER_BUILDKIT=0",
        "docker",
        "build",
        "-q",
        "-t",
        "husk-built",
    ];
    let path = context.path().display().to_string();
    build.push(&path);
    run(&build).expect_code(0);
    let lines = docker_ok(&["run", "--rm", "husk-built"]);
    let lines: Vec<&str> = lines.lines().collect();
    assert!(lines[0].ends_with("-husk"), "{lines:?}");
    assert_eq!(lines[1..], ["user", "copied", lines[0], "/work"]);
    // A step that fails fails the build, with its code.
    fs::write(
        context.path().join("Dockerfile"),
        "FROM localhost/busybox:1\nRUN exit 9\n",
    )
    .unwrap();
    let done = run(&build).expect_code(9);
    assert!(
        done.err().contains("returned a non-zero code: 9"),
        "{}",
        done.err()
    );
    docker_ok(&["image", "rm", "husk-built"]);
    docker(&["container", "prune", "-f"]);
    docker(&["image", "prune", "-f"]);
    drop(by_default);
    census.assert_unchanged();
}

const COMPOSE: &str = r#"
name: husk-composed
services:
  web:
    image: localhost/busybox:1
    runtime: husk
    command: ["sh", "-c", "echo composed >/tmp/page; exec httpd -f -p 80 -h /tmp"]
    ports: ["8090:80"]
    healthcheck:
      test: ["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1/page"]
      interval: 2s
      timeout: 60s
      retries: 30
  client:
    image: localhost/busybox:1
    runtime: husk
    command: ["sh", "-c", "wget -q -T 60 -O - http://web/page; cat /etc/given; exec sleep 1000"]
    depends_on:
      web:
        condition: service_healthy
    configs:
      - source: given
        target: /etc/given
configs:
  given:
    content: "given\n"
"#;

#[test]
fn composed() {
    let census = begin();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("compose.yaml");
    fs::write(&file, COMPOSE).unwrap();
    let file = file.display().to_string();
    let compose = |arguments: &[&str]| docker(&[&["compose", "-f", &file], arguments].concat());
    compose(&["up", "-d"]).expect_code(0);
    assert_eq!(on_host("curl -sS -m 60 http://127.0.0.1:8090/page"), "composed\n");
    let mut said = String::new();
    crate::command::eventually("what the client got", || {
        said = compose(&["logs", "--no-log-prefix", "client"]).out();
        said.contains("composed").then_some(())
    });
    let exec = compose(&["exec", "-T", "client", "uname", "-r"]).expect_code(0);
    assert!(exec.out().ends_with("-husk\n"), "{}", exec.out());
    compose(&["down", "-t", "2"]).expect_code(0);
    census.assert_unchanged();
}
