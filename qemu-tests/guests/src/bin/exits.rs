//! Every instruction that can make a processor exit, one by one (H28): each is carried out or raises what the
//! architecture says, and the guest goes on. Beyond that, sweeps of CPUID leaves, MSRs and ports.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use test_guests::trap::{Frame, handle};
use test_guests::{cpu, entry, println};

/// Where an instruction is put that is to be tried, and memory that it may use.
const CODE: u64 = 8 << 20;
const SCRATCH: u64 = 9 << 20;
/// No RAM and no device; and the local APIC.
const HOLE: u64 = 0xd000_0000;
const APIC: u64 = 0xfee0_0000;
/// A port that nothing answers at.
const NO_PORT: u16 = 0x1234;

const UD: u64 = 6;
const GP: u64 = 13;
const NONE: u64 = u64::MAX;

static VECTOR: AtomicU64 = AtomicU64::new(NONE);
static ERROR: AtomicU64 = AtomicU64::new(0);
static RESUME: AtomicU64 = AtomicU64::new(0);

entry!(main);

fn record(frame: &mut Frame) {
    VECTOR.store(frame.vector, Ordering::Relaxed);
    ERROR.store(frame.error, Ordering::Relaxed);
    frame.rip = RESUME.load(Ordering::Relaxed);
}

/// RAX, RCX, RDX and RSI; RDI is [`SCRATCH`] unless said otherwise.
type Registers = [u64; 4];

/// Carries out an instruction; its exception, or [`NONE`], and RAX afterwards.
fn try_at(instruction: &[u8], [rax, rcx, rdx, rsi]: Registers, rdi: u64) -> (u64, u64) {
    for (at, &byte) in (CODE..).zip(instruction.iter().chain(&[0xc3])) {
        // SAFETY: memory that nothing else uses, mapped one to one.
        unsafe { (at as *mut u8).write_volatile(byte) };
    }
    VECTOR.store(NONE, Ordering::Relaxed);
    RESUME.store(CODE + instruction.len() as u64, Ordering::Relaxed);
    let after;
    // SAFETY: the code ends with RET; what it may change is named or put back, and a fault goes on at the RET.
    unsafe {
        asm!("push rbx", "push rbp", "call r12", "pop rbp", "pop rbx",
             in("r12") CODE, inout("rax") rax => after, inout("rcx") rcx => _, inout("rdx") rdx => _,
             inout("rsi") rsi => _, inout("rdi") rdi => _);
    }
    (VECTOR.load(Ordering::Relaxed), after)
}

fn try_it(instruction: &[u8], registers: Registers) -> u64 {
    try_at(instruction, registers, SCRATCH).0
}

