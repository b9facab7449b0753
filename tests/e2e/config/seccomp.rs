//! `linux.seccomp`: what a filtered system call answers.

use serde_json::{Value, json};

use crate::case::Case;
use crate::command::run;
use crate::containerd::BUSYBOX;

/// Everything is allowed but what `rules` say.
fn filter(rules: Value) -> Value {
    json!({"linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules,
    }}})
}

/// What busybox's shell and `probe` need.
const NEEDED: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getrandom",
    "gettid",
    "gettimeofday",
    "getuid",
    "ioctl",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pipe",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "seccomp",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setpgid",
    "setsid",
    "setuid",
    "setresuid",
    "setresgid",
    "sigaltstack",
    "stat",
    "statfs",
    "statx",
    "sysinfo",
    "tgkill",
    "uname",
    "vfork",
    "wait4",
    "waitid",
    "write",
    "writev",
];

#[test]
fn errno() {
    Case::of(filter(json!([
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["sethostname", "chown"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["setuid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
        {"names": ["unshare", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
    ])))
    .sh("probe mkdir /x 0; probe sethostname x 1; probe chown / 0 0; probe setuid 5; id -u; probe unshare 0; probe getpid | cut -d= -f1; \
         grep -E '^Seccomp(_filters)?:' /proc/self/status")
    .prints(
        "mkdir: EPERM\nsethostname: ENOSYS\nchown: ENOSYS\nsetuid = 0\n0\nunshare: EACCES\ngetpid \nSeccomp:\t2\nSeccomp_filters:\t1\n",
    );
}

#[test]
fn default_action() {
    Case::of(json!({"linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": NEEDED, "action": "SCMP_ACT_ALLOW"}, {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}],
    }}}))
    .sh("probe mkdir /x 0; probe umask 18; probe kill 1 0; probe lseek 0 0 0 > /dev/null && echo allowed")
    .prints("mkdir: EACCES\numask: EACCES\nkill: EIO\nallowed\n");
}

/// `umask` takes one number, harmlessly, and cannot fail.
#[test]
fn arguments() {
    let rule = |errno: u32, args: Value| json!({"names": ["umask"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args});
    let compare = |op: &str, value: u64, two: u64| json!({"index": 0, "value": value, "valueTwo": two, "op": format!("SCMP_CMP_{op}")});
    let plain = |name: &str, errno: u32, index: u32, op: &str, value: u64| {
        json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
            "args": [{"index": index, "value": value, "op": format!("SCMP_CMP_{op}")}]})
    };
    Case::of(filter(json!([
        rule(1, json!([compare("EQ", 1, 0)])),
        rule(2, json!([compare("LT", 1, 0)])),
        rule(4, json!([compare("MASKED_EQ", 0xf0, 0x50)])),
        // Two conditions on one argument are alternatives.
        rule(5, json!([compare("EQ", 6, 0), compare("EQ", 7, 0)])),
        // On two arguments, both must hold.
        rule(9, json!([compare("EQ", 0xff01, 0), {"index": 1, "value": 3, "op": "SCMP_CMP_NE"}])),
        // All of the 64 bits count.
        plain("lseek", 38, 1, "GT", 0x1_0000_0000),
        plain("dup3", 11, 0, "GE", 200),
        plain("personality", 13, 0, "LE", 0xffff_0000),
    ])))
    .sh("for n in 0 1 2 6 7 0x55 0x150 0x65 0x100000001; do probe umask $n; done; probe umask 0xff01 3; probe umask 0xff01 2; \
         for n in 5 0x100000000 0x100000001; do probe lseek 99 $n 0; done; probe dup3 199 5 0; probe dup3 200 5 0; \
         probe personality 8; probe personality 0xffffffff")
    .prints(
        "umask: ENOENT\numask: EPERM\numask = 18\numask: EIO\numask: EIO\numask: EINTR\numask: EINTR\numask = 18\numask = 18\n\
         umask = 18\numask: EBADF\nlseek: EBADF\nlseek: EBADF\nlseek: ENOSYS\ndup3: EBADF\ndup3: EAGAIN\n\
         personality: EACCES\npersonality = 0\n",
    );
}

