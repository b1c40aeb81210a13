//! Segments, interrupt table and handlers: one Rust function per vector.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::{cpu, entry, println};

/// What a handler sees and may change: the interrupted state.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    /// r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax.
    pub registers: [u64; 15],
    /// The vector.
    pub vector: u64,
    /// The error code, or 0.
    pub error: u64,
    /// Where it goes on.
    pub rip: u64,
    /// The code segment; its low two bits are the privilege level.
    pub cs: u64,
    /// The flags.
    pub rflags: u64,
    /// The stack pointer.
    pub rsp: u64,
    /// The stack segment.
    pub ss: u64,
}

/// A handler.
pub type Handler = fn(&mut Frame);

/// Vectors that have stubs and handlers.
pub const VECTORS: usize = 256;

static HANDLERS: [AtomicUsize; VECTORS] = [const { AtomicUsize::new(0) }; VECTORS];

/// Sets a vector's handler.
pub fn handle(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as usize, Ordering::Relaxed);
}

/// Memory that the processor reads and the guest's first processor writes before any other runs.
#[repr(C, align(16))]
struct Table<const N: usize>(UnsafeCell<[u64; N]>);
// SAFETY: one processor writes them, at the start; handlers do not touch them.
unsafe impl<const N: usize> Sync for Table<N> {}

/// Null, kernel code, kernel data, user data, user code, TSS (two entries).
static GDT: Table<7> = Table(UnsafeCell::new([
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
]));
static IDT: Table<{ 2 * VECTORS }> = Table(UnsafeCell::new([0; 2 * VECTORS]));
/// The task-state segment: 104 bytes.
static TSS: Table<13> = Table(UnsafeCell::new([0; 13]));

#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; 16384]>);
// SAFETY: only the processor uses it, when a trap comes from ring 3.
unsafe impl Sync for Stack {}
static RING0_STACK: Stack = Stack(UnsafeCell::new([0; 16384]));

/// Selectors of [`install`]'s segments.
pub mod selector {
    /// Ring-0 code.
    pub const CODE: u64 = 0x08;
    /// Ring-0 data.
    pub const DATA: u64 = 0x10;
    /// Ring-3 data.
    pub const USER_DATA: u64 = 0x1b;
    /// Ring-3 code.
    pub const USER_CODE: u64 = 0x23;
    /// The task-state segment.
    pub const TSS: u64 = 0x28;
}

// One stub a vector, 16 bytes each: a zero where the processor pushes no error code, the vector, the rest.
global_asm!(
    ".balign 16",
    "trap_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21",
    ".else",
    "pushq $0",
    ".endif",
    "pushq $vector",
    "jmp trap_common",
    ".set vector, vector + 1",
    ".endr",
    "trap_common:",
    "push %rax; push %rbx; push %rcx; push %rdx; push %rsi; push %rdi; push %rbp",
    "push %r8; push %r9; push %r10; push %r11; push %r12; push %r13; push %r14; push %r15",
    "mov %rsp, %rdi",
    "mov %rsp, %rbx",
    "and $-16, %rsp",
    "cld",
    "call {dispatch}",
    "mov %rbx, %rsp",
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %r11; pop %r10; pop %r9; pop %r8",
    "pop %rbp; pop %rdi; pop %rsi; pop %rdx; pop %rcx; pop %rbx; pop %rax",
    "add $16, %rsp",
    "iretq",
    dispatch = sym dispatch,
    options(att_syntax),
);

unsafe extern "C" {
    static trap_stubs: [[u8; 16]; VECTORS];
}

extern "C" fn dispatch(frame: &mut Frame) {
    let handler = HANDLERS.get(frame.vector as usize).map_or(0, |slot| slot.load(Ordering::Relaxed));
    if handler == 0 {
        println!(
            "unexpected trap {} error {:#x} rip {:#x} cr2 {:#x}",
            frame.vector,
            frame.error,
            frame.rip,
            cpu::read_cr2()
        );
        entry::exit(entry::FAILED);
    }
    // SAFETY: the table holds zeros and what `handle` stored, which are `Handler`s.
    let handler = unsafe { core::mem::transmute::<usize, Handler>(handler) };
    handler(frame);
}

