//! `process`: who runs, what, where, and with which rights.

use serde_json::json;

use crate::case::{Case, Runtime};

#[test]
fn user() {
    Case::of(json!({"process": {
        "user": {"uid": 1234, "gid": 4321, "umask": 0o27, "additionalGids": [77, 4321, 900]},
    }}))
    .sh("grep -E '^(Uid|Gid|Groups|Umask):' /proc/self/status; id -un; > /tmp/made; stat -c '%a %u %g' /tmp/made")
    .prints("Umask:\t0027\nUid:\t1234\t1234\t1234\t1234\nGid:\t4321\t4321\t4321\t4321\nGroups:\t77 900 4321 \nuser\n640 1234 4321\n");
}

#[test]
fn args_env_and_cwd() {
    let script = r#"for word in "$@"; do echo "[$word]"; done; env | grep -v -E '^(SHLVL|PWD)=' | sort; pwd"#;
    Case::of(json!({"process": {
        "args": ["sh", "-c", script, "zero", "two words", "", "ünï", "$HOME", "new\nline"],
        "env": ["PATH=/bin", "EMPTY=", "SIGNS=a=b c", "TWICE=first", "TWICE=second"],
        "cwd": "/made/by/the runtime",
    }}))
    .prints("[two words]\n[]\n[ünï]\n[$HOME]\n[new\nline]\nEMPTY=\nHOME=/root\nPATH=/bin\nSIGNS=a=b c\nTWICE=second\n/made/by/the runtime\n");
}

#[test]
fn home_is_that_of_the_user() {
    Case::of(json!({"process": {"user": {"uid": 1234, "gid": 4321}}}))
        .sh("echo $HOME")
        .prints("/home\n");
}

#[test]
fn rlimits() {
    Case::of(json!({"process": {"rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 321, "hard": 654},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NPROC", "soft": 500, "hard": 501},
        {"type": "RLIMIT_STACK", "soft": 4194304, "hard": 8388608},
        {"type": "RLIMIT_FSIZE", "soft": 1_000_000, "hard": 18446744073709551615_u64},
        {"type": "RLIMIT_RTPRIO", "soft": 3, "hard": 4},
    ]}}))
    .sh("grep -E '^Max (open files|core|processes|stack|file size|realtime priority)' /proc/self/limits | sed 's/  */ /g'")
    .prints(
        "Max file size 1000000 unlimited bytes \nMax stack size 4194304 8388608 bytes \nMax core file size 0 0 bytes \n\
         Max processes 500 501 processes \nMax open files 321 654 files \nMax realtime priority 3 4 \n",
    );
}

const CAPABILITIES: &str = "grep -E '^Cap' /proc/self/status | tr '\\n' ' '";

#[test]
fn capabilities_of_root() {
    Case::of(json!({"process": {"capabilities": {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_MKNOD"],
        "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_MKNOD"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    }}}))
    // At every execve root gets what is bounding; with noNewPrivileges, of that only what was permitted.
    .sh(CAPABILITIES)
    .prints("CapInh:\t0000000000000020 CapPrm:\t0000000008000021 CapEff:\t0000000008000021 CapBnd:\t0000000008200021 CapAmb:\t0000000000000020 ");
}

#[test]
fn capabilities_of_a_user() {
    Case::of(json!({"process": {
        "user": {"uid": 1234, "gid": 4321},
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "effective": ["CAP_NET_BIND_SERVICE"],
            "inheritable": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
            "ambient": ["CAP_NET_BIND_SERVICE"],
        },
    }}))
    .sh(CAPABILITIES)
    .prints("CapInh:\t0000000000000420 CapPrm:\t0000000000000400 CapEff:\t0000000000000400 CapBnd:\t0000000000000421 CapAmb:\t0000000000000400 ");
}

#[test]
fn capabilities_are_none_when_not_given() {
    // runc leaves its own, which are all, since 1.2.
    Case::of(json!({"process": {"capabilities": null}}))
        .runc_before(1, 2)
        .sh(CAPABILITIES)
        .each(|runtime, done, _| {
            let bounding = done.out();
            assert!(
                bounding.contains("CapEff:\t0000000000000000"),
                "under {runtime:?}: {bounding}"
            );
        });
}

