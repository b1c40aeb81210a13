//! Every kind of event, delivered while what its delivery needs is unknown to the shadow (H31): gates, segments and
//! TSS, stacks, the handler itself, each in a page of its own that is made cold before. Each event has to arrive exactly
//! once, and an NMI has to wait for the IRET of the one before.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use test_guests::paging::{A, AddressSpace, D, DATA, FREE, P, U, W};
use test_guests::trap::{Frame, handle, selector};
use test_guests::{cpu, entry, println};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// Each in a gibibyte of its own, so that each hangs on tables of its own.
const GATES: u64 = FREE;
const SEGMENTS: u64 = FREE + GIB;
const STACK: u64 = FREE + 2 * GIB;
const RING0: u64 = FREE + 3 * GIB;
const OWN_STACK: u64 = FREE + 4 * GIB;
const CODE: u64 = FREE + 5 * GIB;
const USER: u64 = FREE + 6 * GIB;
const TSS_AT: u64 = 0x800;
/// The hardware's frame lies in the upper page of a stack, what the handler saves in the lower one: the IRET is the
/// first to touch the upper page again.
const TOP: u64 = PAGE + 48;
const IMAGE: u64 = 2 << 20;

const APIC: u64 = 0xfee0_0000;
const INTERRUPT: u8 = 0x90;
const SOFTWARE: u8 = 0x81;
const SOFTWARE_OWN_STACK: u8 = 0x82;
const BACK: u8 = 0x80;

static COUNT: AtomicU64 = AtomicU64::new(0);
static VECTOR: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);
static SKIP: AtomicU64 = AtomicU64::new(0);
/// The interrupted RIP was one of a handler's.
static NESTED: AtomicU64 = AtomicU64::new(0);
/// What is made cold before the handler's IRET.
static COLD_AT_IRET: AtomicU64 = AtomicU64::new(0);
/// NMIs that the NMI handler still has to send.
static NMIS: AtomicU64 = AtomicU64::new(0);
/// Where the PTEs of each structure lie, and how many.
static ENTRIES: [(AtomicU64, AtomicU64); 6] = [const { (AtomicU64::new(0), AtomicU64::new(0)) }; 6];

entry!(main);

// `deliver(event, cr3, stack)`: flushes and raises the event at once, on that stack. `deliver_user(event, cr3, stack,
// rflags)`: the same at CPL 3, in the copy of `user_events` at `USER`.
global_asm!(
    "deliver:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + deliver_stack], rsp",
    "mov rsp, rdx",
    "shl edi, 5", "lea rax, [rip + kernel_events]", "add rax, rdi",
    "mov r8d, 0x4400", "mov r9, {apic}", "mov ecx, 0", "mov r10, {unmapped}", "mov r11d, 0x7f8",
    "jmp rax",
    "deliver_user:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + deliver_stack], rsp",
    "mov rsp, rdx",
    "shl edi, 5", "mov rax, {user}", "add rax, rdi",
    "push {user_data}", "push 0", "push rcx", "push {user_code}", "push rax",
    "mov ecx, 0", "mov r10, {unmapped}",
    "mov cr3, rsi", "iretq",
    "deliver_done:",
    "mov rsp, [rip + deliver_stack]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    ".balign 32", "kernel_events:",
    "mov cr3, rsi", "int3", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "int 0x81", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "int 0x82", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", ".byte 0xf1", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "ud2", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "mov ds, r11d", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "mov eax, [r10]", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "div ecx", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "sti", "nop", "nop", "cli", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "sti", "hlt", "cli", "jmp deliver_done",
    ".balign 32", "mov cr3, rsi", "mov [r9], r8d", "nop", "nop", "jmp deliver_done",
    ".balign 32", "user_events:",
    "int3", "int 0x80",
    ".balign 32", "int 0x81", "int 0x80",
    ".balign 32", "int 0x82", "int 0x80",
    ".balign 32", ".byte 0xf1", "int 0x80",
    ".balign 32", "ud2", "int 0x80",
    ".balign 32", "hlt", "int 0x80",
    ".balign 32", "mov eax, [r10]", "int 0x80",
    ".balign 32", "div ecx", "int 0x80",
    ".balign 32", "nop", "nop", "int 0x80",
    ".balign 32", "user_events_end:",
    ".data", ".balign 8", "deliver_stack: .quad 0", ".text",
    apic = const APIC + 0x300,
    unmapped = const 1_u64 << 42,
    user = const USER,
    user_data = const selector::USER_DATA,
    user_code = const selector::USER_CODE,
);

unsafe extern "C" {
    fn deliver(event: u64, cr3: u64, stack: u64);
    fn deliver_user(event: u64, cr3: u64, stack: u64, rflags: u64);
    static deliver_done: [u8; 0];
    static deliver_stack: u64;
    static user_events: [u8; 0];
    static user_events_end: [u8; 0];
    static __image_end: [u8; 0];
}