/// Where the processor goes with a trap of `vector`.
#[must_use]
pub fn stub(vector: u8) -> u64 {
    // SAFETY: the stubs are 256 of 16 bytes each.
    unsafe { &raw const trap_stubs[usize::from(vector)] as u64 }
}

/// Lets the traps of `vector` come on a stack of their own, number `ist` (1 to 7), which ends at `top`.
pub fn use_stack(vector: u8, ist: u8, top: u64) {
    // SAFETY: a guest has one thread, and the processor reads the table only when a trap comes.
    let tss = unsafe { &mut *TSS.0.get() };
    // SAFETY: as above.
    let idt = unsafe { &mut *IDT.0.get() };
    // IST1 begins at byte 36.
    let slot = 3 + usize::from(ist);
    tss[slot] = tss[slot] & 0xffff_ffff | top << 32;
    tss[slot + 1] = tss[slot + 1] & !0xffff_ffff | top >> 32;
    let gate = &mut idt[2 * usize::from(vector)];
    *gate = *gate & !(7 << 32) | u64::from(ist) << 32;
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Builds and loads segments, interrupt table and task register. Called by [`entry!`](crate::entry!).
pub fn install() {
    let stack_top = RING0_STACK.0.get() as u64 + 16384;
    // SAFETY: nobody else touches the segment before `ltr`.
    let tss = unsafe { &mut *TSS.0.get() };
    // RSP0 begins at byte 4.
    tss[0] = stack_top << 32;
    tss[1] = stack_top >> 32;

    // SAFETY: nobody else touches the table, see its `Sync`.
    let gdt = unsafe { &mut *GDT.0.get() };
    let base = TSS.0.get() as u64;
    gdt[5] = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    gdt[6] = base >> 32;

    // SAFETY: nobody else touches the table, see its `Sync`.
    let idt = unsafe { &mut *IDT.0.get() };
    for vector in 0..VECTORS {
        let stub = stub(vector as u8);
        // Interrupt gates; user programs may use 3 and 0x80.
        let kind = if matches!(vector, 3 | 0x80) { 0xee } else { 0x8e };
        idt[2 * vector] = (stub & 0xffff) | selector::CODE << 16 | kind << 40 | (stub >> 16 & 0xffff) << 48;
        idt[2 * vector + 1] = stub >> 32;
    }
    load();
    // SAFETY: the descriptor is complete.
    unsafe { asm!("ltr {tss:x}", tss = in(reg) selector::TSS, options(nostack, preserves_flags)) }
}

/// Loads what [`install`] built, on a further processor. It has no task register: traps must not come from ring 3.
pub fn load() {
    let gdt = Pointer { limit: 7 * 8 - 1, base: GDT.0.get() as u64 };
    let idt = Pointer { limit: (VECTORS * 16 - 1) as u16, base: IDT.0.get() as u64 };
    // SAFETY: the tables are static and complete; the far return reloads CS with the same flat code segment.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "mov ds, {data:x}", "mov es, {data:x}", "mov ss, {data:x}", "mov fs, {data:x}", "mov gs, {data:x}",
            "push {code}", "lea {scratch}, [rip + 2f]", "push {scratch}", "retfq",
            "2:",
            gdt = in(reg) &raw const gdt, idt = in(reg) &raw const idt,
            data = in(reg) selector::DATA, code = const selector::CODE,
            scratch = out(reg) _,
        )
    }
}

/// Ends the guest: with an interrupt table of limit 0 the trap, the #GP and the #DF all fail.
pub fn triple_fault() {
    let empty = [0u16; 5];
    // SAFETY: it is the point.
    unsafe { asm!("lidt [{}]", "int3", in(reg) &raw const empty) }
}
