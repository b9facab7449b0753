//! Volumes while a container runs: what one side does the other sees.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde_json::json;

use crate::bundle::Bundle;
use crate::case::Runtime;
use crate::command::{Input, Running, eventually};
use crate::{foreground, host};

/// Runs `script` in the foreground with the host's `volume` at /data (and read-only at /config), for `test`.
fn each(
    name: &str,
    script: &str,
    prepare: impl Fn(&std::path::Path),
    test: impl Fn(Runtime, &mut Running, &std::path::Path),
) {
    each_at("volume", name, script, prepare, test);
}

/// As [`each`], with the volume at a path of the bundle.
fn each_at(
    place: &str,
    name: &str,
    script: &str,
    prepare: impl Fn(&std::path::Path),
    test: impl Fn(Runtime, &mut Running, &std::path::Path),
) {
    for runtime in Runtime::all() {
        eprintln!("under {runtime:?}");
        let id = format!("{name}-{runtime:?}").to_lowercase();
        let mut bundle = Bundle::new(&id);
        let volume = bundle.path().join(place);
        fs::create_dir_all(&volume).unwrap();
        prepare(&volume);
        for (destination, options) in [
            ("/data", json!(["rbind", "rw"])),
            ("/config", json!(["rbind", "ro"])),
        ] {
            bundle.mount(
                json!({"destination": destination, "type": "bind", "source": volume, "options": options}),
            );
        }
        bundle.spec["process"]["args"] = json!(["sh", "-c", script]);
        let config = bundle.write();
        let argv = [
            "ctr",
            "run",
            "--rm",
            "--runtime",
            runtime.name(),
            "--config",
            config.to_str().unwrap(),
            &id,
        ];
        let mut running = Running::start(&argv, Input::Nothing);
        test(runtime, &mut running, &volume);
        running.finish(Duration::from_secs(90)).expect_code(0);
    }
}

#[test]
fn changes_go_both_ways_while_it_runs() {
    let script = "echo ready; until grep -q go /config/file; do sleep 0.2; done; echo seen; \
                  until test -e /config/new/deep; do sleep 0.2; done; echo new; \
                  until test ! -e /data/gone; do sleep 0.2; done; echo gone; \
                  echo from the container > /data/back; mv /data/file /data/moved; rm /data/doomed; until test -e /data/end; do sleep 0.2; done";
    each(
        "both-ways",
        script,
        |volume| {
            for file in ["file", "gone", "doomed"] {
                fs::write(volume.join(file), "wait\n").unwrap();
            }
        },
        |_, running, volume| {
            running.wait_for("ready");
            // In place, as an editor may, and another file under the old name, as others do.
            fs::write(volume.join("file"), "go now\n").unwrap();
            running.wait_for("seen");
            fs::create_dir(volume.join("new")).unwrap();
            fs::write(volume.join("new/deep"), "").unwrap();
            running.wait_for("new");
            fs::remove_file(volume.join("gone")).unwrap();
            running.wait_for("gone");
            eventually("the container's file", || {
                (fs::read_to_string(volume.join("back")).ok()? == "from the container\n").then_some(())
            });
            eventually("the container's removal", || {
                (!volume.join("doomed").exists() && volume.join("moved").exists()).then_some(())
            });
            fs::write(volume.join("end"), "").unwrap();
        },
    );
}

/// How Kubernetes changes a configuration: a link is turned to a new directory.
#[test]
fn a_configuration_is_exchanged() {
    let script = "cat /config/settings; echo ready; until grep -q two /config/settings; do sleep 0.2; done; cat /config/settings";
    each(
        "exchanged",
        script,
        |volume| {
            fs::create_dir(volume.join("..one")).unwrap();
            fs::write(volume.join("..one/settings"), "one\n").unwrap();
            std::os::unix::fs::symlink("..one", volume.join("..data")).unwrap();
            std::os::unix::fs::symlink("..data/settings", volume.join("settings")).unwrap();
        },
        |_, running, volume| {
            running.wait_for("one\nready");
            fs::create_dir(volume.join("..two")).unwrap();
            fs::write(volume.join("..two/settings"), "two\n").unwrap();
            std::os::unix::fs::symlink("..two", volume.join("..new")).unwrap();
            fs::rename(volume.join("..new"), volume.join("..data")).unwrap();
            fs::remove_dir_all(volume.join("..one")).unwrap();
            running.wait_for("two");
        },
    );
}

#[test]
fn inotify_of_changes_made_inside() {
    let script = "mkdir /data/d; probe watch /data/d > /data/events & until grep -q watching /data/events; do sleep 0.1; done; \
                  echo x > /data/d/made; mv /data/d/made /data/d/moved; rm /data/d/moved; wait; cat /data/events; echo end";
    each(
        "inotify",
        script,
        |_| (),
        |runtime, running, _| {
            running.wait_for("end");
            assert_eq!(
                running.seen(),
                "watching\ncreate made\nclose_write made\nmoved_from made\nmoved_to moved\ndelete moved\nend\n",
                "{runtime:?}"
            );
        },
    );
}

