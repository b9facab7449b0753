//! Which system calls the server's threads may make: those that a file server needs, and no way to more.

use husk_lockdown::seccomp::{self, Allowed, Rule, RuleError, Rules, SeccompError, equal};

/// The first thread, which waits for the end.
const MAIN: Allowed = &[
    libc::SYS_brk,
    libc::SYS_close,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_munmap,
    // After the process was stopped or frozen.
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Those that carry requests out.
const WORKER: Allowed = &[
    // The process.
    libc::SYS_brk,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_madvise,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    // The channel.
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    // Whoever asks.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_umask,
    // Files.
    libc::SYS_clock_gettime,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// Limits the first thread, for good.
///
/// # Errors
/// When the kernel refuses; the thread must not go on then.
pub fn limit_main() -> Result<(), SeccompError> {
    seccomp::limit("main", MAIN.iter().copied(), seccomp::memory(true))
}

/// Limits the calling thread, called `name`, to what carrying out requests takes, for good.
///
/// # Errors
/// When the kernel refuses; the thread must not go on then.
pub fn limit_worker(name: &str) -> Result<(), SeccompError> {
    seccomp::limit(name, WORKER.iter().copied(), worker_rules())
}

/// A descriptor may be duplicated, too: to close the duplicate is how a file's errors are asked for.
fn worker_rules() -> Result<Rules, RuleError> {
    let mut rules = seccomp::memory(true)?;
    for (call, allowed) in &mut rules {
        if *call == libc::SYS_fcntl {
            allowed.push(Rule::new(vec![equal(
                1,
                u64::from(libc::F_DUPFD_CLOEXEC.unsigned_abs()),
            )?])?);
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the README tells of them: those with conditions in brackets.
    fn told(plain: Allowed, rules: Rules) -> String {
        let name = |call: libc::c_long| husk_syscalls::name(u32::try_from(call).unwrap()).unwrap();
        let plain = plain.iter().map(|call| (name(*call), name(*call).to_owned()));
        let rules = rules
            .iter()
            .map(|(call, _)| (name(*call), format!("[{}]", name(*call))));
        let mut all: Vec<_> = plain.chain(rules).collect();
        all.sort();
        let told: Vec<_> = all.into_iter().map(|(_, told)| told).collect();
        format!("{} | {}", told.len(), told.join(" "))
    }

    #[test]
    fn the_readme_tells_what_is_allowed_and_nothing_else() {
        let told = [
            format!(
                "| `husk-fsd` `main` | {} |",
                told(MAIN, seccomp::memory(true).unwrap())
            ),
            format!(
                "| `husk-fsd` `fs-0` to `fs-3` | {} |",
                told(WORKER, worker_rules().unwrap())
            ),
        ];
        // The VMM's own tests look at the others.
        let mut lines = include_str!("../../../README.md").lines();
        assert!(lines.any(|line| line == "| thread | calls | |"));
        let table = lines.by_ref().skip(1).take_while(|line| line.starts_with('|'));
        let rows: Vec<_> = table.filter(|row| row.starts_with("| `husk-fsd` ")).collect();
        assert_eq!(rows, told);
        assert!(
            !lines.any(|line| line.starts_with("| `husk-fsd` `")),
            "rows of another table"
        );
    }

    #[test]
    fn none_opens_by_handle_connects_makes_processes_or_mounts() {
        let forbidden = [
            libc::SYS_open_by_handle_at,
            libc::SYS_name_to_handle_at,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_bpf,
            libc::SYS_ioctl,
            libc::SYS_prctl,
            libc::SYS_setresuid,
        ];
        for call in MAIN.iter().chain(WORKER) {
            assert!(!forbidden.contains(call), "{call}");
        }
    }
}
