//! Fills every register that is switched with the vCPU but not by VM entry and exit, spins for many time slices,
//! and looks whether they still hold what they held. To be run beside another of its kind on the same core.
#![no_std]
#![no_main]

use core::arch::asm;

use test_guests::{cpu, entry, println};

const ROUNDS: u64 = 5;
/// Loops of a round.
const SPINS: u64 = 300_000;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
const MSRS: [u32; 6] = [STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX];

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;

entry!(main);

/// Values that two guests hardly share; the low half, which is canonical and positive.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    *seed >> 18
}

macro_rules! debug_register {
    ($read:ident, $write:ident, $name:literal) => {
        fn $read() -> u64 {
            let value;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) }
            value
        }
        fn $write(value: u64) {
            // SAFETY: DR7 has no breakpoint on.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) }
        }
    };
}
debug_register!(read_dr0, write_dr0, "dr0");
debug_register!(read_dr1, write_dr1, "dr1");
debug_register!(read_dr2, write_dr2, "dr2");
debug_register!(read_dr3, write_dr3, "dr3");

fn write_vectors(low: u64, high: u64) {
    // SAFETY: nothing else in this guest uses the vector registers.
    unsafe { asm!("movq xmm0, {}", "movq xmm15, {}", in(reg) low, in(reg) high, options(nostack)) }
}

fn read_vectors() -> (u64, u64) {
    let (low, high);
    // SAFETY: reads registers.
    unsafe { asm!("movq {}, xmm0", "movq {}, xmm15", out(reg) low, out(reg) high, options(nostack)) }
    (low, high)
}

/// The upper half of YMM7, filled and read through XMM7.
fn write_upper(value: u64) {
    // SAFETY: XCR0 allows AVX.
    unsafe { asm!("movq xmm7, {}", "vinsertf128 ymm7, ymm7, xmm7, 1", in(reg) value, options(nostack)) }
}

fn read_upper() -> u64 {
    let value;
    // SAFETY: XCR0 allows AVX.
    unsafe { asm!("vextractf128 xmm6, ymm7, 1", "movq {}, xmm6", out(reg) value, options(nostack)) }
    value
}

fn xsetbv(value: u64) {
    // SAFETY: CPUID offers what is switched on.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    }
}

fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nostack)) }
    u64::from(high) << 32 | u64::from(low)
}

fn spin() {
    for _ in 0..SPINS {
        core::hint::spin_loop();
    }
}

fn main() -> u8 {
    let features = cpu::cpuid(1, 0)[2];
    let (xsave, avx) = (features >> 26 & 1 != 0, features >> 28 & 1 != 0);
    let tsc_aux = cpu::cpuid(0x8000_0001, 0)[3] >> 27 & 1 != 0;
    cpu::write_cr4(cpu::read_cr4() | CR4_OSFXSR | if xsave { CR4_OSXSAVE } else { 0 });
    let mut seed = cpu::rdtsc();
    // An odd guest without AVX, an even one with it, so that XCR0 differs.
    let avx = avx && seed & 1 == 0;
    let xcr0 = if avx { 7 } else { 3 };
    if xsave {
        xsetbv(xcr0);
    }
    let mut bad = 0;
    for round in 0..ROUNDS {
        let mut values = [0u64; 14];
        values.iter_mut().for_each(|value| *value = next(&mut seed));
        // SFMASK and TSC_AUX have 32 bits.
        values[3] &= 0xffff_ffff;
        values[5] &= 0xffff_ffff;
        for (&msr, &value) in MSRS.iter().zip(&values).filter(|(msr, _)| tsc_aux || **msr != TSC_AUX) {
            cpu::wrmsr(msr, value);
        }
        cpu::write_cr2(values[6]);
        write_dr0(values[7]);
        write_dr1(values[8]);
        write_dr2(values[9]);
        write_dr3(values[10]);
        write_vectors(values[11], values[12]);
        if avx {
            write_upper(values[13]);
        }
        spin();
        let mut check = |name: &str, found: u64, expected: u64| {
            if found != expected {
                println!("registers: {name} is {found:#x}, was {expected:#x} in round {round}: BAD");
                bad += 1;
            }
        };
        for (&msr, &value) in MSRS.iter().zip(&values).filter(|(msr, _)| tsc_aux || **msr != TSC_AUX) {
            check("an MSR", cpu::rdmsr(msr), value);
        }
        check("CR2", cpu::read_cr2(), values[6]);
        check("DR0", read_dr0(), values[7]);
        check("DR1", read_dr1(), values[8]);
        check("DR2", read_dr2(), values[9]);
        check("DR3", read_dr3(), values[10]);
        let (low, high) = read_vectors();
        check("XMM0", low, values[11]);
        check("XMM15", high, values[12]);
        if avx {
            check("YMM7", read_upper(), values[13]);
        }
        if xsave {
            check("XCR0", xgetbv(), xcr0);
        }
    }
    println!("registers done: {bad} bad");
    u8::from(bad != 0)
}
