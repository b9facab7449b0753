//! tc: what arrives at a NIC goes to its tap, and what arrives at a tap goes to its NIC.
//!
//! Both by a program of a few instructions at the device's ingress, which the network namespace's own stack never gets
//! past: it sees no frame of the guest's and answers none (no ARP, no RST) that is meant for the guest. A program needs
//! no kernel module but `cls_bpf` and `sch_ingress`, and drops what the guest sends under another MAC than its own.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use husk_bpf::{Instruction, Register::*};
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

/// `bpf_redirect`.
const REDIRECT: i32 = 23;
/// `bpf_skb_load_bytes`.
const LOAD_BYTES: i32 = 26;
/// `TC_ACT_SHOT`.
const SHOT: u32 = 2;

impl Fate {
    fn program(self) -> Vec<Instruction> {
        let redirect = |device: u32| {
            [
                Instruction::set(R1, device),
                Instruction::set(R2, 0),
                Instruction::call(REDIRECT),
                Instruction::exit(),
            ]
        };
        let drop = [Instruction::set(R0, SHOT), Instruction::exit()];
        match self {
            Self::Drop => drop.to_vec(),
            Self::Redirect(device) => redirect(device).to_vec(),
            Self::RedirectFrom([a, b, c, d, e, f], device) => {
                let mut program = vec![
                    // The sender, bytes 6 to 11 of the frame, onto the stack: bytes -8 to -3.
                    Instruction::set(R2, 6),
                    Instruction::copy_long(R3, Stack),
                    Instruction::add_long(R3, -8),
                    Instruction::set(R4, 6),
                    Instruction::call(LOAD_BYTES),
                    // Each of these jumps past the rest and the redirection.
                    Instruction::jump_unless_null(R0).jumping(8),
                    Instruction::load(R1, Stack, -8),
                    Instruction::jump_unless_equal(R1, u32::from_ne_bytes([a, b, c, d])).jumping(6),
                    Instruction::load_half(R1, Stack, -4),
                    Instruction::jump_unless_equal(R1, u16::from_ne_bytes([e, f]).into()).jumping(4),
                ];
                program.extend(redirect(device));
                program.extend(drop);
                program
            }
        }
    }

    /// Hands the program to the kernel.
    fn load(self) -> io::Result<OwnedFd> {
        const SCHED_CLS: u32 = 3;
        husk_bpf::load(SCHED_CLS, 0, NAME, &self.program())
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
