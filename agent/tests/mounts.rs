//! Mounts of containers made by the real agent without a VM (see `common`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt};

use common::{Host, script};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

/// Adds mounts to a spec; answers the index of the first.
fn add(spec: &mut Value, mounts: &[Value]) -> u32 {
    let all = spec["mounts"].as_array_mut().unwrap();
    let first = all.len() as u32;
    all.extend(mounts.iter().cloned());
    first
}

#[tokio::test]
async fn options_are_seen_in_mountinfo() {
    let host = Host::new().await;
    host.rootfs("c");
    let mut spec = script(
        "cat /proc/self/mountinfo; stat -c %a /sized; ls -l /copied/sub; cat /copied/sub/file; stat -c %a:%u /copied",
    );
    let tmpfs = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "tmpfs", "source": "x", "options": options});
    let copied = host.directory.path().join("share/c/rootfs/copied");
    fs::create_dir_all(copied.join("sub")).unwrap();
    fs::write(copied.join("sub/file"), "image's\n").unwrap();
    fs::set_permissions(&copied, PermissionsExt::from_mode(0o751)).unwrap();
    std::os::unix::fs::chown(&copied, Some(33), Some(33)).unwrap();
    let first = add(
        &mut spec,
        &[
            tmpfs(
                "/sized",
                &[
                    "size=1m",
                    "nr_inodes=100",
                    "mode=1770",
                    "noexec",
                    "nosuid",
                    "nodev",
                    "noatime",
                ],
            ),
            tmpfs("/copied", &["tmpcopyup", "ro", "size=1m"]),
            json!({"destination": "/deep", "type": "bind", "source": "/host", "options": ["rbind", "rro", "rnosuid", "rnoexec", "rstrictatime"]}),
            json!({"destination": "/flat", "type": "bind", "source": "/host", "options": ["rbind", "ro", "nodiratime", "rnodev", "rnosymfollow", "async"]}),
            json!({"destination": "/slave", "type": "bind", "source": "/host", "options": ["rbind", "rslave"]}),
            json!({"destination": "/unbindable", "type": "bind", "source": "/host", "options": ["rbind", "runbindable"]}),
        ],
    );
    // A volume with a mount below it.
    let volumes = host.directory.path().join("share/.volumes");
    for number in 0..4 {
        let volume = volumes.join(number.to_string());
        fs::create_dir_all(volume.join("below")).unwrap();
    }
    let pid = host.agent_pid();
    for number in 0..4 {
        let below = volumes.join(number.to_string()).join("below");
        let mounted = std::process::Command::new("nsenter")
            .args(["-m", "-t", &pid.to_string(), "mount", "-t", "tmpfs", "below"])
            .arg(&below)
            .status()
            .unwrap();
        assert!(mounted.success());
    }
    let numbers: HashMap<u32, u32> = (0..4).map(|number| (first + 2 + number, number)).collect();
    let mut streams = host
        .try_create_with("c", &spec, numbers)
        .await
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    host.try_start("c").await.unwrap();
    let (stdout, stderr) = streams.read().await;
    assert_eq!(stderr, "", "{stdout}");
    // Mount point, options, optional fields and the rest, by mountinfo.
    let line = |place: &str| {
        let line = stdout.lines().find(|line| line.split(' ').nth(4) == Some(place));
        line.unwrap_or_else(|| panic!("{place} is not mounted:\n{stdout}"))
            .to_owned()
    };
    let options = |place: &str| line(place).split(' ').nth(5).unwrap().to_owned();
    assert_eq!(options("/sized"), "rw,nosuid,nodev,noexec,noatime");
    let sized = line("/sized");
    assert!(
        sized.contains("size=1024k") && sized.contains("nr_inodes=100"),
        "{sized}"
    );
    assert_eq!(options("/copied"), "ro,relatime");
    for place in ["/deep", "/deep/below"] {
        assert_eq!(options(place), "ro,nosuid,noexec", "{place}");
    }
    assert_eq!(options("/flat"), "ro,nodev,nodiratime,relatime,nosymfollow");
    assert_eq!(options("/flat/below"), "rw,nodev,relatime,nosymfollow");
    for place in ["/unbindable", "/unbindable/below"] {
        assert!(line(place).contains(" unbindable "), "{}", line(place));
    }
    let rest: Vec<&str> = stdout.lines().skip_while(|line| line.contains(" - ")).collect();
    assert_eq!(rest[0], "1770");
    assert!(
        rest.contains(&"image's") && rest.last() == Some(&"751:33"),
        "{rest:?}"
    );
    assert_eq!(host.next_exit().await.2, 0);
    host.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_copy_up_is_bounded_by_its_tmpfs() {
    let host = Host::new().await;
    let root = host.rootfs("c");
    fs::create_dir(root.join("large")).unwrap();
    fs::write(root.join("large/file"), vec![0u8; 2 << 20]).unwrap();
    let mut spec = script("true");
    add(
        &mut spec,
        &[json!({"destination": "/large", "type": "tmpfs", "options": ["tmpcopyup", "size=1m"]})],
    );
    let failure = host.try_create("c", &spec).await.err().unwrap();
    assert!(
        failure
            .message
            .contains("(/large): tmpcopyup: no space left on device"),
        "{}",
        failure.message
    );
}

