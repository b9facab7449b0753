//! `root`, `mounts` and what hides or protects paths.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::case::{Case, Runtime};
use crate::command::ok;

/// Prints, for each mount below /m: where, its own options, its propagation.
const BELOW_M: &str = r#"awk '$5 ~ "^/m/" { p = ""; for (i = 7; $i != "-"; i++) { sub(":.*", "", $i); p = p " " $i }; print $5, $6 p }' /proc/self/mountinfo | sort"#;

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
}

fn tmpfs_mounts(case: Case, mounts: &[(&str, &[&str])]) -> Case {
    mounts.iter().fold(case, |case, (destination, options)| {
        case.mount(tmpfs(destination, options))
    })
}

#[test]
fn root_readonly() {
    Case::of(json!({"root": {"readonly": true}}))
        .sh("touch /made; echo $?; awk '$5 == \"/\" { print substr($6, 1, 3) }' /proc/self/mountinfo; touch /dev/made && echo dev")
        .each(|runtime, done, _| {
            assert_eq!(done.out(), "1\nro,\ndev\n", "{runtime:?}");
            assert!(done.err().contains("Read-only file system"), "{runtime:?}: {}", done.err());
        });
}

#[test]
fn mount_flags() {
    tmpfs_mounts(
        Case::of(json!({})).sh(BELOW_M),
        &[
            ("/m/a", &["ro"]),
            ("/m/b", &["nosuid", "nodev", "noexec"]),
            ("/m/c", &["nosuid", "nodev", "noexec", "suid", "dev", "exec"]),
            ("/m/d", &["noatime"]),
            ("/m/e", &["nodiratime"]),
            ("/m/f", &["strictatime"]),
            ("/m/g", &["noatime", "atime"]),
            ("/m/i", &["ro", "rw"]),
            ("/m/j", &["nosymfollow"]),
            ("/m/k", &["sync", "dirsync", "lazytime"]),
        ],
    )
    .prints(
        "/m/a ro,relatime\n/m/b rw,nosuid,nodev,noexec,relatime\n/m/c rw,relatime\n/m/d rw,noatime\n\
         /m/e rw,nodiratime,relatime\n/m/f rw\n/m/g rw,relatime\n/m/i rw,relatime\n\
         /m/j rw,relatime,nosymfollow\n/m/k rw,relatime\n",
    );
}

#[test]
fn mount_propagation() {
    tmpfs_mounts(
        Case::of(json!({})).sh(BELOW_M),
        &[
            ("/m/a", &["private"]),
            ("/m/b", &["shared"]),
            ("/m/c", &["rshared"]),
            ("/m/d", &["unbindable"]),
            ("/m/e", &["rprivate"]),
            ("/m/f", &["shared", "slave"]),
        ],
    )
    .prints(
        "/m/a rw,relatime\n/m/b rw,relatime shared\n/m/c rw,relatime shared\n/m/d rw,relatime unbindable\n\
         /m/e rw,relatime\n/m/f rw,relatime\n",
    );
}

#[test]
fn tmpfs_size_mode_and_owner() {
    let script = "df -k /m/a | tail -n1 | awk '{print $2}'; stat -c '%a %u %g' /m/a; stat -c %a /m/b; \
                  head -c 2000000 /dev/zero > /m/a/big; stat -c %s /m/a/big; \
                  touch /m/c/1 /m/c/2 /m/c/3 /m/c/4 2>/dev/null; ls /m/c";
    tmpfs_mounts(
        Case::of(json!({})).sh(script),
        &[
            ("/m/a", &["size=1m", "mode=1750", "uid=12", "gid=34"]),
            ("/m/b", &["mode=0711"]),
            ("/m/c", &["nr_inodes=4"]),
        ],
    )
    .each(|runtime, done, _| {
        assert_eq!(
            done.out(),
            "1024\n1750 12 34\n711\n1048576\n1\n2\n3\n",
            "{runtime:?}"
        );
    });
}