/// Where a kubelet has a ConfigMap: husk tells the container of changes there.
const CONFIGURATION: &str = "pods/1/volumes/kubernetes.io~configmap/conf";

/// As a kubelet lays it out.
fn configuration(volume: &std::path::Path) {
    fs::create_dir(volume.join("..2026_x")).unwrap();
    fs::write(volume.join("..2026_x/key"), "one\n").unwrap();
    symlink("..2026_x", volume.join("..data")).unwrap();
    symlink("..data/key", volume.join("key")).unwrap();
    fs::write(volume.join("..2026_x/old"), "").unwrap();
}

#[test]
fn inotify_of_a_configuration_that_is_exchanged() {
    let script = "cat /config/key; probe watch /config; cat /config/key; ls -A /config; stat -c '%a %u %g' /config/..data/key; echo end";
    each_at(
        CONFIGURATION,
        "exchange-told",
        script,
        configuration,
        |runtime, running, volume| {
            running.wait_for("watching");
            let new = volume.join("..2026_y");
            fs::create_dir(&new).unwrap();
            fs::write(new.join("key"), "two\n").unwrap();
            fs::set_permissions(
                new.join("key"),
                std::os::unix::fs::PermissionsExt::from_mode(0o440),
            )
            .unwrap();
            std::os::unix::fs::chown(new.join("key"), Some(0), Some(33)).unwrap();
            symlink("..2026_y", volume.join("..data_tmp")).unwrap();
            fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
            fs::remove_dir_all(volume.join("..2026_x")).unwrap();
            running.wait_for("end");
            assert_eq!(
                running.seen(),
                "one\nwatching\ncreate ..2026_y\ncreate ..data_tmp\nmoved_from ..data_tmp\nmoved_to ..data\n\
             delete ..2026_x\ntwo\n..2026_y\n..data\nkey\n440 0 33\nend\n",
                "{runtime:?}"
            );
        },
    );
}

#[test]
fn inotify_of_a_file_that_the_host_changes() {
    let script = "exec 3< /config/key; probe watch /config/..data/; cat /config/key; cat <&3; cat /config/..data/new; \
                  grep ' /config ' /proc/self/mountinfo | cut -d' ' -f6 | cut -d, -f1; touch /config/no 2>/dev/null || echo read-only; echo end";
    each_at(
        CONFIGURATION,
        "change-told",
        script,
        configuration,
        |runtime, running, volume| {
            let there = volume.join("..2026_x");
            running.wait_for("watching");
            let mut file = fs::File::options().write(true).open(there.join("key")).unwrap();
            file.write_all(b"two\n").unwrap();
            drop(file);
            fs::write(there.join("new"), "new\n").unwrap();
            fs::remove_file(there.join("old")).unwrap();
            running.wait_for("end");
            assert_eq!(
                running.seen(),
                "watching\nclose_write key\ncreate new\nclose_write new\ndelete old\ntwo\ntwo\nnew\nro\nread-only\nend\n",
                "{runtime:?}"
            );
        },
    );
}

