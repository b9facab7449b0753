//! The whole VMM, on real KVM, with guests of a few instructions.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use husk_vmm_protocol::config::MachineConfig;
use husk_vmm_protocol::control::{EndReason, MAX_REPORT_LEN, Report};
use husk_vmm_protocol::fds::vmm as table;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

const MIB: u64 = 1 << 20;
/// Where the guests are loaded and start.
const LOAD: u64 = 0x10_0000;

/// `mov al, 0xfe; out 0x64, al; hlt`: a reset.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// `ud2`, without an interrupt table.
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// `jmp $`.
const SPIN: &[u8] = &[0xeb, 0xfe];

/// `cmp dword [address], value; je over; ud2; over:`.
fn expect_at(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0x81, 0x3d];
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
    code.extend([0x74, 0x02, 0x0f, 0x0b]);
    code
}

/// `mov dword [address], value`.
fn store_at(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xc7, 0x05];
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

/// An ELF file with a PVH note, `code` at its entry.
fn kernel(code: &[u8]) -> File {
    let mut elf = vec![0u8; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let note_at = 64 + 2 * 56;
    for (kind, offset, address, size) in [(4u32, note_at, 0, 20), (1, 0x1000, LOAD, code.len() as u64)] {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for field in [offset, address, address, size, size, 4096] {
            elf.extend(field.to_le_bytes());
        }
    }
    for field in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD as u32] {
        elf.extend(field.to_le_bytes());
    }
    elf.resize(0x1000, 0);
    elf.extend(code);
    file(&elf)
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn memfd(size: u64) -> File {
    // SAFETY: the name is a C string, the descriptor is new, and the seals are plain numbers.
    unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        let file = File::from_raw_fd(fd);
        file.set_len(size).unwrap();
        assert_eq!(
            libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_GROW | libc::F_SEAL_SHRINK),
            0
        );
        file
    }
}

fn packet_pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which are nobody else's.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Reading and writing end; neither blocks.
fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which are nobody else's.
    unsafe {
        assert_eq!(
            libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK),
            0
        );
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Whether guests can run here. Where they cannot, the tests that need one say so, loudly.
fn has_kvm(test: &str) -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("\n*** SKIPPED: {test} needs /dev/kvm, which is not there. It has NOT been tested. ***\n");
    }
    there
}

/// A VMM under way, and the other ends of its descriptors.
struct Vmm {
    child: Child,
    control: Option<OwnedFd>,
    file_server: Option<OwnedFd>,
    _kept: (OwnedFd, OwnedFd),
}

/// Descriptors by their number in the table.
type Fds = Vec<(RawFd, OwnedFd)>;