#[tokio::test]
async fn unknown_options_are_named() {
    let host = Host::new().await;
    host.rootfs("c");
    for (kind, option) in [
        ("tmpfs", "nosuchoption"),
        ("tmpfs", "size=x"),
        ("proc", "tmpcopyup"),
        ("tmpfs", "idmap"),
    ] {
        let mut spec = script("true");
        let index = add(
            &mut spec,
            &[json!({"destination": "/a", "type": kind, "options": [option]})],
        );
        let failure = host.try_create("c", &spec).await.err().unwrap();
        assert!(
            failure.message.starts_with(&format!("mounts[{index}] (/a).")),
            "{}",
            failure.message
        );
    }
}

#[tokio::test]
async fn containers_see_each_others_mounts_if_they_share_a_volume() {
    let host = Host::new().await;
    fs::create_dir_all(host.directory.path().join("share/.volumes/0/sub")).unwrap();
    let pid = host.agent_pid();
    let mounts = || {
        fs::read_to_string(format!("/proc/{pid}/mountinfo"))
            .unwrap()
            .lines()
            .count()
    };
    let before = mounts();
    let create = async |id: &str, propagation: &str| {
        host.rootfs(id);
        let mut spec = script("echo up; cat; cat /v/sub/file; echo end");
        let index = add(
            &mut spec,
            &[
                json!({"destination": "/v", "type": "bind", "source": "/x", "options": ["rbind", propagation]}),
            ],
        );
        let all = json!(["CAP_SYS_ADMIN"]);
        spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
        if id == "maker" {
            spec["process"]["args"][2] =
                json!("mount -t tmpfs x /v/sub && echo shared > /v/sub/file && echo up; cat");
        }
        let created = host.try_create_with(id, &spec, HashMap::from([(index, 0)])).await;
        let mut streams = created.unwrap_or_else(|failure| panic!("{}", failure.message));
        host.try_start(id).await.unwrap();
        let mut up = [0u8; 3];
        streams
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut up)
            .await
            .unwrap();
        streams
    };
    let mut slave = create("slave", "rslave").await;
    let mut private = create("private", "rprivate").await;
    let mut peer = create("peer", "rshared").await;
    let mut maker = create("maker", "rshared").await;
    let mut late = create("late", "rslave").await;
    for (id, streams, sees) in [
        ("slave", &mut slave, true),
        ("private", &mut private, false),
        ("peer", &mut peer, true),
        ("late", &mut late, true),
        ("maker", &mut maker, false),
    ] {
        streams.stdin = None;
        let (stdout, _) = streams.read().await;
        assert_eq!(stdout.contains("shared"), sees, "{id}: {stdout}");
        assert_eq!(host.next_exit().await.0, id);
        host.delete(id).await.unwrap();
    }
    assert_eq!(mounts(), before);
}
