//! From PVH's 32-bit entry to long mode, and the functions that compiled code expects to find.

use crate::machine::{TABLES, string_move};
use core::arch::{asm, global_asm};

// The note names the entry (XEN_ELFNOTE_PHYS32_ENTRY, 18). The entry maps the first 4 GiB as they are, by pages of
// 2 MiB, and switches to long mode with SSE. `ebx` holds the address of the start info.
global_asm!(
    r#"
    .section .note.husk, "a", @note
    .long 4, 8, 18
    .asciz "Xen"
    .quad hostile_start

    .section .text.entry, "ax"
    .globl hostile_start
    .code32
hostile_start:
    cli
    cld
    movl ${tables}, %edi
    leal 0x1003(%edi), %eax
    movl %eax, (%edi)
    leal 0x2003(%edi), %eax
    xorl %ecx, %ecx
1:  movl %eax, 0x1000(%edi, %ecx, 8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $4, %ecx
    jne 1b
    movl $0x83, %eax
    xorl %ecx, %ecx
2:  movl %eax, 0x2000(%edi, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jne 2b
    // A code segment for long mode and a data segment.
    movl $0x0000ffff, 0x8008(%edi)
    movl $0x00af9b00, 0x800c(%edi)
    movl $0x0000ffff, 0x8010(%edi)
    movl $0x00cf9300, 0x8014(%edi)
    movw $0x2f, 0x8ff0(%edi)
    leal 0x8000(%edi), %eax
    movl %eax, 0x8ff2(%edi)
    // PAE, and SSE as operating systems allow it.
    movl $0x620, %eax
    movl %eax, %cr4
    movl %edi, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000003, %eax
    andl $0xfffffffb, %eax
    movl %eax, %cr0
    lgdtl 0x8ff0(%edi)
    ljmpl $8, $3f
    .code64
3:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl ${stack}, %esp
    movl %ebx, %edi
    call hostile_main
    ud2

    // How another processor starts: copied to a page below 1 MiB, with what LGDT needs at its end. From real mode to
    // long mode at once, with the tables of the first.
    .code16
    .globl hostile_other_start
    .globl hostile_other_end
hostile_other_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl 0xff0
    movl $0x620, %eax
    movl %eax, %cr4
    movl ${tables}, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax
    movl %eax, %cr0
    ljmpl $8, $4f
hostile_other_end:
    .code64
4:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl ${other_stack}, %esp
    movl ${other_work}, %eax
    callq *(%rax)
    ud2
"#,
    other_stack = const crate::second::STACK,
    other_work = const crate::second::WORK,
    tables = const TABLES,
    stack = const TABLES + 0x10_0000,
    options(att_syntax)
);

unsafe extern "C" {
    static hostile_other_start: u8;
    static hostile_other_end: u8;
}

/// Copies the code with which another processor starts to the page at `to`.
pub fn put_start(to: u64) {
    let (from, end) = (&raw const hostile_other_start, &raw const hostile_other_end);
    string_move(from as u64, to, end as u64 - from as u64);
}

/// # Safety
/// As of C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _, options(nostack))
    };
    to
}

/// # Safety
/// As of C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") count => _, in("al") value as u8, options(nostack))
    };
    to
}

/// # Safety
/// As of C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the caller's promise; nothing is overwritten before it is read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's promise; from the end on, nothing is overwritten before it is read.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(count).wrapping_sub(1) => _,
            inout("rsi") from.add(count).wrapping_sub(1) => _, inout("rcx") count => _, options(nostack));
    }
    to
}

/// # Safety
/// As of C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// As of C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(one, other, count) }
}
