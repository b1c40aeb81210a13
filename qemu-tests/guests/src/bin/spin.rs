//! Spins with interrupts off, for ever: whatever ends its time slice is not its own doing.
#![no_std]
#![no_main]

use core::arch::asm;

use test_guests::{cpu, entry, println};

entry!(main);

fn main() -> u8 {
    cpu::disable_interrupts();
    println!("spinning");
    // SAFETY: a jump to itself touches nothing.
    unsafe { asm!("2:", "jmp 2b", options(noreturn)) }
}
