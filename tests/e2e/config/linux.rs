//! `hostname`, `domainname` and the fields of `linux` that are not mounts, resources or filters.

use std::fs;
use std::os::unix::fs::chown;

use serde_json::json;

use crate::case::Case;

#[test]
fn hostname_and_domainname() {
    Case::of(json!({"hostname": "chosen.name"}))
        .sh("hostname; cat /proc/sys/kernel/hostname")
        .prints("chosen.name\nchosen.name\n");
    Case::of(json!({"domainname": "chosen.domain"}))
        .sh("cat /proc/sys/kernel/domainname")
        .runc_since(1, 2)
        .prints("chosen.domain\n");
}

#[test]
fn default_devices_and_links() {
    Case::of(json!({}))
        .sh("cd /dev; stat -c '%n %F %t:%T %a %u:%g' null zero full random urandom tty; \
             for link in fd stdin stdout stderr ptmx; do echo $link $(readlink $link); done; \
             echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; echo x 2>/dev/null > /dev/full || echo full")
        .prints(
            "null character special file 1:3 666 0:0\nzero character special file 1:5 666 0:0\n\
             full character special file 1:7 666 0:0\nrandom character special file 1:8 666 0:0\n\
             urandom character special file 1:9 666 0:0\ntty character special file 5:0 666 0:0\n\
             fd /proc/self/fd\nstdin /proc/self/fd/0\nstdout /proc/self/fd/1\nstderr /proc/self/fd/2\nptmx pts/ptmx\n\
             3\n3\nfull\n",
        );
}

#[test]
fn devices() {
    Case::of(json!({"linux": {"devices": [
        {"path": "/dev/nothing", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 12, "gid": 34},
        {"path": "/dev/deep/down/zeroes", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666},
        {"path": "/dev/unbuffered", "type": "u", "major": 1, "minor": 3, "fileMode": 0o600},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o620},
    ]}}))
    .sh("cd /dev; stat -c '%n %F %t:%T %a %u:%g' nothing deep/down/zeroes unbuffered pipe; \
         echo x > nothing && echo written; head -c 3 deep/down/zeroes | wc -c")
    .prints(
        "nothing character special file 1:3 640 12:34\ndeep/down/zeroes character special file 1:5 666 0:0\n\
         unbuffered character special file 1:3 600 0:0\npipe fifo 0:0 620 0:0\nwritten\n3\n",
    );
}

/// Hardware of the host is not the guest's: a node that would lead nowhere is refused. runc makes it.
#[test]
fn a_device_that_the_guest_does_not_have() {
    Case::of(json!({"linux": {"devices": [{"path": "/dev/disk", "type": "b", "major": 7, "minor": 0}]}}))
        .refused(&["linux.devices[0]", "/dev/disk"], &[]);
}

#[test]
fn sysctl() {
    Case::of(json!({"linux": {"sysctl": {
        "kernel.msgmax": "4321", "kernel.shm_rmid_forced": "1", "net.core.somaxconn": "77", "net.ipv4.ip_unprivileged_port_start": "0",
        "fs.mqueue.msg_max": "9",
    }}}))
    .sh("cd /proc/sys; cat kernel/msgmax kernel/shm_rmid_forced net/core/somaxconn net/ipv4/ip_unprivileged_port_start fs/mqueue/msg_max")
    .prints("4321\n1\n77\n0\n9\n");
}

#[test]
fn a_sysctl_of_the_whole_host() {
    Case::of(json!({"linux": {"sysctl": {"vm.swappiness": "1"}}}))
        .refused(&["linux.sysctl", "vm.swappiness"], &["vm.swappiness"]);
}

#[test]
fn a_sysctl_that_is_not_there() {
    Case::of(json!({"linux": {"sysctl": {"net.no.such": "1"}}}))
        .refused(&["linux.sysctl", "net.no.such"], &["net/no/such", "no such file"]);
}

#[test]
fn personality() {
    Case::of(json!({"linux": {"personality": {"domain": "LINUX32"}}}))
        .sh("uname -m; probe personality 0xffffffff")
        .runc_since(1, 2)
        .prints("i686\npersonality = 8\n");
}

