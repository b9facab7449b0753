//! The bare machine: memory by its physical addresses, ports, registers of the CPU.
//!
//! All of this is safe here, as far as the compiler is concerned, because nothing of the program lies where it is used:
//! its image is below [`TABLES`], and what is above is only reached by address.

use core::arch::asm;

/// Page tables, descriptor tables and the stack: 8 MiB to 9 MiB.
pub const TABLES: u32 = 0x80_0000;
/// What follows the entry's tables: four pages of page directories, one more for what is above 4 GiB.
const HIGH_DIRECTORY: u64 = TABLES as u64 + 0x6000;
const DIRECTORY_POINTERS: u64 = TABLES as u64 + 0x1000;
const GDT: u64 = TABLES as u64 + 0x8000;
const IDT: u64 = TABLES as u64 + 0x9000;
const TSS: u64 = TABLES as u64 + 0xa000;
const HANDLER: u64 = TABLES as u64 + 0xb000;
const HANDLER_STACK_END: u64 = TABLES as u64 + 0xd000;

/// Registers of each processor's local APIC.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// Where [`map_high`] shows memory: 4 GiB.
pub const HIGH: u64 = 1 << 32;

/// Queues and buffers of the devices: from 16 MiB on.
pub const RINGS: u64 = 0x100_0000;
/// Buffers: from 32 MiB on.
pub const BUFFERS: u64 = 0x200_0000;

/// Number of the general-protection fault.
const GENERAL_PROTECTION: u64 = 13;

/// Has a general-protection fault pass over the instruction that made it, which must be one of two bytes, as WRMSR is.
/// All other faults reset the CPU.
pub fn set_up() {
    // add rsp, 8 (the error code); add qword ptr [rsp], 2; iretq
    let handler = [0x48, 0x83, 0xc4, 8, 0x48, 0x83, 4, 0x24, 2, 0x48, 0xcf];
    for (at, byte) in handler.into_iter().enumerate() {
        store(HANDLER + at as u64, byte as u8);
    }
    // The gate: code segment 8, stack 1 of the TSS, present, interrupt.
    let gate = IDT + 16 * GENERAL_PROTECTION;
    store(
        gate,
        (HANDLER & 0xffff) | (8 << 16) | (1 << 32) | (0x8e << 40) | ((HANDLER >> 16 & 0xffff) << 48),
    );
    store(gate + 8, HANDLER >> 32);
    store(TSS + 0x24, HANDLER_STACK_END);
    // The TSS's descriptor: 104 bytes, available, present.
    store(
        GDT + 0x18,
        103u64 | ((TSS & 0xff_ffff) << 16) | (0x89 << 40) | ((TSS >> 24 & 0xff) << 56),
    );
    store(GDT + 0x20, TSS >> 32);
    let table = IDT + 0xff0;
    store(table, 255u16);
    store(table + 2, IDT);
    if cfg!(panic = "abort") {
        // SAFETY: both tables were just made.
        unsafe { asm!("lidt [{0}]", "ltr {1:x}", in(reg) table, in(reg) 0x18u64, options(nostack)) };
    }
}

/// Shows the gigabyte of physical memory at `address` (a multiple of 2 MiB) at [`HIGH`].
pub fn map_high(address: u64) {
    for entry in 0..512 {
        store(HIGH_DIRECTORY + entry * 8, (address + (entry << 21)) | 0x83);
    }
    store(DIRECTORY_POINTERS + 4 * 8, HIGH_DIRECTORY | 3);
    // SAFETY: the tables map the program as before.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _) };
}

