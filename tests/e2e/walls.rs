//! The walls inside the guest: what a container may not reach of the agent's, of the guest's kernel and of the host's
//! ports, with the rights that engines give, and with all rights there are.

use std::collections::BTreeMap;

use crate::census::Census;
use crate::command::{Finished, Input, run, run_with};
use crate::containerd::{BUSYBOX, Detached, RUNTIME};

const DEBIAN: &str = "localhost/debian:13";

/// Tries one thing after the other: `NAME: no, WHY` or `NAME: done, WHAT`.
const TRIES: &str = r#"
import ctypes, errno, fcntl, os, socket, stat, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def vsock(cid, port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(20)
    s.connect((cid, port))
def device(name, major, minor):
    path = '/tmp/' + name
    if not os.path.exists(path): os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
    os.close(os.open(path, os.O_RDWR))
def mount(kind, source='none'):
    place = '/tmp/' + kind
    os.makedirs(place, exist_ok=True)
    if libc.mount(source.encode(), place.encode(), kind.encode(), 0, None) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ' '.join(sorted(os.listdir(place))[:40])
def none(found, what):
    if not found: raise OSError(0, 'there is no ' + what)
    return ' '.join(found)
def agent(proc='/proc'):
    names = []
    for pid in filter(str.isdigit, os.listdir(proc)):
        try: names.append(open(f'{proc}/{pid}/comm').read().strip())
        except OSError: pass
    return none([name for name in names if 'husk' in name or name == 'init'], 'agent')
def mount_namespace():
    fd = os.open('/proc/self/ns/mnt', os.O_RDONLY)
    # NS_MNT_GET_PREV: in the order of their making, the agent's is the first.
    return fcntl.ioctl(fd, 0x8010b70c, struct.pack('IIQ', 16, 0, 0))
def core_pattern(proc='/proc'):
    open(f'{proc}/sys/kernel/core_pattern', 'w').write('core')
tries = {
    'agent port': lambda: vsock(2, 1024),
    'stream port': lambda: vsock(2, 0x10000),
    'agent port of the guest': lambda: vsock(3, 1024),
    'agent port of loopback': lambda: vsock(1, 1024),
    'agent process': agent,
    'named sockets': lambda: none([l.split()[7] for l in open('/proc/net/unix').readlines()[1:] if len(l.split()) > 7], 'name'),
    'listeners': lambda: none([l for l in open('/proc/net/tcp').readlines() if l.split()[3] == '0A'], 'listener'),
    'memory device': lambda: device('mem', 1, 1),
    'port device': lambda: device('port', 1, 4),
    'log device': lambda: device('kmsg', 1, 11),
    'console device': lambda: device('hvc0', 229, 0),
    'kcore': lambda: open('/proc/kcore', 'rb').close(),
    'sysrq': lambda: os.close(os.open('/proc/sysrq-trigger', os.O_WRONLY)),
    'init_module': lambda: call(175, None, 0, b''),
    'finit_module': lambda: call(313, 0, b'', 0),
    'kexec_load': lambda: call(246, 0, 0, None, 0),
    'kexec_file_load': lambda: call(320, 0, 0, 0, None, 0),
    'iopl': lambda: call(172, 3),
    'mount namespace': mount_namespace,
    'core pattern': core_pattern,
    'cgroup': lambda: open('/sys/fs/cgroup/cgroup.procs', 'w').close(),
    'share': lambda: mount('virtiofs', 'share'),
    'devtmpfs': lambda: mount('devtmpfs'),
    'devtmpfs console': lambda: os.close(os.open('/tmp/devtmpfs/hvc0', os.O_RDWR)),
    'cgroup2': lambda: mount('cgroup2'),
    'proc': lambda: mount('proc'),
    'agent process by proc': lambda: agent('/tmp/proc'),
    'kcore by proc': lambda: open('/tmp/proc/kcore', 'rb').close(),
    'sysrq by proc': lambda: os.close(os.open('/tmp/proc/sysrq-trigger', os.O_WRONLY)),
}
for name, attempt in tries.items():
    try: print(f'{name}: done, {attempt()}')
    except OSError as error: print(f'{name}: no, {error}')
print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])
"#;

/// All capabilities that the guest's kernel knows.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// `ctr run` with husk, in the foreground, gone afterwards.
#[track_caller]
fn ctr_run(capabilities: &[&str], image: &str, id: &str, command: &[&str]) -> Finished {
    let mut argv = vec!["ctr", "run", "--rm", "--runtime", RUNTIME];
    for capability in capabilities {
        argv.extend(["--cap-add", capability]);
    }
    argv.extend([image, id]);
    argv.extend(command);
    run(&argv)
}

/// What came of each try, and the capabilities that they were made with.
#[track_caller]
fn tries(capabilities: &[&str], id: &str) -> (BTreeMap<String, String>, u64) {
    let out = ctr_run(capabilities, DEBIAN, id, &["python3", "-c", TRIES])
        .expect_code(0)
        .out();
    let (told, set) = out.trim_end().rsplit_once('\n').unwrap();
    let told = told.lines().map(|line| {
        let (name, result) = line.split_once(": ").unwrap();
        (name.to_owned(), result.to_owned())
    });
    (told.collect(), u64::from_str_radix(set, 16).unwrap())
}

#[test]
fn with_the_usual_rights_nothing_of_the_guests_is_in_reach() {
    let census = Census::take();
    let (told, set) = tries(&[], "walls");
    assert_ne!(set, 0, "it is root, with what engines give");
    assert_eq!(told.len(), 29, "{told:#?}");
    for (name, result) in &told {
        assert!(result.starts_with("no, "), "{name}: {result}");
    }
    census.assert_unchanged();
}