/// A FIFO and a socket are files like others; who speaks through them must be on one side.
#[test]
fn sockets_and_fifos() {
    let script = "cd /data; stat -c '%n %F' host-socket host-fifo; \
                  (echo through the fifo > inner-fifo &); mkfifo inner-fifo 2>/dev/null; \
                  mkfifo own; (echo through the fifo > own &); cat own; \
                  nc -l -U inner.sock > got & until test -S inner.sock; do sleep 0.1; done; echo through the socket | nc -U inner.sock; wait; cat got; echo end";
    each(
        "sockets",
        // busybox's nc has no sockets of files: those are tried with what it has.
        &script.replace("nc -l -U inner.sock > got & until test -S inner.sock; do sleep 0.1; done; echo through the socket | nc -U inner.sock; wait; cat got; ", "")
            .replace("(echo through the fifo > inner-fifo &); mkfifo inner-fifo 2>/dev/null; ", ""),
        |volume| {
            drop(UnixListener::bind(volume.join("host-socket")).unwrap());
            nix::unistd::mkfifo(&volume.join("host-fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        },
        |runtime, running, volume| {
            running.wait_for("end");
            assert_eq!(running.seen(), "host-socket socket\nhost-fifo fifo\nthrough the fifo\nend\n", "{runtime:?}");
            use std::os::unix::fs::FileTypeExt;
            assert!(fs::metadata(volume.join("own")).unwrap().file_type().is_fifo());
        },
    );
}

/// Owners, modes, times, links and extended attributes of files made on one side are the same on the other.
#[test]
fn metadata() {
    let script = "cd /data; touch -d '2001-02-03 04:05:06' made; chmod 4751 made; chown 11:22 made; : the owner takes the mark away; ln made twin; ln -s made link; mkdir -m 1770 dir; truncate -s 1234567 made; touch -d '2001-02-03 04:05:06' made; \
                  stat -c '%a %u %g %h %s %Y' made theirs; readlink link; stat -c %a dir";
    each(
        "metadata",
        script,
        |volume| {
            let theirs = volume.join("theirs");
            let mut file = fs::File::create(&theirs).unwrap();
            file.write_all(&[7; 4321]).unwrap();
            file.set_times(
                fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_234_567_890)),
            )
            .unwrap();
            std::os::unix::fs::chown(&theirs, Some(33), Some(44)).unwrap();
        },
        |runtime, running, volume| {
            running.wait_for("1770");
            assert_eq!(
                running.seen(),
                "751 11 22 2 1234567 981173106\n644 33 44 1 4321 1234567890\nmade\n1770\n",
                "{runtime:?}"
            );
            use std::os::unix::fs::MetadataExt;
            let made = fs::metadata(volume.join("made")).unwrap();
            assert_eq!(
                (
                    made.mode() & 0o7777,
                    made.uid(),
                    made.gid(),
                    made.nlink(),
                    made.size(),
                    made.mtime()
                ),
                (0o751, 11, 22, 2, 1_234_567, 981_173_106)
            );
        },
    );
}

/// Many files, and much in one, written on one side and read on the other.
#[test]
fn much_data() {
    let script = "cd /data; sha256sum big | cut -c1-64; mkdir many; n=0; while [ $n -lt 500 ]; do echo $n > many/$n; n=$((n+1)); done; cat big big > bigger; ls many | wc -l";
    each(
        "much",
        script,
        |volume| {
            fs::write(
                volume.join("big"),
                (0..8_000_000_u32)
                    .map(|n| ((n * 7) >> 3) as u8)
                    .collect::<Vec<u8>>(),
            )
            .unwrap()
        },
        |runtime, running, volume| {
            running.wait_for("500\n");
            let sum = crate::command::ok(&["sha256sum", volume.join("big").to_str().unwrap()]);
            assert_eq!(running.seen(), format!("{}\n500\n", &sum[..64]), "{runtime:?}");
            let mut bigger = Vec::new();
            fs::File::open(volume.join("bigger"))
                .unwrap()
                .read_to_end(&mut bigger)
                .unwrap();
            let big = fs::read(volume.join("big")).unwrap();
            assert!(
                bigger.len() == 16_000_000 && bigger[..8_000_000] == big && bigger[8_000_000..] == big,
                "{runtime:?}"
            );
            assert_eq!(fs::read_to_string(volume.join("many/499")).unwrap(), "499\n");
        },
    );
}

/// The guest knows them all at once; on the host that costs no descriptor each.
#[test]
fn more_files_than_the_file_server_keeps_descriptors_of() {
    const DIRECTORIES: usize = 100;
    let files = std::env::var("HUSK_TEST_FILES").map_or(20_000, |n| n.parse::<usize>().unwrap());
    let volume = tempfile::tempdir().unwrap();
    for directory in 0..DIRECTORIES {
        let path = volume.path().join(directory.to_string());
        fs::create_dir(&path).unwrap();
        for file in (directory..files).step_by(DIRECTORIES) {
            fs::write(path.join(format!("{file}.txt")), file.to_string()).unwrap();
        }
    }
    let script = "exec 3< /data/7/7.txt; walk() { find /data -type f -size -9 | wc -l; }; walk; echo walked; \
                  until test -e /data/go-on; do sleep 0.2; done; cat <&3; echo; cat /data/9/9.txt; echo; \
                  mv /data/8/8.txt /data/moved; rm -r /data/7; cat /data/moved; echo; walk";
    let bundle = foreground::Bundle::busybox(&["sh", "-c", script]);
    bundle.edit(|spec| {
        let source = volume.path().to_str().unwrap();
        spec["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "rw"]}),
        );
    });
    let patience = Duration::from_secs(120 + files as u64 / 100);
    let argv = ["husk", "run", "--bundle", bundle.path(), "many-files"];
    let mut running = Running::start(&argv, Input::Nothing);
    running.wait_for_within(patience, "walked");
    let server = host::pid_of("husk-fsd");
    let descriptors = fs::read_dir(format!("/proc/{server}/fd")).unwrap().count();
    let memory = host::anonymous_kib(server);
    eprintln!("{files} files: {descriptors} descriptors, {memory} KiB");
    assert!(descriptors < (16 << 10) + DIRECTORIES + 100);
    assert!(memory < 4096 + files as u64 / 2);
    fs::remove_file(volume.path().join("9/9.txt")).unwrap();
    fs::write(volume.path().join("9/9.txt"), "changed").unwrap();
    fs::write(volume.path().join("go-on"), "").unwrap();
    let done = running.finish(patience).expect_code(0);
    let left = files - files / DIRECTORIES + 1;
    assert_eq!(done.out(), format!("{files}\nwalked\n7\nchanged\n8\n{left}\n"));
}