/// Name, instruction, registers, the exceptions that it may raise.
type Case = (&'static str, &'static [u8], Registers, &'static [u64]);

/// Not offered to guests, or not while CR4 does not ask for it.
const NOT_OFFERED: &[Case] = &[
    ("VMCLEAR", &[0x66, 0x0f, 0xc7, 0x37], [0; 4], &[UD]),
    ("VMLAUNCH", &[0x0f, 0x01, 0xc2], [0; 4], &[UD]),
    ("VMPTRLD", &[0x0f, 0xc7, 0x37], [0; 4], &[UD]),
    ("VMPTRST", &[0x0f, 0xc7, 0x3f], [0; 4], &[UD]),
    ("VMREAD", &[0x0f, 0x78, 0xc1], [0; 4], &[UD]),
    ("VMRESUME", &[0x0f, 0x01, 0xc3], [0; 4], &[UD]),
    ("VMWRITE", &[0x0f, 0x79, 0xc1], [0; 4], &[UD]),
    ("VMXOFF", &[0x0f, 0x01, 0xc4], [0; 4], &[UD]),
    ("VMXON", &[0xf3, 0x0f, 0xc7, 0x37], [0; 4], &[UD]),
    ("VMFUNC", &[0x0f, 0x01, 0xd4], [0; 4], &[UD]),
    ("INVEPT", &[0x66, 0x0f, 0x38, 0x80, 0x0f], [0; 4], &[UD]),
    ("INVVPID", &[0x66, 0x0f, 0x38, 0x81, 0x0f], [0; 4], &[UD]),
    ("GETSEC", &[0x0f, 0x37], [0; 4], &[UD]),
    ("RSM", &[0x0f, 0xaa], [0; 4], &[UD]),
    ("MONITOR", &[0x0f, 0x01, 0xc8], [SCRATCH, 0, 0, 0], &[UD]),
    ("MWAIT", &[0x0f, 0x01, 0xc9], [0; 4], &[UD]),
    ("ENCLS", &[0x0f, 0x01, 0xcf], [0; 4], &[UD]),
    ("ENCLV", &[0x0f, 0x01, 0xc0], [0; 4], &[UD]),
    ("PCONFIG", &[0x0f, 0x01, 0xc5], [0; 4], &[UD]),
    ("TPAUSE", &[0x66, 0x0f, 0xae, 0xf1], [0; 4], &[UD]),
    ("UMONITOR", &[0xf3, 0x0f, 0xae, 0xf0], [SCRATCH, 0, 0, 0], &[UD]),
    ("XSETBV", &[0x0f, 0x01, 0xd1], [1, 0, 0, 0], &[UD]),
    ("XSAVES", &[0x48, 0x0f, 0xc7, 0x2f], [0; 4], &[UD]),
    ("XRSTORS", &[0x48, 0x0f, 0xc7, 0x1f], [0; 4], &[UD]),
    ("UD2", &[0x0f, 0x0b], [0; 4], &[UD]),
    ("VMMCALL", &[0x0f, 0x01, 0xd9], [0; 4], &[UD]),
];

/// Privileged, and there for guests.
const OFFERED: &[Case] = &[
    ("VMCALL", &[0x0f, 0x01, 0xc1], [0; 4], &[NONE]),
    ("WBINVD", &[0x0f, 0x09], [0; 4], &[NONE]),
    ("INVD", &[0x0f, 0x08], [0; 4], &[NONE]),
    ("RDPMC", &[0x0f, 0x33], [0; 4], &[GP]),
    ("RDTSC", &[0x0f, 0x31], [0; 4], &[NONE]),
    ("PAUSE", &[0xf3, 0x90], [0; 4], &[NONE]),
    ("INVPCID of a type that is none", &[0x66, 0x0f, 0x38, 0x82, 0x0f], [0, 7, 0, 0], &[GP, UD]),
    ("RDTSCP", &[0x0f, 0x01, 0xf9], [0; 4], &[NONE, UD]),
    ("INVLPG of no address", &[0x0f, 0x01, 0x39], [0, 1 << 62, 0, 0], &[NONE]),
    ("CLTS", &[0x0f, 0x06], [0; 4], &[NONE]),
    ("LMSW", &[0x0f, 0x01, 0xf0], [0x11, 0, 0, 0], &[NONE]),
    ("SMSW", &[0x0f, 0x01, 0xe0], [0; 4], &[NONE]),
    ("SLDT", &[0x0f, 0x00, 0xc0], [0; 4], &[NONE]),
    ("STR", &[0x0f, 0x00, 0xc8], [0; 4], &[NONE]),
    ("SGDT", &[0x0f, 0x01, 0x07], [0; 4], &[NONE]),
    ("MOV to CR0 without PE", &[0x0f, 0x22, 0xc0], [0x8000_0000, 0, 0, 0], &[GP]),
    ("MOV to CR0 without PG", &[0x0f, 0x22, 0xc0], [0x31, 0, 0, 0], &[GP]),
    ("MOV to CR0, NW without CD", &[0x0f, 0x22, 0xc0], [0xa000_0031, 0, 0, 0], &[GP]),
    ("MOV to CR0, bit 63", &[0x0f, 0x22, 0xc0], [1 << 63 | 0x8000_0031, 0, 0, 0], &[GP]),
    ("MOV to CR4, VMXE", &[0x0f, 0x22, 0xe0], [0x2020, 0, 0, 0], &[GP]),
    ("MOV to CR4 without PAE", &[0x0f, 0x22, 0xe0], [0, 0, 0, 0], &[GP]),
    ("MOV to CR4, reserved", &[0x0f, 0x22, 0xe0], [1 << 31 | 0x20, 0, 0, 0], &[GP]),
    ("MOV to CR4, all", &[0x0f, 0x22, 0xe0], [u64::MAX, 0, 0, 0], &[GP]),
    ("MOV to CR3, reserved", &[0x0f, 0x22, 0xd8], [1 << 62, 0, 0, 0], &[GP]),
    ("MOV to CR8", &[0x44, 0x0f, 0x22, 0xc0], [5, 0, 0, 0], &[NONE]),
    ("MOV to CR8, too great", &[0x44, 0x0f, 0x22, 0xc0], [16, 0, 0, 0], &[GP]),
    ("MOV to CR8, back", &[0x44, 0x0f, 0x22, 0xc0], [0, 0, 0, 0], &[NONE]),
    ("MOV from CR8", &[0x44, 0x0f, 0x20, 0xc0], [0; 4], &[NONE]),
    ("MOV to CR1", &[0x0f, 0x22, 0xc8], [0; 4], &[UD]),
    ("MOV from CR5", &[0x0f, 0x20, 0xe8], [0; 4], &[UD]),
    ("MOV to DR0", &[0x0f, 0x23, 0xc0], [SCRATCH, 0, 0, 0], &[NONE]),
    ("MOV to DR4", &[0x0f, 0x23, 0xe0], [0; 4], &[NONE]),
    ("MOV to DR7, high", &[0x0f, 0x23, 0xf8], [1 << 32, 0, 0, 0], &[GP]),
    ("MOV to DR7", &[0x0f, 0x23, 0xf8], [0x400, 0, 0, 0], &[NONE]),
    ("MOV from DR6", &[0x0f, 0x21, 0xf0], [0; 4], &[NONE]),
    ("WRMSR of no MSR", &[0x0f, 0x30], [0, 0x7fff_ffff, 0, 0], &[GP]),
    ("RDMSR of no MSR", &[0x0f, 0x32], [0, 0x7fff_ffff, 0, 0], &[GP]),
    ("WRMSR to EFER, reserved", &[0x0f, 0x30], [u64::MAX, 0xc000_0080, 0, 0], &[GP]),
    ("WRMSR to EFER without LME", &[0x0f, 0x30], [0, 0xc000_0080, 0, 0], &[GP]),
    ("WRMSR to APIC_BASE, reserved", &[0x0f, 0x30], [u64::MAX, 0x1b, u64::MAX, 0], &[GP]),
    ("IN AL", &[0xec], [0, 0, NO_PORT as u64, 0], &[NONE]),
    ("IN AX", &[0x66, 0xed], [0, 0, NO_PORT as u64, 0], &[NONE]),
    ("IN EAX", &[0xed], [0, 0, NO_PORT as u64, 0], &[NONE]),
    ("IN EAX, 0xff", &[0xe5, 0xff], [0; 4], &[NONE]),
    ("OUT AL", &[0xee], [0, 0, NO_PORT as u64, 0], &[NONE]),
    ("OUT AX", &[0x66, 0xef], [0, 0, NO_PORT as u64, 0], &[NONE]),
    ("OUT EAX", &[0xef], [0, 0, 0xfffe, 0], &[NONE]),
    ("REP INSB", &[0xf3, 0x6c], [0, 5000, NO_PORT as u64, 0], &[NONE]),
    ("REP INSW", &[0xf3, 0x66, 0x6d], [0, 700, NO_PORT as u64, 0], &[NONE]),
    ("REP INSD", &[0xf3, 0x6d], [0, 700, NO_PORT as u64, 0], &[NONE]),
    ("REP OUTSB", &[0xf3, 0x6e], [0, 700, NO_PORT as u64, SCRATCH], &[NONE]),
    ("OUTSD", &[0x6f], [0, 1, NO_PORT as u64, SCRATCH], &[NONE]),
    ("INSB with no count", &[0xf3, 0x6c], [0, 0, NO_PORT as u64, 0], &[NONE]),
];

/// Accesses to what is no RAM: RDI is the address.
const DEVICE: &[(&str, &[u8])] = &[
    ("read of 1", &[0x8a, 0x07]),
    ("read of 2", &[0x66, 0x8b, 0x07]),
    ("read of 4", &[0x8b, 0x07]),
    ("read of 8", &[0x48, 0x8b, 0x07]),
    ("read across", &[0x48, 0x8b, 0x47, 0x0d]),
    ("write of 1", &[0x88, 0x07]),
    ("write of 8", &[0x48, 0x89, 0x07]),
    ("locked add", &[0xf0, 0x48, 0x01, 0x07]),
    ("exchange", &[0x87, 0x07]),
    ("REP STOSD", &[0xb9, 0x10, 0, 0, 0, 0xf3, 0xab]),
    ("CMPXCHG16B", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]),
];

