//! Its first processor halts with interrupts off, is woken by another one's NMI, and when both have halted so nothing
//! can go on. A third processor is sent a start-up message, by which none starts here; the second one is stopped by INIT
//! and woken again in between.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};

use test_guests::smp::{self, Target};
use test_guests::{cpu, entry, println, trap};

entry!(main);

static NMIS: AtomicU32 = AtomicU32::new(0);
static LIVES: AtomicU32 = AtomicU32::new(0);

/// Time for the first processor to fall asleep and stay so.
const NAP_TICKS: u64 = 2_000_000;

fn wake_the_first(_: usize) {
    smp::send_startup(2, 0x80);
    let begin = cpu::rdtsc();
    while cpu::rdtsc() - begin < NAP_TICKS {}
    smp::send_nmi(Target::One(0));
    // INIT ends this.
    loop {
        core::hint::spin_loop();
    }
}

fn come_again(_: usize) {
    LIVES.fetch_add(1, Ordering::Release);
    // The first one halts meanwhile; the others are parked, and an NMI for them is none for anybody.
    smp::send_nmi(Target::One(2));
}

fn main() -> u8 {
    trap::handle(2, |_| _ = NMIS.fetch_add(1, Ordering::Release));
    let Some(machine) = smp::discover() else { return 1 };
    if !smp::start(&machine, 1, cpu::read_cr3(), wake_the_first) {
        return 2;
    }
    cpu::halt_for_ever();
    println!("smp-halt: woken by {} NMI", NMIS.load(Ordering::Acquire));
    smp::send_init(1);
    let again = smp::start(&machine, 1, cpu::read_cr3(), come_again);
    while LIVES.load(Ordering::Acquire) == 0 {
        core::hint::spin_loop();
    }
    println!("smp-halt: woken again after INIT: {again}");
    cpu::halt_for_ever();
    println!("smp-halt: woken by nobody: BAD");
    3
}