#[test]
fn an_unknown_personality() {
    Case::of(json!({"linux": {"personality": {"domain": "MINIX"}}}))
        .runc_since(1, 2)
        .refused(&["linux.personality"], &["personality"]);
}

#[test]
fn user_namespace() {
    Case::of(json!({"linux": {
        "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 200000, "size": 1000}],
        "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 2000}],
    }}))
    .prepared(|_, bundle| {
        bundle.namespace(json!({"type": "user"}));
        for path in ["", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp"] {
            chown(bundle.in_root(path), Some(100_000), Some(100_000)).unwrap();
        }
        fs::write(bundle.in_root("/theirs"), "").unwrap();
        fs::write(bundle.in_root("/ours"), "").unwrap();
        chown(bundle.in_root("/ours"), Some(200_234), Some(100_077)).unwrap();
    })
    .sh("sed 's/  */ /g' /proc/self/uid_map /proc/self/gid_map; cat /proc/self/setgroups; id -u; id -g; \
         stat -c '%n %u %g' / /ours /theirs; \
         touch /made; chown 1001:7 /made; stat -c '%u %g' /made; chown 5000 /made 2>/dev/null || echo unmapped; \
         mknod /n c 1 3 2>/dev/null || echo no-devices; test -w /dev/null && echo x > /dev/null && echo null")
    .each(|runtime, done, bundle| {
        assert_eq!(
            done.out(),
            " 0 100000 1000\n 1000 200000 1000\n 0 100000 2000\nallow\n0\n0\n/ 0 0\n/ours 1234 77\n/theirs 65534 65534\n\
             1001 7\nunmapped\nno-devices\nnull\n",
            "{runtime:?}: {}",
            done.err()
        );
        let made = fs::metadata(bundle.in_root("/made")).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((made.uid(), made.gid()), (200_001, 100_007), "{runtime:?}");
    });
}

#[test]
fn mappings_without_a_user_namespace() {
    // runc drops them.
    Case::of(json!({"linux": {"uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}}))
        .refused(&["linux.uidMappings"], &[]);
}

#[test]
fn time_offsets() {
    Case::of(json!({"linux": {"timeOffsets": {
        "boottime": {"secs": 1_000_000_000}, "monotonic": {"secs": 2_000_000_000, "nanosecs": 5},
    }}}))
    .prepared(|_, bundle| bundle.namespace(json!({"type": "time"})))
    .runc_since(1, 2)
    .sh(
        "awk '{ print int($1 / 100000000) }' /proc/uptime; sed 's/  */ /g' /proc/self/timens_offsets; \
         probe clocks | awk '{ print $1, int($2 / 100000000) }'",
    )
    .prints("10\nmonotonic 2000000000 5\nboottime 1000000000 0\nmonotonic 20\nboottime 10\n");
}

#[test]
fn time_offsets_without_a_time_namespace() {
    Case::of(json!({"linux": {"timeOffsets": {"boottime": {"secs": 5}}}}))
        .runc_since(1, 2)
        .refused(&["linux.timeOffsets"], &["time"]);
}

/// Without one of its own, a container would share the host's; which the runtimes differ in by nature: in husk it is
/// the sandbox's. Either way the namespaces of the spec are new ones.
#[test]
fn namespaces_are_new() {
    Case::of(json!({}))
        .sh("ip -o link | grep -c -v ' lo:'; echo $$; hostname; ls /dev/mqueue | wc -l; cat /proc/self/cgroup; mount | wc -l | grep -c .")
        .prints("0\n1\nhusk-e2e\n0\n0::/\n1\n");
}

#[test]
fn an_unknown_namespace() {
    Case::of(json!({}))
        .prepared(|_, bundle| bundle.namespace(json!({"type": "weather"})))
        .refused(&["linux.namespaces", "weather"], &["weather"]);
}

#[test]
fn a_device_without_a_node_kind() {
    Case::of(json!({"linux": {"devices": [{"path": "/dev/x", "type": "z", "major": 1, "minor": 3}]}}))
        .refused(&["linux.devices[0]"], &["device"]);
}

/// What nobody knows is no field of config.json: it has no effect, with any runtime.
#[test]
fn annotations() {
    Case::of(json!({"annotations": {"org.example.colour": "green", "empty": ""}}))
        .sh("echo fine")
        .prints("fine\n");
}