impl Vmm {
    /// Starts one for `kernel`; `change` may spoil the table.
    fn start(kernel: File, change: impl FnOnce(&mut Fds)) -> Self {
        let (control, theirs) = packet_pair();
        let (fs, fs_theirs) = packet_pair();
        let (vsock, vsock_theirs) = packet_pair();
        let (console, console_theirs) = pipe();
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.unwrap_or_else(|_| File::options().read(true).write(true).open("/dev/null").unwrap());
        let mut fds: Fds = vec![
            (table::CONTROL, theirs),
            (table::KVM, kvm.into()),
            (table::MEMORY, memfd(64 * MIB).into()),
            (table::KERNEL, kernel.into()),
            (table::INITRAMFS, file(b"070701").into()),
            (table::CONSOLE, console_theirs),
            (table::FS, fs_theirs),
            (table::VSOCK, vsock_theirs),
        ];
        change(&mut fds);
        // Above the table first, so that none is overwritten before it is copied.
        let high: Vec<(RawFd, OwnedFd)> = fds
            .into_iter()
            .map(|(number, fd)| {
                // SAFETY: plain numbers; the new descriptor is nobody else's.
                let copy =
                    unsafe { OwnedFd::from_raw_fd(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100)) };
                (number, copy)
            })
            .collect();
        let numbers: Vec<(RawFd, RawFd)> = high
            .iter()
            .map(|(number, fd)| (*number, fd.as_raw_fd()))
            .collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-vmm"));
        // One heap is for the VMM itself to see to.
        command
            .env_remove("MALLOC_ARENA_MAX")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: only system calls on plain numbers, between fork and exec. Rust's own descriptors, which report a
        // failed exec, are closed at exec as well.
        unsafe {
            command.pre_exec(move || {
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
                for (number, fd) in &numbers {
                    if libc::dup2(*fd, *number) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self {
            child,
            control: Some(control),
            file_server: Some(fs),
            _kept: (vsock, console),
        }
    }

    fn boot(code: &[u8]) -> Self {
        let vmm = Self::start(kernel(code), |_| {});
        vmm.configure(1);
        vmm
    }

    fn configure(&self, vcpus: u8) {
        let config = MachineConfig {
            version: 1,
            vcpus,
            memory_mib: 64,
            kernel_params: String::new(),
            nics: vec![],
        };
        self.send(&config.encode().unwrap());
    }

    fn send(&self, message: &[u8]) {
        let control = self.control.as_ref().unwrap().as_raw_fd();
        // SAFETY: pointer and length belong together.
        let sent = unsafe {
            libc::send(
                control,
                message.as_ptr().cast(),
                message.len(),
                libc::MSG_NOSIGNAL,
            )
        };
        assert_eq!(sent, message.len() as isize);
    }

    /// The next report, `None` at the end.
    fn report(&self) -> Option<Report> {
        let control = self.control.as_ref().unwrap().as_raw_fd();
        let mut fds = [libc::pollfd {
            fd: control,
            events: libc::POLLIN,
            revents: 0,
        }];
        let mut buffer = vec![0u8; MAX_REPORT_LEN];
        // SAFETY: pointers and lengths belong together.
        let length = unsafe {
            assert_eq!(libc::poll(fds.as_mut_ptr(), 1, 30_000), 1, "no report in time");
            libc::recv(control, buffer.as_mut_ptr().cast(), buffer.len(), 0)
        };
        match length {
            0 => None,
            n => Some(serde_json::from_slice(&buffer[..usize::try_from(n).unwrap()]).unwrap()),
        }
    }

    /// All further reports, the log, and how it exits.
    fn finish(mut self) -> (Vec<Report>, String, ExitStatus) {
        let reports = std::iter::from_fn(|| self.report()).collect();
        let mut log = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        (reports, log, self.child.wait().unwrap())
    }
}

fn assert_ends(code: &[u8], reason: EndReason) {
    let (reports, log, status) = Vmm::boot(code).finish();
    assert_eq!(reports, [Report::Running, Report::Ended { reason }], "{log}");
    assert_eq!(status.code(), Some(0), "{log}");
}

fn assert_fails(vmm: Vmm, expected: &str) {
    let (reports, log, status) = vmm.finish();
    let [Report::Failed { message }] = reports.as_slice() else {
        panic!("{reports:?}\n{log}")
    };
    assert!(message.contains(expected), "{message}");
    assert!(log.contains(expected), "{log}");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_guest_resets_itself() {
    if has_kvm("a_guest_resets_itself") {
        assert_ends(RESET, EndReason::Reset);
    }
}

#[test]
fn a_triple_fault_ends_the_machine() {
    if has_kvm("a_triple_fault_ends_the_machine") {
        assert_ends(TRIPLE_FAULT, EndReason::TripleFault);
    }
}

#[test]
fn the_guest_finds_boot_data_devices_and_controllers() {
    if !has_kvm("the_guest_finds_boot_data_devices_and_controllers") {
        return;
    }
    // `cmp dword [ebx], magic; je over; ud2`: the start info is where ebx points.
    let mut code = vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x74, 0x02, 0x0f, 0x0b];
    code.extend(expect_at(0xf_0000, u32::from_le_bytes(*b"_MP_")));
    code.extend(expect_at(64 << 20, u32::MAX)); // Nothing is behind the memory.
    code.extend(expect_at((64 << 20) - 4096, u32::from_le_bytes(*b"0707"))); // The initramfs.
    for (slot, kind) in [(0u32, 19u32), (1, 26), (2, 3), (3, 4)] {
        let base = 0xc000_0000 + slot * 0x1000;
        code.extend(expect_at(base, 0x7472_6976));
        code.extend(expect_at(base + 4, 2));
        code.extend(expect_at(base + 8, kind));
    }
    code.extend(expect_at(0xc000_4000, u32::MAX));
    // The IOAPIC's version, and a redirection entry that becomes a route.
    code.extend(store_at(0xfec0_0000, 1));
    code.extend(expect_at(0xfec0_0010, 0x0017_0011));
    code.extend(store_at(0xfec0_0000, 0x1a));
    code.extend(store_at(0xfec0_0010, 0x31));
    code.extend(expect_at(0xfec0_0010, 0x31));
    code.extend(RESET);
    assert_ends(&code, EndReason::Reset);
}

#[test]
fn the_vmm_ends_with_its_engine() {
    if !has_kvm("the_vmm_ends_with_its_engine") {
        return;
    }
    let mut vmm = Vmm::boot(SPIN);
    assert_eq!(vmm.report(), Some(Report::Running));
    drop(vmm.control.take());
    assert_eq!(vmm.child.wait().unwrap().code(), Some(3));

    // Before the configuration, too.
    let mut vmm = Vmm::start(kernel(SPIN), |_| {});
    drop(vmm.control.take());
    assert_eq!(vmm.child.wait().unwrap().code(), Some(3));
}

#[test]
fn the_vmm_ends_with_its_file_server() {
    if has_kvm("the_vmm_ends_with_its_file_server") {
        let mut vmm = Vmm::boot(SPIN);
        assert_eq!(vmm.report(), Some(Report::Running));
        drop(vmm.file_server.take());
        assert_fails(vmm, "husk-fsd");
    }
}

#[test]
fn a_running_vmm_has_no_rights_left() {
    if !has_kvm("a_running_vmm_has_no_rights_left") {
        return;
    }
    let mut vmm = Vmm::start(kernel(SPIN), |_| {});
    vmm.configure(2);
    assert_eq!(vmm.report(), Some(Report::Running));
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", vmm.child.id())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        if status.starts_with("Name:\tkvm-") {
            continue; // A thread of the kernel's own.
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        threads += 1;
    }
    assert_eq!(threads, 7, "the main thread, two vCPUs, four devices");
    drop(vmm.control.take());
    vmm.child.wait().unwrap();
}

#[test]
fn a_bad_configuration_is_refused() {
    for (message, expected) in [
        (&b"{}"[..], "not valid"),
        (b"\xff\xfe", "not valid"),
        (br#"{"version":9,"vcpus":1,"memory_mib":64}"#, "version 9"),
        (br#"{"version":1,"vcpus":0,"memory_mib":64}"#, "0 vCPUs"),
        (br#"{"version":1,"vcpus":1,"memory_mib":1}"#, "1 MiB"),
        (&[b' '; 20_000], "20001 bytes|16385 bytes"),
    ] {
        let vmm = Vmm::start(kernel(RESET), |_| {});
        vmm.send(message);
        let expected = expected.split('|').next_back().unwrap();
        assert_fails(vmm, expected);
    }
}

#[test]
fn a_second_message_ends_the_machine() {
    if has_kvm("a_second_message_ends_the_machine") {
        let vmm = Vmm::boot(SPIN);
        assert_eq!(vmm.report(), Some(Report::Running));
        vmm.send(b"more");
        assert_fails(vmm, "second message");
    }
}

#[test]
fn a_wrong_table_of_descriptors_is_refused() {
    let missing = |number| move |fds: &mut Fds| fds.retain(|(n, _)| *n != number);
    for (number, name) in [
        (table::KVM, "/dev/kvm"),
        (table::MEMORY, "guest memory"),
        (table::KERNEL, "kernel"),
        (table::INITRAMFS, "initramfs"),
        (table::CONSOLE, "console"),
        (table::FS, "file server"),
        (table::VSOCK, "streams"),
    ] {
        assert_fails(
            Vmm::start(kernel(RESET), missing(number)),
            &format!("descriptor {number} ({name}"),
        );
        let wrong = |fds: &mut Fds| {
            let directory = File::open("/").unwrap().into();
            fds.iter_mut().find(|(n, _)| *n == number).unwrap().1 = directory;
        };
        assert_fails(Vmm::start(kernel(RESET), wrong), "is not a");
    }
    // What stands where a tap can be is to be one, and there is no gap.
    for (number, error) in [
        (table::TAPS, "descriptor 11 (tap) is not a tap"),
        (table::TAPS + 1, "descriptor 12 is open"),
        (table::VHOST, "descriptor 75 (/dev/vhost-net) is not a"),
        (table::VHOST + 1, "descriptor 76 is open"),
        (table::END, "descriptor 83 is open"),
    ] {
        let more = |fds: &mut Fds| fds.push((number, file(b"").into()));
        assert_fails(Vmm::start(kernel(RESET), more), error);
    }

    // Without a control socket there is nobody to tell but the log.
    let (_, log, status) = Vmm::start(kernel(RESET), missing(table::CONTROL)).finish();
    assert!(log.contains("descriptor 3 (control socket) is not open"), "{log}");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn memory_and_kernel_are_checked() {
    if !has_kvm("memory_and_kernel_are_checked") {
        return;
    }
    let replaced = |number: RawFd, file: File| {
        let vmm = Vmm::start(kernel(RESET), move |fds: &mut Fds| {
            fds.iter_mut().find(|(n, _)| *n == number).unwrap().1 = file.into();
        });
        vmm.configure(1);
        vmm
    };
    assert_fails(
        replaced(table::MEMORY, memfd(32 * MIB)),
        "33554432 bytes, the configuration says 67108864",
    );
    let unsealed = {
        // SAFETY: the name is a C string, the descriptor is new.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(64 * MIB).unwrap();
        file
    };
    assert_fails(replaced(table::MEMORY, unsealed), "not sealed");
    assert_fails(
        replaced(table::KERNEL, file(b"#!/bin/sh\n")),
        "kernel could not be read",
    );
    assert_fails(
        replaced(table::KERNEL, file(&[0x7f; 4096])),
        "not an uncompressed x86_64 vmlinux",
    );
    let large = file(b"");
    large.set_len(64 * MIB).unwrap();
    assert_fails(replaced(table::INITRAMFS, large), "more memory");
}

#[test]
fn help_and_version_are_told() {
    let run = |argument: &str| {
        Command::new(env!("CARGO_BIN_EXE_husk-vmm"))
            .arg(argument)
            .output()
            .unwrap()
    };
    assert!(
        String::from_utf8(run("--help").stdout)
            .unwrap()
            .contains("husk starts it")
    );
    assert!(
        String::from_utf8(run("--version").stdout)
            .unwrap()
            .starts_with("husk-vmm ")
    );
    assert_eq!(run("--frobnicate").status.code(), Some(2));
}