#[test]
fn killing() {
    Case::of(filter(json!([
        {"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["chown"], "action": "SCMP_ACT_TRAP"},
        {"names": ["setuid"], "action": "SCMP_ACT_KILL"},
        {"names": ["unshare"], "action": "SCMP_ACT_KILL_THREAD"},
        {"names": ["umask"], "action": "SCMP_ACT_LOG"},
    ])))
    .sh("probe mkdir /x 0; echo $?; probe chown / 0 0; echo $?; probe setuid 0; echo $?; probe unshare 0; echo $?; probe umask 18; test -e /x || echo not-made")
    .prints("159\n159\n159\n159\numask = 18\nnot-made\n");
}

#[test]
fn killing_the_main_process() {
    Case::of(filter(
        json!([{"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS"}]),
    ))
    .prepared(|_, bundle| bundle.spec["process"]["args"] = json!(["probe", "mkdir", "/x", "0"]))
    .exits(159)
    .prints("");
}

#[test]
fn flags() {
    Case::of(json!({"linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
    }}}))
    .runc_since(1, 2)
    .sh("probe mkdir /x 0; grep Seccomp: /proc/self/status")
    .prints("mkdir: EPERM\nSeccomp:\t2\n");
}

/// Without noNewPrivileges the filter is installed by privilege, before the capabilities go.
#[test]
fn with_new_privileges_and_without_capabilities() {
    Case::of(filter(json!([{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}])))
        .prepared(|_, bundle| bundle.change(&json!({"process": {"noNewPrivileges": false, "capabilities": null, "user": {"uid": 1234, "gid": 4321}}})))
        .sh("probe mkdir /tmp/x 0; id -u; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status")
        .prints("mkdir: EPERM\n1234\nNoNewPrivs:\t0\nSeccomp:\t2\n");
}

/// The profile that containerd, and with it Kubernetes and Docker, uses.
#[test]
fn the_default_profile() {
    for runtime in crate::case::Runtime::all() {
        let argv = [
            "ctr",
            "run",
            "--rm",
            "--runtime",
            runtime.name(),
            "--seccomp",
            BUSYBOX,
            "profile",
            "sh",
            "-c",
            "grep Seccomp: /proc/self/status; unshare -U true 2>&1; mount -t tmpfs x /tmp 2>&1; chroot / echo chroot",
        ];
        let done = run(&argv).expect_code(0);
        assert_eq!(
            done.out(),
            "Seccomp:\t2\nunshare: unshare(0x10000000): Operation not permitted\n\
             mount: permission denied (are you root?)\nchroot\n",
            "{runtime:?}"
        );
    }
}

#[test]
fn an_exec_is_filtered_too() {
    // Asked of the init process's filter by nothing but the exec itself: see task::exec_has_the_filter.
    Case::of(filter(
        json!([{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]),
    ))
    .sh("sh -c 'exec sh -c \"probe mkdir /x 0\"'")
    .prints("mkdir: ENOSYS\n");
}

#[test]
fn an_unknown_action() {
    Case::of(json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_SHRUG"}}})).refused(
        &["linux.seccomp.defaultAction", "SCMP_ACT_SHRUG"],
        &["SCMP_ACT_SHRUG"],
    );
}

#[test]
fn an_unknown_comparator() {
    Case::of(filter(json!([{"names": ["umask"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_LIKE"}]}])))
        .refused(&["linux.seccomp.syscalls[0].args", "SCMP_CMP_LIKE"], &["SCMP_CMP_LIKE"]);
}

#[test]
fn an_unknown_architecture() {
    Case::of(json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_Z80"], "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}}}))
        .refused(&["linux.seccomp.architectures", "SCMP_ARCH_Z80"], &["SCMP_ARCH_Z80"]);
}

#[test]
fn an_unknown_flag() {
    Case::of(json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_PIRATE"], "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}}}))
        .runc_since(1, 2)
        .refused(&["linux.seccomp.flags", "SECCOMP_FILTER_FLAG_PIRATE"], &["SECCOMP_FILTER_FLAG_PIRATE"]);
}

#[test]
fn an_argument_that_no_call_has() {
    Case::of(filter(json!([{"names": ["umask"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}])))
        .refused(&["linux.seccomp.syscalls[0].args"], &["seccomp"]);
}

/// The listener is a socket of the host, which the guest does not reach.
#[test]
fn a_listener() {
    Case::of(json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/no-such.sock", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}}}))
        .refused(&["linux.seccomp"], &["no-such.sock"]);
}
