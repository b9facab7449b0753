//! tc: what arrives at a NIC goes to its tap, and what arrives at a tap goes to its NIC.
//!
//! Both by a program of a few instructions at the device's ingress, which the network namespace's own stack never gets
//! past: it sees no frame of the guest's and answers none (no ARP, no RST) that is meant for the guest. A program needs
//! no kernel module but `cls_bpf` and `sch_ingress`, and drops what the guest sends under another MAC than its own.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use husk_netlink::{Error, Message, Request, Socket, kind, message::u32_at};

/// `TC_H_INGRESS`: where the queueing discipline is.
const INGRESS: u32 = 0xffff_fff1;
/// Its own handle.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_CLSACT`, `TC_H_MIN_INGRESS`: where its filters are.
const FILTERS: u32 = 0xffff_fff2;
/// The filter's place among others, for all protocols (`ETH_P_ALL`, in network byte order).
const INFO: u32 = (1 << 16) | (0x0003_u16.to_be() as u32);
/// The filter's handle.
const HANDLE: u32 = 1;
/// By which ours are known.
const NAME: &str = "husk";

/// `TCA_BPF_FD`.
const BPF_FD: u16 = 6;
/// `TCA_BPF_NAME`.
const BPF_NAME: u16 = 7;
/// `TCA_BPF_FLAGS`.
const BPF_FLAGS: u16 = 8;
/// `TCA_BPF_FLAG_ACT_DIRECT`: the program tells what becomes of the frame.
const ACT_DIRECT: u32 = 1;

/// What becomes of the frames that arrive at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// They are sent from another device, given by its number.
    Redirect(u32),
    /// Those of this sender are sent from another device, all others are dropped.
    RedirectFrom([u8; 6], u32),
    /// All are dropped.
    Drop,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    number: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        number,
    }
}

/// Codes: class, operation and source in one byte, as in the kernel's `bpf_common.h` and `bpf.h`.
mod code {
    /// ALU64, MOV, of a number.
    pub const SET: u8 = 0xb7;
    /// ALU64, MOV, of a register.
    pub const COPY: u8 = 0xbf;
    /// ALU64, ADD, of a number.
    pub const ADD: u8 = 0x07;
    /// LDX, MEM: 32 bits, 16 bits.
    pub const LOAD_WORD: u8 = 0x61;
    pub const LOAD_HALF: u8 = 0x69;
    /// JMP, to be taken unless a register has a value.
    pub const JUMP_UNLESS: u8 = 0x55;
    /// The same, of 32 bits.
    pub const JUMP_UNLESS_32: u8 = 0x56;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
}

/// `bpf_redirect`.
const REDIRECT: i32 = 23;
/// `bpf_skb_load_bytes`.
const LOAD_BYTES: i32 = 26;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