/// Clears A and D of the structures in `mask`: the next flush takes them out of the shadow.
fn make_cold(mask: u64) {
    for (number, (first, count)) in ENTRIES.iter().enumerate() {
        if mask >> number & 1 != 0 {
            for slot in 0..count.load(Relaxed) {
                let slot = first.load(Relaxed) + 8 * slot;
                cpu::write64(slot, cpu::read64(slot) & !(A | D));
            }
        }
    }
}

fn record(frame: &mut Frame) {
    COUNT.fetch_add(1, Relaxed);
    VECTOR.store(frame.vector, Relaxed);
    ERROR.store(frame.error, Relaxed);
    frame.rip += SKIP.load(Relaxed);
    if frame.rip >= CODE && frame.rip < USER {
        NESTED.fetch_add(1, Relaxed);
    }
    if frame.vector == u64::from(INTERRUPT) {
        cpu::write32(APIC + 0xb0, 0);
    }
    if frame.vector == 2 && NMIS.load(Relaxed) > 0 {
        NMIS.fetch_sub(1, Relaxed);
        let before = COUNT.load(Relaxed);
        send_nmi();
        for _ in 0..200 {
            core::hint::spin_loop();
        }
        if COUNT.load(Relaxed) != before {
            NESTED.fetch_add(1, Relaxed);
        }
    }
    let cold = COLD_AT_IRET.load(Relaxed);
    if cold != 0 {
        make_cold(cold);
        cpu::write_cr3(cpu::read_cr3());
    }
}

/// From CPL 3 back to who asked.
fn back(frame: &mut Frame) {
    frame.rip = &raw const deliver_done as u64;
    frame.cs = selector::CODE;
    frame.ss = selector::DATA;
    frame.rflags = 2;
    // SAFETY: written before CPL 3 was entered.
    frame.rsp = unsafe { (&raw const deliver_stack).read_volatile() };
}

fn send_nmi() {
    cpu::write32(APIC + 0x310, 0);
    cpu::write32(APIC + 0x300, 0x4400);
}

fn send_interrupt() {
    cpu::write32(APIC + 0x300, 0x4_4000 | u32::from(INTERRUPT));
}