/// Writes to memory or to registers in it.
pub fn store<T>(address: u64, value: T) {
    // SAFETY: see the module.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Reads from memory or from registers in it.
pub fn load<T>(address: u64) -> T {
    // SAFETY: see the module.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes bytes to memory.
pub fn store_bytes(address: u64, bytes: &[u8]) {
    for (at, byte) in bytes.iter().enumerate() {
        store(address + at as u64, *byte);
    }
}

/// Fills memory.
pub fn fill(address: u64, length: u64, value: u8) {
    // SAFETY: see the module.
    unsafe { core::ptr::write_bytes(address as *mut u8, value, length as usize) }
}

/// Bytes of memory that nobody else writes meanwhile, as text.
pub fn text(address: u64, most: usize) -> &'static str {
    let mut length = 0;
    while length < most && load::<u8>(address + length as u64) != 0 {
        length += 1;
    }
    // SAFETY: see the module.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, length) };
    core::str::from_utf8(bytes).unwrap_or_default()
}

/// A value that goes to a port.
pub trait PortValue: Copy {
    /// IN.
    fn read(port: u16) -> Self;
    /// OUT.
    fn write(self, port: u16);
}

macro_rules! port_value {
    ($type:ty, $register:tt) => {
        impl PortValue for $type {
            fn read(port: u16) -> Self {
                let value;
                // SAFETY: no port changes the program's memory.
                unsafe { asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nomem, nostack)) };
                value
            }
            fn write(self, port: u16) {
                // SAFETY: as above.
                unsafe { asm!(concat!("out dx, ", $register), in($register) self, in("dx") port, options(nomem, nostack)) };
            }
        }
    };
}
port_value!(u8, "al");
port_value!(u16, "ax");
port_value!(u32, "eax");

/// OUT.
pub fn write_port(port: u16, value: impl PortValue) {
    value.write(port);
}

/// IN.
pub fn read_port<T: PortValue>(port: u16) -> T {
    T::read(port)
}

/// REP INSB to, or REP OUTSB from, a buffer.
pub fn string_port(port: u16, out: bool, address: u64, count: u64) {
    // SAFETY: see the module.
    unsafe {
        if out {
            asm!("rep outsb", inout("rsi") address => _, inout("rcx") count => _, in("dx") port, options(nostack));
        } else {
            asm!("rep insb", inout("rdi") address => _, inout("rcx") count => _, in("dx") port, options(nostack));
        }
    }
}

/// REP MOVSB between any addresses, registers of devices among them.
pub fn string_move(from: u64, to: u64, count: u64) {
    // SAFETY: see the module.
    unsafe {
        asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") count => _, options(nostack));
    }
}

/// A 16-byte access, read and written.
pub fn wide_access(address: u64) {
    // SAFETY: see the module.
    unsafe {
        asm!("movups xmm0, [{0}]", "movups [{0}], xmm0", in(reg) address, out("xmm0") _, options(nostack));
    }
}

/// An exchange, locked.
pub fn locked_access(address: u64) {
    // SAFETY: see the module.
    unsafe {
        asm!("lock xadd dword ptr [{0}], {1:e}", in(reg) address, inout(reg) 1u64 => _, options(nostack))
    };
}

/// WRMSR; what the CPU refuses has no effect.
pub fn write_msr(msr: u32, value: u64) {
    // SAFETY: the callers leave alone what the program itself needs.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// RDMSR; what the CPU refuses reads as `None`.
pub fn read_msr(msr: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing here.
    unsafe {
        asm!("rdmsr", in("ecx") msr, inout("eax") 0xdead_beefu32 => low, inout("edx") 0xdead_beefu32 => high, options(nostack));
    }
    let value = u64::from(high) << 32 | u64::from(low);
    (value != 0xdead_beef_dead_beef).then_some(value)
}

/// A call of the hypervisor's (VMMCALL).
pub fn hypercall(number: u64, one: u64, two: u64) -> u64 {
    let mut result = number;
    // SAFETY: KVM's calls change no memory but what they are given; rbx, which the compiler keeps, is put back.
    unsafe {
        asm!("xchg {one}, rbx", "vmmcall", "xchg {one}, rbx", one = inout(reg) one => _, inout("rax") result, in("rcx") two);
    }
    result
}

/// Time in cycles.
pub fn cycles() -> u64 {
    // SAFETY: reading changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Stands still for a number of cycles.
pub fn wait(count: u64) {
    let start = cycles();
    while cycles().wrapping_sub(start) < count {
        core::hint::spin_loop();
    }
}

/// Asks for the machine's reset, by the keyboard controller.
pub fn reset() -> ! {
    write_port(0x64, 0xfeu8);
    halt()
}

/// Halts with interrupts off, for ever.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing follows.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}

/// Ends by faults for which there is no handler.
pub fn triple_fault() -> ! {
    let none = BUFFERS;
    store(none, [0u8; 16]);
    // SAFETY: this is the end.
    unsafe { asm!("lidt [{0}]", "ud2", in(reg) none, options(noreturn)) }
}

/// Goes on at an address.
pub fn jump(address: u64) -> ! {
    // SAFETY: this is the end.
    unsafe { asm!("jmp {0}", in(reg) address, options(noreturn)) }
}
