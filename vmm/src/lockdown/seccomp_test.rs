//! The limits of each thread, by what becomes of a process that oversteps them.

use super::*;
use husk_lockdown::violation;

fn roles() -> Vec<Role> {
    let device = [
        Device::Console,
        Device::Fs,
        Device::Net,
        Device::Rng,
        Device::Vsock,
    ]
    .map(Role::Device);
    let mut roles = vec![
        Role::Main,
        Role::Vcpu {
            vcpu: 400,
            vm: 401,
            vhost: 2,
        },
    ];
    roles.extend(device);
    roles
}

/// All system calls of a role, by number.
fn calls(role: &Role) -> Vec<libc::c_long> {
    let mut calls: Vec<_> = role.plain().collect();
    calls.extend(role.rules().unwrap().into_iter().map(|(call, _)| call));
    calls.sort_unstable();
    calls
}

/// How a child of this process ends that is limited to `role` and then does `act`.
fn end_of(role: &Role, act: fn()) -> i32 {
    let mut status = 0;
    // SAFETY: the child makes system calls only and then exits.
    unsafe {
        match libc::fork() {
            0 => {
                // Other tests' descriptors: reports and requests would reach them, and hang-ups would wait for this child.
                if libc::close_range(3, u32::MAX, 0) < 0 {
                    libc::_exit(98);
                }
                super::super::watch_violations().unwrap();
                if limit("test", role).is_err() {
                    libc::_exit(99);
                }
                act();
                libc::_exit(0)
            }
            child => assert_eq!(libc::waitpid(child, &raw mut status, 0), child),
        }
    }
    assert!(libc::WIFEXITED(status), "{status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn the_lists_are_short_and_hold_each_call_once() {
    for role in roles() {
        let calls = calls(&role);
        let most = if matches!(role, Role::Vcpu { .. }) { 12 } else { 30 };
        assert!(calls.len() <= most, "{role:?}: {} calls", calls.len());
        assert!(
            calls.windows(2).all(|pair| pair[0] < pair[1]),
            "{role:?}: {calls:?}"
        );
    }
    let mut requests: Vec<_> = roles()
        .iter()
        .flat_map(Role::requests)
        .map(|(_, request)| request)
        .collect();
    requests.sort_unstable();
    requests.dedup();
    assert!(requests.len() <= 16, "{requests:x?}");
}

/// The system calls of a role as the README tells of them: those with conditions in brackets.
fn told(role: &Role) -> String {
    let plain: Vec<_> = role.plain().collect();
    let mut names: Vec<String> = calls(role)
        .into_iter()
        .map(|call| {
            let name = husk_syscalls::name(u32::try_from(call).unwrap()).unwrap();
            if plain.contains(&call) {
                name.to_owned()
            } else {
                format!("[{name}]")
            }
        })
        .collect();
    names.sort_by_key(|name| name.trim_matches(['[', ']']).to_owned());
    format!("{} | {}", names.len(), names.join(" "))
}

/// The rows of the README's only table with this head.
fn rows_under(head: &str) -> Vec<&'static str> {
    let mut lines = include_str!("../../../README.md").lines();
    assert!(lines.any(|line| line == head), "{head}");
    let rows = lines.by_ref().skip(1).take_while(|line| line.starts_with('|'));
    let rows = rows.collect();
    assert!(!lines.any(|line| line == head), "{head} is there twice");
    rows
}

#[test]
fn the_readme_tells_what_is_allowed_and_nothing_else() {
    let told = roles().into_iter().map(|role| {
        let name = match &role {
            Role::Main => "main".to_owned(),
            Role::Vcpu { .. } => "vcpu".to_owned(),
            Role::Device(device) => format!("{device:?}").to_lowercase(),
        };
        format!("| `{name}` | {} |", told(&role))
    });
    // The file server's own tests look at its rows.
    let mut rows = rows_under("| thread | calls | |");
    rows.retain(|row| !row.starts_with("| `husk-fsd` "));
    assert_eq!(rows, told.collect::<Vec<_>>());
}

#[test]
fn the_readme_tells_the_requests_that_are_allowed_and_no_others() {
    use vhost::request;
    let names = [
        (KVM_RUN, "KVM_RUN"),
        (KVM_GET_REGS, "KVM_GET_REGS"),
        (KVM_SET_GSI_ROUTING, "KVM_SET_GSI_ROUTING"),
        (libc::TUNSETOFFLOAD as u32, "TUNSETOFFLOAD"),
        (request::SET_FEATURES as u32, "VHOST_SET_FEATURES"),
        (request::SET_MEM_TABLE as u32, "VHOST_SET_MEM_TABLE"),
        (request::SET_VRING_NUM as u32, "VHOST_SET_VRING_NUM"),
        (request::SET_VRING_ADDR as u32, "VHOST_SET_VRING_ADDR"),
        (request::SET_VRING_BASE as u32, "VHOST_SET_VRING_BASE"),
        (request::SET_VRING_KICK as u32, "VHOST_SET_VRING_KICK"),
        (request::SET_VRING_CALL as u32, "VHOST_SET_VRING_CALL"),
        (request::SET_VRING_ERR as u32, "VHOST_SET_VRING_ERR"),
        (request::NET_SET_BACKEND as u32, "VHOST_NET_SET_BACKEND"),
    ];
    let told = roles().into_iter().flat_map(|role| {
        let requests = role.requests().into_iter();
        let told = requests.map(|(descriptors, request)| {
            let name = names.iter().find(|(number, _)| *number == request);
            let (_, name) = name.unwrap_or_else(|| panic!("{request:#x} has no name"));
            // As they are numbered in `roles`.
            let of = match (descriptors.start, descriptors.end) {
                (400, 401) => "its vCPU",
                (401, 402) => "its VM",
                (table::TAPS, table::VHOST) => "its taps",
                (table::VHOST, end) if end == table::VHOST + 2 => "its vhost-net",
                _ => panic!("{name} of {descriptors:?}"),
            };
            format!("| `vcpu` | `{name}` | {request:#x} | {of} |")
        });
        assert!(told.len() == 0 || matches!(role, Role::Vcpu { .. }), "{role:?}");
        told.collect::<Vec<_>>()
    });
    assert_eq!(
        rows_under("| thread | request | number | of |"),
        told.collect::<Vec<_>>()
    );
}

