//! The local APIC, in xAPIC or x2APIC mode: ids, inter-processor interrupts, EOI, the one-shot timer.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use raw_cpuid::CpuId;
use x86_64::registers::model_specific::Msr;

use super::time;

/// The vector of the one-shot timer.
pub const TIMER_VECTOR: u8 = 0xf0;
/// The vector of interrupts that were withdrawn.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const IA32_APIC_BASE: u32 = 0x1b;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Register offsets in xAPIC mode (SDM Vol. 3, "Local APIC Register Address Map").
#[derive(Clone, Copy)]
#[repr(u32)]
enum Register {
    Id = 0x20,
    TaskPriority = 0x80,
    EndOfInterrupt = 0xb0,
    SpuriousVector = 0xf0,
    ErrorStatus = 0x280,
    CommandLow = 0x300,
    CommandHigh = 0x310,
    LvtTimer = 0x320,
    LvtPerformance = 0x340,
    LvtLint0 = 0x350,
    LvtLint1 = 0x360,
    LvtError = 0x370,
    TimerInitial = 0x380,
    TimerCurrent = 0x390,
    TimerDivide = 0x3e0,
}

const MASKED: u32 = 1 << 16;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_INIT: u32 = 5 << 8;
const DELIVERY_STARTUP: u32 = 6 << 8;
const ASSERT: u32 = 1 << 14;
const DELIVERY_PENDING: u32 = 1 << 12;

static X2APIC: AtomicBool = AtomicBool::new(false);
/// Where the registers are mapped in xAPIC mode; 0 until then.
static REGISTERS: AtomicU64 = AtomicU64::new(0);
/// Timer ticks per nanosecond, times 2^32.
static TIMER_PER_NS: AtomicU64 = AtomicU64::new(0);

/// Whether x2APIC mode is used.
#[inline]
#[must_use]
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

fn base() -> u64 {
    // SAFETY: every processor with long mode has this MSR.
    unsafe { Msr::new(IA32_APIC_BASE).read() }
}

/// The physical address of the registers in xAPIC mode, as the firmware left it.
#[must_use]
pub fn physical_base() -> memory::Hpa {
    memory::Hpa(base() & BASE_ADDRESS)
}

#[inline]
fn write(register: Register, value: u32) {
    if is_x2apic() {
        // SAFETY: an x2APIC register, in x2APIC mode; the values written keep to our vectors.
        unsafe { Msr::new(0x800 + (register as u32 >> 4)).write(value.into()) };
        return;
    }
    let address = (REGISTERS.load(Ordering::Relaxed) + register as u64) as *mut u32;
    // SAFETY: `set_up` was given the mapping of the registers.
    unsafe { address.write_volatile(value) };
}

#[inline]
fn read(register: Register) -> u32 {
    if is_x2apic() {
        // SAFETY: an x2APIC register, in x2APIC mode; reading changes nothing.
        return unsafe { Msr::new(0x800 + (register as u32 >> 4)).read() } as u32;
    }
    let address = (REGISTERS.load(Ordering::Relaxed) + register as u64) as *const u32;
    // SAFETY: `set_up` was given the mapping of the registers.
    unsafe { address.read_volatile() }
}

/// Chooses the mode for all cores: x2APIC where the processor has it.
///
/// # Safety
/// `registers` maps the page at [`physical_base`], uncached, for ever.
pub unsafe fn set_up(registers: u64) {
    let has_x2apic = CpuId::new().get_feature_info().is_some_and(|info| info.has_x2apic());
    REGISTERS.store(registers, Ordering::Relaxed);
    X2APIC.store(has_x2apic, Ordering::Relaxed);
}

/// Whether [`set_up`] is done.
#[must_use]
pub fn is_set_up() -> bool {
    REGISTERS.load(Ordering::Relaxed) != 0
}

