//! Exceptions and interrupts of the hypervisor itself.
//!
//! It runs with interrupts off except in [`super::cores::idle`]. An exception here is our own bug: a panic with
//! the state. The NMI is the kick: it sets this core's kick byte, and where it hits a window between the last look
//! at that byte and the step that would sleep or enter a guest, it turns the step back.

use core::arch::global_asm;
use core::sync::atomic::Ordering;

use super::{apic, cores, legacy, panic, power};
use crate::vmx::entry;

/// The registers that a stub saved, and what the processor pushed.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "each is the register of its name")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// Which of the 256 gates was taken.
    pub vector: u64,
    /// The error code; 0 for a vector without one.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Bytes from one stub to the next.
const STUB_BYTES: u64 = 16;

// The stubs: vectors 8, 10 to 14, 17, 21, 29 and 30 push an error code (SDM Vol. 3, "Error Code"), the others
// get a zero in its place. The stack is 16-byte aligned at the call: the processor aligns it and pushes 5 words,
// then come 2 + 15.
global_asm!(
    // Visible beyond this object file: the compiler may put the users of the labels into another.
    ".irp label, umbra_stubs",
    ".globl \\label",
    ".hidden \\label",
    ".endr",
    ".pushsection .text.umbra_stubs, \"ax\"",
    ".balign 16",
    "umbra_stubs:",
    ".set umbra_vector, 0",
    ".rept 256",
    ".balign 16",
    ".if !(umbra_vector == 8 || (umbra_vector >= 10 && umbra_vector <= 14) || umbra_vector == 17 || \
         umbra_vector == 21 || umbra_vector == 29 || umbra_vector == 30)",
    "pushq $0",
    ".endif",
    "pushq $umbra_vector",
    "jmp umbra_trap",
    ".set umbra_vector, umbra_vector + 1",
    ".endr",
    ".balign 16",
    "umbra_trap:",
    "pushq %rax",
    "pushq %rbx",
    "pushq %rcx",
    "pushq %rdx",
    "pushq %rsi",
    "pushq %rdi",
    "pushq %rbp",
    "pushq %r8",
    "pushq %r9",
    "pushq %r10",
    "pushq %r11",
    "pushq %r12",
    "pushq %r13",
    "pushq %r14",
    "pushq %r15",
    "movq %rsp, %rdi",
    "cld",
    "call {trap}",
    "popq %r15",
    "popq %r14",
    "popq %r13",
    "popq %r12",
    "popq %r11",
    "popq %r10",
    "popq %r9",
    "popq %r8",
    "popq %rbp",
    "popq %rdi",
    "popq %rsi",
    "popq %rdx",
    "popq %rcx",
    "popq %rbx",
    "popq %rax",
    "addq $16, %rsp",
    "iretq",
    ".popsection",
    trap = sym trap,
    options(att_syntax)
);

unsafe extern "C" {
    static umbra_stubs: u8;
}

/// The address of a vector's stub.
#[must_use]
pub fn stub(vector: u8) -> u64 {
    (&raw const umbra_stubs) as u64 + u64::from(vector) * STUB_BYTES
}

const NMI: u64 = 2;

extern "C" fn trap(frame: &mut TrapFrame) {
    match frame.vector {
        NMI => nmi(frame),
        exception @ 0..32 => panic::exception(frame, name(exception)),
        vector => interrupt(vector as u8),
    }
}

/// Takes no lock, and does the same however often it runs.
fn nmi(frame: &mut TrapFrame) {
    if cores::must_halt() {
        power::halt();
    }
    let core = cores::this_core();
    core.kick.store(1, Ordering::Relaxed);
    core.count_nmi();
    turn_back(frame);
}

/// Returns behind the entry or the sleep that was about to begin.
fn turn_back(frame: &mut TrapFrame) {
    if entry::in_entry_window(frame.rip) {
        frame.rip = entry::abort_address();
    } else if cores::idle_window().contains(&frame.rip) {
        frame.rip = cores::idle_window().end;
    }
}

fn interrupt(vector: u8) {
    // A masked 8259 still raises spurious interrupts, which want no EOI of the local APIC; nor do its own.
    let spurious =
        vector == apic::SPURIOUS_VECTOR || (legacy::PIC_VECTORS..legacy::PIC_VECTORS + 16).contains(&vector);
    if !spurious {
        cores::this_core().count_interrupt();
        apic::eoi();
    }
}

/// What a VM exit for an NMI calls: does as the handler does, then lets further NMIs in.
#[inline]
pub fn nmi_exit() {
    if cores::must_halt() {
        power::halt();
    }
    cores::this_core().kick.store(1, Ordering::Relaxed);
    unblock_nmis();
}

/// Ends the blocking of NMIs on this core, as an IRET does: to be called when an NMI ended a guest's run (a VM exit
/// for an NMI blocks further ones, SDM Vol. 3, "Updating Non-Register State").
#[inline]
pub fn unblock_nmis() {
    // SAFETY: returns to the next instruction with the same segments, flags and stack.
    unsafe {
        core::arch::asm!(
            "mov {saved}, rsp",
            "mov {scratch:e}, ss",
            "push {scratch}",
            "push {saved}",
            "pushfq",
            "mov {scratch:e}, cs",
            "push {scratch}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "iretq",
            "2:",
            saved = out(reg) _,
            scratch = out(reg) _,
        );
    }
}

/// An exception's name: SDM Vol. 3, "Exceptions and Interrupts".
#[must_use]
pub const fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error (#DE)",
        1 => "debug exception (#DB)",
        2 => "NMI",
        3 => "breakpoint (#BP)",
        4 => "overflow (#OF)",
        5 => "bound range exceeded (#BR)",
        6 => "invalid opcode (#UD)",
        7 => "device not available (#NM)",
        8 => "double fault (#DF)",
        10 => "invalid TSS (#TS)",
        11 => "segment not present (#NP)",
        12 => "stack-segment fault (#SS)",
        13 => "general protection (#GP)",
        14 => "page fault (#PF)",
        16 => "x87 floating-point error (#MF)",
        17 => "alignment check (#AC)",
        18 => "machine check (#MC)",
        19 => "SIMD floating-point exception (#XM)",
        20 => "virtualization exception (#VE)",
        21 => "control protection (#CP)",
        _ => "reserved exception",
    }
}
