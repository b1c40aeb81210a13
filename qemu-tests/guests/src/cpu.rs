//! Single instructions.
//!
//! Safe wrappers: a guest owns its (virtual) machine, and what goes wrong in it is what the tests look for.

use core::arch::asm;

/// Reads a byte from a port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O touches no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: port I/O touches no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// The time-stamp counter.
#[must_use]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags)) }
    u64::from(high) << 32 | u64::from(low)
}

/// CPUID: eax, ebx, ecx, edx.
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: CPUID writes four registers; rbx, which the compiler keeps, is put back.
    unsafe {
        asm!("mov {b}, rbx", "cpuid", "xchg {b}, rbx", b = out(reg) b,
             inout("eax") leaf => a, inout("ecx") subleaf => c, out("edx") d, options(nostack, preserves_flags))
    }
    [a, b as u32, c, d]
}

/// Reads a model-specific register.
#[must_use]
pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register, or raises #GP, which the guest's IDT takes.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub fn wrmsr(index: u32, value: u64) {
    // SAFETY: the guest knows which registers it may write.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags))
    }
}

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[must_use]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) }
            value
        }
        #[doc = concat!("Writes ", $name, ".")]
        pub fn $write(value: u64) {
            // SAFETY: the guest's tables keep its code, data and stack mapped where they are.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) }
        }
    };
}
control_register!(read_cr0, write_cr0, "cr0");
control_register!(read_cr2, write_cr2, "cr2");
control_register!(read_cr3, write_cr3, "cr3");
control_register!(read_cr4, write_cr4, "cr4");

/// Forgets the translation of one page.
pub fn invlpg(address: u64) {
    // SAFETY: only makes the processor walk the tables again.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) }
}

/// Reads eight bytes at an address; may fault, which the guest's handlers expect.
#[must_use]
pub fn read64(address: u64) -> u64 {
    let value;
    // SAFETY: a read changes nothing; where the page is missing the #PF handler deals with it.
    unsafe { asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) }
    value
}

/// Writes eight bytes at an address; may fault, which the guest's handlers expect.
pub fn write64(address: u64, value: u64) {
    // SAFETY: callers write to memory outside the image (see `paging::POOL`), or to pages they mapped there.
    unsafe { asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) }
}

/// Reads four bytes of a device's register.
#[must_use]
pub fn read32(address: u64) -> u32 {
    let value;
    // SAFETY: as for `read64`.
    unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) }
    value
}

/// Writes four bytes to a device's register.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as for `write64`.
    unsafe { asm!("mov [{}], {:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) }
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: every vector has a handler once `trap::install` has run.
    unsafe { asm!("sti", options(nostack)) }
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: no memory is touched.
    unsafe { asm!("cli", options(nostack)) }
}

/// Waits for the next interrupt, with interrupts on; off again afterwards.
pub fn wait_for_interrupt() {
    // SAFETY: STI holds interrupts off for one instruction, so that none slips in before the HLT.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
}

/// Halts with interrupts off: nothing but an NMI or the hypervisor comes back.
pub fn halt_for_ever() {
    // SAFETY: no memory is touched.
    unsafe { asm!("cli", "hlt", options(nostack)) }
}
