//! What a test does inside a container and no shell can: `probe NAME ARGUMENT…` makes one system call and prints
//! what became of it, `NAME = RESULT` or `NAME: ERRNO`. An argument is a number (decimal or 0x…) or, failing that,
//! a string, of which the call gets the address. `scheduler`, `clocks` and `watch DIRECTORY` tell what takes more than
//! one call; `serve PORT`, `send ADDRESS:PORT BYTES` and `fetch ADDRESS:PORT BYTES` are the two ends of traffic that is
//! checked (husk_tests::traffic). Static, so that it runs in any root file system.

use std::ffi::CString;

use husk_tests::traffic::{fetch, send, serve};

const CALLS: &[(&str, libc::c_long)] = &[
    ("add_key", libc::SYS_add_key),
    ("chmod", libc::SYS_chmod),
    ("chown", libc::SYS_chown),
    ("clock_settime", libc::SYS_clock_settime),
    ("dup3", libc::SYS_dup3),
    ("getcpu", libc::SYS_getcpu),
    ("getpid", libc::SYS_getpid),
    ("getpriority", libc::SYS_getpriority),
    ("ioprio_get", libc::SYS_ioprio_get),
    ("kill", libc::SYS_kill),
    ("lseek", libc::SYS_lseek),
    ("mkdir", libc::SYS_mkdir),
    ("mknod", libc::SYS_mknod),
    ("mount", libc::SYS_mount),
    ("open", libc::SYS_open),
    ("personality", libc::SYS_personality),
    ("prctl", libc::SYS_prctl),
    ("ptrace", libc::SYS_ptrace),
    ("setuid", libc::SYS_setuid),
    ("sethostname", libc::SYS_sethostname),
    ("umask", libc::SYS_umask),
    ("unshare", libc::SYS_unshare),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    match name.as_str() {
        "scheduler" => scheduler(),
        "watch" => watch(&arguments.next().unwrap_or_default()),
        "serve" | "send" | "fetch" => match traffic(&name, &arguments.collect::<Vec<_>>()) {
            Ok(told) => println!("{told}"),
            Err(error) => {
                eprintln!("probe: {name}: {error}");
                std::process::exit(1);
            }
        },
        "clocks" => {
            println!("monotonic {}", seconds(libc::CLOCK_MONOTONIC));
            println!("boottime {}", seconds(libc::CLOCK_BOOTTIME));
        }
        _ => match CALLS.iter().find(|(known, _)| *known == name) {
            Some((_, number)) => call(&name, *number, arguments.collect()),
            None => {
                eprintln!("probe: no such call: {name:?}");
                std::process::exit(2);
            }
        },
    }
}

fn traffic(name: &str, words: &[String]) -> Result<u64, Box<dyn std::error::Error>> {
    match (name, words) {
        ("serve", [port]) => {
            serve(port.parse()?)?;
            Ok(0)
        }
        ("send", [to, count]) => Ok(send(to.parse()?, count.parse()?)?),
        ("fetch", [from, count]) => Ok(fetch(from.parse()?, count.parse()?)?),
        _ => Err("serve PORT, send ADDRESS:PORT BYTES or fetch ADDRESS:PORT BYTES".into()),
    }
}

fn call(name: &str, number: libc::c_long, words: Vec<String>) {
    let mut values = [0_i64; 6];
    let mut strings = Vec::new();
    for (value, word) in values.iter_mut().zip(words) {
        let parsed = match word.strip_prefix("0x") {
            Some(digits) => i64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        };
        *value = parsed.unwrap_or_else(|| {
            let string = CString::new(word).unwrap_or_default();
            let address = string.as_ptr() as i64;
            strings.push(string);
            address
        });
    }
    let [a, b, c, d, e, f] = values;
    // SAFETY: the calls of the table write to no memory of ours when given numbers, and `strings` outlives the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    let error = nix::errno::Errno::last();
    if result != -1 {
        println!("{name} = {result}");
    } else if error == nix::errno::Errno::UnknownErrno {
        println!("{name}: errno {}", nix::errno::Errno::last_raw());
    } else {
        println!("{name}: {error:?}");
    }
}

/// The kernel's `struct sched_attr`, version 0 (include/uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn scheduler() {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the kernel writes at most `size` bytes to `attr`, which is that large and plain data.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if result != 0 {
        println!("sched_getattr: {:?}", nix::errno::Errno::last());
        return;
    }
    println!(
        "policy {} flags {} nice {} priority {} runtime {} deadline {} period {}",
        attr.policy, attr.flags, attr.nice, attr.priority, attr.runtime, attr.deadline, attr.period
    );
}

/// Tells what happens to the files of a directory, until one is deleted.
fn watch(directory: &str) {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let kinds = [
        (AddWatchFlags::IN_CREATE, "create"),
        (AddWatchFlags::IN_CLOSE_WRITE, "close_write"),
        (AddWatchFlags::IN_MOVED_FROM, "moved_from"),
        (AddWatchFlags::IN_MOVED_TO, "moved_to"),
        (AddWatchFlags::IN_DELETE, "delete"),
    ];
    let all = kinds
        .iter()
        .fold(AddWatchFlags::empty(), |all, (kind, _)| all | *kind);
    let Ok(inotify) = Inotify::init(InitFlags::IN_CLOEXEC) else {
        return println!("no inotify");
    };
    if let Err(error) = inotify.add_watch(directory, all) {
        return println!("watch {directory}: {error:?}");
    }
    println!("watching");
    while let Ok(events) = inotify.read_events() {
        for event in events {
            let Some((kind, word)) = kinds.iter().find(|(kind, _)| event.mask.contains(*kind)) else {
                continue;
            };
            println!("{word} {}", event.name.unwrap_or_default().to_string_lossy());
            if *kind == AddWatchFlags::IN_DELETE {
                return;
            }
        }
    }
}

fn seconds(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec to `time`.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec
}