/// It is root of the guest's kernel, but for what that kernel does not have, and the agent is not in its reach.
#[test]
fn with_all_rights_a_container_is_not_the_agent() {
    let census = Census::take();
    let (told, set) = tries(&ALL, "walls-all");
    assert_eq!(set, (1 << ALL.len()) - 1);
    let closed = [
        "agent port",
        "stream port",
        "agent port of the guest",
        "agent port of loopback",
        "agent process",
        "agent process by proc",
        "named sockets",
        "listeners",
        "memory device",
        "port device",
        "log device",
        "console device",
        "devtmpfs console",
        "mount namespace",
        "kcore",
        "kcore by proc",
        "sysrq",
        "sysrq by proc",
        "init_module",
        "finit_module",
        "kexec_load",
        "kexec_file_load",
    ];
    for name in closed {
        assert!(told[name].starts_with("no, "), "{name}: {}", told[name]);
    }
    // The tries are such that they succeed where the right is there.
    for name in ["iopl", "devtmpfs", "proc", "cgroup2"] {
        assert!(told[name].starts_with("done, "), "{name}: {}", told[name]);
    }
    census.assert_unchanged();
}

/// The kernel runs the program that `core_pattern` names as root, beside the agent.
#[test]
fn a_program_that_the_kernel_starts_has_no_rights() {
    let census = Census::take();
    let script = "mkdir /p && mount -t proc proc /p || exit 9; r=/run/husk/share/walls-helper/rootfs; \
                  echo \"|$r/bin/busybox cp /proc/self/status $r/tmp/s\" >/p/sys/kernel/core_pattern || exit 8; \
                  sh -c 'kill -SEGV $$'; \
                  n=0; while [ $n -lt 100 ] && ! grep -q CapAmb /tmp/s 2>/dev/null; do sleep 0.1; n=$((n + 1)); done; \
                  grep -E '^(Uid|Cap)' /tmp/s";
    let done = ctr_run(&ALL, BUSYBOX, "walls-helper", &["sh", "-c", script]).expect_code(0);
    let out = done.out();
    assert!(out.contains("Uid:\t0\t"), "it ran as root: {out:?}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            out.contains(&format!("{set}:\t0000000000000000\n")),
            "{set}: {out:?}"
        );
    }
    census.assert_unchanged();
}

/// A container dials the ports that come next, while the agent dials those of an exec.
#[test]
fn a_container_does_not_get_the_streams_of_another() {
    // Not without a pause: the guest's one processor is the agent's, too.
    const THIEF: &str = "import socket, time\n\
        while True:\n \
        for port in list(range(0x10000, 0x10000 + 24)) + [1024]:\n  \
        time.sleep(0.005)\n  \
        try:\n   \
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n   \
        s.settimeout(5)\n   \
        s.connect((2, port))\n   \
        print('taken', port, s.recv(100), flush=True)\n  \
        except OSError: pass";
    let census = Census::take();
    let container = Detached::start_with(&[], DEBIAN, "walls-thief", &["sleep", "1000"]);
    let start = "python3 -c \"$0\" >/tmp/taken 2>&1 & sleep 1";
    container
        .exec("thief", &["sh", "-c", start, THIEF])
        .expect_code(0);
    for exec in ["one", "two", "three"] {
        let argv = ["ctr", "task", "exec", "--exec-id", exec, "walls-thief", "cat"];
        let input = Input::Bytes(b"a secret\n".to_vec());
        let done = run_with(&argv, input, crate::command::DEADLINE).expect_code(0);
        assert_eq!(done.out(), "a secret\n");
    }
    let done = container.exec(
        "look",
        &["sh", "-c", "ls -l /proc/*/exe | grep -c python3; cat /tmp/taken"],
    );
    let out = done.out();
    let (running, taken) = out.split_once('\n').unwrap();
    assert_ne!(running.trim(), "0", "the thief runs: {out:?}");
    assert_eq!(taken, "");
    container.remove();
    census.assert_unchanged();
}

/// Whoever has CAP_SYS_PTRACE can take a process over as soon as it is in sight, before its exec.
#[test]
fn an_exec_is_out_of_the_agents_namespaces_before_the_container_sees_it() {
    const WATCH: &str = "import os\n\
        seen, roots = set(), set()\n\
        while not os.path.exists('/tmp/stop'):\n \
        for pid in filter(str.isdigit, os.listdir('/proc')):\n  \
        try:\n   \
        seen.add(os.readlink(f'/proc/{pid}/ns/mnt'))\n   \
        roots.add(os.path.exists(f'/proc/{pid}/root/run/husk'))\n  \
        except OSError: pass\n\
        print(len(seen), roots, flush=True)";
    let census = Census::take();
    let container = Detached::start_with(
        &["--cap-add", "CAP_SYS_PTRACE"],
        DEBIAN,
        "walls-exec",
        &["sleep", "1000"],
    );
    let start = "python3 -c \"$0\" >/tmp/seen 2>&1 & sleep 1";
    container
        .exec("watch", &["sh", "-c", start, WATCH])
        .expect_code(0);
    for number in 0..4 {
        container.exec(&format!("e{number}"), &["true"]).expect_code(0);
    }
    let stop = "touch /tmp/stop; while ! grep -q } /tmp/seen; do sleep 0.1; done; cat /tmp/seen";
    let done = container.exec("stop", &["sh", "-c", stop]).expect_code(0);
    assert_eq!(
        done.out(),
        "1 {False}\n",
        "mount namespaces, and whether one has the agent's files"
    );
    container.remove();
    census.assert_unchanged();
}