#[test]
fn no_thread_opens_connects_makes_or_executes_anything() {
    let forbidden = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_open_by_handle_at,
        libc::SYS_creat,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_tgkill,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_memfd_create,
        libc::SYS_prctl,
        libc::SYS_rt_sigaction,
        libc::SYS_newfstatat,
    ];
    for role in roles() {
        let calls = calls(&role);
        for call in forbidden {
            assert!(!calls.contains(&call), "{role:?}: {call}");
        }
    }
}

#[test]
fn what_is_not_allowed_ends_the_process() {
    for role in roles() {
        assert_eq!(end_of(&role, || {}), 0, "{role:?}");
        // SAFETY: the path is a C string.
        let open = end_of(&role, || unsafe {
            libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY);
        });
        assert_eq!(open, violation::EXIT_CODE, "{role:?}");
        // SAFETY: no pointers are involved.
        let socket = end_of(&role, || unsafe {
            libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        });
        assert_eq!(socket, violation::EXIT_CODE, "{role:?}");
    }
}

#[test]
fn memory_is_mapped_but_neither_executed_nor_a_files() {
    fn map(protection: i32, flags: i32) {
        // SAFETY: a new mapping, which nothing else has.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    }
    let anonymous = || {
        map(
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        )
    };
    let executable = || {
        map(
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        )
    };
    let file = || map(libc::PROT_READ, libc::MAP_SHARED);
    let protect = || {
        let mut byte = 0u8;
        // SAFETY: what this may change is of no more use: the process ends.
        unsafe {
            libc::mprotect(
                (&raw mut byte).map_addr(|at| at & !4095).cast(),
                4096,
                libc::PROT_EXEC,
            )
        };
    };
    for role in roles() {
        assert_eq!(end_of(&role, protect), violation::EXIT_CODE);
        assert_eq!(end_of(&role, anonymous), 0);
        assert_eq!(end_of(&role, executable), violation::EXIT_CODE);
        assert_eq!(end_of(&role, file), violation::EXIT_CODE);
    }
}

#[test]
fn a_vcpu_makes_its_own_requests_of_its_own_descriptors() {
    fn request(fd: i32, request: u32) {
        // SAFETY: none of these descriptors is open.
        unsafe { libc::ioctl(fd, request.into(), 0) };
    }
    let role = Role::Vcpu {
        vcpu: 400,
        vm: 401,
        vhost: 1,
    };
    assert_eq!(end_of(&role, || request(400, KVM_RUN)), 0);
    assert_eq!(end_of(&role, || request(401, KVM_SET_GSI_ROUTING)), 0);
    assert_eq!(end_of(&role, || request(401, KVM_RUN)), violation::EXIT_CODE);
    assert_eq!(
        end_of(&role, || request(400, KVM_SET_GSI_ROUTING)),
        violation::EXIT_CODE
    );
    assert_eq!(
        end_of(&role, || request(0, libc::TIOCSTI as u32)),
        violation::EXIT_CODE
    );
    assert_eq!(
        end_of(&role, || request(table::TAPS, libc::TUNSETOFFLOAD as u32)),
        0
    );
    assert_eq!(
        end_of(&role, || request(table::VHOST - 1, libc::TUNSETOFFLOAD as u32)),
        0
    );
    for outside in [
        || request(table::TAPS - 1, libc::TUNSETOFFLOAD as u32),
        || request(table::VHOST, libc::TUNSETOFFLOAD as u32),
        || request(-1, libc::TUNSETOFFLOAD as u32),
        || request(table::TAPS, libc::TUNSETIFF as u32),
        || request(table::VHOST + 1, vhost::request::NET_SET_BACKEND as u32),
    ] {
        assert_eq!(end_of(&role, outside), violation::EXIT_CODE);
    }
    let vhost = || request(table::VHOST, vhost::request::NET_SET_BACKEND as u32);
    assert_eq!(end_of(&role, vhost), 0);
    let without = Role::Vcpu {
        vcpu: 400,
        vm: 401,
        vhost: 0,
    };
    assert_eq!(end_of(&without, vhost), violation::EXIT_CODE);
    assert_eq!(
        end_of(&Role::Main, || request(400, KVM_RUN)),
        violation::EXIT_CODE
    );
}

#[test]
fn a_panic_ends_the_process_as_one_in_every_role() {
    for role in roles() {
        let end = end_of(&role, || {
            husk_lockdown::panics::end_the_process("husk-vmm");
            panic!("what a thread finds wrong");
        });
        assert_eq!(end, husk_lockdown::panics::EXIT_CODE, "{role:?}");
    }
}
