//! Ten ticks of the PIT through the PIC, then ten of the local APIC's timer.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};

use test_guests::trap::{Frame, handle};
use test_guests::{cpu, entry, println};

const PIC1: u16 = 0x20;
const PIC2: u16 = 0xa0;
const PIT: u16 = 0x40;
const IRQ0_VECTOR: u8 = 0x20;
const APIC_VECTOR: u8 = 0x40;
const SPURIOUS_VECTOR: u8 = 0xff;
/// 1,193,182 Hz / 11,932: 100 Hz.
const DIVISOR: u16 = 11_932;

const APIC: u64 = 0xfee0_0000;
const APIC_EOI: u64 = APIC + 0xb0;
const APIC_SPURIOUS: u64 = APIC + 0xf0;
const APIC_LVT_TIMER: u64 = APIC + 0x320;
const APIC_INITIAL_COUNT: u64 = APIC + 0x380;
const APIC_CURRENT_COUNT: u64 = APIC + 0x390;
const APIC_DIVIDE: u64 = APIC + 0x3e0;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;

static TICKS: AtomicU32 = AtomicU32::new(0);

entry!(main);

fn pit_tick(_: &mut Frame) {
    TICKS.fetch_add(1, Ordering::Relaxed);
    cpu::out8(PIC1, 0x20);
}

fn apic_tick(_: &mut Frame) {
    TICKS.fetch_add(1, Ordering::Relaxed);
    cpu::write32(APIC_EOI, 0);
}

fn wait_for(ticks: u32) {
    while TICKS.load(Ordering::Relaxed) < ticks {
        cpu::wait_for_interrupt();
    }
}

fn main() -> u8 {
    handle(IRQ0_VECTOR, pit_tick);
    handle(APIC_VECTOR, apic_tick);
    handle(SPURIOUS_VECTOR, |_| ());

    // ICW1 to ICW4 of both controllers: vectors 0x20 and 0x28, cascade on line 2; only IRQ 0 unmasked.
    for (port, value) in [
        (PIC1, 0x11),
        (PIC2, 0x11),
        (PIC1 + 1, IRQ0_VECTOR),
        (PIC2 + 1, 0x28),
        (PIC1 + 1, 4),
        (PIC2 + 1, 2),
        (PIC1 + 1, 1),
        (PIC2 + 1, 1),
        (PIC1 + 1, 0xfe),
        (PIC2 + 1, 0xff),
    ] {
        cpu::out8(port, value);
    }
    // Channel 0, low and high byte, mode 2.
    cpu::out8(PIT + 3, 0x34);
    cpu::out8(PIT, DIVISOR as u8);
    cpu::out8(PIT, (DIVISOR >> 8) as u8);
    let begin = cpu::rdtsc();
    wait_for(10);
    let pit_ticks = cpu::rdtsc() - begin;
    println!("timer: 10 PIT ticks");
    cpu::out8(PIC1 + 1, 0xff);

    // How fast the APIC timer counts, measured against the TSC for as long as ten PIT ticks took.
    cpu::write32(APIC_SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    cpu::write32(APIC_DIVIDE, 0b1011);
    cpu::write32(APIC_LVT_TIMER, MASKED | u32::from(APIC_VECTOR));
    cpu::write32(APIC_INITIAL_COUNT, u32::MAX);
    let begin = cpu::rdtsc();
    while cpu::rdtsc() - begin < pit_ticks {}
    let counted = u32::MAX - cpu::read32(APIC_CURRENT_COUNT);
    if counted < 1000 {
        println!("timer: the APIC timer counted only {counted} in 100 ms: BAD");
        return 1;
    }

    TICKS.store(0, Ordering::Relaxed);
    cpu::write32(APIC_LVT_TIMER, PERIODIC | u32::from(APIC_VECTOR));
    cpu::write32(APIC_INITIAL_COUNT, counted / 10);
    wait_for(10);
    cpu::write32(APIC_LVT_TIMER, MASKED | u32::from(APIC_VECTOR));
    println!("timer: 10 APIC ticks");
    0
}
