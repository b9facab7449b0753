use std::{fs, io::Write, time::Instant};

use super::*;
use crate::{
    front::io::{Names, open},
    test_help,
};

const WHOSE: Whose<'_> = Whose {
    namespace: "ns",
    id: "c",
};

/// A logging program: a shell script, in a directory of its own, which it finds as `$dir`.
fn program(script: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("logger");
    test_help::script(&path, &format!("dir={}\n{script}", dir.path().display()));
    (dir, path)
}

fn binary(path: &Path, query: &str) -> Binary {
    Binary::parse(&format!("{}{query}", path.display())).unwrap()
}

fn write(fd: OwnedFd, text: &str) {
    fs::File::from(fd).write_all(text.as_bytes()).unwrap();
}

const CAT: &str = "exec 5>&-; cat <&3 >$dir/out & cat <&4 >$dir/err & exec 3<&- 4<&-; wait";

#[test]
fn a_name_tells_arguments_and_environment() {
    let text = |list: &[CString]| {
        list.iter()
            .map(|item| item.to_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let named =
        Binary::parse("/bin/a%2Fb?--x=1&flag&--x=2&y=a+b%26c&env.K=v=w&env.CONTAINER_ID=no#f").unwrap();
    assert_eq!(named.path, Path::new("/bin/a/b"));
    assert_eq!(text(&named.args), ["--x", "1", "flag", "", "y", "a b&c"]);
    assert_eq!(text(&named.env), ["K=v=w"]);
    assert!(Binary::parse("/x").unwrap().args.is_empty());
    for bad in ["", "x", "host/x", "/x%0", "/x%00", "/x%ff", "/x?a=%00", "/x?%"] {
        assert_eq!(Binary::parse(bad), None, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_gets_both_outputs_and_knows_whose_they_are() {
    let (dir, path) = program(&format!(
        "env >$dir/env; echo $# \"$@\" >$dir/args; umask >$dir/umask; ls /proc/$$/fd >$dir/fds; {CAT}"
    ));
    let loggers = Loggers::default();
    let (logger, inputs) = loggers
        .start(&binary(&path, "?a=b&env.E=f"), WHOSE)
        .await
        .unwrap();
    write(inputs.stdout, "to stdout");
    write(inputs.stderr, "to stderr");
    let child = logger.child();
    drop(logger);
    loggers.ended(Duration::from_secs(20)).await;
    assert_eq!(child.ended().await.to_string(), "exited with code 0");
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(
        (read("out").as_str(), read("err").as_str()),
        ("to stdout", "to stderr")
    );
    let env = read("env");
    for line in ["CONTAINER_ID=c", "CONTAINER_NAMESPACE=ns", "E=f"] {
        assert!(env.lines().any(|l| l == line), "{env}");
    }
    assert!(!env.contains("HOME="), "{env}");
    assert_eq!(read("args"), "2 a b\n");
    assert_eq!(read("umask"), "0022\n");
    let fds = read("fds");
    assert!(
        ["0", "1", "2", "3", "4", "5"]
            .iter()
            .all(|fd| fds.lines().any(|l| l == *fd)),
        "{fds}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_says_ready_as_well() {
    let (_dir, path) = program("printf x >&5; cat <&3; cat <&4");
    let loggers = Loggers::default();
    let (logger, inputs) = loggers.start(&binary(&path, ""), WHOSE).await.unwrap();
    drop((inputs, logger));
    loggers.ended(Duration::from_secs(20)).await;
    assert!(loggers.0.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_does_not_come_up_is_told_and_does_not_run() {
    let loggers = Loggers::default();
    let missing = Binary::parse("/nonexistent/logger").unwrap();
    let error = loggers.start(&missing, WHOSE).await.unwrap_err();
    assert_eq!(
        crate::front::status::chain(&error),
        "cannot start the logging program /nonexistent/logger: No such file or directory (os error 2)"
    );
    // Its descriptor 5 is closed long after its death, which is seen by then.
    let (_dir, path) = program("sleep 2 & exit 3");
    let error = loggers.start(&binary(&path, ""), WHOSE).await.unwrap_err();
    let text = crate::front::status::chain(&error);
    assert!(
        text.ends_with("it exited with code 3 before it was ready"),
        "{text}"
    );
    let (_dir, path) = program("exec sleep 1000");
    let patience = Duration::from_millis(200);
    let error = loggers
        .start_within(&binary(&path, ""), WHOSE, patience)
        .await
        .unwrap_err();
    assert!(matches!(error, IoError::NotReady { .. }), "{error}");
    let before = Instant::now();
    loggers.ended(Duration::from_secs(20)).await;
    assert!(before.elapsed() < Duration::from_secs(3));
    assert!(loggers.0.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_does_not_end_by_itself_is_told_to() {
    let (dir, path) =
        program("trap 'echo told >$dir/told; exit 0' TERM; exec 5>&-; while :; do sleep 0.1; done");
    let loggers = Loggers::default();
    let (logger, inputs) = loggers.start(&binary(&path, ""), WHOSE).await.unwrap();
    let child = logger.child();
    drop((inputs, logger));
    loggers.ended(Duration::from_millis(100)).await;
    assert_eq!(child.ended().await.to_string(), "exited with code 0");
    assert_eq!(fs::read_to_string(dir.path().join("told")).unwrap(), "told\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn stdout_s_program_has_both_and_a_terminal_s_only_one() {
    let (dir, path) = program(CAT);
    let uri = format!("binary://{}", path.display());
    for (terminal, stderr, expected) in [
        (false, uri.clone(), "outerr"),
        (false, String::new(), "outerr"),
        (true, uri.clone(), "out"),
    ] {
        let names = Names {
            terminal,
            stdout: uri.clone(),
            stderr,
            ..Names::default()
        };
        let loggers = Loggers::default();
        let (stdio, held) = open(&names, WHOSE, &loggers).await.unwrap();
        assert_eq!(stdio.stderr.is_none(), terminal);
        write(stdio.stdout.unwrap(), "out");
        if let Some(stderr) = stdio.stderr {
            write(stderr, "err");
        }
        drop(held);
        loggers.ended(Duration::from_secs(20)).await;
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("out") + &read("err"), expected);
    }
}
