//! Loads a CR3 that is no RAM: from there on every access is the guest's own page fault, and so is that of each handler.
#![no_std]
#![no_main]

use test_guests::{cpu, entry, println};

/// Below any MAXPHYADDR, and above any guest's memory here.
const NOWHERE: u64 = 32 << 30;

entry!(main);

fn main() -> u8 {
    println!("a CR3 that is no RAM next");
    cpu::write_cr3(NOWHERE);
    1
}
