//! Our own bugs: what is known is printed, the other cores are stopped, and the machine ends.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::interrupts::TrapFrame;
use super::log::{self, raw};
use super::stacks::{self, Place};
use super::{apic, cores, image, machine_check, power};

/// The exit code of a panic.
pub const EXIT_CODE: u8 = 101;

/// Frames of a backtrace, at most.
const DEPTH_MAX: usize = 48;

/// Core that panics, plus 1; 0: none.
static PANICKING: AtomicUsize = AtomicUsize::new(0);

/// The bootloader's stack, until we leave it.
static EARLY_STACK: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Remembers the stack that the bootloader gave us, for backtraces.
pub fn set_early_stack(start: u64, end: u64) {
    EARLY_STACK[0].store(start, Ordering::Relaxed);
    EARLY_STACK[1].store(end, Ordering::Relaxed);
}

/// Makes this core the one that reports, and the log usable whatever was interrupted. A second core that panics
/// halts; a panic in the report itself halts too, but says so.
fn begin() {
    let own = cores::this_core().index() + 1;
    match PANICKING.compare_exchange(0, own, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(other) if other == own => {
            raw(format_args!("umbra: error: a panic while reporting a panic"));
            power::halt()
        }
        Err(_) => power::halt(),
    }
    if apic::is_set_up() {
        cores::stop_others();
    }
    // SAFETY: we panic, and the others are stopped or on their way to it.
    unsafe { log::break_locks() };
}

/// Ends the machine with a report: what boot's `#[panic_handler]` calls.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    begin();
    raw(format_args!("umbra: error: panic on core {}: {}", cores::this_core().index(), info.message()));
    if let Some(place) = info.location() {
        raw(format_args!("umbra: error:   at {place}"));
    }
    let frame: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    backtrace(None, frame);
    power::exit(EXIT_CODE)
}

/// Ends the machine with a report of an exception in the hypervisor.
pub(super) fn exception(frame: &TrapFrame, name: &str) -> ! {
    const PAGE_FAULT: u64 = 14;
    const DOUBLE_FAULT: u64 = 8;
    const MACHINE_CHECK: u64 = 18;
    begin();
    let cr2 = x86_64::registers::control::Cr2::read_raw();
    let core = cores::this_core().index();
    raw(format_args!("umbra: error: {name} in the hypervisor on core {core}, error code {:#x}", frame.error));
    if frame.vector == MACHINE_CHECK {
        raw(format_args!("umbra: error: {}: the hardware is at fault", machine_check::examine()));
    }
    if frame.vector == PAGE_FAULT {
        let access = access(frame.error);
        let null = if cr2 < 4096 { ": a null pointer" } else { "" };
        raw(format_args!("umbra: error: {access} at {cr2:#x}{null}"));
    }
    if matches!(frame.vector, PAGE_FAULT | DOUBLE_FAULT)
        && let Some(Place::Guard(core, purpose)) = stacks::locate(cr2)
    {
        raw(format_args!("umbra: error: stack overflow: the {} stack of core {core}", purpose.name()));
    }
    raw(format_args!(
        "  rip {:#018x} rflags {:#x} cs {:#x} ss {:#x}",
        frame.rip, frame.rflags, frame.cs, frame.ss
    ));
    raw(format_args!("  rsp {:#018x} rbp {:#018x} cr2 {cr2:#018x}", frame.rsp, frame.rbp));
    raw(format_args!("  rax {:#018x} rbx {:#018x} rcx {:#018x}", frame.rax, frame.rbx, frame.rcx));
    raw(format_args!("  rdx {:#018x} rsi {:#018x} rdi {:#018x}", frame.rdx, frame.rsi, frame.rdi));
    raw(format_args!("  r8  {:#018x} r9  {:#018x} r10 {:#018x}", frame.r8, frame.r9, frame.r10));
    raw(format_args!("  r11 {:#018x} r12 {:#018x} r13 {:#018x}", frame.r11, frame.r12, frame.r13));
    raw(format_args!("  r14 {:#018x} r15 {:#018x}", frame.r14, frame.r15));
    // After a jump into nowhere, the caller is on the top of the stack.
    let caller = (!image::is_text(frame.rip) && frame.rsp & 7 == 0 && is_on_stack(frame.rsp))
        // SAFETY: aligned, and on a stack.
        .then(|| unsafe { (frame.rsp as *const u64).read() });
    backtrace(caller.or(Some(frame.rip)), frame.rbp);
    power::exit(EXIT_CODE)
}

/// What a page fault's error code says (SDM Vol. 3, "Page-Fault Exceptions").
const fn access(error: u64) -> &'static str {
    match (error & 1 != 0, error & 2 != 0, error & 16 != 0) {
        (_, _, true) => "execution of what is no code",
        (true, true, _) => "a write to read-only memory",
        (false, true, _) => "a write to unmapped memory",
        (true, false, _) => "a read that its mapping forbids (a reserved bit?)",
        (false, false, _) => "a read of unmapped memory",
    }
}

/// Prints the return addresses from `frame` up, each as a link address that xtask turns into a name.
fn backtrace(first: Option<u64>, mut frame: u64) {
    let line = |address: u64| {
        raw(format_args!("umbra: backtrace: {:#x} (at {address:#x})", image::offset(address)));
    };
    if let Some(address) = first {
        line(address);
    }
    for _ in 0..DEPTH_MAX {
        // Both words of the frame must lie on a stack that is mapped.
        if frame & 7 != 0 || !is_on_stack(frame) || !is_on_stack(frame + 8) {
            return;
        }
        // SAFETY: aligned, and two words on a stack.
        let [next, address] = unsafe { (frame as *const [u64; 2]).read() };
        if !image::is_text(address) || address == 0 {
            return;
        }
        line(address);
        // Callers are further up; anything else is no chain.
        if next <= frame {
            return;
        }
        frame = next;
    }
}

fn is_on_stack(address: u64) -> bool {
    let early = EARLY_STACK[0].load(Ordering::Relaxed)..EARLY_STACK[1].load(Ordering::Relaxed);
    early.contains(&address)
        || matches!(stacks::locate(address), Some(Place::Stack(core, _)) if core < cores::count())
}