#[test]
fn no_new_privileges() {
    for (value, shown) in [(true, "NoNewPrivs:\t1\n"), (false, "NoNewPrivs:\t0\n")] {
        Case::of(json!({"process": {"noNewPrivileges": value}}))
            .sh("grep NoNewPrivs /proc/self/status")
            .prints(shown);
    }
}

#[test]
fn oom_score_adj() {
    Case::of(json!({"process": {"oomScoreAdj": 345}}))
        .sh("cat /proc/self/oom_score_adj")
        .prints("345\n");
}

#[test]
fn scheduler() {
    // Without the rest: Linux 6.12 tells the slice of such a process as its runtime.
    Case::of(json!({"process": {"scheduler": {"policy": "SCHED_BATCH", "nice": 5}}}))
        .sh("probe scheduler | cut -d' ' -f1-8")
        .runc_since(1, 2)
        .prints("policy 3 flags 0 nice 5 priority 0\n");
}

#[test]
fn scheduler_of_real_time() {
    Case::of(json!({"process": {"scheduler": {
        "policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"],
    }}}))
    // In the first process itself: a child would have it reset.
    .prepared(|_, bundle| bundle.spec["process"]["args"] = json!(["probe", "scheduler"]))
    .runc_since(1, 2)
    .prints("policy 2 flags 1 nice 0 priority 7 runtime 0 deadline 0 period 0\n");
}

#[test]
fn io_priority() {
    // (class << 13) | priority, class 2 being best effort.
    Case::of(json!({"process": {"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}}}))
        .sh("probe ioprio_get 1 0")
        .runc_since(1, 2)
        .prints("ioprio_get = 16387\n");
}

#[test]
fn an_unknown_capability() {
    // runc only warns.
    Case::of(json!({"process": {"capabilities": {"bounding": ["CAP_FLY"]}}}))
        .refused(&["process.capabilities.bounding", "CAP_FLY"], &[]);
}

#[test]
fn an_unknown_rlimit() {
    Case::of(json!({"process": {"rlimits": [{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]}}))
        .refused(&["process.rlimits", "RLIMIT_FUN"], &["RLIMIT_FUN"]);
}

#[test]
fn an_unknown_scheduler() {
    Case::of(json!({"process": {"scheduler": {"policy": "SCHED_MAGIC"}}}))
        .runc_since(1, 2)
        .refused(&["process.scheduler"], &["policy"]);
}

#[test]
fn an_unknown_io_priority() {
    Case::of(json!({"process": {"ioPriority": {"class": "IOPRIO_CLASS_FIRST", "priority": 1}}}))
        .runc_since(1, 2)
        .refused(&["process.ioPriority"], &["IOPRIO_CLASS_FIRST"]);
}

#[test]
fn a_relative_cwd() {
    Case::of(json!({"process": {"cwd": "tmp"}})).refused(&["process.cwd"], &["absolute"]);
}

/// The image's user database is not needed for numbers.
#[test]
fn a_user_without_passwd() {
    Case::of(json!({"process": {"user": {"uid": 777, "gid": 778}}}))
        .prepared(|_: Runtime, bundle| std::fs::remove_file(bundle.in_root("/etc/passwd")).unwrap())
        .sh("id -u; id -g; echo $HOME")
        .prints("777\n778\n/\n");
}

/// A profile that somebody wrote is refused, as runc refuses one that the host does not have.
#[test]
fn an_apparmor_profile() {
    Case::of(json!({"process": {"apparmorProfile": "somebodys-own"}}))
        .refused(&["process.apparmorProfile", "somebodys-own"], &["apparmor"]);
}

/// Those that engines ask for by default guard the host's kernel, which the container never meets. The host here may
/// have no such profile, so runc is not asked.
#[test]
fn the_engines_own_apparmor_profile() {
    Case::of(json!({"process": {"apparmorProfile": "docker-default"}}))
        .runc_since(99, 0)
        .sh("echo fine")
        .prints("fine\n");
}