/// MSRs that a guest may have, and some beside each range.
const MSR_RANGES: [(u32, u32); 6] = [
    (0, 0x1200),
    (0x17d0, 0x17e0),
    (0x4000_0000, 0x4000_0120),
    (0x4b56_4d00, 0x4b56_4d10),
    (0xc000_0000, 0xc000_0200),
    (0xc001_0000, 0xc001_0040),
];
/// Those whose every value a guest takes and that keep it from going on: none is written.
const NOT_WRITTEN: [u32; 2] = [0x10, 0x3b];

fn main() -> u8 {
    for vector in 0..32 {
        handle(vector, record);
    }
    let mut bad = 0u32;
    for (name, instruction, registers, may) in NOT_OFFERED.iter().chain(OFFERED) {
        let vector = try_it(instruction, *registers);
        if !may.contains(&vector) || vector == GP && ERROR.load(Ordering::Relaxed) != 0 {
            println!("exits: {name} raised {vector}: BAD");
            bad += 1;
        }
    }
    let (_, answer) = try_at(&[0x0f, 0x01, 0xc1], [0; 4], SCRATCH);
    if answer != -1000_i64 as u64 {
        println!("exits: VMCALL answers {answer:#x}: BAD");
        bad += 1;
    }
    for port in (0..0x100).chain(0xcf8..0xd00) {
        let _ = cpu::in8(port);
    }
    for (name, instruction) in DEVICE {
        for address in [HOLE, HOLE + 0xff3, APIC + 0x20, 1 << 38] {
            // The last one is mapped by nobody.
            let vector = try_at(instruction, [0; 4], address).0;
            let good = if address == 1 << 38 { vector == 14 } else { matches!(vector, NONE | GP) };
            if !good {
                println!("exits: {name} at {address:#x} raised {vector}: BAD");
                bad += 1;
            }
        }
    }
    for leaf in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000, u32::MAX - 64] {
        for leaf in leaf..leaf + 64 {
            for subleaf in [0, 1, 2, 63, 64, u32::MAX] {
                let _ = cpu::cpuid(leaf, subleaf);
            }
        }
    }
    let (mut read, mut written) = (0, 0);
    for (first, last) in MSR_RANGES {
        for msr in first..last {
            let (vector, value) = try_at(
                &[0x0f, 0x32, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0],
                [0, msr.into(), 0, 0],
                SCRATCH,
            );
            if vector != NONE && (vector != GP || ERROR.load(Ordering::Relaxed) != 0) {
                println!("exits: RDMSR of {msr:#x} raised {vector}: BAD");
                bad += 1;
            }
            read += u32::from(vector == NONE);
            if NOT_WRITTEN.contains(&msr) {
                continue;
            }
            for garbage in [u64::MAX, 0x5555_5555_5555_5555, 1 << 63, 0] {
                // APIC_BASE and EFER keep the guest going: only what is refused is written to them.
                if vector != NONE || matches!(msr, 0x1b | 0xc000_0080) {
                    continue;
                }
                let vector = try_it(&[0x0f, 0x30], [garbage, msr.into(), garbage >> 32, 0]);
                if vector != NONE && vector != GP {
                    println!("exits: WRMSR of {msr:#x} raised {vector}: BAD");
                    bad += 1;
                }
                written += u32::from(vector == NONE);
            }
            if vector == NONE && !matches!(msr, 0x1b | 0xc000_0080) {
                let _ = try_it(&[0x0f, 0x30], [value, msr.into(), value >> 32, 0]);
            }
        }
    }
    println!("exits: {read} MSRs read, {written} values written");
    println!("exits done: {bad} bad");
    u8::from(bad != 0)
}
