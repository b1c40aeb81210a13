//! Ends by a triple fault: no interrupt table, then a breakpoint.
#![no_std]
#![no_main]

use core::arch::asm;

use test_guests::{entry, println};

entry!(main);

fn main() -> u8 {
    println!("triple fault next");
    let empty = [0u16; 5];
    // SAFETY: it is the point: with a table of limit 0 the trap, the #GP and the #DF all fail.
    unsafe { asm!("lidt [{}]", "int3", in(reg) &raw const empty) }
    println!("still alive after a triple fault");
    1
}
