//! One of its processors triple-faults while another spins with interrupts off, one sleeps, and one was never woken.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};

use test_guests::smp;
use test_guests::{cpu, entry, println, trap};

entry!(main);

static ASLEEP: AtomicU32 = AtomicU32::new(0);

fn sleep(_: usize) {
    ASLEEP.store(1, Ordering::Release);
    loop {
        cpu::wait_for_interrupt();
    }
}

fn crash(_: usize) {
    trap::triple_fault();
}

fn main() -> u8 {
    let Some(machine) = smp::discover() else { return 1 };
    if !smp::start(&machine, 1, cpu::read_cr3(), sleep) {
        return 2;
    }
    while ASLEEP.load(Ordering::Acquire) == 0 {
        core::hint::spin_loop();
    }
    println!("smp-crash: the end comes");
    if !smp::start(&machine, 2, cpu::read_cr3(), crash) {
        return 3;
    }
    loop {
        core::hint::spin_loop();
    }
}