#[test]
fn tmpcopyup() {
    Case::of(json!({}))
        .prepared(|_, bundle| {
            fs::create_dir_all(bundle.in_root("/data/deep")).unwrap();
            fs::write(bundle.in_root("/data/deep/file"), "from the image\n").unwrap();
            fs::write(bundle.in_root("/data/x"), "x").unwrap();
            symlink("deep/file", bundle.in_root("/data/link")).unwrap();
            std::os::unix::fs::chown(bundle.in_root("/data/x"), Some(12), Some(34)).unwrap();
        })
        .mount(tmpfs("/data", &["tmpcopyup", "size=4m"]))
        .sh("cat /data/link; stat -c '%u %g %a' /data/x; echo changed > /data/deep/file; cat /data/deep/file; grep -c ' /data ' /proc/mounts")
        .each(|runtime, done, bundle| {
            assert_eq!(done.out(), "from the image\n12 34 644\nchanged\n1\n", "{runtime:?}");
            let kept = fs::read_to_string(bundle.in_root("/data/deep/file")).unwrap();
            assert_eq!(kept, "from the image\n", "{runtime:?}");
        });
}

/// Makes `volume` beside config.json with `file` and `sub/file` in it; gives its path.
fn volume(bundle: &Bundle) -> String {
    let volume = bundle.path().join("volume");
    fs::create_dir_all(volume.join("sub")).unwrap();
    fs::write(volume.join("file"), "from the host\n").unwrap();
    fs::write(volume.join("sub/file"), "below\n").unwrap();
    volume.to_str().unwrap().to_owned()
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

#[test]
fn bind_mounts_of_directories_and_files() {
    Case::of(json!({}))
        .prepared(|_, bundle| {
            let volume = volume(bundle);
            bundle.mount(bind(&volume, "/m/rw", &["rbind", "rw"]));
            bundle.mount(bind(&volume, "/m/ro", &["bind", "ro", "nosuid", "nodev", "noexec"]));
            bundle.mount(bind(&format!("{volume}/file"), "/m/file", &["bind"]));
            bundle.mount(bind(&format!("{volume}/file"), "/etc/resolv.conf", &["bind", "ro"]));
            // Over one that is there.
            bundle.mount(bind(&format!("{volume}/sub/file"), "/m/rw/file", &["bind"]));
        })
        .sh("cat /m/rw/file /m/ro/file /m/file; echo two >> /m/file; cat /etc/resolv.conf; echo three > /etc/resolv.conf; \
             touch /m/ro/x; touch /m/rw/made; echo deep >> /m/rw/file; cat /m/ro/sub/file; \
             awk '$5 == \"/m/ro\" { print $6 }' /proc/self/mountinfo")
        .each(|runtime, done, bundle| {
            assert_eq!(
                done.out(),
                "below\nfrom the host\nfrom the host\nfrom the host\ntwo\nbelow\ndeep\nro,nosuid,nodev,noexec,relatime\n",
                "{runtime:?}: {}",
                done.err()
            );
            assert_eq!(done.err().matches("ead-only file system").count(), 2, "{runtime:?}: {}", done.err());
            assert!(bundle.path().join("volume/made").exists(), "{runtime:?}");
            let file = fs::read_to_string(bundle.path().join("volume/file")).unwrap();
            assert_eq!(file, "from the host\ntwo\n", "{runtime:?}");
        });
}

/// A volume with a mount of the host below it, unmounted with the test.
struct Nested(String);

impl Nested {
    fn in_volume(volume: &str) {
        ok(&["mount", "-t", "tmpfs", "nested", &format!("{volume}/sub")]);
        fs::write(format!("{volume}/sub/nested"), "nested\n").unwrap();
    }

    fn of(bundle: &Bundle) -> Self {
        Self(bundle.path().join("volume/sub").to_str().unwrap().to_owned())
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        crate::command::run(&["umount", &self.0]);
    }
}

/// `ro` is for the mount itself, `rro` for those below it too; `bind` brings none of those.
#[test]
fn bind_mounts_with_mounts_below() {
    Case::of(json!({}))
        .prepared(|_, bundle| {
            let volume = volume(bundle);
            Nested::in_volume(&volume);
            bundle.mount(bind(&volume, "/m/ro", &["rbind", "ro"]));
            bundle.mount(bind(&volume, "/m/rro", &["rbind", "rro"]));
            bundle.mount(bind(&volume, "/m/flat", &["bind"]));
            bundle.mount(bind(
                &volume,
                "/m/many",
                &["rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime"],
            ));
        })
        .sh("cat /m/ro/sub/nested /m/rro/sub/nested; ls /m/flat/sub; \
             touch /m/ro/x; touch /m/ro/sub/x && echo ro-sub-written; touch /m/rro/x; touch /m/rro/sub/x; \
             awk '$5 ~ \"^/m/many\" { print $5, $6 }' /proc/self/mountinfo")
        .each(|runtime, done, bundle| {
            let _nested = Nested::of(bundle);
            let many = "rw,nosuid,nodev,noexec,noatime\n";
            assert_eq!(
                done.out(),
                format!("nested\nnested\nfile\nro-sub-written\n/m/many {many}/m/many/sub {many}"),
                "{runtime:?}: {}",
                done.err()
            );
            let errors = done.err().matches("ead-only file system").count();
            assert_eq!(errors, 3, "{runtime:?}: {}", done.err());
        });
}

/// A destination is found inside the container's root, whatever the links in it say.
#[test]
fn destinations_through_links() {
    Case::of(json!({}))
        .prepared(|_, bundle| {
            let volume = volume(bundle);
            fs::create_dir_all(bundle.in_root("/real")).unwrap();
            symlink("real", bundle.in_root("/relative")).unwrap();
            symlink("/real", bundle.in_root("/absolute")).unwrap();
            symlink("../../../../../../../..", bundle.in_root("/upwards")).unwrap();
            bundle.mount(bind(&volume, "/relative/a", &["bind"]));
            bundle.mount(bind(&volume, "/absolute/b", &["bind"]));
            bundle.mount(bind(&volume, "/upwards/real/c", &["bind"]));
            bundle.mount(bind(&volume, "/real/x/../d", &["bind"]));
        })
        .sh("cat /real/a/file /real/b/file /real/c/file /real/d/file")
        .prints(&"from the host\n".repeat(4));
}

#[test]
fn the_usual_mounts() {
    Case::of(json!({}))
        .sh("awk '$5 == \"/proc\" || $5 ~ \"^/(dev|sys)\" || $5 == \"/run\" { t = $0; sub(\".* - \", \"\", t); sub(\" .*\", \"\", t); print $5, $6, t }' /proc/self/mountinfo | \
             grep -v -E '^/(sys/firmware|proc/)' | sort; stat -c %a /dev/shm; df -k /dev/shm | tail -n1 | awk '{print $2}'")
        .prints(
            "/dev rw,nosuid tmpfs\n/dev/mqueue rw,nosuid,nodev,noexec,relatime mqueue\n\
             /dev/pts rw,nosuid,noexec,relatime devpts\n/dev/shm rw,nosuid,nodev,noexec,relatime tmpfs\n\
             /proc rw,nosuid,nodev,noexec,relatime proc\n/run rw,nosuid tmpfs\n\
             /sys ro,nosuid,nodev,noexec,relatime sysfs\n/sys/fs/cgroup ro,nosuid,nodev,noexec,relatime cgroup2\n1777\n65536\n",
        );
}

#[test]
fn masked_paths() {
    Case::of(json!({"linux": {"maskedPaths": ["/etc/passwd", "/secrets", "/proc/meminfo", "/not/there"]}}))
        .prepared(|_, bundle| {
            fs::create_dir(bundle.in_root("/secrets")).unwrap();
            fs::write(bundle.in_root("/secrets/key"), "secret").unwrap();
        })
        .sh("cat /etc/passwd /proc/meminfo | wc -c; ls -A /secrets | wc -l; touch /secrets/x 2>/dev/null || echo refused; \
             echo x 2>/dev/null > /etc/passwd; cat /etc/passwd; test -e /not && echo made; \
             awk '$5 == \"/secrets\" { print $6 }' /proc/self/mountinfo | cut -d, -f1")
        .prints("0\n0\nrefused\nro\n");
}

#[test]
fn readonly_paths() {
    Case::of(json!({"linux": {"readonlyPaths": ["/etc", "/home/file", "/proc/sys", "/not/there"]}}))
        .prepared(|_, bundle| fs::write(bundle.in_root("/home/file"), "kept\n").unwrap())
        .sh("touch /etc/x; echo x > /home/file; touch /home/x && echo beside; echo x > /proc/sys/kernel/domainname; cat /home/file; \
             test -e /not && echo made; true")
        .each(|runtime, done, _| {
            assert_eq!(done.out(), "beside\nkept\n", "{runtime:?}: {}", done.err());
            assert_eq!(done.err().matches("ead-only file system").count(), 3, "{runtime:?}: {}", done.err());
        });
}

#[test]
fn rootfs_propagation() {
    for (value, shown) in [
        ("shared", "shared\n"),
        ("private", "none\n"),
        ("unbindable", "unbindable\n"),
    ] {
        Case::of(json!({"linux": {"rootfsPropagation": value}}))
            .runc_since(1, 2)
            .sh("awk '$5 == \"/\" { p = $7; sub(\":.*\", \"\", p); print p == \"-\" ? \"none\" : p }' /proc/self/mountinfo")
            .prints(shown);
    }
}

/// Files of the host appear with the owners of the mapping.
#[test]
fn id_mapped_mounts() {
    Case::of(json!({}))
        .prepared(|_, bundle| {
            let volume = volume(bundle);
            std::os::unix::fs::chown(bundle.path().join("volume/file"), Some(5), Some(6)).unwrap();
            let mapping = json!([{"containerID": 0, "hostID": 1000, "size": 100}]);
            let mut mount = bind(&volume, "/m/mapped", &["bind", "idmap"]);
            mount["uidMappings"] = mapping.clone();
            mount["gidMappings"] = mapping;
            bundle.mount(mount);
        })
        .runc_since(1, 2)
        .sh("stat -c '%u %g' /m/mapped /m/mapped/file")
        .prints("1000 1000\n1005 1006\n");
}

#[test]
fn an_unknown_mount_option() {
    // Passed on to the file system, which does not know it either.
    Case::of(json!({}))
        .mount(tmpfs("/m/a", &["nosuid", "flying"]))
        .refused(&["mounts[8]", "flying"], &["invalid argument"]);
}

#[test]
fn an_unknown_mount_type() {
    Case::of(json!({}))
        .mount(json!({"destination": "/m/a", "type": "nofs", "source": "none"}))
        .refused(&["mounts[8]", "nofs"], &["no such device"]);
}

#[test]
fn a_volume_that_is_not_there() {
    Case::of(json!({}))
        .mount(bind("/no/such/volume", "/m/a", &["bind"]))
        .refused(
            &["mounts[8]", "/no/such/volume"],
            &["/no/such/volume", "no such file"],
        );
}

#[test]
fn a_file_mounted_over_a_directory() {
    Case::of(json!({}))
        .prepared(|_: Runtime, bundle| {
            let volume = volume(bundle);
            bundle.mount(bind(&format!("{volume}/file"), "/home", &["bind"]));
        })
        .refused(&["mounts[8]", "/home"], &["not a directory"]);
}
