//! MOV SS puts off the debug exception that its operand's breakpoint raised, over the next instruction (H30): here one
//! that exits, one that exits under single step, and one that raises another event.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use test_guests::trap::{Frame, handle, selector};
use test_guests::{cpu, entry, println};

/// What MOV SS loads, in memory that nothing else uses.
const OPERAND: u64 = 8 << 20;
/// DR7: a breakpoint on reads and writes of the two bytes at DR0; none.
const WATCH: u64 = 0x0007_0402;
const OFF: u64 = 0x400;
const BREAKPOINT: u64 = 1 << 0;
const STEP: u64 = 1 << 14;
const TRAP_FLAG: u64 = 1 << 8;

static DEBUG: AtomicU64 = AtomicU64::new(0);
static OTHER: AtomicU64 = AtomicU64::new(0);
static DR6: AtomicU64 = AtomicU64::new(0);
static RIP: AtomicU64 = AtomicU64::new(0);

entry!(main);

fn debug(frame: &mut Frame) {
    DEBUG.fetch_add(1, Relaxed);
    RIP.store(frame.rip, Relaxed);
    let dr6: u64;
    // SAFETY: reads and clears the debug status.
    unsafe { asm!("mov {0}, dr6", "mov {1}, 0xffff0ff0", "mov dr6, {1}", out(reg) dr6, out(reg) _) };
    DR6.store(dr6, Relaxed);
    frame.rflags &= !TRAP_FLAG;
}

fn other(_: &mut Frame) {
    OTHER.fetch_add(1, Relaxed);
}

/// What came: debug exceptions, other events, DR6.
fn take() -> (u64, u64, u64) {
    (DEBUG.swap(0, Relaxed), OTHER.swap(0, Relaxed), DR6.swap(0, Relaxed) & (BREAKPOINT | STEP))
}

fn main() -> u8 {
    handle(1, debug);
    handle(3, other);
    cpu::write64(OPERAND, selector::DATA);
    let mut bad = 0;
    let mut check = |name: &str, good: bool, got: (u64, u64, u64)| {
        println!(
            "{name}: {} debug, {} other, DR6 {:#x}: {}",
            got.0,
            got.1,
            got.2,
            if good { "ok" } else { "BAD" }
        );
        bad += u8::from(!good);
    };

    // SAFETY: reads of the operand trap from here on.
    unsafe { asm!("mov dr0, {0}", "mov dr7, {1}", in(reg) OPERAND, in(reg) WATCH) };
    let _ = cpu::read64(OPERAND);
    let got = take();
    check("a read", got == (1, 0, BREAKPOINT), got);

    let behind: u64;
    // SAFETY: the same stack segment again; CPUID's results are dropped, rbx is put back.
    unsafe {
        asm!("mov r8, rbx", "xor eax, eax", "mov ss, word ptr [{0}]", "cpuid", "2:", "lea {1}, [rip + 2b]", "nop",
             "mov rbx, r8", in(reg) OPERAND, out(reg) behind, out("eax") _, out("ecx") _, out("edx") _, out("r8") _);
    }
    let got = take();
    check("MOV SS, CPUID", got == (1, 0, BREAKPOINT) && RIP.load(Relaxed) == behind, got);

    // SAFETY: as above, under TF from before the MOV SS; the handler turns it off.
    unsafe {
        asm!("mov r8, rbx", "xor eax, eax", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
             "mov ss, word ptr [{0}]", "cpuid", "2:", "lea {1}, [rip + 2b]", "nop", "mov rbx, r8",
             in(reg) OPERAND, out(reg) _, out("eax") _, out("ecx") _, out("edx") _, out("r8") _);
    }
    // The step after CPUID and the breakpoint that waited for it are one exception.
    let got = take();
    check("MOV SS, CPUID, single step", got == (1, 0, BREAKPOINT | STEP), got);

    // SAFETY: as above, with a port for CPUID.
    unsafe { asm!("mov ss, word ptr [{0}]", "in al, 0x80", "nop", in(reg) OPERAND, out("al") _) };
    let got = take();
    check("MOV SS, IN", got == (1, 0, BREAKPOINT), got);

    // Before INT3 has been delivered the debug exception must not come, or it would find INT3's handler unprepared;
    // whether it comes then is the processor's choice (SDM Vol. 3, "Masking Exceptions and Interrupts When Switching
    // Stacks").
    // SAFETY: INT3 comes back behind itself.
    unsafe { asm!("mov ss, word ptr [{0}]", "int3", "nop", in(reg) OPERAND) };
    let got = take();
    check("MOV SS, INT3", got.0 <= 1 && got.1 == 1, got);

    // SAFETY: no breakpoint any more.
    unsafe { asm!("mov dr7, {0}", in(reg) OFF) };
    println!("mov-ss done: {bad} bad");
    bad
}