/// Switches this core's local APIC on, in the chosen mode: no priorities, LINT0 (the 8259) masked, LINT1 an NMI.
pub fn enable() {
    let mut value = base() | BASE_ENABLE;
    // SAFETY: the address is not changed, and enabling it has no effect on memory.
    unsafe { Msr::new(IA32_APIC_BASE).write(value) };
    if is_x2apic() {
        value |= BASE_X2APIC;
        // SAFETY: the processor has x2APIC; the step from enabled xAPIC is the allowed one.
        unsafe { Msr::new(IA32_APIC_BASE).write(value) };
    }
    write(Register::SpuriousVector, 0x100 | u32::from(SPURIOUS_VECTOR));
    write(Register::TaskPriority, 0);
    write(Register::LvtTimer, MASKED | u32::from(TIMER_VECTOR));
    write(Register::LvtPerformance, MASKED);
    write(Register::LvtLint0, MASKED);
    write(Register::LvtLint1, DELIVERY_NMI);
    write(Register::LvtError, MASKED | 0xfe);
    write(Register::ErrorStatus, 0);
    write(Register::EndOfInterrupt, 0);
    // Divide by 1.
    write(Register::TimerDivide, 0b1011);
}

/// This core's APIC id.
#[must_use]
pub fn id() -> u32 {
    let id = read(Register::Id);
    if is_x2apic() { id } else { id >> 24 }
}

/// This processor's APIC id before the APIC is set up, from CPUID.
#[must_use]
pub fn initial_id() -> u32 {
    CpuId::new().get_feature_info().map_or(0, |info| info.initial_local_apic_id().into())
}

/// Ends the interrupt in service.
#[inline]
pub fn eoi() {
    write(Register::EndOfInterrupt, 0);
}

#[inline]
fn command(target: u32, low: u32) {
    if is_x2apic() {
        // The MSR write is not ordered after earlier stores by itself (SDM Vol. 3, "MSR Access in x2APIC Mode"),
        // and the target must see the request that this interrupt is about.
        // SAFETY: fences have no other effect.
        unsafe { core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags)) };
        let value = u64::from(target) << 32 | u64::from(low);
        // SAFETY: the interrupt command register, in x2APIC mode.
        unsafe { Msr::new(0x830).write(value) };
        return;
    }
    wait_until_sent();
    write(Register::CommandHigh, target << 24);
    write(Register::CommandLow, low);
}

/// xAPIC mode: until the last command has left. Bounded: a target that is not there may never take it.
fn wait_until_sent() {
    for _ in 0..100_000 {
        if read(Register::CommandLow) & DELIVERY_PENDING == 0 {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Sends an NMI to the core with this APIC id. All earlier stores are visible to it by then.
#[inline]
pub fn send_nmi(target: u32) {
    command(target, ASSERT | DELIVERY_NMI);
}

/// Sends INIT: the target waits for a startup IPI then.
pub fn send_init(target: u32) {
    command(target, ASSERT | DELIVERY_INIT);
}

/// Sends a startup IPI: the target begins in real mode at page number `page`.
pub fn send_startup(target: u32, page: u8) {
    command(target, ASSERT | DELIVERY_STARTUP | u32::from(page));
}

/// Measures the timer against the TSC; all cores' timers run alike. Returns its frequency in Hz.
pub fn calibrate_timer() -> u64 {
    const WINDOW_NS: u64 = 1_000_000;
    write(Register::LvtTimer, MASKED | u32::from(TIMER_VECTOR));
    write(Register::TimerInitial, u32::MAX);
    let start = time::tsc();
    let first = read(Register::TimerCurrent);
    time::busy_wait_ns(WINDOW_NS);
    let ticks = u64::from(first.wrapping_sub(read(Register::TimerCurrent)));
    let passed_ns = time::ticks_to_ns(time::tsc().wrapping_sub(start)).max(1);
    write(Register::TimerInitial, 0);
    TIMER_PER_NS.store(((u128::from(ticks) << 32) / u128::from(passed_ns)) as u64, Ordering::Relaxed);
    ticks * 1_000_000_000 / passed_ns
}

/// Raises [`TIMER_VECTOR`] on this core once, `ns` nanoseconds from now (at least one tick; longer times than the
/// counter holds end early). Replaces the time set before.
#[inline]
pub fn arm_timer(ns: u64) {
    let ticks = (u128::from(ns) * u128::from(TIMER_PER_NS.load(Ordering::Relaxed))) >> 32;
    write(Register::LvtTimer, u32::from(TIMER_VECTOR));
    write(Register::TimerInitial, ticks.clamp(1, u32::MAX as u128) as u32);
}

/// Takes the time set by [`arm_timer`] back.
#[inline]
pub fn disarm_timer() {
    write(Register::TimerInitial, 0);
    write(Register::LvtTimer, MASKED | u32::from(TIMER_VECTOR));
}
