//! Raises each exception a program can raise, and counts that each arrives exactly once, where it should.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use test_guests::trap::{Frame, handle};
use test_guests::{cpu, entry, println};

static COUNT: AtomicU64 = AtomicU64::new(0);
static VECTOR: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);
static CR2: AtomicU64 = AtomicU64::new(0);
/// Bytes of the faulting instruction, to be skipped; 0 for traps.
static SKIP: AtomicU64 = AtomicU64::new(0);

entry!(main);

fn record(frame: &mut Frame) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    VECTOR.store(frame.vector, Ordering::Relaxed);
    ERROR.store(frame.error, Ordering::Relaxed);
    CR2.store(cpu::read_cr2(), Ordering::Relaxed);
    frame.rip += SKIP.load(Ordering::Relaxed);
    frame.rflags &= !(1 << 8); // TF: one step only.
}

fn expect(name: &str, vector: u64, error: u64, skip: u64, raise: fn()) -> u8 {
    COUNT.store(0, Ordering::Relaxed);
    SKIP.store(skip, Ordering::Relaxed);
    raise();
    let count = COUNT.load(Ordering::Relaxed);
    let (got, got_error) = (VECTOR.load(Ordering::Relaxed), ERROR.load(Ordering::Relaxed));
    let good = count == 1 && got == vector && got_error == error;
    println!("{name}: {count} of vector {got} error {got_error:#x}: {}", if good { "ok" } else { "BAD" });
    u8::from(!good)
}

/// An address that the identity map of 4 GiB leaves out.
const UNMAPPED: u64 = 1 << 40;

fn main() -> u8 {
    for vector in [0, 1, 3, 4, 6, 13, 14] {
        handle(vector, record);
    }
    let mut bad = 0;
    // SAFETY: UD2 raises #UD; the handler skips its two bytes.
    bad += expect("#UD", 6, 0, 2, || unsafe { asm!("ud2") });
    // SAFETY: INT3 raises #BP after itself.
    bad += expect("#BP", 3, 0, 0, || unsafe { asm!("int3") });
    // SAFETY: a software interrupt through a gate of ours.
    bad += expect("INT 4", 4, 0, 0, || unsafe { asm!("int 4") });
    // SAFETY: DIV by zero raises #DE; the handler skips its two bytes.
    bad += expect("#DE", 0, 0, 2, || unsafe {
        asm!("div ecx", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _)
    });
    // SAFETY: a WRMSR to a register that no processor has raises #GP(0); two bytes.
    bad += expect("#GP wrmsr", 13, 0, 2, || unsafe {
        asm!("wrmsr", in("ecx") 0x7fff_0000u32, in("eax") 0, in("edx") 0)
    });
    // SAFETY: a selector beyond the table raises #GP(selector); MOV DS, EAX has two bytes.
    bad += expect("#GP selector", 13, 0x7f8, 2, || unsafe { asm!("mov ds, eax", in("eax") 0x7f8) });
    // SAFETY: the page is not mapped: #PF; MOV EAX, [RCX] has two bytes.
    bad +=
        expect("#PF read", 14, 0, 2, || unsafe { asm!("mov eax, [rcx]", in("rcx") UNMAPPED, out("eax") _) });
    let address = CR2.load(Ordering::Relaxed);
    if address != UNMAPPED {
        println!("CR2 {address:#x}: BAD");
        bad += 1;
    }
    // SAFETY: as above; MOV [RCX], EAX has two bytes.
    bad +=
        expect("#PF write", 14, 2, 2, || unsafe { asm!("mov [rcx], eax", in("rcx") UNMAPPED, in("eax") 0) });
    // SAFETY: TF traps after the instruction that follows POPF.
    bad += expect("#DB step", 1, 0, 0, || unsafe {
        asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop")
    });
    // Over an instruction that exits: the trap must neither be lost nor come twice.
    // SAFETY: as above; CPUID's results are dropped, rbx is put back.
    bad += expect("#DB step over CPUID", 1, 0, 0, || unsafe {
        asm!("mov r8, rbx", "xor eax, eax", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "cpuid",
             "mov rbx, r8", out("eax") _, out("ecx") _, out("edx") _, out("r8") _)
    });
    println!("faults done: {bad} bad");
    bad
}