impl Fate {
    fn program(self) -> Vec<Instruction> {
        use code::*;
        let redirect = |device: u32| {
            [
                instruction(SET, 1, 0, 0, device as i32),
                instruction(SET, 2, 0, 0, 0),
                instruction(CALL, 0, 0, 0, REDIRECT),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        };
        let drop = [instruction(SET, 0, 0, 0, SHOT), instruction(EXIT, 0, 0, 0, 0)];
        match self {
            Self::Drop => drop.to_vec(),
            Self::Redirect(device) => redirect(device).to_vec(),
            Self::RedirectFrom([a, b, c, d, e, f], device) => {
                let mut program = vec![
                    // The sender, bytes 6 to 11 of the frame, onto the stack: bytes -8 to -3.
                    instruction(SET, 2, 0, 0, 6),
                    instruction(COPY, 3, 10, 0, 0),
                    instruction(ADD, 3, 0, 0, -8),
                    instruction(SET, 4, 0, 0, 6),
                    instruction(CALL, 0, 0, 0, LOAD_BYTES),
                    // Each of these jumps past the rest and the redirection.
                    instruction(JUMP_UNLESS, 0, 0, 8, 0),
                    instruction(LOAD_WORD, 1, 10, -8, 0),
                    instruction(JUMP_UNLESS_32, 1, 0, 6, i32::from_ne_bytes([a, b, c, d])),
                    instruction(LOAD_HALF, 1, 10, -4, 0),
                    instruction(JUMP_UNLESS_32, 1, 0, 4, i32::from(u16::from_ne_bytes([e, f]))),
                ];
                program.extend(redirect(device));
                program.extend(drop);
                program
            }
        }
    }

    /// Hands the program to the kernel.
    fn load(self) -> io::Result<OwnedFd> {
        /// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; 16],
        }
        const PROG_LOAD: libc::c_int = 5;
        const SCHED_CLS: u32 = 3;
        let program = self.program();
        let mut name = [0; 16];
        for (to, from) in name.iter_mut().zip(NAME.bytes()) {
            *to = from;
        }
        let load = Load {
            kind: SCHED_CLS,
            count: u32::try_from(program.len()).map_err(io::Error::other)?,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
        };
        // SAFETY: the attributes and what they point to live through the call; the length is theirs.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// `struct tcmsg`.
fn header(device: u32, handle: u32, parent: u32, info: u32) -> [u8; kind::TRAFFIC_HEADER] {
    let mut header = [0; kind::TRAFFIC_HEADER];
    let fields = [device, handle, parent, info];
    for (to, from) in header.get_mut(4..).unwrap_or_default().chunks_mut(4).zip(fields) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    header
}

/// Decides what becomes of the frames that arrive at a device, instead of what was decided before.
///
/// # Errors
/// The kernel's.
pub fn set(socket: &mut Socket, device: u32, fate: Fate) -> io::Result<()> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let discipline = Request::new(
        libc::RTM_NEWQDISC,
        flags,
        &header(device, INGRESS_HANDLE, INGRESS, 0),
    );
    match socket.request(&discipline.with_text(libc::TCA_KIND, "ingress")) {
        // There may be one with filters of somebody else's.
        Err(error) if error.number() != Some(libc::EEXIST) => return Err(advise(error, "sch_ingress")),
        _ => {}
    }
    let program = fate
        .load()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot load a BPF program: {error}")))?;
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let filter = Request::new(
        libc::RTM_NEWTFILTER,
        flags,
        &header(device, HANDLE, FILTERS, INFO),
    )
    .with_text(libc::TCA_KIND, "bpf")
    .with_nested(libc::TCA_OPTIONS | kind::NESTED, |options| {
        options
            .with_u32(BPF_FD, program.as_raw_fd() as u32)
            .with_text(BPF_NAME, NAME)
            .with_u32(BPF_FLAGS, ACT_DIRECT)
    });
    socket.request(&filter).map_err(|error| advise(error, "cls_bpf"))
}

fn advise(error: Error, module: &str) -> io::Error {
    let kind = error.source.kind();
    io::Error::new(
        kind,
        format!("tc: {error}; it needs the kernel's module {module}"),
    )
}

/// Takes back [`set`]. None there is fine; filters of somebody else's stay.
///
/// # Errors
/// The kernel's.
pub fn remove(socket: &mut Socket, device: u32) -> io::Result<()> {
    let list = Request::new(libc::RTM_GETTFILTER, 0, &header(device, 0, FILTERS, 0));
    let filters = match socket.dump(&list) {
        Ok(filters) => filters,
        // No discipline, or no device.
        Err(_) => return Ok(()),
    };
    let (ours, others): (Vec<&Message>, Vec<&Message>) = filters.iter().partition(|filter| is_ours(filter));
    if ours.is_empty() {
        return Ok(());
    }
    // The kernel lists a filter's place, too, without its handle.
    let others = others
        .iter()
        .any(|filter| u32_at(&filter.body, 8).is_some_and(|handle| handle != 0));
    let request = if others {
        Request::new(libc::RTM_DELTFILTER, 0, &header(device, HANDLE, FILTERS, INFO))
            .with_text(libc::TCA_KIND, "bpf")
    } else {
        Request::new(libc::RTM_DELQDISC, 0, &header(device, INGRESS_HANDLE, INGRESS, 0))
    };
    match socket.request(&request) {
        Err(error) if !matches!(error.number(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
            Err(error.into())
        }
        _ => Ok(()),
    }
}

fn is_ours(filter: &Message) -> bool {
    filter
        .attributes(kind::TRAFFIC_HEADER)
        .filter(|found| found.kind == libc::TCA_OPTIONS)
        .flat_map(|options| options.nested())
        .any(|option| option.kind == BPF_NAME && option.text() == Some(NAME))
}