/// Name, vector, error code, bytes to skip.
type Event = (&'static str, u8, u64, u64);

/// In the order of `kernel_events`.
const KERNEL: [Event; 11] = [
    ("INT3", 3, 0, 0),
    ("INT n", SOFTWARE, 0, 0),
    ("INT n, own stack", SOFTWARE_OWN_STACK, 0, 0),
    ("INT1", 1, 0, 0),
    ("#UD", 6, 0, 2),
    ("#GP", 13, 0x7f8, 3),
    ("#PF", 14, 0, 3),
    ("#DE", 0, 0, 2),
    ("interrupt", INTERRUPT, 0, 0),
    ("interrupt in HLT", INTERRUPT, 0, 0),
    ("NMI", 2, 0, 0),
];
/// In the order of `user_events`.
const USERS: [Event; 9] = [
    ("INT3", 3, 0, 0),
    ("INT n", SOFTWARE, 0, 0),
    ("INT n, own stack", SOFTWARE_OWN_STACK, 0, 0),
    ("INT1", 1, 0, 0),
    ("#UD", 6, 0, 2),
    ("#GP", 13, 0, 1),
    ("#PF", 14, 4, 3),
    ("#DE", 0, 0, 2),
    ("interrupt", INTERRUPT, 0, 0),
];

fn reset(skip: u64) {
    COUNT.store(0, Relaxed);
    SKIP.store(skip, Relaxed);
    NESTED.store(0, Relaxed);
}

/// One event from one level with the structures in `cold` unknown, and those in `at_iret` once more before the IRET.
fn one(user: bool, number: usize, cold: u64, at_iret: u64) -> u32 {
    let (name, vector, error, skip) = if user { USERS[number] } else { KERNEL[number] };
    reset(skip);
    COLD_AT_IRET.store(at_iret, Relaxed);
    if vector == INTERRUPT {
        send_interrupt();
    }
    make_cold(cold);
    let stack = STACK + PAGE + 256;
    if user {
        let flags = if vector == INTERRUPT { 0x202 } else { 2 };
        // SAFETY: the structures are mapped, the stack is nobody else's, and every handler comes back.
        unsafe { deliver_user(number as u64, cpu::read_cr3(), stack, flags) };
    } else {
        // SAFETY: the same.
        unsafe { deliver(number as u64, cpu::read_cr3(), stack) };
    }
    COLD_AT_IRET.store(0, Relaxed);
    let (count, got, got_error) = (COUNT.load(Relaxed), VECTOR.load(Relaxed), ERROR.load(Relaxed));
    if (count, got, got_error) == (1, vector.into(), error) {
        return 0;
    }
    println!(
        "deliveries: {name} from CPL {}, cold {cold:#x}, at IRET {at_iret:#x}: {count} of vector {got} error {got_error:#x}: BAD",
        if user { 3 } else { 0 }
    );
    1
}

/// An NMI that comes while another is handled waits for that one's IRET, even where the IRET faults in the shadow.
fn blocked_nmis(at_iret: u64) -> u32 {
    reset(0);
    COLD_AT_IRET.store(at_iret, Relaxed);
    NMIS.store(2, Relaxed);
    send_nmi();
    for _ in 0..200 {
        core::hint::spin_loop();
    }
    COLD_AT_IRET.store(0, Relaxed);
    let (count, nested) = (COUNT.load(Relaxed), NESTED.load(Relaxed));
    if (count, nested) == (3, 0) {
        return 0;
    }
    println!("deliveries: {count} NMIs of 3, {nested} of them within another, at IRET {at_iret:#x}: BAD");
    1
}

/// Moves gates, segments, TSS and stacks to pages of their own.
fn move_structures(space: &mut AddressSpace) {
    let image_pages = ((&raw const __image_end as u64) - IMAGE).div_ceil(PAGE);
    for page in 0..image_pages {
        space.map(CODE + page * PAGE, IMAGE + page * PAGE, P | W | A | D);
    }
    let pages = [(GATES, 1), (SEGMENTS, 1), (STACK, 2), (RING0, 2), (OWN_STACK, 2)];
    let mut frame = DATA;
    for (address, count) in pages {
        for page in 0..count {
            space.map(address + page * PAGE, frame, P | W | A | D);
            frame += PAGE;
        }
    }
    for ((first, count), (address, pages)) in
        ENTRIES.iter().zip(pages.into_iter().chain([(CODE, image_pages)]))
    {
        first.store(space.entry(address), Relaxed);
        count.store(pages, Relaxed);
    }
    space.map(USER, frame, P | W | U | A | D);
    let (from, to) = (&raw const user_events as u64, &raw const user_events_end as u64);
    for word in 0..(to - from).div_ceil(8) {
        cpu::write64(frame + 8 * word, cpu::read64(from + 8 * word));
    }

    let mut pointer = [0u16; 5];
    let base = |pointer: &[u16; 5]| (1..5).fold(0, |base, i| base | u64::from(pointer[i]) << (16 * (i - 1)));
    // SAFETY: stores ten bytes.
    unsafe { asm!("sidt [{}]", in(reg) &raw mut pointer) };
    let old = base(&pointer);
    for vector in 0..256 {
        let (low, high) = (cpu::read64(old + 16 * vector), cpu::read64(old + 16 * vector + 8));
        let stub = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let moved = stub - IMAGE + CODE;
        let kind = if matches!(vector as u8, 3 | BACK | SOFTWARE | SOFTWARE_OWN_STACK) { 0xee } else { 0x8e };
        let stack = u64::from(matches!(vector as u8, 2 | SOFTWARE_OWN_STACK));
        cpu::write64(
            GATES + 16 * vector,
            moved & 0xffff | selector::CODE << 16 | stack << 32 | kind << 40 | (moved >> 16 & 0xffff) << 48,
        );
        cpu::write64(GATES + 16 * vector + 8, moved >> 32);
    }
    // SAFETY: stores ten bytes.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut pointer) };
    let old = base(&pointer);
    for entry in 0..5 {
        cpu::write64(SEGMENTS + 8 * entry, cpu::read64(old + 8 * entry));
    }
    let tss = SEGMENTS + TSS_AT;
    cpu::write64(
        SEGMENTS + selector::TSS,
        103 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56,
    );
    cpu::write64(SEGMENTS + selector::TSS + 8, tss >> 32);
    for word in 0..13 {
        cpu::write64(tss + 8 * word, 0);
    }
    cpu::write64(tss + 4, RING0 + TOP);
    cpu::write64(tss + 36, OWN_STACK + TOP);
    let load = |limit: u16, base: u64| {
        [limit, base as u16, (base >> 16) as u16, (base >> 32) as u16, (base >> 48) as u16]
    };
    let (gates, segments) = (load(4095, GATES), load(55, SEGMENTS));
    // SAFETY: the new tables say what the old ones did.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {2:x}",
             in(reg) &raw const segments, in(reg) &raw const gates, in(reg) selector::TSS);
    }
}

fn main() -> u8 {
    for vector in [0, 1, 2, 3, 6, 13, 14, SOFTWARE, SOFTWARE_OWN_STACK, INTERRUPT] {
        handle(vector, record);
    }
    handle(BACK, back);
    let mut space = AddressSpace::install();
    move_structures(&mut space);
    cpu::write32(APIC + 0xf0, 0x1ff);
    handle(0xff, |_| ());

    let (mut bad, mut count) = (0, 0);
    for cold in 0..64 {
        // The stacks, at the IRET: none, or all of them.
        for at_iret in [0, 0b1_1100] {
            for number in 0..KERNEL.len() {
                bad += one(false, number, cold, at_iret);
            }
            for number in 0..USERS.len() {
                bad += one(true, number, cold, at_iret);
            }
            count += KERNEL.len() + USERS.len();
        }
        bad += blocked_nmis(cold & 0b1_1110);
    }
    println!("deliveries: {count} events");
    println!("deliveries done: {bad} bad");
    u8::from(bad != 0)
}
